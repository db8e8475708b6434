"""Two Kronecker terms in one basis: both are diagonal there, so that their sum is inverted entry by entry.

With `A₁ = L Lᵀ` and `L⁻¹ A₂ L⁻ᵀ = U diag(s) Uᵀ`, `P = L U` gives `A₁ = P Pᵀ` and `A₂ = P diag(s) Pᵀ`; likewise `G₁`, `G₂`
with values `t`. So `G₁ ⊗ A₁ + G₂ ⊗ A₂ = (P_G ⊗ P_A) diag(1 + t sᵀ) (P_G ⊗ P_A)ᵀ`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from resect.statistics.cholesky import root_of

LEAST = 0.1
"""The share of the first term that is left in every direction: `F ⪰ LEAST · F₁`."""

Square = Float[Tensor, "size size"]


@dataclass(frozen=True)
class Side:
    """Inputs or outputs: `first = P Pᵀ`, `second = P diag(values) Pᵀ`, and `Q = P⁻ᵀ`."""

    values: Float[Tensor, " size"]
    P: Square
    Q: Square

    @classmethod
    def of(cls, first: Square, second: Square) -> Side:
        """Of a positive definite matrix and a symmetric one."""
        root = root_of(first)
        half = torch.linalg.solve_triangular(root, second, upper=False)
        values, U = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.mT, upper=False))
        return cls(values, root @ U, torch.linalg.solve_triangular(root.mT, U, upper=True))

    def second(self) -> Square:
        """The second matrix, put together again."""
        found: Tensor = (self.P * self.values) @ self.P.mT
        return found


@dataclass(frozen=True)
class Joint:
    """The basis of both terms: `t` are the values of the side `G`, `s` those of the side `A`."""

    A: Side
    G: Side

    @cached_property
    def inverse(self) -> Float[Tensor, "rows columns"]:
        """`d = 1 / (1 + t sᵀ)`: the diagonal of `F⁻¹` in this basis."""
        return 1 / (1 + self.G.values[:, None] * self.A.values)

    @cached_property
    def inverse_diagonal(self) -> Float[Tensor, "rows columns"]:
        """The diagonal of `F⁻¹`: `(Q_G ∘ Q_G) d (Q_A ∘ Q_A)ᵀ`."""
        found: Tensor = self.G.Q.square() @ self.inverse @ self.A.Q.square().mT
        return found

    def solved(self, right: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """`F⁻¹` times a matrix: `Q_G (d ∘ (Q_Gᵀ B Q_A)) Q_Aᵀ`."""
        found: Tensor = self.G.Q @ (self.inverse * (self.G.Q.mT @ right @ self.A.Q)) @ self.A.Q.mT
        return found

    def positive(self, least: float = LEAST) -> Joint:
        """With values clipped so that `1 + t sᵀ ≥ least`, and itself where they are so already.

        On both sides, values of one sign stay as they are; those of the other are brought nearer to zero, as little as it takes.
        Of the two ways to choose the sign, the one is taken that changes `t sᵀ` less.
        """
        t, s = self.G.values, self.A.values
        if float(_least(t, s)) >= least:
            return self
        ways = [_raised(t, s, least), tuple(-values for values in _raised(-t, -s, least))]
        t, s = min(ways, key=lambda way: _distance(self.G.values, self.A.values, *way))
        return Joint(replace(self.A, values=s), replace(self.G, values=t))

    def kept(self, whole: Joint) -> float:
        """The share of the second term of `whole` that is left in this one: of the sum of squares of `t sᵀ`."""
        before, now = ((one.G.values.square().sum() * one.A.values.square().sum()) for one in (whole, self))
        return float(now / before)


def _least(t: Tensor, s: Tensor) -> Tensor:
    return (1 + torch.stack(t.aminmax())[:, None] * torch.stack(s.aminmax())).min()


def _raised(t: Tensor, s: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Both without values that the largest of the other makes less than `least - 1`."""
    floors = [(least - 1) / float(other.max()) if other.max() > 0 else -torch.inf for other in (s, t)]
    t, s = t.clamp_min(floors[0]), s.clamp_min(floors[1])
    return t, s


def _distance(t: Tensor, s: Tensor, t_now: Tensor, s_now: Tensor) -> float:
    """`‖t sᵀ − t' s'ᵀ‖²`."""
    crossing = (t @ t_now) * (s @ s_now)
    return float((t @ t) * (s @ s) - 2 * crossing + (t_now @ t_now) * (s_now @ s_now))
