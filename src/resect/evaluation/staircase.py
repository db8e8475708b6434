"""What widths cost on this machine: a table of measured seconds, which goes down in stairs as units go.

Nothing is computed from operation counts. One pass of the network has every one of its like blocks cut to another width, all of
them timed on the way, so that each runs with the memory traffic of a whole network around it. First widths at equal distances
are measured, then the right edge of every tread is looked for by bisection: the widest layer that takes no longer.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from math import ceil, log2
from os.path import commonprefix
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from resect.errors import UsageError
from resect.evaluation.latency import check_positions, next_tokens, now, prompts
from resect.evaluation.mode import evaluating
from resect.explain import from_json
from resect.graph import DEPTH, Graph, Group
from resect.plan import Cost, Kept, Plan, Workload
from resect.ranges import Numbers, whole
from resect.surgery import cut
from resect.surroundings import unaffected

EVEN = 0.01
"""Times that differ by less than this share are equal."""
POINTS = 24
"""Widths at equal distances that are measured of every family."""
WHOLE_POINTS = 6
"""The same where a width is one of the whole network, and takes a pass of its own."""
DECODED = 8
"""Tokens written in one round."""
Timer = Callable[[Mapping[str, int]], Mapping[str, float]]
"""Seconds of every module that is watched, and of the whole network under "", when so many units of some groups stay."""


class Steps(Numbers):
    """Groups that are alike, and the seconds of the module around one of them by the number of units that stay."""

    kind: str
    units: int = Field(ge=1)
    homes: dict[str, str]
    """The module around every group, by the group's name."""
    seconds: dict[int, Annotated[float, Field(ge=0)]]

    @model_validator(mode="after")
    def _complete(self) -> Steps:
        if self.units not in self.seconds or min(self.seconds) < 0 or max(self.seconds) > self.units:
            raise ValueError(f"seconds are of numbers of units from 0 to {self.units}, all of them among these.")
        return self

    @cached_property
    def edges(self) -> list[int]:
        """The numbers of units at which it is worth stopping, most first: less of them would be slower, more no faster."""
        edges = [self.units]
        for width in sorted(self.seconds, reverse=True):
            if self.seconds[width] < (1 - EVEN) * self.seconds[edges[-1]]:
                edges.append(width)
        return edges

    def at(self, kept: int) -> float:
        """Seconds when so many units stay: those of the nearest edge above."""
        return self.seconds[min(edge for edge in self.edges if edge >= kept)]


class LatencyTable(Numbers):
    """What every width costs, as measured; plain JSON."""

    version: Literal[1] = 1
    where: str
    """The work: `prefill:1x512`."""
    device: str
    dtype: str
    threads: int
    seconds: float = Field(gt=0)
    """Of the whole dense network."""
    families: tuple[Steps, ...]
    machine: dict[str, Any] = {}

    @property
    def workload(self) -> Workload:
        """The work that was timed."""
        return Workload.parse(self.where)

    @cached_property
    def _steps(self) -> dict[str, Steps]:
        return {name: steps for steps in self.families for name in steps.homes}

    def cost(self, graph: Graph) -> Cost:
        """Seconds as a function of the units removed; raises `UsageError` for a network that the table is not about."""
        for name, steps in self._steps.items():
            if graph.group(name).units != steps.units:
                raise UsageError(
                    f"The latency table is of another network: it counts {steps.units} units in {name}, this network has "
                    f"{graph.group(name).units}. Measure again: resect bench MODEL --table -o DIR."
                )
        return Cost(f"latency@{self.where}", lambda removed: self._value(graph, removed), self._stops, "s")

    def _stops(self, name: str) -> Sequence[int]:
        return self._steps[name].edges if name in self._steps else ()

    def _value(self, graph: Graph, removed: Mapping[str, int]) -> float:
        """Seconds of the network when so many units of each group are removed."""
        known = {name: self._steps[name] for name, count in removed.items() if count and name in self._steps}
        whole = [steps.homes[name] for name, steps in known.items() if steps.kind in DEPTH]
        left = self.seconds
        for name, steps in known.items():
            if not any(self._goes_with(steps.homes[name], other, steps.kind) for other in whole):
                left -= steps.at(steps.units) - steps.at(steps.units - removed[name])
        return left

    @staticmethod
    def _goes_with(home: str, other: str, kind: str) -> bool:
        """Whether what is saved in a module is saved already when another goes as a whole."""
        return _around(other, home) and not (home == other and kind in DEPTH)

    def to_json(self) -> str:
        """The table as JSON."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Reads `to_json`; a malformed table is a `UsageError` that says where."""
        return from_json(cls, text, "a latency table")


@unaffected()
def latency_table(
    model: PreTrainedModel,
    graph: Graph,
    workload: Workload,
    *,
    kinds: Sequence[str] = ("heads", "channels"),
    points: int = POINTS,
    rounds: int = 4,
    machine: Mapping[str, Any] | None = None,
) -> LatencyTable:
    """Measures what every width of some kinds costs, on the model's device and in its dtype. The model is left as it was.

    Memory for a second model is needed. `points` widths at equal distances and the edges between them are measured of every
    family of like groups, each as the fastest of `rounds` runs or more: whatever else the machine does only ever adds.
    """
    points = whole("points", points)
    rounds = whole("rounds", rounds)
    check_positions("the model", model, workload.length + DECODED)
    watch = Stopwatch(model, graph, workload, _modules(graph, kinds), rounds)
    families, seconds = measure_families(graph, watch, kinds=kinds, points=points, homes=watch.homes)
    return LatencyTable(
        where=str(workload),
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        seconds=seconds,
        families=tuple(families),
        machine=dict(machine or {}),
    )


@unaffected()
def measure_families(
    graph: Graph,
    timer: Timer,
    *,
    kinds: Sequence[str],
    points: int = POINTS,
    homes: Mapping[str, str] | None = None,
) -> tuple[list[Steps], float]:
    """The steps of every family of like groups, and the seconds of the dense network, with whatever clock `timer` has.

    `homes` are the modules that are timed, by group: those around the group, unless the network does not call them.
    """
    homes = homes or _modules(graph, kinds)
    families = [_Family(groups, homes) for groups in _alike(graph, kinds, homes)]
    if not families:
        raise UsageError(f"A latency budget was asked for, and the network offers no {', '.join(kinds)}.")
    halvings = max(ceil(log2(max(1, family.units / points))) for family in families)
    with tqdm(total=2 + halvings, desc="latency table", unit="pass", leave=False, disable=None) as bar:
        dense = timer({})
        bar.update()
        for family in families:
            family.seconds[family.units] = statistics.median(dense[home] for home in family.homes.values())
        wanted = {number: family.coarse(points) for number, family in enumerate(families)}
        while any(wanted.values()):
            for chosen in _passes(families, wanted):
                found = timer({name: kept for name, (_, kept) in chosen.items()})
                for name, (number, kept) in chosen.items():
                    families[number].seconds[kept] = found[homes[name]]
                bar.update()
            wanted = {number: family.between() for number, family in enumerate(families)}
    return [family.steps() for family in families], dense[""]


@dataclass
class _Family:
    """Groups that are alike, and what has been measured of them."""

    groups: Sequence[Group]
    all_homes: Mapping[str, str]
    seconds: dict[int, float] = field(default_factory=dict)
    treads: list[_Tread] | None = None

    @property
    def units(self) -> int:
        return self.groups[0].units

    @property
    def homes(self) -> dict[str, str]:
        return {group.name: self.all_homes[group.name] for group in self.groups}

    @property
    def whole(self) -> bool:
        """Whether a width is one of the whole network."""
        return "" in self.homes.values()

    def coarse(self, points: int) -> list[int]:
        """Widths at equal distances, and the smallest."""
        if self.groups[0].kind in DEPTH:
            return []
        points = min(points, WHOLE_POINTS) if self.whole else points
        least = max(1, self.groups[0].least)
        widths = {max(least, round(self.units * place / points)) for place in range(1, points)}
        return sorted({least, *widths} - {self.units}, reverse=True)

    def between(self) -> list[int]:
        """The widths to be measured next, to find where treads end."""
        if self.treads is None:
            known = [] if self.whole else sorted(self.seconds)
            pairs = [(left, right) for left, right in pairwise(known) if self._slower(right, left)]
            self.treads = [_Tread(left, left, right) for left, right in pairs]
        for tread in self.treads:
            while tread.middle in self.seconds and tread.high - tread.low > 1:
                tread.narrow(slower=self._slower(tread.middle, tread.start))
        return sorted({tread.middle for tread in self.treads if tread.high - tread.low > 1}, reverse=True)

    def _slower(self, width: int, other: int) -> bool:
        return self.seconds[width] > (1 + EVEN) * self.seconds[other]

    def steps(self) -> Steps:
        """What was measured. Of modules that go whole, nothing stays."""
        first = self.groups[0]
        seconds = {**({0: 0.0} if first.kind in DEPTH else {}), **dict(sorted(self.seconds.items()))}
        return Steps(kind=first.kind, units=first.units, homes=self.homes, seconds=seconds)


@dataclass
class _Tread:
    """Widths that take as long as `start`, the narrowest; the widest of them is `low` or above, and below `high`."""

    start: int
    low: int
    high: int

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2

    def narrow(self, *, slower: bool) -> None:
        """What is known once the middle was measured."""
        self.low, self.high = (self.low, self.middle) if slower else (self.middle, self.high)


def _passes(families: Sequence[_Family], wanted: Mapping[int, list[int]]) -> Iterator[dict[str, tuple[int, int]]]:
    """Which group is cut to which width in every pass: `{group: (family, width)}`, no module twice."""
    left = {number: list(widths) for number, widths in wanted.items()}
    while any(left.values()):
        chosen: dict[str, tuple[int, int]] = {}
        taken: list[str] = []
        for number, family in enumerate(families):
            for name, home in family.homes.items():
                if left[number] and not any(_around(home, other) or _around(other, home) for other in taken):
                    chosen[name] = (number, left[number].pop(0))
                    taken.append(home)
        yield chosen


def _around(outer: str, inner: str) -> bool:
    """Whether a module lies around another, or is it."""
    return not outer or f"{inner}.".startswith(f"{outer}.")


def _modules(graph: Graph, kinds: Sequence[str]) -> dict[str, str]:
    """The module around all slices of a group, by the group's name; "" is the whole network."""
    return {group.name: _module(graph, group) for group in graph.of_kind(*kinds)}


def _module(graph: Graph, group: Group) -> str:
    if group.kind == "blocks":
        return group.name
    if group.kind == "sublayers":
        return graph.sublayers[group.name].silences[0].path
    return ".".join(commonprefix([member.parameter.split(".")[:-1] for member in graph.weights(group)]))


def _alike(graph: Graph, kinds: Sequence[str], homes: Mapping[str, str]) -> list[list[Group]]:
    """Families of groups with the same kind, units and slices of parameters of the same shapes, at the same place of a block."""
    families: dict[Any, list[Group]] = {}
    for group in graph.of_kind(*kinds):
        within = graph.blocks.within
        slices = ((within(one.parameter), one.axis, graph.shapes[one.parameter]) for one in group.members)
        key = (group.kind, group.units, within(homes[group.name]), tuple(sorted(slices)))
        families.setdefault(key, []).append(group)
    return list(families.values())


class Stopwatch:
    """The clock of a real network: cuts a copy, runs it, and times modules on the way."""

    def __init__(
        self, model: PreTrainedModel, graph: Graph, workload: Workload, modules: Mapping[str, str], rounds: int
    ) -> None:
        self.model, self.graph, self.workload, self.rounds = model, graph, workload, rounds
        self.rest = 0.0
        ran = self._called(sorted({place for path in modules.values() for place in _upwards(path)}))
        self.homes = {name: next(place for place in _upwards(path) if place in ran) for name, path in modules.items()}

    def __call__(self, kept: Mapping[str, int]) -> dict[str, float]:
        """The fastest of several rounds, of every module by itself and of what is left of the network.

        There are more rounds, up to twice as many, as long as the two fastest do not agree. What is cut in no pass shows how fast
        the machine is at the time; all passes are given in the seconds of the first.
        """
        groups = [self.graph.group(name) for name in kept]
        plan = Plan(
            groups={
                group.name: Kept(kind=group.kind, layer=group.layer, units=group.units, keep=tuple(range(kept[group.name])))
                for group in groups
            }
        )
        network = cut(copy.deepcopy(self.model), plan, self.graph) if kept else self.model
        assert isinstance(network, PreTrainedModel)
        paths = sorted({path for path in self.homes.values() if path})
        outermost = [path for path in paths if not any(_around(other, path) and other != path for other in paths)]
        found: list[dict[str, float]] = []
        with evaluating(network):
            for seconds in islice(self._rounds(network, paths), 1, 2 + 2 * self.rounds):  # the first warms up
                found.append({**seconds, "": seconds[""] - sum(seconds[path] for path in outermost)})
                if len(found) >= max(2, self.rounds) and _settled(found):
                    break
        fastest = {path: min(one[path] for one in found) for path in ["", *paths]}
        scale = self._scale(fastest[""]) if all(self.homes[name] for name in kept) else 1.0
        seconds = {path: scale * value for path, value in fastest.items()}
        return {**seconds, "": seconds[""] + sum(seconds[path] for path in outermost)}

    def _scale(self, rest: float) -> float:
        """By how much the machine is faster in this pass than it was in the first, by what is the same in both."""
        self.rest = self.rest or rest
        return self.rest / rest

    def _rounds(self, network: PreTrainedModel, paths: Sequence[str]) -> Iterator[dict[str, float]]:
        """Seconds of a prompt, or of a token after it, and of every module in that, again and again."""
        tokens = prompts(network, self.workload.batch, self.workload.length)
        if self.workload.phase == "prefill":
            while True:
                with _laps(network, paths) as laps:
                    network(input_ids=tokens, use_cache=True)
                yield laps.seconds(1)
        read = network(input_ids=tokens, use_cache=True)
        while True:
            token, cache = next_tokens(read.logits), copy.deepcopy(read.past_key_values)
            with _laps(network, paths) as laps:
                for _ in range(DECODED):
                    output = network(input_ids=token, past_key_values=cache, use_cache=True)
                    token = next_tokens(output.logits)
            yield laps.seconds(DECODED)

    def _called(self, paths: Sequence[str]) -> set[str]:
        """The modules that the network calls, of some."""
        with evaluating(self.model), _laps(self.model, paths) as laps:
            self.model(input_ids=prompts(self.model, 1, 1), use_cache=False)
        return {"", *laps.begun}


def _settled(found: Sequence[Mapping[str, float]]) -> bool:
    """Whether the two fastest rounds agree, for nearly all modules."""
    pairs = [sorted(one[path] for one in found)[:2] for path in found[0]]
    return sum(second <= (1 + 2 * EVEN) * first for first, second in pairs) >= 0.9 * len(pairs)


def _upwards(path: str) -> Iterator[str]:
    """A module and those around it, the whole network last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


@dataclass
class _Laps:
    """When modules began and ended.

    On an accelerator these are events, so that nothing waits. On the CPU they are the seconds that the main thread computed,
    so that what other programs take of the machine is not counted; the worker threads are spun for meanwhile.
    """

    device: torch.device
    begun: dict[str, list[Any]] = field(default_factory=dict)
    ended: dict[str, list[Any]] = field(default_factory=dict)
    whole: float = 0.0

    def mark(self) -> Any:
        """Now."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def clock(self) -> float:
        """Seconds, once the device has done what it was told."""
        return time.thread_time() if self.device.type == "cpu" else now(self.device)

    def seconds(self, runs: int) -> dict[str, float]:
        """Seconds of every module, and of all under "", in one of so many runs."""
        totals = {
            path: sum(_between(start, end) for start, end in zip(self.begun[path], self.ended[path], strict=True)) / runs
            for path in self.begun
        }
        return {**totals, "": self.whole / runs}


def _between(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end)) / 1e3 if isinstance(start, torch.cuda.Event) else float(end - start)


@contextmanager
def _laps(network: PreTrainedModel, paths: Sequence[str]) -> Iterator[_Laps]:
    """Times modules while the context lasts."""
    laps = _Laps(network.device)

    def hooked(path: str, module: nn.Module) -> list[Any]:
        begin = module.register_forward_pre_hook(lambda *_: laps.begun.setdefault(path, []).append(laps.mark()))
        return [begin, module.register_forward_hook(lambda *_: laps.ended.setdefault(path, []).append(laps.mark()))]

    handles = [handle for path in paths if path for handle in hooked(path, network.get_submodule(path))]
    start = laps.clock()
    try:
        yield laps
    finally:
        laps.whole = laps.clock() - start
        for handle in handles:
            handle.remove()
