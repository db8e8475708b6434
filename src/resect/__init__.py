"""resect: cut whole structures out of a neural network; what is left is an ordinary, smaller, faster model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resect.calibration import calibrate
    from resect.checkpoint import load, load_tokenizer, save, skeleton
    from resect.graph import Graph, trace
    from resect.methods import Result, prune
    from resect.plan import Plan
    from resect.surgery import cut, mask, masked

__all__ = [
    "Graph",
    "Plan",
    "Result",
    "calibrate",
    "cut",
    "load",
    "load_tokenizer",
    "mask",
    "masked",
    "prune",
    "save",
    "skeleton",
    "trace",
]

_ROOMS = {
    "calibrate": "calibration",
    **dict.fromkeys(("load", "load_tokenizer", "save", "skeleton"), "checkpoint"),
    **dict.fromkeys(("Graph", "trace"), "graph"),
    **dict.fromkeys(("Result", "prune"), "methods"),
    "Plan": "plan",
    **dict.fromkeys(("cut", "mask", "masked"), "surgery"),
}


def __getattr__(name: str) -> Any:
    """Rooms are imported on first use: a help text needs no torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'resect' has no attribute {name!r}")
    return getattr(import_module(f"resect.{_ROOMS[name]}"), name)
