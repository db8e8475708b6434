"""From traced axes to coupled groups: which leaves can be offered, and what every parameter costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from resect.graph.atoms import Atom, Axis, Contest, Form, below, coordinates, form, kept_length, leaves, length, root
from resect.graph.blocks import Blocks, find_blocks
from resect.graph.depth import Flow, Sublayer, chained, find_sublayers
from resect.graph.groups import Factor, Frame, Frozen, Graph, Group, Loop, Member, Operation, Rivals, Term, Witness
from resect.graph.vocabulary import VOCABULARY, named_tokens

FUSED = (nn.TransformerEncoderLayer,)
"""Blocks that may hand the weights of all their modules to one kernel, so that none of them can be replaced."""


@dataclass
class _Leaf:
    """What is known of one leaf atom over all parameters."""

    atom: Atom
    members: list[Member] = field(default_factory=list)
    reason: str = ""
    around: dict[Atom, None] = field(default_factory=dict)  # leaves that it lies inside of, in any parameter
    settled: bool = False


@dataclass(frozen=True)
class Run:
    """What one traced run leaves behind."""

    parameters: Mapping[str, Sequence[Axis]]  # tied ones once, in the order that data reaches them
    buffers: Mapping[str, Sequence[Axis]]  # those that belong to the checkpoint
    operations: Sequence[Operation]
    loops: Mapping[int, Loop]
    contractions: Sequence[tuple[str, tuple[Axis, ...]]]  # by module
    contests: Mapping[Contest, Axis]  # what competes
    statistics: Mapping[str, Sequence[Axis]]  # what the normalisations of each module run over
    flow: Flow
    tokens: Mapping[str, Atom]  # the axes of the example text
    frames: Mapping[str, Sequence[Frame]]  # what each module takes in and puts out, call by call
    example: tuple[tuple[Any, ...], dict[str, Any]]
    fake: bool  # whether fake tensors were enough
    spared: frozenset[tuple[str, int]] = frozenset()  # parameters and axes that are put over their own length
    lifted: Mapping[tuple[str, int], tuple[Any, ...]] = field(default_factory=dict)  # what tensors were made of
    stateful: frozenset[str] = frozenset()  # modules that keep something from one run to the next
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the example as the caller gave it


def couple(model: nn.Module, run: Run) -> Graph:
    """The graph of a traced network."""
    parameters = run.parameters
    blocks = find_blocks(model, {visit.path: visit.streams for visit in run.flow.visits})
    found, frozen = _leaves(model, {**parameters, **run.buffers}, run)
    found = {atom: leaf for atom, leaf in found.items() if any(member.parameter in parameters for member in leaf.members)}
    offered = {leaf.atom: group for leaf, group in _name(found.values(), blocks, model, run.contests)}
    frozen += [
        Frozen(member.parameter, member.axis, leaf.atom.size, leaf.reason)
        for leaf in found.values()
        if leaf.reason
        for member in leaf.members
    ]
    taken = {group.name for group in offered.values()}
    sublayers = [
        replace(one, name=f"{one.name}.whole") if one.name in taken else one
        for one in find_sublayers(run.flow, blocks, parameters)
        if not any(_keeps_state(silence.path, run.stateful) for silence in one.silences)
    ]
    depth = _depth(model, blocks, run, sublayers)
    owners = _owners(depth, sublayers)

    def term(axes: Sequence[Axis], where: str, tokens: Mapping[str, Atom]) -> Term:
        atoms = [atom for axis in axes for atom in leaves(axis)]
        powers = {name: sum(atom is root(given) for atom in atoms) for name, given in tokens.items()}
        own = [atom for atom in atoms if all(atom is not root(given) for given in tokens.values())]
        factors = tuple(_factor((atom,), offered) for atom in own)
        owning = tuple(owners[path] for path in _around(where) if path in owners)
        return Term(factors, owning, blocks.layer_of(where), powers.get("batch", 0), powers.get("tokens", 0))

    named = {atom: group.name for atom, group in offered.items()}
    normalising = {path for group in offered.values() for path in group.mixed}
    frames = {path: tuple(calls) for path, calls in run.frames.items() if path in normalising}
    return Graph(
        groups=(*sorted(offered.values(), key=_order), *depth),
        frozen=tuple(frozen),
        shapes={name: tuple(map(length, axes)) for name, axes in (*parameters.items(), *run.buffers.items())},
        blocks=blocks,
        parameters={name: term(axes, name, {}) for name, axes in parameters.items()},
        contractions=tuple(term(axes, where, run.tokens) for where, axes in run.contractions),
        sublayers={sublayer.name: sublayer for sublayer in sublayers},
        witness=Witness(tuple(run.operations), run.example, named, run.fake, run.loops, frames, run.lifted, run.given),
        spared=run.spared,
        tables=tuple(name for name, axes in parameters.items() if axes and _looked_up(axes[0])),
    )


def _looked_up(axis: Axis) -> bool:
    return any(VOCABULARY in leaf.marks for leaf in _under(axis))


def _order(group: Group) -> tuple[int, str]:
    return (-1 if group.layer is None else group.layer, group.name)


def _factor(axis: Axis, offered: Mapping[Atom, Group]) -> Factor:
    """Every offered group is linear in an axis: one unit fewer takes its width away."""
    size = length(axis)
    widths = {}
    for atom, group in ((atom, offered[atom]) for atom in _under(axis) if atom in offered):
        widths[group.name] = size - kept_length(axis, {atom: atom.size - 1})
    return Factor(size, widths)


def _under(axis: Sequence[Atom]) -> list[Atom]:
    return list(dict.fromkeys(below(axis)))


def _leaves(model: nn.Module, parameters: Mapping[str, Sequence[Axis]], run: Run) -> tuple[dict[Atom, _Leaf], list[Frozen]]:
    found: dict[Atom, _Leaf] = {}
    frozen: list[Frozen] = []
    layouts = _Layouts()
    for name, axes in parameters.items():
        for place, axis in enumerate(axes):
            under = _under(axis)
            frozen += [Frozen(name, place, leaf.size, leaf.reason) for leaf in under if leaf.reason]
            if all(leaf.reason for leaf in under):
                continue
            layout = layouts.of(axis)
            for number, atom in enumerate(layout.leaves):
                if not atom.reason:
                    own = "" if atom in found else _unfit(model, atom, run)
                    leaf = found.setdefault(atom, _Leaf(atom))
                    leaf.members.append(Member(name, place, layout.indices[number]))
                    leaf.around.update((layout.leaves[other], None) for other in layout.outer[number])
                    leaf.reason = leaf.reason or own
    for leaf in found.values():
        _settle(leaf, found)
    return found, frozen


@dataclass(frozen=True)
class _Layout:
    """Where the leaves of an axis lie."""

    leaves: list[Atom]
    indices: list[Tensor]  # of every leaf, the positions of every unit: [units, width]
    outer: list[list[int]]  # of every leaf, those before it that it shares positions with


class _Layouts:
    """The layouts of axes; those of one form share their tensors, since a deep network has few forms."""

    def __init__(self) -> None:
        self._known: dict[Form, _Layout] = {}

    def of(self, axis: Axis) -> _Layout:
        """The layout of one axis."""
        numbers: dict[Atom, int] = {}
        key = form(axis, numbers)
        if key in self._known:
            known = self._known[key]
            return _Layout(list(numbers), known.indices, known.outer)
        found = coordinates(axis)
        layout = _Layout(list(found), [_index(where, atom.size) for atom, where in found.items()], _outer([*found.values()]))
        if list(found) == list(numbers) and not _repeats(axis):
            self._known[key] = layout
        return layout


def _repeats(axis: Sequence[Atom]) -> bool:
    """Whether a leaf occurs more than once, which may freeze it: that is no matter of the form alone."""
    found = list(below(axis))
    return len(found) > len(set(found))


def _index(coordinate: Tensor, units: int) -> Tensor:
    """The positions of every unit: [units, width]."""
    order = torch.argsort(coordinate, stable=True)
    return order[(coordinate < 0).sum() :].view(units, -1)


def _unfit(model: nn.Module, atom: Atom, run: Run) -> str:
    """Why a coordinate is not offered, wherever it stands."""
    return _unused(atom) or _homeless(model, atom, run.statistics) or _unruly(atom, run.contests)


def _unused(atom: Atom) -> str:
    """Positions that the run only passed by, such as those of a table that a longer text would look up."""
    return "" if "used" in atom.marks else "not used in the traced run"


def _outer(places: Sequence[Tensor]) -> list[list[int]]:
    here = [where >= 0 for where in places]
    return [[other for other in range(number) if (here[other] & here[number]).any()] for number in range(len(here))]


def _settle(leaf: _Leaf, found: Mapping[Atom, _Leaf]) -> None:
    """Gives a coordinate inside another removable one, or inside attention heads, a reason why it is not offered.

    Of two that lie inside each other, in different parameters, the one that is met first is offered.
    """
    if leaf.settled:
        return
    leaf.settled = True
    if "inside a head" in leaf.atom.marks or any("attention" in other.marks for other in leaf.around):
        leaf.reason = leaf.reason or "a part of every head"
        return
    for other in leaf.around:
        if other in found and not other.reason and not _is_expert(other):
            _settle(found[other], found)
            nested = not found[other].reason
            leaf.reason = leaf.reason or ("a part of every unit of another group" if nested else "")


def _is_expert(atom: Atom) -> bool:
    """Whether units compete and the winners are looked up by number; the channels of all experts are units themselves."""
    return "chosen" in atom.marks and bool(atom.contests)


def _homeless(model: nn.Module, atom: Atom, statistics: Mapping[str, Sequence[Axis]]) -> str:
    """A statistic can be narrowed only where it is a module of its own, which takes it over one axis."""
    for name in atom.mixed:
        if name == "the model" or any(True for _ in model.get_submodule(name).children()):
            return f"a statistic over it is taken inside {name}, which is not a normalisation module"
        over = [axis for axis in statistics[name] if atom in _under(axis)]
        if any(leaves(axis) != leaves(over[0]) for axis in over):
            return f"statistics over different axes are taken inside {name}"
    return ""


def _unruly(atom: Atom, contests: Mapping[Contest, Axis]) -> str:
    """Positions that compete can be cut where the winners are looked up by number: then the losers are never asked."""
    for contest in atom.contests:
        if "chosen" not in atom.marks or VOCABULARY in atom.marks or _competing(atom, contests[contest]) is None:
            return f"positions see each other at {contest.operator} in {contest.module or 'the model'}"
    if VOCABULARY in atom.marks and atom.mixed:
        return f"rows of the vocabulary, over which {next(iter(atom.mixed))} takes a statistic"
    if VOCABULARY in atom.marks and "summed" in atom.marks:
        return "rows of the vocabulary, over which a product sums"
    return ""


def _competing(atom: Atom, axis: Axis) -> Tensor | None:
    """The positions of the units along an axis over which they compete, one for each: [units, 1]; None if there are others."""
    coordinate = coordinates(axis).get(atom)
    index = None if coordinate is None else _index(coordinate, atom.size)
    return index if index is not None and index.shape[1] == 1 else None


def _name(
    found: Iterable[_Leaf], blocks: Blocks, model: nn.Module, contests: Mapping[Contest, Axis]
) -> list[tuple[_Leaf, Group]]:
    """The groups that are offered, with unique names that say where they are."""
    named: list[tuple[_Leaf, Group]] = []
    taken: Counter[str] = Counter()
    for leaf in found:
        if leaf.reason:
            continue
        layers = {blocks.layer_of(member.parameter) for member in leaf.members}
        layer = layers.pop() if len(layers) == 1 else None
        kind = _kind(leaf.atom, layer, blocks)
        if kind in ("residual", VOCABULARY):
            stem = kind
        else:
            places = [member.parameter.split(".")[:-2] for member in leaf.members]
            stem = ".".join([*commonprefix(places), kind])
        taken[stem] += 1
        name = stem if taken[stem] == 1 else f"{stem}.{taken[stem]}"
        competing = [(contest, _competing(leaf.atom, contests[contest])) for contest in leaf.atom.contests]
        rivals = tuple(Rivals(contest, index) for contest, index in competing if index is not None)
        least = leaf.atom.least
        tokens = named_tokens(model) if kind == VOCABULARY else {}
        within = {token: field for token, field in tokens.items() if 0 <= token < leaf.atom.size}
        group = Group(name, kind, layer, leaf.atom.size, tuple(leaf.members), tuple(leaf.atom.mixed), rivals, least, within)
        named.append((leaf, group))
    return named


def _kind(atom: Atom, layer: int | None, blocks: Blocks) -> str:
    if VOCABULARY in atom.marks:
        return VOCABULARY
    if _is_expert(atom):
        return "experts"
    if "attention" in atom.marks and (layer is not None or not blocks.count):
        return "heads"
    return "channels" if layer is not None or not blocks.count else "residual"


def _keeps_state(path: str, stateful: Collection[str]) -> bool:
    """Whether a module, or one inside it, keeps something that others may read: how far the text has come, a cache."""
    return any(name == path or name.startswith(f"{path}.") for name in stateful)


def _depth(model: nn.Module, blocks: Blocks, run: Run, sublayers: Sequence[Sublayer]) -> list[Group]:
    """Groups of one unit: every block that hands on its stream and every sub-layer, if nothing else uses its parameters."""
    parameters = run.parameters
    shared = Counter(id(tensor) for paths in blocks.modules for path in paths for tensor in _tensors(model, [path]))
    chain = {path for path in chained(run.flow, blocks) if not _keeps_state(path, run.stateful)}
    found = [("blocks", paths[0], [paths[0]], layer) for layer, paths in enumerate(blocks.modules) if paths[0] in chain]
    found += [
        ("sublayers", one.name, [silence.path for silence in one.silences], one.layer)
        for one in sublayers
        if not isinstance(model.get_submodule(blocks.modules[one.layer][0]), FUSED)
    ]
    own: dict[int | None, list[str]] = {}
    for parameter in parameters:
        own.setdefault(blocks.layer_of(parameter), []).append(parameter)
    groups = []
    for kind, name, paths, layer in found:
        if all(shared[id(tensor)] == 1 for tensor in _tensors(model, paths)):
            inside = tuple(f"{path}." for path in paths)
            names = (parameter for parameter in own.get(layer, ()) if parameter.startswith(inside) and parameters[parameter])
            members = tuple(Member(one, 0, torch.arange(length(parameters[one][0]))[None]) for one in names)
            groups.append(Group(name, kind, layer, 1, members, least=0))
    return groups


def _tensors(model: nn.Module, paths: Iterable[str]) -> set[nn.Parameter]:
    return {tensor for path in paths for tensor in model.get_submodule(path).parameters()}


def _owners(depth: Iterable[Group], sublayers: Iterable[Sublayer]) -> dict[str, str]:
    """The group that a module disappears with."""
    silences = {sublayer.name: sublayer.silences for sublayer in sublayers}
    owners = {}
    for group in depth:
        paths = [group.name] if group.kind == "blocks" else [silence.path for silence in silences[group.name]]
        owners.update(dict.fromkeys(paths, group.name))
    return owners


def _around(where: str) -> Iterator[str]:
    """The paths of a name and of everything around it."""
    while where:
        yield where
        where = where.rpartition(".")[0]
