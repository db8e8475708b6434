"""Which positions of which parameters a plan keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from resect.errors import UsageError
from resect.graph import DEPTH, KINDS, Graph, Group, Sublayer
from resect.plan import Plan

SLICED = tuple(kind for kind in KINDS if kind not in DEPTH)
"""Kinds whose units are slices of parameters."""


def changed(graph: Graph, plan: Plan, *, kinds: tuple[str, ...] = SLICED) -> Iterator[tuple[Group, Tensor]]:
    """The groups that lose units, each with the numbers of those that stay: [kept] long.

    A sub-layer of which no unit stays loses none: it goes as a whole (`removed_sublayers`).
    Raises `UsageError` when the plan was made for another network.
    """
    emptied = graph.emptied(plan.removed())
    for name, kept in plan.groups.items():
        group = graph.group(name)
        if group.units != kept.units:
            raise UsageError(
                f"The plan is for another network: it counts {kept.units} units in {name}, this network has {group.units}."
            )
        _check_named(group, kept.keep if kept.removed else range(group.units))
        if not kept.removed or group.kind not in kinds or graph.home(group) in emptied:
            continue
        if len(kept.keep) < group.least:
            raise UsageError(f"The plan keeps {len(kept.keep)} of the {group.units} {group.kind} in {name}. {_why(graph, group)}")
        yield group, torch.tensor(kept.keep, dtype=torch.long)


def _why(graph: Graph, group: Group) -> str:
    if group.least > 1:
        return f"The network chooses {group.least} of them at a time, so at least as many must stay."
    home = graph.home(group)
    rest = f"remove {home}, or keep no unit of anything in it" if home else "it belongs to no sub-layer that could go as a whole"
    return f"At least one must stay; {rest}."


def _check_named(group: Group, keep: Sequence[int]) -> None:
    stays = set(keep) if group.named else set()
    for unit, name in group.named.items():
        if unit not in stays:
            raise UsageError(f"The plan drops token {unit}, which is the model's {name}. Keep it, or set that to another token.")


def removed_blocks(graph: Graph, plan: Plan) -> list[str]:
    """Paths of the blocks that a plan removes whole."""
    return [group.name for group, _ in changed(graph, plan, kinds=("blocks",))]


def removed_sublayers(graph: Graph, plan: Plan) -> list[Sublayer]:
    """The sub-layers that a plan removes, by name or by keeping no unit of theirs, outside of removed blocks."""
    names = [*(group.name for group, _ in changed(graph, plan, kinds=("sublayers",))), *graph.emptied(plan.removed())]
    layers = {group.layer for group, _ in changed(graph, plan, kinds=("blocks",))}
    found = [graph.sublayers[name] for name in dict.fromkeys(names)]
    return [sublayer for sublayer in found if sublayer.layer not in layers]


def kept_positions(graph: Graph, plan: Plan) -> dict[str, dict[int, Tensor]]:
    """For every parameter and axis that shrinks, the positions that stay, ascending: [positions] long."""
    gone: dict[str, dict[int, Tensor]] = {}
    for group, keep in changed(graph, plan):
        lost = missing(group.units, keep)
        for member in group.members:
            axes = gone.setdefault(member.parameter, {})
            size = graph.shapes[member.parameter][member.axis]
            mask = axes.setdefault(member.axis, torch.zeros(size, dtype=torch.bool))
            mask[member.index[lost].flatten()] = True
    return {name: {axis: (~mask).nonzero().flatten() for axis, mask in axes.items()} for name, axes in gone.items()}


def missing(count: int, keep: Tensor) -> Tensor:
    """Which of `count` positions are not among those that stay: [count] bool."""
    lost = torch.ones(count, dtype=torch.bool)
    lost[keep] = False
    return lost


def take(tensor: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    """The slices of a tensor at the given positions of each axis, in memory of their own."""
    for axis, keep in positions.items():
        tensor = tensor.index_select(axis, keep.to(tensor.device))
    return tensor
