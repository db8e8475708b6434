"""resect: cut whole structures out of a neural network; what is left is an ordinary, smaller, faster model."""

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
