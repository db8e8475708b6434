"""What can be cut out of a network, and what cannot and why, in few lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from resect.graph import KINDS, Frozen, Graph, Group, Member
from resect.report.layers import spans
from resect.report.results import SCHEMA, Record


class MemberRow(Record):
    """A parameter that coupled groups slice."""

    parameter: str
    """`*` stands for the layers' numbers."""
    axis: int
    positions: int
    """That every unit owns."""
    layers: str
    """`0-29`; empty outside blocks."""


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
    parameters: int = 0
    """Parameters that go with all units of all these groups."""
    of_model: float = 0.0
    whole: bool = False
    """Whether a unit is a module and all that is in it, such as a block."""
    module: str = ""
    """The module in a block that a unit is, such as `self_attn`."""
    members: list[MemberRow] = []

    @property
    def title(self) -> str:
        """The kind, and the module if the units are one in every block."""
        return f"{self.kind} {self.module}".strip()


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
    alike: dict[tuple[int, int, tuple[Place, ...]], list[Group]] = {}
    for group in graph.of_kind(kind):
        price = dense - graph.parameter_count({group.name: 1})
        alike.setdefault((group.units, price, _places(graph, group)), []).append(group)
    rows = []
    for (units, price, _), groups in alike.items():
        gone = dense - graph.parameter_count({group.name: units for group in groups})
        rows.append(
            UnitRow(
                kind=kind,
                layers=_layers(groups),
                groups=len(groups),
                units=units,
                unit_parameters=price,
                parameters=gone,
                of_model=gone / max(dense, 1),
                whole=_is_whole(groups[0]),
                module=graph.blocks.within(groups[0].name) if _is_whole(groups[0]) else "",
                members=_member_rows(graph, groups),
            )
        )
    return rows


def _is_whole(group: Group) -> bool:
    """Whether the one unit of a group is all there is of a module."""
    return group.units == 1 and group.least == 0


Place = tuple[str, int, int]
"""A parameter in the words of any layer, an axis, and how many of its positions a unit owns."""


def _place(member: Member) -> Place:
    return _any_layer(member.parameter), member.axis, member.index.shape[1]


def _places(graph: Graph, group: Group) -> tuple[Place, ...]:
    return tuple(dict.fromkeys(map(_place, graph.weights(group))))


def _member_rows(graph: Graph, groups: Sequence[Group]) -> list[MemberRow]:
    """What some groups slice, folded over layers."""
    layers: dict[Place, set[int]] = {}
    for member in (member for group in groups for member in graph.weights(group)):
        layer = graph.blocks.layer_of(member.parameter)
        layers.setdefault(_place(member), set()).update(() if layer is None else (layer,))
    return [
        MemberRow(parameter=parameter, axis=axis, positions=positions, layers=spans(found))
        for (parameter, axis, positions), found in layers.items()
    ]


def _layers(groups: Sequence[Group]) -> str:
    return spans({group.layer for group in groups if group.layer is not None})


def _shares(graph: Graph, kinds: Sequence[str]) -> list[KindShare]:
    """Per kind that lies inside blocks, and for all of them together but whole modules; what two kinds share counts once."""
    inside = [kind for kind in kinds if all(group.layer is not None for group in graph.of_kind(kind))]
    known = [kind for kind in KINDS if kind in inside]
    inside = [*known, *(kind for kind in inside if kind not in known)]
    together = [kind for kind in inside if not any(map(_is_whole, graph.of_kind(kind)))]
    shares = [_share(graph, [kind]) for kind in inside]
    return [*shares, _share(graph, together)] if len(together) > 1 else shares


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
