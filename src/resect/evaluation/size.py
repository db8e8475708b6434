"""How large a model is, at rest and at work."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def entry_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of one entry of every parameter."""
    return {name: parameter.element_size() for name, parameter in model.named_parameters()}


class PeakMemory:
    """While the context lasts: how far memory grows at most over what was held when it began.

    Of an accelerator, tensors; on the CPU, the resident set of this process, after the allocator gave back what it did not
    use. `grown` is None where the system does not say.
    """

    def __init__(self, device: torch.device) -> None:
        self.grown: int | None = None
        self._device = device
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu":
            self._before = _reset_resident_peak()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is None:
            return
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident("VmHWM")
        self.grown = None if peak is None else max(0, peak - self._before)


def _reset_resident_peak() -> int | None:
    """Forgets the largest resident set so far and gives the present one, in bytes; None where that cannot be done."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
