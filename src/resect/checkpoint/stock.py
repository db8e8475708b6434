"""Which configuration of transformers' own classes describes a cut model, if any: it then loads without our code.

Nothing is known about families here. Integer fields whose value went into a size that changed are candidates; a
candidate is judged by building the model on the meta device and comparing every shape. Where a family's configuration
refuses, a relative with the same mathematics may say it (`RELATIVES`). Equal shapes do not make an equal function, so
the caller's `accept` has the last word on every proposal.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from resect.checkpoint.shipped import has_own_code
from resect.checkpoint.silence import quiet
from resect.graph import DEPTH, Graph, Group
from resect.plan import Plan, places
from resect.surgery.modeling_resect import shorten

Shapes = dict[str, tuple[int, ...]]
Changes = dict[str, Any]
Fields = dict[str, Any]

ROUNDS = 12
"""At most so many fields change."""
MOST_TRIED = 64
"""Where not every number of units can be said, at most about so many are tried."""
MISSING = 1_000_000
"""A parameter that should not be there, or should, outweighs every wrong size."""


@dataclasses.dataclass(frozen=True)
class Relative:
    """A model type that computes the same with the fields set so; callables take the head size."""

    model_type: str
    fields: Mapping[str, Any]


# Seen to give a logit difference of 0; the relatives lack llama's check that hidden size divides by number of heads.
RELATIVES: dict[str, tuple[Relative, ...]] = {
    "llama": (
        Relative("mistral", {"sliding_window": None}),
        Relative(
            "granite",
            {
                "embedding_multiplier": 1.0,
                "logits_scaling": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": lambda head_dim: head_dim**-0.5,
            },
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Stock:
    """A configuration and class of transformers that describe the cut model."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    changes: Changes
    relabelled_from: str | None = None


def find_stock(
    shapes: Shapes,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    *,
    accept: Callable[[Stock], str] = lambda stock: "",
) -> tuple[Stock | None, str]:
    """A stock configuration under which `model_class` has exactly `shapes`, or None and the reason.

    `shapes` is of the cut model's state; `config` is the dense configuration, with as many layers as are left.
    `accept` looks at a proposal and says what is wrong with it ("" for nothing).
    """
    with quiet():
        dense = blank(config, model_class)
        before = shapes_of(dense)
        if reason := _uneven(shapes, before):
            return None, reason
        reasons = []
        for family in _families(config, model_class, head_dim := _head_dim(dense)):
            for extra in _extras(family.config, head_dim):
                search = _Search(family, extra, shapes, before)
                for stock in search.solutions():
                    if not (reason := accept(stock)):
                        return stock, ""
                    search.reason = reason
                reasons.append(f"{family.config.model_type}: {search.reason}")
    return None, "; ".join(dict.fromkeys(reasons))


def expressible_kinds(model: PreTrainedModel, groups: Sequence[Group]) -> dict[str, bool | str]:
    """For each kind of group: True if a stock configuration can say that layers have fewer of its units, else why not.

    `model` is dense, usually on the meta device; it is not changed. Equal numbers in every layer are assumed; it is
    tried with one unit less, then with more, since some configurations want sizes to divide. Shapes and constants are
    compared, not logits: `save` still checks.
    """
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    return {kind: _expressible(model, members) for kind, members in kinds.items()}


@dataclasses.dataclass(frozen=True)
class Expressible:
    """What stock configurations can say of smaller layers."""

    sizes: Mapping[str, tuple[int, ...]]
    """The numbers of units besides all that a group may keep, by group; none for one that stays whole."""
    equal: tuple[tuple[str, ...], ...]
    """Groups that one field sizes: they keep as many units as each other."""
    withheld: Mapping[str, str]
    """Why nothing of a kind can go, or, under `kind at place`, nothing of its groups there."""


def expressible_sizes(model: PreTrainedModel, graph: Graph, kinds: Sequence[str]) -> Expressible:
    """How many units the groups of some kinds may keep, so that a stock configuration says it.

    `model` is dense and is not changed. Groups at the same place of their blocks keep equal numbers; each place is tried
    alone, then together with others of the same kind that fail alone, for those that one field sizes. Shapes and
    constants are compared, not logits: `save` still checks.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    equal: list[tuple[str, ...]] = []
    withheld: dict[str, str] = {}
    for kind in [kind for kind in kinds if graph.of_kind(kind)]:
        if kind in DEPTH:
            found = _expressible(model, graph.of_kind(kind))
            withheld |= {} if found is True else {kind: str(found)}
            continue
        rows = places(graph, kind)
        sought = {place: _Sizes(model, groups) for place, groups in rows.items()}
        failed = {place: one for place, one in sought.items() if not one.numbers}
        for together in _partners(failed):
            joint = _Sizes(model, [group for place in together for group in rows[place]])
            if joint.numbers and not any(sought[place].numbers for place in together):
                equal.append(tuple(group.name for group in joint.groups))
                sought |= dict.fromkeys(together, joint)
        sizes |= {group.name: one.numbers for place, one in sought.items() for group in rows[place]}
        refused = {place: one.reason for place, one in sought.items() if not one.numbers}
        if len(refused) == len(rows):
            withheld[kind] = "; ".join(dict.fromkeys(refused.values()))
        else:
            withheld |= {f"{kind} at {place}": reason for place, reason in refused.items()}
    return Expressible(sizes, tuple(equal), withheld)


def inexpressible(model: PreTrainedModel, graph: Graph, plan: Plan) -> str:
    """Why no stock configuration has the shapes that a plan leaves of the dense `model`; empty where one has."""
    config = copy.deepcopy(model.config)
    with quiet():
        shapes = _without(model, {group: plan.groups[group.name].removed for group in map(graph.group, plan.removed())})
    gone = [group.name for group in graph.of_kind("blocks") if group.name in plan.removed()]
    kept = _renumbered(model, config, shapes, gone)
    return find_stock(kept, config, type(model), accept=lambda stock: _changed_constant(model, stock, gone))[1]


def blank(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes without memory. The configuration is copied."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def shapes_of(model: torch.nn.Module) -> Shapes:
    """The shape of everything in the model's state, tied parameters under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclasses.dataclass(frozen=True)
class _Family:
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    relabelled_from: str | None = None


@dataclasses.dataclass
class _Search:
    """Field by field towards the target: the change that leaves fewest sizes wrong, pairs where no single one helps."""

    family: _Family
    extra: Changes
    target: Shapes
    before: Shapes
    reason: str = ""

    def solutions(self) -> Iterator[Stock]:
        """Configurations with the right shapes, the one with fewest changes first."""
        changes, left = dict(self.extra), self._wrong(self.extra)
        candidates = self._candidates()
        for _ in range(ROUNDS):
            if not left:
                break
            options = [*candidates, *self._unset(changes)]
            best = self._best(changes, [{name: value} for name, value in options], left)
            best = best or self._best(changes, [dict(pair) for pair in itertools.combinations(candidates, 2)], left)
            if best is None:
                return self._give_up(changes)
            left, changes = best
        if left:
            return None
        yield self._stock(changes)
        for name, value in candidates:
            if name not in changes and self._wrong({**changes, name: value}) == 0:
                yield self._stock({**changes, name: value})
        return None

    def _candidates(self) -> list[tuple[str, int]]:
        """Integer fields whose value went into a size that changed, as it is or times a constant."""
        pairs = {pair for name, shape in self.target.items() for pair in zip(self.before.get(name, ()), shape, strict=False)}
        pairs = {(old, new) for old, new in pairs if old != new}
        found: dict[tuple[str, int], None] = {}
        for name, value in self._fields():
            if type(value) is not int or value < 2 or "head_dim" in name:  # heads go whole: their size stays
                continue
            for old, new in sorted(pairs):
                if old % value == 0 and new * value % old == 0 and new:
                    found[name, new * value // old] = None
        return list(found)

    def _unset(self, changes: Changes) -> list[tuple[str, int]]:
        """Fields that follow another while they are None, with the sizes that are still wrong."""
        names = [name for name, value in self._fields() if value is None and name not in changes and self._takes_int(name)]
        if not names:
            return []
        found = self._build(changes)
        sizes = {
            size
            for name, shape in self.target.items()
            for size, other in zip(shape, found.get(name, ()) if isinstance(found, dict) else (), strict=False)
            if size != other
        }
        return [(name, size) for name in names for size in sorted(sizes)]

    def _fields(self) -> list[tuple[str, Any]]:
        return [(n, v) for n, v in _flat(self.family.config.to_dict()) if "token_id" not in n]

    def _takes_int(self, name: str) -> bool:
        config: Any = self.family.config
        *outer, leaf = name.split(".")
        for part in outer:
            config = getattr(config, part, None)
        fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
        return any(f.name == leaf and re.search(r"\bint\b", str(f.type)) for f in fields)

    def _best(self, changes: Changes, options: Sequence[Changes], left: int) -> tuple[int, Changes] | None:
        """The option after which fewest sizes are wrong, if fewer than now."""
        fresh = [{**changes, **option} for option in options if not option.keys() & changes.keys()]
        tried = [(self._wrong(option), option) for option in fresh]
        better = [(wrong, option) for wrong, option in tried if wrong is not None and wrong < left]
        return min(better, key=lambda one: one[0], default=None)

    def _wrong(self, changes: Changes) -> Any:
        """How many sizes differ from the target; None where the configuration refuses."""
        found = self._build(changes)
        if isinstance(found, str):
            self.reason = found
            return None
        missing = len(found.keys() ^ self.target.keys())  # a layer less would be many sizes less that are wrong
        return MISSING * missing + sum(
            a != b for name in found.keys() & self.target.keys() for a, b in _axes(found[name], self.target[name])
        )

    def _build(self, changes: Changes) -> Shapes | str:
        """Shapes under the changed configuration, or what it says against it."""
        try:
            return shapes_of(blank(self._config(changes), self.family.model_class))
        except Exception as error:  # any class may refuse, each in its own way
            said = re.sub(r"^Class validation error for validator '\w+':\s*(\w+: )?", "", str(error).strip())
            return " ".join(said.split()) or type(error).__name__

    def _config(self, changes: Changes) -> PreTrainedConfig:
        made = type(self.family.config).from_dict(_changed(self.family.config.to_dict(), changes))
        made.validate()  # classes of others leave that to whoever saves them
        return made

    def _stock(self, changes: Changes) -> Stock:
        family = self.family
        return Stock(self._config(changes), family.model_class, changes, family.relabelled_from)

    def _give_up(self, changes: Changes) -> None:
        if self.reason:
            return
        found = self._build(changes)
        assert isinstance(found, dict)
        wrong = sorted(name for name in found.keys() | self.target.keys() if found.get(name) != self.target.get(name))
        name = wrong[0]
        self.reason = f"no field makes {name} {self.target.get(name)} (it stays {found.get(name)})"


def _flat(fields: Fields) -> Iterator[tuple[str, Any]]:
    """The fields of a configuration, those of configurations inside it under names with a dot."""
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            yield from ((f"{name}.{inner}", one) for inner, one in _flat(value))
        else:
            yield name, value


def _changed(fields: Fields, changes: Changes) -> Fields:
    """Fields of a configuration with some of them set; names may have dots."""
    made = copy.deepcopy(fields)
    for name, value in changes.items():
        *outer, leaf = name.split(".")
        place = made
        for part in outer:
            place = place[part]
        place[leaf] = value
    return made


def _axes(a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[tuple[int | None, int | None]]:
    return itertools.zip_longest(a, b)


def _families(config: PreTrainedConfig, model_class: type[PreTrainedModel], head_dim: int | None) -> Iterator[_Family]:
    """The model's own family, then relatives that can stand in for it."""
    yield _Family(config, model_class)
    for relative in RELATIVES.get(config.model_type, ()):
        config_class = CONFIG_MAPPING[relative.model_type]
        known = {field.name for field in dataclasses.fields(config_class)} | {"head_dim"}
        fields = {name: value for name, value in config.to_dict().items() if name in known and name != "transformers_version"}
        fields |= {name: value(head_dim) if callable(value) else value for name, value in relative.fields.items()}
        other = config_class.from_dict(fields)
        other_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        yield _Family(other, other_class, config.model_type)


def _head_dim(model: torch.nn.Module) -> int | None:
    """The size of a head, if the attention modules agree on one."""
    sizes = {getattr(module, name, None) for module in model.modules() for name in ("head_dim", "head_size")}
    sizes = {size for size in sizes if type(size) is int}
    return sizes.pop() if len(sizes) == 1 else None


def _extras(config: PreTrainedConfig, head_dim: int | None) -> list[Changes]:
    """What to pin besides: the size of a head, where it would else follow from the number of heads."""
    pinned = head_dim is None or getattr(config, "head_dim", None) == head_dim
    return [{}] if pinned else [{}, {"head_dim": head_dim}]


def _uneven(shapes: Shapes, before: Shapes) -> str:
    """Why no uniform configuration can exist: sizes that were equal in all layers and no longer are."""
    kinds: dict[tuple[str, int], dict[str, None]] = {}
    for name, shape in shapes.items():
        layer_free = re.sub(r"\.\d+\.", ".*.", name)
        for axis, (old, new) in enumerate(zip(before.get(name, ()), shape, strict=False)):
            kinds.setdefault((f"{layer_free} axis {axis} of {old}", axis), {})[str(new)] = None
    for (name, _), sizes in kinds.items():
        if len(sizes) > 1:
            return f"sizes differ from layer to layer: {name} is {', '.join(list(sizes)[:4])}"
    return ""


def _expressible(model: PreTrainedModel, groups: Sequence[Group]) -> bool | str:
    """Tries one unit less in every group, then more; a model with code of its own has to take any number."""
    whole = groups[0].kind == "blocks"
    groups = [group for group in groups if group.units > 1 or whole]
    fewest = sum(group.units for group in groups) if whole else min((group.units for group in groups), default=1)
    reasons, strict = [], has_own_code(type(model))
    for step in [step for step in dict.fromkeys([1, 2, 4, 8, 16, 64, 128, fewest // 2]) if 0 < step < fewest]:
        config = copy.deepcopy(model.config)
        target = _without_blocks(model, config, fewest, step) if whole else _without_units(model, groups, step)
        stock, reason = find_stock(target, config, type(model), accept=lambda stock: _changed_constant(model, stock))
        if stock is not None and not strict:
            return True
        if stock is None:
            reasons.append(reason)
            if strict:
                break
    if strict and not reasons and fewest > 1:
        return True
    return reasons[0] if reasons else "there is only one unit"


class _Sizes:
    """Which numbers of units some groups may all keep."""

    def __init__(self, model: PreTrainedModel, groups: Sequence[Group]) -> None:
        self.model, self.groups = model, groups
        self.reason = "there is only one unit"
        self._known: list[tuple[Stock, int]] = []
        self.units = groups[0].units
        self.numbers = self._found()

    def _found(self) -> tuple[int, ...]:
        units = self.units
        probes = [kept for kept in dict.fromkeys([units // 2, units - 1, units - 2, units - 3]) if 0 < kept < units]
        said = [self._says(kept) for kept in probes]
        if said and all(said):
            return tuple(range(1, units))
        if not any(said) or has_own_code(type(self.model)):  # code of a model's own has to take any number
            return ()
        few = range(1, units) if units <= MOST_TRIED else range(units % (units // MOST_TRIED), units, units // MOST_TRIED)
        return tuple(kept for kept in few if kept > 0 and self._says(kept))

    def _says(self, kept: int) -> bool:
        """Whether a configuration has these shapes; fields in proportion to those that were found before come first."""
        target = _without_units(self.model, self.groups, self.units - kept)
        if any(self._fits(stock, before, kept, target) for stock, before in self._known):
            return True
        stock, reason = find_stock(target, self.model.config, type(self.model), accept=self._accept)
        if stock is None:
            self.reason = reason if not self._known else self.reason
            return False
        self._known.append((stock, kept))
        return True

    def _accept(self, stock: Stock) -> str:
        return _changed_constant(self.model, stock)

    def _fits(self, stock: Stock, before: int, kept: int, target: Shapes) -> bool:
        changes = {}
        for name, value in stock.changes.items():
            scaled = value if "head_dim" in name or type(value) is not int else value * kept / before
            if scaled != int(scaled):
                return False
            changes[name] = int(scaled)
        try:
            with quiet():
                config = type(stock.config).from_dict(_changed(stock.config.to_dict(), changes))
                config.validate()
                if shapes_of(blank(config, stock.model_class)) != target:
                    return False
                return not self._accept(dataclasses.replace(stock, config=config))
        except Exception:  # any class may refuse, each in its own way
            return False


def _partners(failed: Mapping[str, _Sizes]) -> Iterator[tuple[str, ...]]:
    """Places that one field may size together: pairs with as many units, then all that have."""
    names = list(failed)
    yield from (pair for pair in itertools.combinations(names, 2) if len({failed[name].units for name in pair}) == 1)
    for units in dict.fromkeys(one.units for one in failed.values()):
        alike = tuple(name for name in names if failed[name].units == units)
        if len(alike) > 2:
            yield alike


def _changed_constant(model: PreTrainedModel, stock: Stock, gone: Sequence[str] = ()) -> str:
    """A number in the mathematics that follows a size in the stock code, while a cut model keeps the dense one's."""
    modules = {} if gone else dict(model.named_modules())  # without blocks the others have other numbers
    for path, module in blank(stock.config, stock.model_class).named_modules():
        constants = vars(modules[path]) if path in modules else {}
        for name, value in vars(module).items():
            if type(value) is float and type(constants.get(name)) is float and constants[name] != value:
                return f"{name} of {path} would be {value:.4g}, not {constants[name]:.4g}"
    return ""


def _without_units(model: PreTrainedModel, groups: Sequence[Group], step: int) -> Shapes:
    """Shapes with `step` units less in every group."""
    return _without(model, dict.fromkeys(groups, step))


def _without(model: PreTrainedModel, removed: Mapping[Group, int]) -> Shapes:
    """Shapes with so many units less of every group; blocks and sub-layers keep theirs."""
    aliases: dict[int, list[str]] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        aliases.setdefault(id(tensor), []).append(name)
    same = {name: names for names in aliases.values() for name in names}
    shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
    for group, step in removed.items():
        for member in group.members if group.kind not in DEPTH else ():
            for name in same[member.parameter]:
                if name in shapes:  # buffers that are not saved follow from the configuration
                    shapes[name][member.axis] -= step * member.index.shape[1]
    return {name: tuple(shape) for name, shape in shapes.items()}


def _renumbered(model: PreTrainedModel, config: PreTrainedConfig, shapes: Shapes, gone: Sequence[str]) -> Shapes:
    """Shapes under their names once the blocks `gone` are; `config` is shortened to match."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in gone):
        numbers = {int(name.rpartition(".")[2]) for name in gone if name.rpartition(".")[0] == parent}
        count = len(model.get_submodule(parent))  # type: ignore[arg-type]
        shorten(config, numbers, blocks=count, path=parent)
        stays = {old: new for new, old in enumerate(number for number in range(count) if number not in numbers)}
        renamed = {}
        for name, shape in shapes.items():
            number, _, rest = name.removeprefix(f"{parent}.").partition(".")
            if not name.startswith(f"{parent}."):
                renamed[name] = shape
            elif int(number) in stays:
                renamed[f"{parent}.{stays[int(number)]}.{rest}"] = shape
        shapes = renamed
    return shapes


def _without_blocks(model: PreTrainedModel, config: PreTrainedConfig, blocks: int, step: int) -> Shapes:
    """Shapes without the last `step` blocks; `config` is shortened to match."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == blocks]
    gone = range(blocks - step, blocks)
    shorten(config, gone, blocks=blocks)
    prefixes = tuple(f"{name}.{index}." for name in lists for index in gone)
    return {name: shape for name, shape in shapes_of(model).items() if not name.startswith(prefixes)}
