"""Choosing what goes: one greedy walk over removal steps, ordered by loss per cost or by share.

A *ladder* is a family of groups that shrink together: a single group (`layout="per-layer"`) or all groups of one kind
(`layout="uniform"`). Its steps remove the lowest units first. `selection="global"` orders steps by summed saliency per
unit of cost, so that units of different size compete fairly; `selection="local"` by the share of the ladder that is
gone, so that every ladder loses the same share. `spread` lies between the two: global order, but no ladder loses more
than so many times the share that all would lose alike, because single losses stop adding up when most of a group goes.
Steps are taken in order until the budget is met; then the dearest ones that are not needed are given back, which lands
within one step of the target.

Where a cost goes down in stairs (`Cost.stops`), steps go from one edge to the next, and each has a price of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from math import ceil, inf, lcm
from typing import Any

import torch
from torch import Tensor

from resect.errors import NumericsError, UsageError, nearest
from resect.graph import DEPTH, KINDS, Graph, Group
from resect.plan.budget import OF, Cost, cost_of
from resect.plan.plan import Kept, Plan
from resect.ranges import share, whole

LAYOUTS = ("uniform", "per-layer")
SELECTIONS = ("global", "local")
Ranges = Mapping[str, tuple[int, int]]
Align = int | Mapping[str, int]
"""What the units that stay are a multiple of: channels, residual channels and rows of the vocabulary, or by kind."""
ALIGNED = ("channels", "residual", "vocabulary")
COMPETE = "positions see each other"
"""How the reason begins why units that compete for tokens stay whole."""
PLAIN = ("an input", "an output", "a part of every")
"""How reasons begin that say nothing of a kind."""
MOST_REASONS = 3


@dataclass(frozen=True)
class Step:
    """`units` more units of every group of a ladder; the lowest key goes first, then the lowest loss."""

    key: float
    loss: float  # saliency per unit of cost
    ladder: int
    units: int


def select(
    graph: Graph,
    scores: Mapping[str, Tensor],
    *,
    keep: float,
    of: str | Cost = "blocks",
    layout: str = "per-layer",
    selection: str = "global",
    align: Align = 1,
    kinds: Sequence[str] = ("heads", "channels"),
    groups: Collection[str] | None = None,
    protect: Collection[str] = (),
    ranges: Ranges | None = None,
    floor: int | Mapping[str, int] = 1,
    spread: float | None = None,
    within: Plan | None = None,
    tokens: int = 64,
) -> Plan:
    """The plan that keeps the share `keep` of a cost and loses least by the given saliencies.

    `scores` gives a saliency per unit for every group, `[units]`. `of` is what `keep` is a share of: parameters in blocks,
    parameters of the model, multiply-accumulates on `tokens` tokens, or any other `Cost`. `align` rounds the channels and
    residual channels that stay to multiples, or the units of the kinds that it names. `groups` names those that may be cut (none:
    all of these kinds), `protect` those that stay whole (with them the blocks and sub-layers that they lie in), `ranges` bounds
    the layers of a kind, `(first, last + 1)`. At least `floor` units of every group stay, or so many by kind (1 where none is
    given). `spread` (1 or more) caps what a group may lose, as a multiple of the share that its kind would lose if all lost
    alike.
    `within` is an earlier plan for the same groups: what it removed is gone, whatever it was worth.
    The result costs at most `keep` of the dense model, less than one step below it.
    Raises `UsageError` for unknown names, shares outside (0, 1], and budgets that cannot be reached.
    """
    _check(keep, of=of, layout=layout, selection=selection, kinds=(*kinds, *(ranges or ())))
    multiples = aligned(align)
    if spread is not None and not 1 <= spread < inf:
        raise UsageError(f"spread={spread:g} was asked; it is a multiple of the even share, 1 or more.")
    cost = cost_of(graph, of, tokens=tokens)
    ladders = _ladders(graph, layout, kinds=kinds, ranges=ranges, groups=groups, protect=protect)
    gone = {name: kept.removed for name, kept in within.groups.items()} if within else {}
    scores = {name: spent_first(values, within, name) for name, values in scores.items()} if within else scores
    dense = cost({})
    target = keep * dense
    prices = [_Prices(cost, ladder, float(dense)) for ladder in ladders]
    least_by_kind = floor if isinstance(floor, Mapping) else dict.fromkeys(kinds, floor)
    floors = [_floor(graph, ladder, least_by_kind.get(ladder[0].kind, 1)) for ladder in ladders]
    spent = [gone.get(ladder[0].name, 0) for ladder in ladders]
    aligns = [lcm(*(multiples.get(group.kind, 1) for group in ladder)) for ladder in ladders]
    order = partial(_order, graph, ladders, scores, prices=prices, aligns=aligns, spent=spent)
    if spread is not None and selection == "global":
        even = _take(order(floors=floors, local=True), ladders, cost, target)
        floors = _capped(ladders, floors, even, spread) if even else floors
        floors = [min(least, ladder[0].units - went) for least, ladder, went in zip(floors, ladders, spent, strict=True)]
    steps = order(floors=floors, local=selection == "local")
    taken = _take(steps, ladders, cost, target)
    if taken is None:
        least = ceil(cost(_removed(steps, ladders)) / dense * 1e4) / 1e4
        amount = f" ({cost(_removed(steps, ladders)):,} {cost.unit})" if cost.unit else ""
        raise UsageError(
            f"keep={keep:g} of {cost.name} cannot be met by removing {', '.join(kinds)}: with {_stays(least_by_kind)} kept in "
            f"every group the smallest reachable share is {least:.4f}{amount}. Let more stay, or "
            + ("protect fewer groups." if protect else "let more kinds or layers be cut.")
        )
    return _plan(ladders, scores, taken)


def aligned(align: Any) -> dict[str, int]:
    """What the units of each kind that stay are a multiple of; `UsageError` for what is no multiple of a kind's."""
    if not isinstance(align, Mapping):
        return dict.fromkeys(ALIGNED, whole("align", align))
    known = [kind for kind in KINDS if kind not in DEPTH]
    for kind in align:
        if kind not in known:
            raise UsageError(f"align names {kind!r}, which is no kind of unit. {nearest(str(kind), known)}")
    return {kind: whole(f"align.{kind}", multiple) for kind, multiple in align.items()}


def select_share(
    graph: Graph,
    scores: Mapping[str, Tensor],
    *,
    share: float | Mapping[str, float],
    kinds: Sequence[str] = ("heads", "channels"),
    protect: Collection[str] = (),
    ranges: Ranges | None = None,
) -> Plan:
    """The plan that removes the same share of positions from every selected group, as the LLM-Pruner paper states sizes.

    A group of n units with w positions each keeps `int(n * w * (1 - share))` positions, rounded up to whole units. Those named
    in `protect` keep all. `share` is one for all `kinds`, or one by kind.
    """
    shares = dict(share) if isinstance(share, Mapping) else dict.fromkeys(kinds, share)
    removed = {}
    for part in shares.values():
        _check(1 - part, of="blocks", layout="per-layer", selection="local", kinds=(*shares, *(ranges or ())))
    together = [[kind] for kind in share] if isinstance(share, Mapping) else [list(kinds)]
    ladders: list[list[Group]] = []
    for some in together:
        ladders += _ladders(graph, "per-layer", kinds=some, ranges=ranges, protect=protect)
    for group in chain.from_iterable(ladders):
        width = min(member.index.shape[1] for member in group.members)
        positions = group.units * width
        removed[group.name] = (positions - int(positions * (1 - shares[group.kind]))) // width
        _check_size(graph, group, group.units - removed[group.name])
    return _plan(ladders, scores, removed)


def select_widths(
    graph: Graph,
    scores: Mapping[str, Tensor],
    *,
    widths: Mapping[str, int],
    protect: Collection[str] = (),
    ranges: Ranges | None = None,
    done: float = 1.0,
) -> Plan:
    """The plan that leaves so many units of every group, by kind; the lowest saliencies go.

    Of what has to go, the share `done` goes. Raises `UsageError` for a group that has fewer units,
    or that cannot do with so few.
    """
    _check(1.0, of="blocks", layout="per-layer", selection="local", kinds=(*widths, *(ranges or ())))
    removed = {}
    ladders: list[list[Group]] = []
    for kind in widths:
        ladders += _ladders(graph, "per-layer", kinds=[kind], ranges=ranges, protect=protect)
    for group in chain.from_iterable(ladders):
        width, least = widths[group.kind], graph.least(group)
        if not least <= width <= group.units:
            raise UsageError(
                f"{width} {group.kind} were asked for; {group.name} has {group.units} and needs {least}. "
                "Ask for a number between, or bound the layers of the kind with the setting blocks."
            )
        _check_size(graph, group, width)
        removed[group.name] = round((group.units - width) * done)
    return _plan(ladders, scores, removed)


def _check_size(graph: Graph, group: Group, kept: int) -> None:
    """Refuses a number of units that the group may not keep."""
    sizes = graph.sizes.get(group.name)
    if sizes is None or kept == group.units or kept in sizes:
        return
    near = sorted((*sizes, group.units), key=lambda size: abs(size - kept))[:3]
    numbers = ", ".join(map(str, sorted(near)))
    raise UsageError(
        f"{kept} {group.kind} of {group.name} were to stay, and no stock configuration says so many. "
        f"The nearest numbers that one says are {numbers}. Ask for one of them, or use layout=per-layer."
    )


def _floor(graph: Graph, ladder: list[Group], asked: int) -> int:
    """How many units of each group of a ladder stay: what was asked, if the network can do with so few."""
    return max(0 if group.kind in DEPTH else max(asked, graph.least(group)) for group in ladder)


def _stays(floor: Mapping[str, int]) -> str:
    if len(set(floor.values())) == 1:
        return f"at least {next(iter(floor.values()))} unit"
    return ", ".join(f"at least {least} {kind}" for kind, least in floor.items())


def _check(keep: float, *, of: str | Cost, layout: str, selection: str, kinds: Sequence[str]) -> None:
    share("keep", keep)
    named: list[tuple[str, str, Sequence[str]]] = [("layout", layout, LAYOUTS), ("selection", selection, SELECTIONS)]
    if isinstance(of, str):
        named.append(("of", of, OF))
    for name, value, known in [*named, *(("kind", kind, KINDS) for kind in kinds)]:
        if value not in known:
            raise UsageError(f"There is no {name} {value!r}. {nearest(value, known)}")


def _ladders(
    graph: Graph,
    layout: str,
    *,
    kinds: Sequence[str],
    ranges: Ranges | None,
    groups: Collection[str] | None = None,
    protect: Collection[str] = (),
) -> list[list[Group]]:
    ladders: list[list[Group]] = []
    for kind in kinds:
        first, last = (ranges or {}).get(kind, (0, graph.blocks.count))
        inside = [group for group in graph.of_kind(kind) if group.layer is None or first <= group.layer < last]
        offered = [group for group in inside if groups is None or group.name in groups]
        found = _open(graph, offered, protect)
        if layout == "per-layer":
            ladders += [[group] for group in found]
        else:
            ladders += _uniform(graph, kind, found, protect)
    ladders = _joined(graph, ladders)
    if not ladders:
        known = ", ".join(sorted({group.kind for group in graph.groups})) or "none"
        spared = f", and {len(protect)} groups are protected" if protect else ""
        raise UsageError(
            f"Nothing to cut: {', '.join(kinds)} were asked for, the network offers {known} in these layers{spared}."
            + _reasons(graph, kinds)
        )
    return ladders


def _reasons(graph: Graph, kinds: Sequence[str]) -> str:
    """Why the network offers nothing of some kinds, by place, as far as the graph knows; empty where it offers some."""
    if graph.of_kind(*kinds):
        return ""
    competing = [one for one in graph.frozen if one.reason.startswith(COMPETE)] if "experts" in kinds else []
    found = competing or [one for one in graph.frozen if not one.reason.startswith(PLAIN)]
    places_of = {one.reason: one.parameter for one in reversed(found)}
    first = [f"{name} ({reason})" for reason, name in reversed(places_of.items())][:MOST_REASONS]
    return f" These stay whole: {'; '.join(first)}." if first else ""


def _open(graph: Graph, groups: Sequence[Group], protect: Collection[str]) -> list[Group]:
    """The groups that are not protected; a block or a sub-layer around a protected group is."""
    inside = [group for group in map(graph.group, protect) if group.layer is not None]
    spared = {member.parameter for group in inside for member in group.members}
    around = {g.name for g in groups if g.kind in DEPTH and any(member.parameter in spared for member in g.members)}
    return [group for group in groups if group.name not in protect and group.name not in around]


def places(graph: Graph, kind: str) -> dict[str, list[Group]]:
    """The groups of a kind that get one size in a uniform layout, by their place: equally many units at the same place.

    The place is the name within the block, without the numbers of lists in it (`mlp.experts.*.channels`). Blocks that have
    nothing there do not count. Groups that lie in no block, and blocks and sub-layers themselves, stand alone.
    """
    found: dict[tuple[str, int], list[Group]] = {}
    for group in graph.of_kind(kind):
        alone = group.layer is None or kind in DEPTH
        place = group.name if alone else re.sub(r"(^|\.)\d+(?=\.)", r"\1*", graph.blocks.within(group.name))
        found.setdefault((place, group.units), []).append(group)
    several = Counter(place for place, _ in found)
    return {
        f"{place} of {units}" if several[place] > 1 else place: groups for (place, units), groups in found.items()
    }


def _uniform(graph: Graph, kind: str, found: Sequence[Group], protect: Collection[str]) -> list[list[Group]]:
    """Groups that stand at the same place of their blocks, shrinking together."""
    names = {group.name for group in found}
    rows = []
    for place, row in places(graph, kind).items():
        missing = [group for group in row if group.name not in names]
        if not missing:
            rows.append(row)
            continue
        if len(missing) == len(row):
            continue
        if spared := [group.name for group in missing if group.name in protect]:
            raise UsageError(
                f"layout=uniform gives every block the same number of {kind}, and {len(spared)} of {len(row)} groups of them are "
                f"protected ({spared[0]}{', ...' if len(spared) > 1 else ''}). Use layout=per-layer."
            )
        raise UsageError(
            f"layout=uniform gives all {len(row)} groups of {kind} at {place} one size, and {len(missing)} of them lie outside "
            "the ranges that were asked for. Use layout=per-layer, or leave the ranges out."
        )
    return rows


def _joined(graph: Graph, ladders: list[list[Group]]) -> list[list[Group]]:
    """Ladders whose groups have to stay equally wide made one; without those of which a group stays whole."""
    place = {group.name: number for number, ladder in enumerate(ladders) for group in ladder}
    home = list(range(len(ladders)))
    whole: set[int] = set()
    for names in graph.equal:
        numbers = {home[place[name]] for name in names if name in place}
        if any(name not in place for name in names):
            whole |= numbers
        elif len(numbers) > 1:
            first = min(numbers)
            whole = {first if number in numbers else number for number in whole}
            home = [first if number in numbers else number for number in home]
    joined: dict[int, list[Group]] = {}
    for number, ladder in enumerate(ladders):
        joined.setdefault(home[number], []).extend(ladder)
    return [ladder for number, ladder in joined.items() if number not in whole]


def _capped(ladders: list[list[Group]], floors: Sequence[int], even: Mapping[str, int], spread: float) -> list[int]:
    """How many units must stay where no group may lose more than `spread` times the share that its kind loses evenly."""
    lost, units = Counter[str](), Counter[str]()
    for first, *_ in ladders:
        lost[first.kind] += even.get(first.name, 0)
        units[first.kind] += first.units
    most = [
        max(even.get(first.name, 0), int(spread * lost[first.kind] / units[first.kind] * first.units)) for first, *_ in ladders
    ]
    return [max(least, first.units - cap) for (first, *_), least, cap in zip(ladders, floors, most, strict=True)]


def _order(
    graph: Graph,
    ladders: list[list[Group]],
    scores: Mapping[str, Tensor],
    *,
    prices: Sequence[_Prices],
    floors: Sequence[int],
    aligns: Sequence[int],
    spent: Sequence[int],
    local: bool,
) -> list[Step]:
    """All steps, first to go first; one block is left whatever happens."""
    steps: list[Step] = []
    for number, (ladder, price, least, width, went) in enumerate(zip(ladders, prices, floors, aligns, spent, strict=True)):
        limits = [graph.sizes[group.name] for group in ladder if group.name in graph.sizes]
        allowed = set(limits[0]).intersection(*limits[1:]) if limits else None
        sizes = _removals(ladder[0].units, width, least, price.stops, allowed)
        found = _steps(number, ladder, scores, sizes=sizes, price=price, local=local)
        before = accumulate(sizes)
        steps += [replace(step, key=-inf) if done <= went else step for step, done in zip(found, before, strict=False)]
    steps.sort(key=lambda step: (step.key, step.loss))
    whole = [step for step in steps if ladders[step.ladder][0].kind == "blocks"]
    if whole and len(whole) == graph.blocks.count:
        steps.remove(whole[-1])
    return steps


@dataclass(frozen=True)
class _Prices:
    """What the steps of a ladder save."""

    cost: Cost
    ladder: list[Group]
    dense: float
    """The cost of the whole network."""

    @cached_property
    def stops(self) -> Sequence[int] | None:
        """The numbers of units at which it is worth stopping; None: at any."""
        stops = self.cost.stops
        return None if stops is None else sorted({stop for group in self.ladder for stop in stops(group.name)})

    @cached_property
    def _unit(self) -> float:
        return self.dense - self._after(1)

    def of(self, sizes: Sequence[int]) -> Tensor:
        """The savings of steps of so many units, [steps]."""
        if self.stops is None:
            return torch.tensor(sizes, dtype=torch.float64) * self._unit
        costs = [self.dense, *map(self._after, accumulate(sizes))]
        return torch.tensor([before - after for before, after in pairwise(costs)], dtype=torch.float64)

    def keys(self, losses: Tensor, prices: Tensor) -> Tensor:
        """Loss per cost [steps], such that no step comes before those that must go first."""
        return (losses / prices).cummax(0).values if self.stops is None else _pooled(losses, prices)

    def _after(self, count: int) -> float:
        return float(self.cost({group.name: count for group in self.ladder}))


def _pooled(losses: Tensor, prices: Tensor) -> Tensor:
    """Loss per cost of every step [steps], each run of steps that leads to a bargain taken as one."""
    runs: list[tuple[float, float, int]] = []
    for loss, price in zip(losses.tolist(), prices.tolist(), strict=True):
        run = (loss, price, 1)
        while runs and runs[-1][0] * run[1] >= run[0] * runs[-1][1]:
            before = runs.pop()
            run = (before[0] + run[0], before[1] + run[1], before[2] + run[2])
        runs.append(run)
    return torch.tensor([loss / price for loss, price, steps in runs for _ in range(steps)], dtype=torch.float64)


def _removals(
    units: int, align: int, floor: int, stops: Sequence[int] | None = None, allowed: Collection[int] | None = None
) -> list[int]:
    """How many units each step removes: one at a time, or down to multiples of `align`, or from stop to stop.

    `allowed` are the numbers that may stay; None: any.
    """
    lowest = max(floor, align) if floor and align > 1 else floor
    offered = range(lowest, units) if stops is None else [kept for kept in stops if lowest <= kept < units]
    stays = [kept for kept in reversed(offered) if kept % align == 0 and (allowed is None or kept in allowed)]
    return [before - after for before, after in zip([units, *stays], stays, strict=False)]


def _steps(
    number: int, ladder: list[Group], scores: Mapping[str, Tensor], *, sizes: list[int], price: _Prices, local: bool
) -> list[Step]:
    prices = price.of(sizes)
    if not sizes or not bool((prices > 0).all()):
        return []
    ordered = torch.stack([_score(scores, group).sort().values for group in ladder]).sum(0)  # [units]
    gone = ordered[: sum(sizes)]
    losses = gone if set(sizes) == {1} else torch.stack([chunk.sum() for chunk in gone.split(sizes)])
    key = torch.tensor(sizes, dtype=torch.float64).cumsum(0) / ladder[0].units if local else price.keys(losses, prices)
    tie = losses / prices if local else key
    return [Step(k, v, number, size) for k, v, size in zip(key.tolist(), tie.tolist(), sizes, strict=True)]


def _score(scores: Mapping[str, Tensor], group: Group) -> Tensor:
    score = scores[group.name].detach().to("cpu", torch.float64)
    if not score.isfinite().all():
        raise NumericsError(f"The saliency of {group.name} is not finite. Check the weights and the calibration text.")
    return score


def _removed(steps: Sequence[Step], ladders: list[list[Group]], before: Mapping[str, int] | None = None) -> dict[str, int]:
    removed = dict(before or {})
    for step in steps:
        for group in ladders[step.ladder]:
            removed[group.name] = removed.get(group.name, 0) + step.units
    return removed


def _take(steps: list[Step], ladders: list[list[Group]], cost: Cost, target: float) -> dict[str, int] | None:
    """Units removed by the shortest run of steps that meets the target.

    Where the last step goes too far, the dearest steps that are not needed are given back, and if that does not help
    it is passed over for the smaller ones behind it.
    """
    if cost(_removed(steps, ladders)) > target:
        return None
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(_removed(steps[:middle], ladders)) <= target else (middle + 1, high)
    sizes = {(step.ladder, step.units): step for step in steps}
    dense = cost({})
    smallest = min((dense - cost(_removed([step], ladders)) for step in sizes.values()), default=0)
    taken = steps[: max(low - 1, 0)]
    removed = best = _removed(taken, ladders)
    passed: set[int] = set()
    for step in steps[len(taken) :]:
        if cost(best) <= target and target - cost(best) < smallest:
            break
        if step.ladder in passed:
            continue
        more = _removed([step], ladders, removed)
        if cost(more) > target:
            removed, taken = more, [*taken, step]
            continue
        fitted = _give_back(more, [*taken, step], ladders, cost, target)
        if cost(best) > target or cost(fitted) > cost(best):
            best = fitted
        passed.add(step.ladder)
    return best


def _give_back(
    removed: dict[str, int], taken: Sequence[Step], ladders: list[list[Group]], cost: Cost, target: float
) -> dict[str, int]:
    """Less of what was taken, dearest first, as long as the target is met."""
    needed: set[int] = set()
    for step in reversed(taken):
        if step.ladder in needed or step.key == -inf:
            continue
        fewer = removed | {group.name: removed[group.name] - step.units for group in ladders[step.ladder]}
        if cost(fewer) <= target:
            removed = fewer
        else:
            needed.add(step.ladder)
    return removed


def part_of(plan: Plan, scores: Mapping[str, Tensor], share: float) -> Plan:
    """A stop on the way to a plan: of what it removes from every group, the share that goes first by the scores, rounded."""
    groups = {}
    for name, kept in plan.groups.items():
        stays = set(kept.keep)
        order = scores[name].argsort(stable=True).tolist() if kept.removed else []
        going = [unit for unit in order if unit not in stays]
        gone = set(going[: round(share * len(going))])
        keep = tuple(unit for unit in range(kept.units) if unit not in gone)
        groups[name] = kept.model_copy(update={"keep": keep})
    return Plan(groups=groups)


def spent_first(values: Tensor, plan: Plan, group: str) -> Tensor:
    """What an earlier plan removed is worth nothing now, whatever the criterion says."""
    if group not in plan.groups:
        return values
    stays = values.new_zeros(values.shape)
    stays[list(plan.groups[group].keep)] = 1
    return values * stays


def _plan(ladders: list[list[Group]], scores: Mapping[str, Tensor], removed: Mapping[str, int]) -> Plan:
    groups = {}
    for group in (group for ladder in ladders for group in ladder):
        order = _score(scores, group).argsort(stable=True)
        keep = tuple(sorted(order[removed.get(group.name, 0) :].tolist()))
        groups[group.name] = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)
    return Plan(groups=groups)
