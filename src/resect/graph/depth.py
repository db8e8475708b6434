"""Depth: which modules of a block can be silenced, so that what runs on is the stream of hidden states alone.

A sub-layer is a module inside a block whose result is added to the stream: an attention, an MLP, a mixture of experts.
Without it the network is one in which that result is zero. What was computed for it alone (the norm before it, the
attention behind an output projection) is idle then and goes with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod

from resect.graph.atoms import Axis, leaves, length
from resect.graph.blocks import Blocks

ADDITIONS = frozenset(("aten.add", "aten.add_", "aten.addcmul"))


@dataclass(frozen=True)
class Step:
    """One operator in the flow of data; every value it takes or gives has a number."""

    name: str
    taken: tuple[int, ...]
    given: tuple[int, ...]
    axes: tuple[Axis, ...]
    """Of the first value that it gives."""
    contracts: bool


@dataclass(frozen=True)
class Visit:
    """One call of a module: the values that went in and came out, and the steps `start:stop` between."""

    path: str
    taken: tuple[int, ...]
    given: tuple[int, ...]
    start: int
    stop: int
    entering: tuple[Axis, ...]
    """The axes of the first tensor that went in."""
    leaving: tuple[Axis, ...]
    returns: int
    """Items of the tuple that came out; 0 for a tensor by itself, -1 for anything else."""

    @property
    def streams(self) -> bool:
        """Whether what leaves lies on the same axes as what entered."""
        return bool(self.entering) and list(map(leaves, self.entering)) == list(map(leaves, self.leaving))


@dataclass(frozen=True)
class Silence:
    """A module that a removed sub-layer leaves idle, and what its stand-in has to put out: zeros, `width` along `axis`.

    Along all others they are as long as what goes in.
    """

    path: str
    axis: int
    """Counted from the end."""
    width: Axis
    returns: int


@dataclass(frozen=True)
class Sublayer:
    """Modules of a block that are idle without one of them: the first is silenced, the others only served it."""

    name: str
    layer: int
    silences: tuple[Silence, ...]


@dataclass
class Flow:
    """Who put out what and who took it, over one run."""

    steps: list[Step] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    """Calls of modules in the order they ended."""
    results: set[int] = field(default_factory=set)
    """What the network puts out."""

    @cached_property
    def last_use(self) -> Mapping[int, int]:
        """The last step that takes each value."""
        return {value: number for number, step in enumerate(self.steps) for value in step.taken}

    def live(self, visit: Visit, silenced: int) -> tuple[set[int], list[bool]]:
        """Values of a call that matter to the network when one of them is zero, and which of its steps do."""
        steps = self.steps[visit.start : visit.stop]
        made = {value for step in steps for value in step.given}
        live = {value for value in made if value in self.results or self.last_use.get(value, -1) >= visit.stop}
        live = (live | set(visit.given)) - {silenced}
        matters = [False] * len(steps)
        for number in range(len(steps) - 1, -1, -1):
            if live.intersection(steps[number].given):
                matters[number] = True
                live.update(value for value in steps[number].taken if value != silenced)
        return live, matters


def chained(flow: Flow, blocks: Blocks) -> set[str]:
    """The blocks that can be left out: those that run once and hand on their stream to the next, with nothing between.

    Where something outside reads what a block hands on to the next, the number of blocks matters, and none is left out. Of a
    list with one block nothing tells whether it hands on its stream or is one of several branches, so it stays.
    """
    times = Counter(visit.path for visit in flow.visits)
    visits = {visit.path: visit for visit in flow.visits}
    single = [paths[0] for paths in blocks.modules if len(paths) == 1 and times[paths[0]] == 1]
    read = _read_outside(flow, [visits[path] for path in single])
    pairs = [(path, other) for path, other in pairwise(single) if _list_of(path) == _list_of(other)]
    broken = {
        _list_of(path)
        for path, other in pairs
        if not _follows(visits[other], visits[path]) or read.intersection(visits[path].given[:1])
    }
    linked = {path for pair in pairs for path in pair if _list_of(path) not in broken}
    return {path for path in linked if visits[path].streams and visits[path].returns >= 0}


def _list_of(path: str) -> str:
    """The list that holds a block."""
    return path.rpartition(".")[0]


def _follows(visit: Visit, before: Visit) -> bool:
    """Whether a block begins where another ends, and takes in its stream and nothing else of it."""
    alone = not set(visit.taken[1:]) & set(before.given[1:])
    return visit.start == before.stop and visit.taken[:1] == before.given[:1] and alone


def _read_outside(flow: Flow, blocks: Sequence[Visit]) -> set[int]:
    """Values that are taken outside of the blocks, or put out by the network."""
    inside = {number for block in blocks for number in range(block.start, block.stop)}
    taken = (value for number, step in enumerate(flow.steps) if number not in inside for value in step.taken)
    return {*flow.results, *taken}


def find_sublayers(flow: Flow, blocks: Blocks, parameters: Mapping[str, Sequence[Axis]]) -> list[Sublayer]:
    """The sub-layers of every block. `parameters` gives the axes of every parameter, by name."""
    inside: dict[int, list[Visit]] = {}
    for visit in flow.visits:
        if (layer := blocks.layer_of(visit.path)) is not None:
            inside.setdefault(layer, []).append(visit)
    return [
        sublayer
        for layer, (path, *beside) in enumerate(blocks.modules)
        if not beside and layer in inside
        for sublayer in _within_block(flow, path, layer, inside[layer], parameters)
    ]


def _within_block(
    flow: Flow, path: str, layer: int, visits: Sequence[Visit], parameters: Mapping[str, Sequence[Axis]]
) -> list[Sublayer]:
    times = Counter(visit.path for visit in visits)
    if times[path] != 1:
        return []
    block = next(visit for visit in visits if visit.path == path)
    if not block.streams:
        return []
    steps = flow.steps[block.start : block.stop]
    stream = _stream(block, steps)
    # Calls that end later come first, those around others before those within.
    calls = {visit.path: visit for visit in reversed(visits) if visit is not block and times[visit.path] == 1}
    own = {name: parameters[name] for name in parameters if name.startswith(f"{path}.")}
    features = {visit.path: axis for visit in calls.values() if (axis := _feature_axis(visit, own)) is not None}
    able = [visit for visit in calls.values() if visit.path in features]
    found: list[Sublayer] = []
    idle: list[str] = []
    for visit in able:
        value = visit.given[0] if visit.given else -1
        if _is_under(visit.path, idle) or value in stream or not _joins(value, block, steps, stream):
            continue
        live, matters = flow.live(block, value)
        if live.intersection(visit.given[1:]):
            continue
        silent = [visit.path]
        for other in able:
            doing = matters[other.start - block.start : other.stop - block.start]
            idle_now = bool(doing) and not any(doing)  # one that took in nothing, an expert without tokens, tells nothing
            if idle_now and not _is_under(other.path, [*silent, *idle]):
                silent.append(other.path)
        idle += silent
        silences = tuple(
            Silence(name, features[name], calls[name].leaving[features[name]], calls[name].returns) for name in silent
        )
        found.append(Sublayer(max(silent, key=lambda name: _size(name, own)), layer, silences))
    return found[::-1]


def _stream(block: Visit, steps: Sequence[Step]) -> set[int]:
    """Values that are what entered the block, with something added and normalised."""
    stream = {block.taken[0]}
    for step in steps:
        if stream.intersection(step.taken) and _on_stream(step, block):
            stream.update(step.given)
    return stream


def _joins(value: int, block: Visit, steps: Sequence[Step], stream: Collection[int]) -> bool:
    """Whether a value, scaled and normalised at most, is added to the stream."""
    own = {value}
    for step in steps:
        if own.intersection(step.taken) and _on_stream(step, block):
            if step.name in ADDITIONS and any(other in stream and other not in own for other in step.taken):
                return True
            own.update(step.given)
    return False


def _on_stream(step: Step, block: Visit) -> bool:
    return not step.contracts and bool(step.axes) and leaves(step.axes[-1]) == leaves(block.entering[-1])


def _feature_axis(visit: Visit, parameters: Mapping[str, Sequence[Axis]]) -> int | None:
    """The axis, counted from the end, along which zeros that stand for what a module puts out have a width of their own.

    It lies on an axis of the module's parameters, and the others are as long as what goes in. None where it is not clear: an
    axis of one position behind the batch may have come out with that length by chance.
    """
    if visit.returns < 0 or not visit.given or len(visit.entering) != len(visit.leaving) or not visit.leaving:
        return None
    inside = [axes for name, axes in parameters.items() if name.startswith(f"{visit.path}.")]
    learned = {atom for axes in inside for axis in axes for atom in leaves(axis)}
    pairs = list(zip(visit.entering, visit.leaving, strict=True))
    found = [number for number, (_, axis) in enumerate(pairs) if learned.intersection(leaves(axis))]
    changed = [number for number in found if leaves(pairs[number][0]) != leaves(pairs[number][1])]
    if len(changed) > 1 or not found:
        return None
    own = changed[0] if changed else found[-1]
    others = [(number, a, b) for number, (a, b) in enumerate(pairs) if number != own]
    kept = all(length(a) == length(b) and (length(a) > 1 or number == 0) for number, a, b in others)
    return own - len(pairs) if kept else None


def _size(path: str, parameters: Mapping[str, Sequence[Axis]]) -> int:
    """Parameters of a module."""
    return sum(prod(map(length, axes)) for name, axes in parameters.items() if name.startswith(f"{path}."))


def _is_under(path: str, parents: Sequence[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)
