"""Every architecture that transformers can build, made small by rules."""
