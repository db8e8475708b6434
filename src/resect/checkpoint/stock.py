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
from resect.graph import Group
from resect.surgery.modeling_resect import shorten

Shapes = dict[str, tuple[int, ...]]
Changes = dict[str, Any]
Fields = dict[str, Any]

ROUNDS = 12
"""At most so many fields change."""
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
        return [(n, v) for n, v in self.family.config.to_dict().items() if "token_id" not in n]

    def _takes_int(self, name: str) -> bool:
        return any(f.name == name and re.search(r"\bint\b", str(f.type)) for f in dataclasses.fields(self.family.config))

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
        made = type(self.family.config).from_dict({**self.family.config.to_dict(), **changes})
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


def _changed_constant(model: PreTrainedModel, stock: Stock) -> str:
    """A number in the mathematics that follows a size in the stock code, while a cut model keeps the dense one's."""
    modules = dict(model.named_modules())
    for path, module in blank(stock.config, stock.model_class).named_modules():
        constants = vars(modules[path]) if path in modules else {}
        for name, value in vars(module).items():
            if type(value) is float and type(constants.get(name)) is float and constants[name] != value:
                return f"{name} of {path} would be {value:.4g}, not {constants[name]:.4g}"
    return ""


def _without_units(model: PreTrainedModel, groups: Sequence[Group], step: int) -> Shapes:
    """Shapes with `step` units less in every group."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), []).append(name)
    same = {name: names for names in aliases.values() for name in names}
    shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
    for group in groups:
        for member in group.members:
            for name in same[member.parameter]:
                shapes[name][member.axis] -= step * member.index.shape[1]
    return {name: tuple(shape) for name, shape in shapes.items()}


def _without_blocks(model: PreTrainedModel, config: PreTrainedConfig, blocks: int, step: int) -> Shapes:
    """Shapes without the last `step` blocks; `config` is shortened to match."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == blocks]
    gone = range(blocks - step, blocks)
    shorten(config, gone, blocks=blocks)
    prefixes = tuple(f"{name}.{index}." for name in lists for index in gone)
    return {name: shape for name, shape in shapes_of(model).items() if not name.startswith(prefixes)}
