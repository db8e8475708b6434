"""The whole ladder of widths of a layer: blocks of columns go one after the other, the cheapest first, the rest making up for it.

After `C` goes, `A⁻¹` becomes `A⁻¹ − A⁻¹[:,C] ([A⁻¹]_CC)⁻¹ A⁻¹[C,:]` and `W` becomes `W − W_C ([A⁻¹]_CC)⁻¹ A⁻¹[C,:]`, so that
the next loss is what its removal costs besides. Several layers that take in the same units go together, their losses summed.

With two terms, a layer is as many layers of a single output, each a row `w̃_i` of `P_Gᵀ W`, with `A₁ + t_i A₂` for the moments of
its inputs. Rows of like `t_i` share these, so that there are few; losses summed are within `NEAR` of what they are without that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resect.statistics import Curvature, root_of, solved_by

NEAR = 4.0
"""How many times larger or smaller `A₁ + t A₂` may be in some direction than what stands for it."""
PENDING = 128
"""Removed columns that wait until they are taken off the whole of `A⁻¹` and `W` by one matrix product."""
AHEAD = 1.25
"""How many times as far a ladder reaches down as it is likely to be needed."""


@dataclass(frozen=True)
class Ladder:
    """Units in the order they go, and what each step costs besides the ones before, in nats per prediction."""

    order: Int[Tensor, " removed"]
    losses: Float[Tensor, " removed"]

    def scores(self, units: int, *, alone: Float[Tensor, " units"] | None = None) -> Float[Tensor, " units"]:
        """A loss for every unit that rises, if only by a hair, along the order, and on among those below its end.

        What is below costs as much as that at least: just that, or in proportion to what it costs `alone`.
        """
        tiny = torch.finfo(torch.float64).tiny
        losses = self.losses.clamp_min(tiny).cummax(0).values
        stays = torch.ones(units, dtype=torch.bool)
        stays[self.order] = False
        below, further = stays.nonzero().flatten(), losses[-1:].sum().repeat(int(stays.sum()))
        if alone is not None and len(losses):
            below = below[alone[below].argsort(stable=True)]
            further *= (alone[below] / alone[self.order].max().clamp_min(tiny)).clamp_min(1)
        rises = 1 + 1e-13 * torch.arange(units, dtype=torch.float64)
        scores = torch.empty(units, dtype=torch.float64)
        scores[torch.cat([self.order, below])] = torch.cat([losses, further]) * rises
        return scores


@dataclass(frozen=True)
class Reader:
    """A layer that takes in the units: its matrix, its curvature and the columns of every unit."""

    weight: Float[Tensor, "rows columns"]
    curvature: Curvature
    columns: Int[Tensor, "units width"]


def reach(units: int, likely: float) -> int:
    """How many steps of a ladder are enough, as a rule, where so many of its units are likely to go."""
    return min(units, max(1, ceil(AHEAD * likely)))


def ladder(readers: Sequence[Reader], *, steps: int | None = None, gone: Sequence[int] = ()) -> Ladder:
    """The ladder of the units that some layers take in, all of it or its first `steps`; those in `gone` went before."""
    units = len(readers[0].columns)
    stays = torch.ones(units, dtype=torch.bool)
    states = [_State(part, list(gone)) for reader in readers for part in _parts(reader)]
    stays[list(gone)] = False
    order, losses = [], []
    left = int(stays.sum())
    for _ in range(left if steps is None else min(left, steps)):
        total = torch.stack([state.losses() for state in states]).sum(0)
        unit = int(torch.where(stays, total, torch.inf).argmin())
        order.append(unit)
        losses.append(float(total[unit]))
        stays[unit] = False
        for state in states:
            state.remove(unit)
    return Ladder(torch.tensor(order, dtype=torch.long), torch.tensor(losses, dtype=torch.float64))


def line_ladders(
    weight: Float[Tensor, "rows columns"],
    curvature: Curvature,
    *,
    inner: int | None = None,
    steps: Sequence[int | None] = (None, None),
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " inner"]]:
    """A loss for every row and for every one of the first `inner` columns (all): each after those of its side before it.

    Rows are the columns of `Wᵀ`, for which `G` and `A` have changed places. The last of a side may go, too. `steps` of the sides
    are enough; lines below cost no less than the last.
    """
    G = torch.eye(len(weight), dtype=weight.dtype) if curvature.G is None else curvature.G
    turned = Curvature(G, curvature.A, curvature.G2, curvature.A2)
    sides = (weight.mT, turned, len(weight)), (weight, curvature, weight.shape[1] if inner is None else inner)
    rows, columns = (
        ladder([Reader(W, F, torch.arange(units)[:, None])], steps=enough).scores(units)
        for (W, F, units), enough in zip(sides, steps, strict=True)
    )
    return rows, columns


def _parts(reader: Reader) -> list[Reader]:
    """A reader whose curvature has two terms as several with one, each of the rows of like `t`; another as it is."""
    curvature, joint = reader.curvature, reader.curvature.joint
    if joint is None or curvature.A2 is None:
        return [reader]
    within, t = joint.G.P.mT @ reader.weight, joint.G.values
    return [
        Reader(within[rows], Curvature(curvature.A + t[rows].mean() * curvature.A2), reader.columns)
        for rows in _alike(t, joint.A.values)
    ]


def _alike(t: Float[Tensor, " rows"], s: Float[Tensor, " columns"]) -> list[Int[Tensor, " some"]]:
    """Rows in sets within which `1 + t s` differs by less than `NEAR` times, whatever `s`; it does so most at the ends of `s`."""
    order = t.argsort(stable=True)
    logs = torch.log1p(t[order][:, None] * torch.stack(s.aminmax()))
    starts = [0]
    for row in range(len(order)):
        if float((logs[row] - logs[starts[-1]]).abs().max()) > log(NEAR):
            starts.append(row)
    return list(order.tensor_split(starts[1:]))


class _State:
    """One layer on the way down.

    `H` is `A⁻¹` and `M` is `Wᵀ G W`. What was removed since they were last brought up to date is pending: `A⁻¹ = H − P Pᵀ` and
    `W = W₀ − B Pᵀ`, so that `Wᵀ G W = M − Z Pᵀ − P Zᵀ + P S Pᵀ` with `Z = W₀ᵀ G B` and `S = Bᵀ G B`; `B` itself is never
    needed. Of every unit, the blocks `[A⁻¹]_CC` and `[Wᵀ G W]_CC` are kept up to date.
    """

    def __init__(self, reader: Reader, gone: Sequence[int]) -> None:
        self.columns = reader.columns
        curvature = reader.curvature
        H, weight = curvature.A_inverse, reader.weight
        if gone:
            H, weight = _without(H, weight, reader.columns[gone].flatten())
        self.gone = torch.zeros(len(reader.columns), dtype=torch.bool)
        self.gone[gone] = True
        self.H = H.clone()
        self.M = weight.mT @ (weight if curvature.G is None else curvature.G @ weight)
        room = PENDING + self.columns.shape[1]
        self.P, self.Z, self.S = H.new_empty(len(H), room), H.new_empty(len(H), room), H.new_empty(room, room)
        self.pending, self.since = 0, list(gone)
        self.flush()

    def losses(self) -> Float[Tensor, " units"]:
        """What each unit costs now."""
        if self.columns.shape[1] == 1:
            return 0.5 * (self.gram / self.inverse).flatten()
        inverse = self.inverse.clone()
        inverse[self.gone] = torch.eye(inverse.shape[1], dtype=inverse.dtype)
        root = root_of(inverse, "blocks of the inverse curvature")
        return 0.5 * solved_by(root, self.gram).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Takes a unit off."""
        C, k = self.columns[unit], self.pending
        P, Z, S = self.P[:, :k], self.Z[:, :k], self.S[:k, :k]
        root = root_of(self.inverse[unit], "blocks of the inverse curvature")  # [A⁻¹]_CC = R Rᵀ
        p = _solved(root, self.H[C] - P[C] @ P.mT)  # [columns, width]
        z = _solved(root, self.M[C] - P[C] @ Z.mT)  # [columns, width]
        across = _solved(root, Z[C] - P[C] @ S)  # [pending, width]
        square = _solved(root, _solved(root, self.gram[unit]))  # [width, width]
        parts, crossing = p[self.columns], (z - P @ across)[self.columns]  # [units, width, width of C]
        mixed = crossing @ parts.mT
        self.inverse -= parts @ parts.mT
        self.gram += parts @ square @ parts.mT - mixed - mixed.mT
        new = slice(k, k + len(C))
        self.P[:, new], self.Z[:, new], self.S[new, new] = p, z, square
        self.S[:k, new], self.S[new, :k] = across, across.mT
        self.pending += len(C)
        self.gone[unit] = True
        self.since.append(unit)
        if self.pending >= PENDING:
            self.flush()

    def flush(self) -> None:
        """Carries out what is pending, and drops the columns that went."""
        stays = torch.ones(len(self.H), dtype=torch.bool)
        stays[self.columns[self.since].flatten()] = False
        P, Z, S = self.P[stays, : self.pending], self.Z[stays, : self.pending], self.S[: self.pending, : self.pending]
        half = (Z - 0.5 * P @ S) @ P.mT
        left = stays.nonzero().flatten()
        self.H, self.M = (square.index_select(0, left).index_select(1, left) for square in (self.H, self.M))
        self.H.addmm_(P, P.mT, alpha=-1)
        self.M.sub_(half).sub_(half.mT)
        self.columns = (stays.cumsum(0) - 1)[self.columns].masked_fill(self.gone[:, None], 0)  # of what went: of no meaning
        self.P, self.Z = self.P[: len(self.H)], self.Z[: len(self.H)]
        self.pending, self.since = 0, []
        if self.gone.all():
            return
        square = self.columns[:, :, None], self.columns[:, None, :]
        self.inverse, self.gram = self.H[square], self.M[square]


def _solved(root: Tensor, rows: Tensor) -> Tensor:
    """`(R⁻¹ X)ᵀ`."""
    found: Tensor = torch.linalg.solve_triangular(root, rows, upper=False).mT
    return found


def _without(H: Tensor, weight: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """`A⁻¹` and `W` after the columns `C` went."""
    solved = solved_by(root_of(H[C][:, C], "the inverse curvature"), H[C])
    return H - H[:, C] @ solved, weight - weight[:, C] @ solved
