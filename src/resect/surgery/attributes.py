"""Shape attributes: the numbers in a network's own code that have to follow a cut.

A module may keep the number of its heads, or the place where it splits a fused projection, as an integer attribute or read
it from a configuration. Nothing is guessed from names: the cut network is run on fake tensors next to the trace of the
dense one. At the first operator whose result does not have the shape that the coupling demands, the attributes of the
module it ran in, and then of those around it, are tried, one, two or three at once; what gets further is followed, the
furthest first. What worked for one module is used for its likes in the other blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from itertools import combinations, islice, product
from math import inf
from types import SimpleNamespace
from typing import Any

from torch import nn

from resect.errors import ModelError
from resect.graph import Blocks, Graph, Group, Replay, kept_length, length
from resect.plan import Plan
from resect.surgery.modeling_resect import INSIDE, followers, set_attributes
from resect.surgery.positions import changed, kept_positions

Attributes = dict[str, dict[str, Any]]
Census = dict[type[nn.Module], list[tuple[str, int | None, nn.Module, dict[str, int]]]]
AT_ONCE = 3
"""How many attributes of one module may have to change together."""
DEEPEST, MOST_HELD = 3, 256
"""How deep numbers are looked for inside what a module holds, and among how many things in one place."""
TABLES = ("_parameters", "_buffers", "_modules", "generation_config")
"""What a module holds under its own names that is looked into elsewhere, or not at all."""
GROUPS = ("groups", "num_groups")
"""Attributes that say into how many groups of channels the leading axis of a weight falls."""
MOST_NAMED = 4
"""Groups that an error names."""
OPERATORS = 150_000
"""Operators replayed in all after which the search gives up: a long network gets fewer trials."""
STUCK = 400
"""Replays in a row that get no further, after which it gives up, too."""
TORN = 40
"""The same, once an operator demands another size of a number than one before it did; then more than two are not tried."""


@dataclass(frozen=True)
class Role:
    """An attribute that is `offset + units * multiple` of the group at one place, in every module of a class.

    The place is an axis of a parameter inside the module or, where the group has none there, the group's name in its block.
    """

    module_type: type[nn.Module]
    attribute: str
    group: str | tuple[str, int]
    multiple: int
    offset: int = 0


def shape_attributes(model: nn.Module, graph: Graph, plan: Plan, shapes: Mapping[str, list[int]]) -> Attributes:
    """The attributes of each module that have to change with the plan: `{module: {attribute: value}}`.

    `config.x` stands for field `x` of the configuration that the module reads. Raises `ModelError` when the network's code
    cannot take the new sizes. The model is left as it was.
    """
    lost = list(changed(graph, plan))
    groups = [(group, len(keep)) for group, keep in lost]
    found = _layer_sizes(model, shapes)
    padded = _padding_rows(model, graph, plan)
    for path, values in padded.items():
        found.setdefault(path, {}).update(values)
    counted = (_expert_counts(model, groups), group_counts(model, graph, plan), _normalised_shapes(model, graph, groups))
    for path, values in (item for attributes in counted for item in attributes.items()):
        found.setdefault(path, {}).update(values)
    removed = {group.name: group.units - count for group, count in groups}
    search = Search(model, graph.blocks, Replay(model, graph, removed, shapes), groups, _census(model, graph.blocks))
    reached, where = search.run(found)
    if reached < inf and Replay(model, graph, {}, {}).run()[0] < inf:
        raise ModelError(f"{type(model).__name__} changed itself when it ran; trace it again.")
    solved = search.deepen(found, reached, where)
    if solved is None:
        kinds = ", ".join(sorted({group.kind for group, _ in groups}))
        near = [group.name for group in _around(search.where, [group for group, _ in groups])]
        raise ModelError(
            f"{type(model).__name__} cannot be cut this way: its code in {search.where or 'the model'} does not take the new "
            f"sizes ({search.problem}). Leave out {kinds} of this model, or protect {_listed(near)}.",
            near,
        )
    solved = search.with_namesakes(solved, found)
    return {
        path: {name: value for name, value in values.items() if name not in padded.get(path, {})}
        for path, values in solved.items()
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} others" if len(names) > MOST_NAMED else "")


@dataclass
class Search:
    """Trials of attributes on one cut network; each that brings the replay further is followed, the furthest first."""

    model: nn.Module
    blocks: Blocks
    replay: Replay
    groups: list[tuple[Group, int]]
    census: Census
    spent: int = 0
    stuck: int = 0
    limit: int = STUCK
    furthest: float = -1
    where: str = ""
    problem: str = ""
    known: dict[str, tuple[float, str]] = field(default_factory=dict)
    supposed: set[tuple[str, str]] = field(default_factory=set)
    """Modules and attributes of theirs that were set because likes of theirs had to have them set."""

    def run(self, attributes: Attributes) -> tuple[float, str]:
        """How many operators of the cut network agree with the coupling, and where the first one does not; inf when all do."""
        trial = repr(sorted((path, sorted(values.items())) for path, values in attributes.items()))
        if trial not in self.known:
            self.stuck += 1
            with _attributes_set(self.model, attributes):
                reached, where, problem = self.replay.run()
            self.spent += 1 if reached == inf else int(reached) + 1
            if reached > self.furthest:
                self.furthest, self.where, self.problem, self.stuck = reached, where, problem, 0
            self.known[trial] = reached, where
        return self.known[trial]

    def deepen(self, found: Attributes, reached: float, where: str) -> Attributes | None:
        """The attributes with which the network runs through, or None; one at a time at first, then more at once."""
        for most in range(1, AT_ONCE + 1):
            self.stuck = 0
            solved = self._solve(found, reached, where, most)
            if solved is not None or (self.limit == TORN and most > 1):
                return solved
        return None

    def with_namesakes(self, solved: Attributes, sizes: Attributes) -> Attributes:
        """Beside each number that had to follow, those of its module that had the same value under a like name.

        They may be read where the example does not go: when a cache is set up, say. `heads` and `kv_heads` are alike.
        `sizes` are what layers note of their weights, which is not searched for.
        """
        for path, values in solved.items():
            module = self.model.get_submodule(path)
            own = {name: value for name, value in values.items() if name not in sizes.get(path, {})}
            numbers = dict(_integers(module))
            for name, new in own.items():
                old = numbers.get(name)
                alike = [
                    other
                    for other, value in numbers.items()
                    if other not in solved[path] and value == old and _last_word(module, other) == _last_word(module, name)
                ]
                for other in alike:
                    trial = {**solved, path: {**solved[path], other: new}}
                    solved = trial if self.run(trial)[0] == inf else solved
        return solved

    def _solve(self, found: Attributes, reached: float, where: str, most: int) -> Attributes | None:
        if reached == inf:
            return found
        for trials in self._better(found, reached, where, most):
            for further, at, trial in sorted(trials, key=lambda item: -item[0]):
                stuck = self.stuck
                solved = self._solve(trial, further, at, most)
                if solved is not None:
                    return solved
                self.stuck = stuck  # a wrong turn takes nothing from the next
        return None

    def _better(self, found: Attributes, reached: float, where: str, most: int) -> Iterator[list[tuple[float, str, Attributes]]]:
        """Trials that get further, by the number of attributes and then by how far around `where` these were looked for."""
        path = where.split(".") if where else []
        reaches = []
        for trial in self._demanded(found, reached, path):
            if self.spent >= OPERATORS or self.stuck >= self.limit:
                return
            further, at = self.run(trial)
            reaches.append(further)
            if further > reached:
                trial = self._likes(found, self._needed(found, trial))
                yield [(*self.run(trial), trial)]
        if reaches and max(reaches) < reached:
            self.limit = TORN
        for count in range(1, most + 1):
            for place in self._places(path):
                roles = list(dict.fromkeys(_candidates(self.model, self.blocks, place, self.groups)))
                if count > 1:  # a module that reads its configuration while it runs reads one number at a time
                    roles = [role for role in roles if not role.attribute.startswith("config.")]
                better = []
                for chosen in combinations(roles, count):
                    if self.spent >= OPERATORS or self.stuck >= self.limit:
                        return
                    trial = found
                    for role in chosen:
                        trial = _apply(self.census, self.blocks, role, self.groups, trial)
                    further, at = (reached, where) if trial == found else self.run(trial)
                    if further == inf:
                        yield [(further, at, trial)]
                        return
                    if further > reached:
                        better.append((further, at, trial))
                if better:
                    yield better

    def _demanded(self, found: Attributes, reached: float, path: list[str]) -> Iterator[Attributes]:
        """Trials of attributes that are sizes of what the operator put out in the dense run: given those it has to have now.

        Of the module it runs in and of those around it, all of a module at once and then each alone.
        """
        sizes = self.replay.sizes(int(reached))
        for depth in range(len(path), -1, -1):
            where = ".".join(path[:depth])
            known, resized = found.get(where, {}), _resized(self.model.get_submodule(where), sizes)
            known = {name: value for name, value in known.items() if (where, name) not in self.supposed}
            if any(known.get(name, values[0]) not in values for name, values in resized.items()):
                self.limit = TORN
            choices = [[(name, value) for value in values] for name, values in resized.items() if name not in known]
            alone = [(choice,) for values in choices for choice in values] if len(choices) > 1 else []
            for chosen in [*islice(product(*choices), AT_ONCE**3), *alone] if choices else []:
                yield {**found, where: {**found.get(where, {}), **dict(chosen)}}

    def _places(self, path: list[str]) -> list[str]:
        """A module, those around it, and those right inside it: another method of theirs may run as a part of it."""
        around = [".".join(path[:depth]) for depth in range(len(path), -1, -1)]
        inside = [".".join([*path, name]) for name, _ in self.model.get_submodule(around[0]).named_children()]
        return around + inside

    def _needed(self, found: Attributes, trial: Attributes) -> Attributes:
        """A trial without what it gets as far without: another number may have the same size by chance."""
        for where, values in trial.items():
            for name in sorted(values.keys() - found.get(where, {}).keys()):
                fewer = {**trial, where: {key: value for key, value in trial[where].items() if key != name}}
                if self.run(fewer)[0] >= self.run(trial)[0]:
                    trial = fewer
        return trial

    def _likes(self, found: Attributes, trial: Attributes) -> Attributes:
        """A trial in which the likes of its module follow their own groups as well, where that gets as far."""
        for where, values in trial.items():
            for name in sorted(values.keys() - found.get(where, {}).keys()):
                for role in _candidates(self.model, self.blocks, where, self.groups):
                    if role.attribute == name:
                        wider = _apply(self.census, self.blocks, role, self.groups, trial)
                        if wider[where][name] == values[name] and self.run(wider)[0] >= self.run(trial)[0]:
                            self.supposed |= {(path, name) for path in wider if wider[path] != trial.get(path)}
                            trial = wider
                            break
        return trial


def _resized(module: nn.Module, sizes: Mapping[tuple[int, ...], set[tuple[int, ...]]]) -> dict[str, list[Any]]:
    """The attributes of a module that are sizes, or lists of sizes, and what they may be instead."""
    single = {have[0]: sorted(want[0] for want in wants) for have, wants in sizes.items() if len(have) == 1}
    found: dict[str, list[Any]] = {name: list(single[value]) for name, value in _integers(module) if value in single}
    for name, value in vars(module).items():
        if isinstance(value, list | tuple) and all(type(item) is int for item in value):
            each = [single.get(item, [item])[0] for item in value]
            wanted = [list(want) for want in sorted(sizes.get(tuple(value), ()))] or [each]
            if wanted != [list(value)]:
                found[name] = wanted
    return found


def _layer_sizes(model: nn.Module, shapes: Mapping[str, list[int]]) -> Attributes:
    """What layers note of their own weight; setting the weight sets it too, so this serves the replay alone."""
    found: Attributes = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if name in shapes and (values := followers(module, module.weight.shape, shapes[name])):
            found[path] = values
    return found


def _padding_rows(model: nn.Module, graph: Graph, plan: Plan) -> Attributes:
    """The rows of padding under their new numbers; 0 stands for one that is gone, for the replay, which looks nothing up."""
    found: Attributes = {}
    for name, axes in kept_positions(graph, plan).items():
        path, _, leaf = name.rpartition(".")
        padding = getattr(model.get_submodule(path), "padding_idx", None)
        if leaf == "weight" and 0 in axes and type(padding) is int and padding >= 0:
            found[path] = {"padding_idx": int((axes[0] < padding).sum()) if padding in axes[0] else 0}
    return found


def _normalised_shapes(model: nn.Module, graph: Graph, groups: list[tuple[Group, int]]) -> Attributes:
    """The shape that a normalisation without weights insists on."""
    counts = {group.name: count for group, count in groups}
    kept = {atom: counts.get(name, atom.size) for atom, name in graph.witness.groups.items()}
    found: Attributes = {}
    for path, calls in graph.witness.frames.items():
        module = model.get_submodule(path)
        over = calls[-1].entering[0][-1:]
        if tuple(getattr(module, "normalized_shape", ())) == tuple(map(length, over)) and not list(module.parameters()):
            found[path] = {"normalized_shape": [kept_length(axis, kept) for axis in over]}
    return found


def _expert_counts(model: nn.Module, groups: list[tuple[Group, int]]) -> Attributes:
    """Numbers of experts beside their weights: the replay runs a kernel that does not look at them, others do."""
    found: Attributes = {}
    for group, count in groups:
        members = group.members if group.kind == "experts" else ()
        for path in dict.fromkeys(member.parameter.rpartition(".")[0] for member in members):
            own = dict(model.get_submodule(path).named_parameters(recurse=False))
            inside = [member for member in group.members if member.parameter.rpartition(".")[0] == path]
            weights = [member for member in inside if member.parameter.rpartition(".")[2] in own]
            sizes = {own[member.parameter.rpartition(".")[2]].shape[member.axis] for member in weights}  # some may always stay
            if len(sizes) == 1 and len(weights) == len(own) and {member.index.shape[1] for member in weights} == {1}:
                size = sizes.pop()
                values = [name for name, value in _integers(model.get_submodule(path)) if value == size]
                found[path] = {name: size - group.units + count for name in values if not name.startswith("config.")}
    return found


def group_counts(model: nn.Module, graph: Graph, plan: Plan) -> Attributes:
    """The groups that are left of grouped convolutions and group norms: those that keep any of their channels."""
    found: Attributes = {}
    for name, axes in kept_positions(graph, plan).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        for attribute in GROUPS:
            count = getattr(module, attribute, None)
            if leaf == "weight" and 0 in axes and type(count) is int and count > 1 and not getattr(module, "transposed", False):
                left = len((axes[0] // (graph.shapes[name][0] // count)).unique())
                found[path] = {attribute: left} if left != count else {}
    return found


def _candidates(model: nn.Module, blocks: Blocks, where: str, groups: list[tuple[Group, int]]) -> Iterator[Role]:
    """Attributes of a module, and of its configuration, that count the units of a group that shrinks around it.

    Groups with parameters in the module come first: another one may have as many units by chance.
    """
    layer = blocks.layer_of(where)
    near = [group for group, _ in groups if group.layer in (None, layer)] or [group for group, _ in groups]
    near = _around(where, near)
    module = model.get_submodule(where)
    near = [group for group in near if _concerns(group, module, where)]
    beside = []
    for name, value in _integers(module):
        for group in near:
            multiple, rest = divmod(value, group.units)
            place = _place(group, where, blocks)
            widths = {member.index.shape[1] for member in group.members}
            if not rest and any(width % multiple == 0 for width in widths):
                yield Role(type(module), name, place, multiple)
            for width in sorted(widths):
                if value > group.units * width and not name.startswith("config."):
                    offset = value - group.units * width
                    beside.append(Role(type(module), name, place, width, offset))
    yield from beside


def _concerns(group: Group, module: nn.Module, where: str) -> bool:
    """Whether a module has a slice of the group in one of its parameters; one without parameters may serve any group."""
    start = f"{where}." if where else ""
    return any(member.parameter.startswith(start) for member in group.members) or next(module.parameters(), None) is None


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The numbers that a module keeps, by name: its own, those inside what it holds, and those of its configuration."""
    config: Any = getattr(module, "config", None)
    fields = hasattr(config, "to_dict")
    for name, value in vars(module).items():
        if "__" in name:  # of Python, or private to a class
            continue
        if type(value) is int and value > 0:
            yield name, value
        elif name not in TABLES and INSIDE not in name and not (fields and name == "config"):
            yield from _inside(name, value, DEEPEST)
    if fields:
        for name, value in config.to_dict().items():
            if type(value) is int and value > 0:
                yield f"config.{name}", value


def _inside(name: str, holder: Any, depth: int) -> Iterator[tuple[str, int]]:
    """The numbers inside a mapping, a sequence, a partial function or a plain object, by the keys that lead to them."""
    for key, value in islice(_held(holder), MOST_HELD) if depth else ():
        if "__" in str(key):
            continue
        where = f"{name}{INSIDE}{key}"
        if type(value) is int and value > 0:
            yield where, value
        else:
            yield from _inside(where, value, depth - 1)


def _held(holder: Any) -> Iterator[tuple[Any, Any]]:
    """What something holds, by key; nothing for what is no plain holder of numbers."""
    if isinstance(holder, partial):
        yield from enumerate(holder.args)
        yield from holder.keywords.items()
    elif isinstance(holder, dict):
        yield from ((key, value) for key, value in holder.items() if type(key) in (str, int) and INSIDE not in str(key))
    elif isinstance(holder, tuple | list):
        yield from enumerate(holder) if any(type(item) is not int for item in holder) else ()  # lists of sizes are one
    elif (is_dataclass(holder) or isinstance(holder, SimpleNamespace)) and hasattr(holder, "__dict__"):
        yield from vars(holder).items()


def _last_word(module: nn.Module, name: str) -> str:
    """The last word of what a number is called: by its key, or by the text that stands in front of it in a pair."""
    first, *keys = name.split(INSIDE)
    holder: Any = vars(module).get(first)
    for key in keys[:-1]:
        holder = {str(name): value for name, value in _held(holder)}.get(key)
    pair = isinstance(holder, tuple | list) and len(holder) == 2 and isinstance(holder[0], str)
    key = holder[0] if pair else keys[-1] if keys else first
    return str(key).rpartition(".")[2].rpartition("_")[2]


def _census(model: nn.Module, blocks: Blocks) -> Census:
    """Of every class, its modules: their paths and blocks, themselves, and the numbers that they keep."""
    found: Census = {}
    for path, module in model.named_modules():
        found.setdefault(module.__class__, []).append((path, blocks.layer_of(path), module, dict(_integers(module))))
    return found


def _apply(census: Census, blocks: Blocks, role: Role, groups: list[tuple[Group, int]], found: Attributes) -> Attributes:
    """The attributes with a role given to every module of its class, each with the units that its own block keeps."""
    result = {path: dict(values) for path, values in found.items()}
    kept = {group.layer: (group, count) for group, count in groups if _within_block(group, blocks) == role.group}
    placed: dict[tuple[str, int], list[tuple[Group, int]]] = {}
    for group, count in groups:
        for member in group.members:
            placed.setdefault((member.parameter, member.axis), []).append((group, count))
    for path, layer, module, integers in census[role.module_type]:
        if isinstance(role.group, str):
            near = [kept[number] for number in (layer, None) if number in kept][:1]
            near = [(group, count) for group, count in near if _concerns(group, module, path)]
        else:
            near = placed.get((f"{path}.{role.group[0]}".removeprefix("."), role.group[1]), [])
        for group, count in near:
            if integers.get(role.attribute) == role.offset + group.units * role.multiple:
                result.setdefault(path, {})[role.attribute] = role.offset + count * role.multiple
    return result


def _around(where: str, groups: list[Group]) -> list[Group]:
    """The groups that have to do with a module: with parameters in it, or else in the closest module around it."""
    path = where.split(".") if where else []
    for depth in range(len(path), 0, -1):
        inside = ".".join(path[:depth]) + "."
        touching = [group for group in groups if any(member.parameter.startswith(inside) for member in group.members)]
        if touching:
            return touching
    return groups


def _place(group: Group, where: str, blocks: Blocks) -> str | tuple[str, int]:
    """Where a group is found in the likes of a module: by an axis of a parameter inside it, or by its name in its block."""
    inside = f"{where}." if where else ""
    for member in group.members:
        if member.parameter.startswith(inside):
            return member.parameter.removeprefix(inside), member.axis
    return _within_block(group, blocks)


def _within_block(group: Group, blocks: Blocks) -> str:
    return blocks.within(group.name)


@contextmanager
def _attributes_set(model: nn.Module, attributes: Attributes) -> Iterator[None]:
    """Sets attributes for a while; configurations are copied, so that modules do not share the change."""
    before = [(model.get_submodule(path), dict(vars(model.get_submodule(path)))) for path in attributes]
    try:
        set_attributes(model, attributes)
        yield
    finally:
        for module, values in before:
            vars(module).clear()
            vars(module).update(values)
