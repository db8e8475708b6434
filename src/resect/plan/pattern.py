"""What stays of single matrices: rows and columns, or elements. The decision as a value, and one threshold over all matrices.

Source: LLM Surgeon (arXiv 2312.17244), section 3.3: the layers share one threshold on the loss, so that each keeps what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from resect.errors import NumericsError, UsageError
from resect.explain import from_json
from resect.plan.plan import Count

Losses = Callable[[], Iterable[Float[Tensor, " any"]]]
"""Gives the losses of all matrices, one after the other, each time that it is called."""
Lines = tuple[Bool[Tensor, " rows"], Bool[Tensor, " columns"]]
"""Which rows and columns of a matrix go."""


class Matrix(BaseModel):
    """What stays of one matrix; rows and columns that are not named stay all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Count, Count]
    rows: tuple[Count, ...] | None = None
    columns: tuple[Count, ...] | None = None
    zeros: Count = 0
    """Elements that are zero."""

    @model_validator(mode="after")
    def _within(self) -> Matrix:
        for name, kept, size in (("rows", self.rows, self.shape[0]), ("columns", self.columns, self.shape[1])):
            if kept is not None and (sorted(set(kept)) != list(kept) or kept and kept[-1] >= size):
                raise ValueError(f"{name} must be unique, ascending and below {size}")
        if self.zeros > prod(self.shape):
            raise ValueError(f"{self.zeros} zeros in a matrix of {self.shape[0]} x {self.shape[1]}")
        return self


class Pattern(BaseModel):
    """What stays of the matrices of a network, by the names of their layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    kind: str = ""
    """`rows-columns`, `unstructured`, or `n:m` for n elements that stay of every m neighbours."""
    layers: Mapping[str, Matrix] = {}

    @property
    def zeroed(self) -> tuple[str, ...]:
        """The layers that have zeros."""
        return tuple(path for path, matrix in self.layers.items() if matrix.zeros)

    def to_json(self) -> str:
        """The pattern as JSON, one line per layer."""
        rows = [f"  {json.dumps(name)}: {matrix.model_dump_json(exclude_none=True)}" for name, matrix in self.layers.items()]
        lines = ",\n".join(rows)
        return f'{{"version": 1, "kind": {json.dumps(self.kind)}, "layers": {{\n{lines}\n}}}}\n'

    @classmethod
    def from_json(cls, text: str) -> Pattern:
        """Reads `to_json`; a malformed pattern is a `UsageError` that says where."""
        return from_json(cls, text, "a pattern")


def lowest(losses: Losses, count: int) -> float:
    """The largest of the `count` lowest losses, as float32; minus infinity for none.

    Exact in two passes, whatever their number: floats that are not negative are ordered like the integers of their bits.
    """
    if count <= 0:
        return -torch.inf
    high = _histogram(losses, lambda bits: bits >> 16)
    upper = int(torch.searchsorted(high.cumsum(0), count))
    if upper == len(high):
        raise UsageError(f"{count} elements were to go, there are {int(high.sum())}.")
    low = _histogram(losses, lambda bits: (bits & 0xFFFF)[(bits >> 16) == upper])
    lower = int(torch.searchsorted(low.cumsum(0), count - int(high[:upper].sum())))
    return float(torch.tensor((upper << 16) + lower, dtype=torch.int32).view(torch.float32))


def _histogram(losses: Losses, number: Callable[[Tensor], Tensor]) -> Tensor:
    found = torch.zeros(1 << 16, dtype=torch.long)
    for values in losses():
        if values.isnan().any() or (values < 0).any():
            raise NumericsError("Losses must be numbers, zero or more. Check the weights and the calibration text.")
        found += torch.bincount(number(values.float().flatten().view(torch.int32)), minlength=1 << 16)
    return found


def rows_and_columns(
    losses: Mapping[str, tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]], *, remove: int, floor: int = 1
) -> dict[str, Lines]:
    """Which rows and columns of every matrix go: all with losses up to the largest threshold that removes at most `remove`.

    With ρ rows and κ columns of R x C gone, ρC + κR − ρκ parameters are. At least `floor` rows and columns of each stay, the
    dearest. Raises `UsageError` where not as much can go.
    """
    spared = {name: tuple(_sparing(values, floor) for values in pair) for name, pair in losses.items()}
    values = torch.cat([side[side.isfinite()] for pair in spared.values() for side in pair]).unique()
    low, high = 0, len(values)  # so many of the lowest values may go
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _gone(spared, float(values[middle - 1])) <= remove else (low, middle - 1)
    if low == len(values) and (most := _gone(spared, torch.inf)) < 0.99 * remove:
        raise UsageError(
            f"{remove:,} parameters were to go; with {floor} rows and columns kept in each matrix only {most:,} can."
        )
    threshold = float(values[low - 1]) if low else -torch.inf
    return {name: (rows <= threshold, columns <= threshold) for name, (rows, columns) in spared.items()}


def _sparing(losses: Tensor, floor: int) -> Tensor:
    """The losses, infinite for those that stay in any case."""
    if losses.isnan().any():
        raise NumericsError("Losses must be numbers. Check the weights and the calibration text.")
    losses = losses.double().clone()
    losses[losses.argsort(stable=True)[max(len(losses) - floor, 0) :]] = torch.inf
    return losses


def _gone(losses: Mapping[str, tuple[Tensor, ...]], threshold: float) -> int:
    """Parameters that go at a threshold."""
    total = 0
    for rows, columns in losses.values():
        r, c = (int(((side <= threshold) & side.isfinite()).sum()) for side in (rows, columns))
        total += r * len(columns) + c * len(rows) - r * c
    return total
