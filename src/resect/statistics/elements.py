"""What is summed over the elements of a weight: one function per criterion, from weight and gradients to element values.

`w` is a weight, `g` the gradient of the mean token loss over all calibration text, `f` the mean over sequences of the
squared gradient of one sequence's mean token loss (the diagonal of the empirical Fisher information).
Source: LLM-Pruner (arXiv 2305.11627), sections 3.2 and A; signs as in its text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Element = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """How element values are made, and which gradients they need."""

    name: str
    element: Element
    gradient: bool = False  # needs g
    squares: bool = False  # needs f
    signed: bool = False  # positions sum signed values, the absolute value is taken per position

    @property
    def weights_only(self) -> bool:
        """Whether no text is needed."""
        return not (self.gradient or self.squares)

    @property
    def adds(self) -> bool:
        """Whether sums per position add over pieces of text."""
        return self.weights_only or self.signed or not self.gradient


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("vector", lambda w, g, f: w * g, gradient=True, signed=True),
        Criterion("element1", lambda w, g, f: (w * g).abs(), gradient=True),
        Criterion("element2", lambda w, g, f: w.square() * f, squares=True),
        Criterion("mix", lambda w, g, f: (w * g - 0.5 * w.square() * f).abs(), gradient=True, squares=True),
        Criterion("l1", lambda w, g, f: w.abs()),
        Criterion("l2", lambda w, g, f: w.square()),
        Criterion("random", lambda w, g, f: w.new_zeros(()).expand_as(w)),
    )
}
"""Every criterion of LLM-Pruner by name; `l1`, `l2` and `random` need no text."""
