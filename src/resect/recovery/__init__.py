"""Training what is left: the only room, with surgery, that writes to a model."""

from resect.recovery.correction import Correction, correct

__all__ = ["Correction", "correct"]
