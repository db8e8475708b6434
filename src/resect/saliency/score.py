"""From positions to units: what removing each unit is estimated to cost."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from resect.errors import NumericsError, UsageError, nearest
from resect.graph import Graph, Group, Member
from resect.statistics import Statistics, position_values

Reduction = Callable[[Float[Tensor, "members units"]], Float[Tensor, " units"]]

REDUCTIONS: dict[str, Reduction] = {
    "sum": lambda values: values.sum(0),
    "mean": lambda values: values.mean(0),
    "max": lambda values: values.amax(0),
    "prod": lambda values: values.prod(0),
    "last": lambda values: values[-1],
}
"""How the members of a group combine; `last` takes the member that data reaches last. Source: arXiv 2305.11627, section 3.2."""


def score(
    graph: Graph,
    statistics: Statistics,
    *,
    criterion: str | None = None,
    reduction: str = "sum",
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The saliency of every unit of every group that the statistics cover: `{group: [units]}`, float64, lowest goes first.

    `criterion` must be the one the statistics were collected for. `seed` is for `random`. `weights` are needed where
    statistics were kept by element. Raises `UsageError` for unknown names.
    """
    if reduction not in REDUCTIONS:
        raise UsageError(f"There is no reduction {reduction!r}. {nearest(reduction, REDUCTIONS)}")
    if criterion not in (None, statistics.criterion.name):
        raise UsageError(f"Scores by {criterion!r} were asked of statistics collected for {statistics.criterion.name!r}.")
    values = position_values(statistics, weights or {})
    covered = [g for g in graph.groups if all(m.axis in values.get(m.parameter, {}) for m in graph.weights(g))]
    if statistics.criterion.name == "random":
        return {group.name: _random(group, seed) for group in covered}
    return {group.name: _reduced(unit_values(graph.weights(group), values), reduction, group) for group in covered}


def _reduced(values: Float[Tensor, "members units"], reduction: str, group: Group) -> Float[Tensor, " units"]:
    reduced = REDUCTIONS[reduction](values)
    if reduction == "prod" and ((reduced == 0) & (values > 0).all(0)).any():
        raise NumericsError(f"The product over the {len(values)} members of {group.name} underflows. Use reduction=sum.")
    return reduced


def unit_values(members: Sequence[Member], values: Mapping[str, Mapping[int, Tensor]]) -> Float[Tensor, "members units"]:
    """The value of each unit in each member: the sum over the positions it owns there.

    Paper: members combine first, then the positions of a head add up. Here: the other way round, because the members of a
    grouped head own different numbers of positions. For `sum` and `last` it is the same.
    """
    return torch.stack([values[m.parameter][m.axis][m.index].sum(1) for m in members])


def _random(group: Group, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.name}".encode()))
    return torch.rand(group.units, generator=generator, dtype=torch.float64)
