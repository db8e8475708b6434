"""The precision that a network computes in."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from resect.errors import EmulatedPrecision


def computing(model: nn.Module, *, bf16: bool) -> AbstractContextManager[Any]:
    """The precision that a network computes in while this lasts: bfloat16 where torch.autocast deems it safe, or as it is."""
    device = next(model.parameters()).device.type
    # weights may change on the way, and a cache would not notice
    return torch.autocast(device, torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()


def tell_emulated(model: nn.Module, *, bf16: bool) -> None:
    """Warns (`EmulatedPrecision`) where a network computes in bfloat16 on a processor that has no instructions for it."""
    parameter = next(model.parameters())
    in_bfloat16 = bf16 or parameter.dtype == torch.bfloat16
    if parameter.device.type == "cpu" and in_bfloat16 and not multiplies_bfloat16():
        warnings.warn(
            "This processor does not multiply in bfloat16: emulating it can take tens of times as long as float32. Leave out "
            "bf16 (--set settings.bf16=false, or recovery.settings.bf16=false) and load the model in float32.",
            EmulatedPrecision,
            stacklevel=4,  # beyond what makes a function independent of its surroundings
        )


def multiplies_bfloat16() -> bool:
    """Whether the library that multiplies matrices on the processor has a kernel for bfloat16 here."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
