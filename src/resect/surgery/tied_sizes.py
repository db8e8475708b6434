"""Groups that one number of a network's code holds together: known before anything is scored, so that plans respect it.

`x.split((self.half, self.half), 1)` takes two halves that nothing else couples, and one number for both. A plan that cuts one
of them is refused; one that cuts both alike is not. Found by trial: groups are cut by different numbers, and where the code
refuses that, those around it are cut alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from resect.errors import ModelError
from resect.graph import DEPTH, VOCABULARY, Graph, Group
from resect.plan import Kept, Plan
from resect.surgery.cut import plan_record

ROUNDS = 6
"""Trials of all groups at once: each but the last finds one constraint, or groups that cannot be cut at all."""
MOST_ALONE = 8
"""Groups of a size around one place that are tried one by one."""


def equal_sizes(model: nn.Module, graph: Graph, kinds: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Names of groups of those kinds that have to keep as many units as each other.

    Every trial runs the network on fake tensors, no weight is read. A network whose groups are independent takes one.
    """
    groups = {group.name: group for group in graph.of_kind(*kinds) if group.kind not in (*DEPTH, VOCABULARY) and group.units > 1}
    found: list[tuple[str, ...]] = []
    for _ in range(ROUNDS):
        around = _refused(model, graph, _unlike(groups, found))
        if around is None:
            break
        near = [name for name in around if name in groups and not any(name in names for names in found)]
        new = [names for units in _by_units(groups, near) if (names := _held_together(model, graph, groups, units))]
        found += [alike for names in new for alike in _likes(names, groups)]
        if not new:  # the code takes other sizes of these in no way: the cut says so
            for name in near or list(groups):
                groups.pop(name)
    return tuple(dict.fromkeys(found))


def _refused(model: nn.Module, graph: Graph, removed: Mapping[str, int]) -> tuple[str, ...] | None:
    """The groups around the code that does not take a cut; None where all of it does."""
    plan = Plan(groups={name: _without(graph.group(name), count) for name, count in removed.items() if count})
    if not plan.groups:
        return None
    try:
        plan_record(model, plan, graph)
    except ModelError as problem:
        return problem.groups
    return None


def _without(group: Group, count: int) -> Kept:
    """The first units of a group gone, but for those that have to stay."""
    free = [unit for unit in range(group.units) if unit not in group.named][:count]
    keep = tuple(unit for unit in range(group.units) if unit not in free)
    return Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)


def _unlike(groups: Mapping[str, Group], found: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """How many units each group loses when all lose other numbers, but for those that are held together."""
    removed: dict[str, int] = {}
    for number, (name, group) in enumerate(groups.items()):
        most = max(0, min(group.units - max(group.least, 1), group.units // 2))
        removed[name] = 1 + number % most if most else 0
    for first, *others in found:
        removed.update({name: removed[first] for name in others if first in removed and name in removed})
    return removed


def _by_units(groups: Mapping[str, Group], names: Iterable[str]) -> Iterator[list[str]]:
    """Names of several groups of one kind and as many units."""
    alike: dict[tuple[str, int], list[str]] = {}
    for name in names:
        alike.setdefault((groups[name].kind, groups[name].units), []).append(name)
    return (found for found in alike.values() if 1 < len(found) <= MOST_ALONE)


def _held_together(model: nn.Module, graph: Graph, groups: Mapping[str, Group], names: Sequence[str]) -> tuple[str, ...]:
    """Of groups with as many units, those that the code lets shrink together, and none of them alone; empty if there are none."""
    if any(not _unlike({name: groups[name]}, ())[name] for name in names):
        return ()
    if _refused(model, graph, dict.fromkeys(names, 1)) is not None:
        return ()
    alone = tuple(name for name in names if _refused(model, graph, {name: 1}) is not None)
    return alone if len(alone) > 1 and _refused(model, graph, dict.fromkeys(alone, 1)) is None else ()


def _likes(names: tuple[str, ...], groups: Mapping[str, Group]) -> list[tuple[str, ...]]:
    """The groups, and those that are called so in modules with other numbers and have as many units as each other."""
    start = _common(names)
    ends = [name[len(start) :] for name in names]
    found = [names]
    starts = {name[: -len(ends[0])] for name in groups if name.endswith(ends[0])} - {start, ""}
    for other in sorted(starts):
        alike = tuple(other + end for end in ends)
        numbered = re.sub(r"\d+", "*", other) == re.sub(r"\d+", "*", start)
        if numbered and all(name in groups for name in alike) and len({groups[name].units for name in alike}) == 1:
            found.append(alike)
    return found


def _common(names: Sequence[str]) -> str:
    """The path of the module that several names lie in, with its dot."""
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return "".join(f"{part}." for part in paths[0][:shared])
