"""The second Kronecker term of a layer's curvature: the one nearest to what the first leaves of the Fisher information.

`F = E[(g gᵀ) ⊗ (x xᵀ)]` over positions, per prediction; the residual is `F − G₁ ⊗ A₁`. The `G₂ ⊗ A₂` that is nearest to it in the
Frobenius norm is found by alternating least squares, which is the power method for the leading singular vectors of the residual,
rearranged: with `‖G₂‖ = 1`, `A₂ = E[(gᵀ G₂ g) x xᵀ] − ⟨G₁, G₂⟩ A₁`, and the other way round. A step is a pass over the data and
never makes the fit worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 5
"""Passes over the data after the first, which collects the first term and takes the identity for `G₂`."""
ROUNDING = 100
"""A residual of so many times the precision of the sums is taken for rounding."""


class Fit:
    """A second term on its way. It takes in what a layer sees, position by position, and steps when all data has passed."""

    def __init__(self, like: Tensor, rows: int, columns: int) -> None:
        self.sizes = {"A": columns, "G": rows}
        self.sought, self.held = "A", "G"
        """The factor that this pass is for, and the one that does not change in it."""
        self.units: dict[str, Tensor] = {}
        """What is known of `A₂` and `G₂`, each of norm 1, in float64."""
        self.weigher: Tensor | None = None
        """The factor that is held, beside the data; None stands for the identity."""
        self.norm = 0.0
        self.sums = like.new_zeros(columns, columns)

    def take(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds positions: what each took in [positions, columns], and the gradients of what it put out [positions, rows]."""
        seen = {"A": inputs, "G": gradients}
        known, summed = seen[self.held], seen[self.sought]
        weights = ((known if self.weigher is None else known @ self.weigher) * known).sum(1, keepdim=True)
        self.sums.addmm_(summed.T, summed * weights)

    def step(self, A: Tensor, G: Tensor, predictions: int) -> None:
        """Ends a pass: the factor that was sought is known, and held in the next. `A`, `G` are the first term in float64."""
        first, held = {"A": A, "G": G}, self.units.get(self.held)
        scale = 1.0 if held is not None else self.sizes[self.held] ** -0.5  # the identity has norm 1 then
        along = scale * float(first[self.held].trace()) if held is None else float((first[self.held] * held).sum())
        total = scale * self.sums.cpu().double() / predictions
        found = 0.5 * (total + total.mT) - along * first[self.sought]
        self.norm = float(found.norm())
        if self.norm <= ROUNDING * torch.finfo(self.sums.dtype).eps * float(total.norm()):
            self.norm = 0.0
        self.units[self.sought] = found / (self.norm or torch.inf)
        self.weigher = self.units[self.sought].to(self.sums)
        self.sought, self.held = self.held, self.sought
        self.sums = self.sums.new_zeros(self.sizes[self.sought], self.sizes[self.sought])

    def factors(self, A: Tensor) -> tuple[Tensor, Tensor] | None:
        """`A₂`, as large as `A₁`, and `G₂`; None where nothing was left to fit."""
        size = float(A.norm())
        if not self.norm:
            return None
        return (self.units["A"] * size).to(self.sums), (self.units["G"] * (self.norm / size)).to(self.sums)
