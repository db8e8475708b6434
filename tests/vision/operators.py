"""Makes `import torchvision` work where its compiled operators cannot be loaded; import this before transformers.

A wheel of torchvision that was built for another torch - one with CUDA beside one without - cannot load its operators, and
then neither it nor what imports it, such as transformers, can be imported. No classification network needs them: declared
without a body they do.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

MISSED = ("nms", "qnms")
"""Operators that `import torchvision` asks for by name."""


def declare() -> None:
    """Declares the operators, if torchvision is installed and cannot load its own."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(str(library))
    except OSError:
        for name in MISSED:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare()
