"""What can be cut out of a network, and what cannot and why, in few lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from resect.graph import Frozen, Graph, Group
from resect.report.layers import spans
from resect.report.results import SCHEMA, Record

TOGETHER = ("heads", "channels")
"""Kinds that do not contain one another, so that their shares add up to what can go inside blocks."""


class UnitRow(Record):
    """Coupled groups of one kind with the same sizes."""

    kind: str
    layers: str
    """`0-29`; empty for groups of the whole model."""
    groups: int
    units: int
    """In every group."""
    unit_parameters: int
    """Parameters that go with one unit."""


class KindShare(Record):
    """What goes when every unit of some kinds does."""

    kind: str
    parameters: int
    of_blocks: float
    of_model: float


class FrozenRow(Record):
    """Axes that are kept whole for the same reason."""

    parameter: str
    """`*` stands for the layers' numbers."""
    axis: int
    sizes: list[int]
    """Positions of every such part of the axis."""
    layers: str
    reason: str


class Inspection(Record):
    """The coupled groups of a network and what they hold."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["inspection"] = "inspection"
    model: str
    architecture: str
    parameters: int
    block_parameters: int
    macs: int
    """Of one sequence of 64 tokens."""
    blocks: int
    block_path: str
    units: list[UnitRow]
    shares: list[KindShare]
    frozen: list[FrozenRow]
    mixed: dict[str, list[str]]
    """Norms whose statistics run over the units of a kind: what stays is normalised by itself."""


def inspection(graph: Graph, *, model: str, architecture: str) -> Inspection:
    """Groups folded over layers of the same sizes, with prices; frozen axes folded over layers and reasons."""
    kinds = list(dict.fromkeys(group.kind for group in graph.groups))
    return Inspection(
        model=model,
        architecture=architecture,
        parameters=graph.parameter_count(),
        block_parameters=graph.parameter_count(blocks_only=True),
        macs=graph.macs(),
        blocks=graph.blocks.count,
        block_path=graph.blocks.path,
        units=[row for kind in kinds for row in _unit_rows(graph, kind)],
        shares=_shares(graph, kinds),
        frozen=_frozen_rows(graph),
        mixed=_mixed(graph, kinds),
    )


def _unit_rows(graph: Graph, kind: str) -> list[UnitRow]:
    dense = graph.parameter_count()
    alike: dict[tuple[int, int], list[Group]] = {}
    for group in graph.of_kind(kind):
        price = dense - graph.parameter_count({group.name: 1})
        alike.setdefault((group.units, price), []).append(group)
    return [
        UnitRow(kind=kind, layers=_layers(groups), groups=len(groups), units=units, unit_parameters=price)
        for (units, price), groups in alike.items()
    ]


def _layers(groups: Sequence[Group]) -> str:
    return spans({group.layer for group in groups if group.layer is not None})


def _shares(graph: Graph, kinds: Sequence[str]) -> list[KindShare]:
    """Per kind that lies inside blocks, and for heads and channels together."""
    inside = [kind for kind in kinds if all(group.layer is not None for group in graph.of_kind(kind))]
    both = [kind for kind in TOGETHER if kind in inside]
    shares = [_share(graph, [kind]) for kind in inside]
    return [*shares, _share(graph, both)] if len(both) > 1 else shares


def _share(graph: Graph, kinds: Sequence[str]) -> KindShare:
    removed = {group.name: group.units for group in graph.of_kind(*kinds)}
    gone = graph.parameter_count() - graph.parameter_count(removed)
    blocks = graph.parameter_count(blocks_only=True)
    gone_inside = blocks - graph.parameter_count(removed, blocks_only=True)
    return KindShare(
        kind=" + ".join(kinds),
        parameters=gone,
        of_blocks=gone_inside / max(blocks, 1),
        of_model=gone / max(graph.parameter_count(), 1),
    )


def _frozen_rows(graph: Graph) -> list[FrozenRow]:
    alike: dict[tuple[str, int, str], list[Frozen]] = {}
    for item in graph.frozen:
        alike.setdefault((_any_layer(item.parameter), item.axis, _any_layer(item.reason)), []).append(item)
    rows = []
    for (parameter, axis, reason), items in alike.items():
        layers = [layer for item in items if (layer := graph.blocks.layer_of(item.parameter)) is not None]
        sizes = list(dict.fromkeys(item.size for item in items))
        rows.append(FrozenRow(parameter=parameter, axis=axis, sizes=sizes, layers=spans(set(layers)), reason=reason))
    return rows


def _mixed(graph: Graph, kinds: Sequence[str]) -> dict[str, list[str]]:
    found = {
        kind: list(dict.fromkeys(_any_layer(norm) for group in graph.of_kind(kind) for norm in group.mixed)) for kind in kinds
    }
    return {kind: norms for kind, norms in found.items() if norms}


def _any_layer(text: str) -> str:
    """A path with `*` for every number in it."""
    return re.sub(r"\.\d+(?=\.|\s|$)", ".*", text)
