"""Run as a process of its own by `verify`: loads a directory as a stranger would and writes down its logits."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resect.checkpoint.silence import quiet


@torch.no_grad()
def main(directory: str, tokens: str, logits: str, shipped_code: str) -> None:
    """Reads `tokens` [N, T] from one safetensors file, writes `logits` [N, T, vocabulary] to another."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=shipped_code == "shipped-code", use_safetensors=True, local_files_only=True
        )
    found = model.eval()(load_file(tokens)["tokens"], use_cache=False).logits
    save_file({"logits": found.contiguous()}, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
