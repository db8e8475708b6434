"""resect: cut whole structures out of a neural network; what is left is an ordinary, smaller, faster model."""

from __future__ import annotations

import os
import sys

if (sys.argv[:1] == ["-m"] and "resect.cli" in sys.orig_argv) or os.path.basename(sys.argv[0]) in ("resect", "resect.exe"):
    # Started as a program, before it imports anything: what lies in the working directory is no module of its, nor of a Python
    # that it or a library starts. `python -m` and empty entries of PYTHONPATH put that directory there.
    _home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _here = os.path.realpath(os.curdir)
    sys.path[:] = [_ for _ in sys.path if os.path.realpath(_) == _home or (os.path.isabs(_) and os.path.realpath(_) != _here)]
    os.environ["PYTHONSAFEPATH"] = "1"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resect.calibration import calibrate
    from resect.checkpoint import cut_tokenizer, load, load_into, load_tokenizer, needed_tokens, save, skeleton
    from resect.export import Exported, export
    from resect.graph import Graph, trace
    from resect.methods import Knowledge, Result, Vocabulary, analyze, prune, vocabulary_plan
    from resect.plan import Plan
    from resect.recovery import Recovered, Recovery, recover
    from resect.surgery import cut, mask, masked

__all__ = [
    "Exported",
    "Graph",
    "Knowledge",
    "Plan",
    "Recovered",
    "Recovery",
    "Result",
    "Vocabulary",
    "analyze",
    "calibrate",
    "cut",
    "cut_tokenizer",
    "export",
    "load",
    "load_into",
    "load_tokenizer",
    "mask",
    "masked",
    "needed_tokens",
    "prune",
    "recover",
    "save",
    "skeleton",
    "trace",
    "vocabulary_plan",
]

_ROOMS = {
    "calibrate": "calibration",
    **dict.fromkeys(("cut_tokenizer", "load", "load_into", "load_tokenizer", "needed_tokens", "save", "skeleton"), "checkpoint"),
    **dict.fromkeys(("Exported", "export"), "export"),
    **dict.fromkeys(("Graph", "trace"), "graph"),
    **dict.fromkeys(("Knowledge", "Result", "Vocabulary", "analyze", "prune", "vocabulary_plan"), "methods"),
    "Plan": "plan",
    **dict.fromkeys(("Recovered", "Recovery", "recover"), "recovery"),
    **dict.fromkeys(("cut", "mask", "masked"), "surgery"),
}


def __getattr__(name: str) -> Any:
    """Rooms are imported on first use: a help text needs no torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'resect' has no attribute {name!r}")
    return getattr(import_module(f"resect.{_ROOMS[name]}"), name)
