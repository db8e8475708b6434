"""resect: cut whole structures out of a neural network; what is left is an ordinary, smaller, faster model."""

from resect.graph import Graph, trace
from resect.plan import Plan
from resect.surgery import cut, mask, masked

__all__ = ["Graph", "Plan", "cut", "mask", "masked", "trace"]
