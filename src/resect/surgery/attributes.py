"""Shape attributes: the numbers in a network's own code that have to follow a cut.

A module may keep the number of its heads, or the place where it splits a fused projection, as an integer attribute or read
it from a configuration. Nothing is guessed from names: the cut network is run on fake tensors next to the trace of the
dense one. At the first operator whose result does not have the shape that the coupling demands, the attributes of the
module it ran in are tried, one, two or three at once, until that module runs through as it should. What worked for one
module is used for its likes in the other blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import inf
from typing import Any

from torch import nn

from resect.errors import ModelError
from resect.graph import Blocks, Graph, Group, replay
from resect.plan import Plan
from resect.surgery.modeling_resect import followers, set_attributes
from resect.surgery.positions import changed

Attributes = dict[str, dict[str, Any]]
AT_ONCE = 3
"""How many attributes of one module may have to change together."""


@dataclass(frozen=True)
class Role:
    """An attribute that counts units, `units * multiple`, of the group of one name in each block, in every module of a class."""

    module_type: type[nn.Module]
    attribute: str
    group: str
    multiple: int


def shape_attributes(model: nn.Module, graph: Graph, plan: Plan, shapes: Mapping[str, list[int]]) -> Attributes:
    """The attributes of each module that have to change with the plan: `{module: {attribute: value}}`.

    `config.x` stands for field `x` of the configuration that the module reads. Raises `ModelError` when the network's code
    cannot take the new sizes. The model is left as it was.
    """
    lost = list(changed(graph, plan))
    groups = [(group, len(keep)) for group, keep in lost]
    removed = plan.removed()
    found = _layer_sizes(model, shapes)
    while True:
        reached, where, problem = _run(model, graph, removed, shapes, found)
        if reached == inf:
            return found
        better = _search(model, graph, removed, shapes, found, groups=groups, where=where)
        if better is None:
            kinds = ", ".join(sorted({group.kind for group, _ in groups}))
            raise ModelError(
                f"{type(model).__name__} cannot be cut this way: its code in {where or 'the model'} does not take the new sizes "
                f"({problem}). Leave out {kinds} of this model, or keep that module whole."
            )
        found = better


def _search(
    model: nn.Module,
    graph: Graph,
    removed: Mapping[str, int],
    shapes: Mapping[str, list[int]],
    found: Attributes,
    *,
    groups: list[tuple[Group, int]],
    where: str,
) -> Attributes | None:
    """The fewest attributes with which the module `where`, or one around it, runs through as the coupling demands."""
    path = where.split(".") if where else []
    for depth in range(len(path), -1, -1):
        around = ".".join(path[:depth])
        roles = list(dict.fromkeys(_candidates(model, graph.blocks, around, groups)))
        for count in range(1, min(len(roles), AT_ONCE) + 1):
            for chosen in combinations(roles, count):
                trial = found
                for role in chosen:
                    trial = _apply(model, graph.blocks, role, groups, trial)
                stopped, at, _ = _run(model, graph, removed, shapes, trial)
                if stopped == inf or not f"{at}.".startswith(f"{where}."):
                    return trial
    return None


def _layer_sizes(model: nn.Module, shapes: Mapping[str, list[int]]) -> Attributes:
    """What layers note of their own weight; setting the weight sets it too, so this serves the replay alone."""
    found: Attributes = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if name in shapes and (values := followers(module, module.weight.shape, shapes[name])):
            found[path] = values
    return found


def _run(
    model: nn.Module,
    graph: Graph,
    removed: Mapping[str, int],
    shapes: Mapping[str, list[int]],
    attributes: Attributes,
) -> tuple[float, str, str]:
    """How many operators of the cut network agree with the coupling, and where the first one does not; inf when all do."""
    with _attributes_set(model, attributes):
        return replay(model, graph, removed, shapes)


def _candidates(model: nn.Module, blocks: Blocks, where: str, groups: list[tuple[Group, int]]) -> Iterator[Role]:
    """Attributes of a module, and of its configuration, that count the units of a group that shrinks around it."""
    layer = blocks.layer_of(f"{where}.")
    near = [group for group, _ in groups if group.layer in (None, layer)] or [group for group, _ in groups]
    module = model.get_submodule(where)
    for name, value in _integers(module):
        for group in near:
            multiple, rest = divmod(value, group.units)
            if not rest and any(member.index.shape[1] % multiple == 0 for member in group.members):
                yield Role(type(module), name, _within_block(group, blocks), multiple)


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if type(value) is int and value > 0:
            yield name, value
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        for name, value in config.to_dict().items():
            if type(value) is int and value > 0:
                yield f"config.{name}", value


def _apply(model: nn.Module, blocks: Blocks, role: Role, groups: list[tuple[Group, int]], found: Attributes) -> Attributes:
    """The attributes with a role given to every module of its class, each with the units that its own block keeps."""
    result = {path: dict(values) for path, values in found.items()}
    kept = {group.layer: (group.units, count) for group, count in groups if _within_block(group, blocks) == role.group}
    for path, module in model.named_modules():
        counts = kept.get(blocks.layer_of(f"{path}."), kept.get(None))
        if module.__class__ is not role.module_type or counts is None:
            continue
        units, count = counts
        if dict(_integers(module)).get(role.attribute) == units * role.multiple:
            result.setdefault(path, {})[role.attribute] = count * role.multiple
    return result


def _within_block(group: Group, blocks: Blocks) -> str:
    return group.name.removeprefix(f"{blocks.path}.{group.layer}.")


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
