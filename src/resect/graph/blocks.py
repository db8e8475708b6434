"""Where a model keeps its repeated blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a network, numbered through all its stacks in the order they run.

    `modules` has the paths of every block: one module, or several that stand at the same place of lists side by side.
    """

    modules: tuple[tuple[str, ...], ...] = ()
    _layers: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._layers.update({path: layer for layer, paths in enumerate(self.modules) for path in paths})

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.modules)

    @property
    def lists(self) -> tuple[str, ...]:
        """The paths of the lists that hold the blocks."""
        return tuple(dict.fromkeys(path.rpartition(".")[0] for paths in self.modules for path in paths))

    @property
    def path(self) -> str:
        """The list that holds the blocks, or all of them with commas between."""
        return ", ".join(self.lists)

    def layer_of(self, name: str) -> int | None:
        """The number of the block that a parameter, or a module, belongs to; None outside."""
        return next((layer for layer, _ in self._around(name)), None)

    def within(self, name: str) -> str:
        """A name without the part that leads to its block."""
        return next((name[len(path) + 1 :] for _, path in self._around(name)), name)

    def _around(self, name: str) -> Iterator[tuple[int, str]]:
        at = name.find(".")
        while at >= 0:
            if (layer := self._layers.get(name[:at])) is not None:
                yield layer, name[:at]
            at = name.find(".", at + 1)
        if name in self._layers:
            yield self._layers[name], name


def find_blocks(model: nn.Module, streams: Mapping[str, bool]) -> Blocks:
    """The outermost `ModuleList`s whose modules hand on the axes that they take in.

    `streams` says of every module in a list that ran, in the order they were done, whether it does. Lists side by side
    whose modules take turns make one stack.
    """
    order = {path: place for place, path in enumerate(streams)}
    stacks: list[list[str]] = []
    for path in sorted(_stacks(model, "", streams), key=lambda path: min(_turns(model, path, order))):
        if not any(path in stack for stack in stacks):
            stacks.append([path, *_beside(model, path, order)])
    return Blocks(tuple(block for stack in stacks for block in zip(*(_children(model, path) for path in stack), strict=True)))


def _stacks(module: nn.Module, path: str, streams: Mapping[str, bool]) -> Iterator[str]:
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and _is_stack(child, where, streams):
            yield where
        else:
            yield from _stacks(child, where, streams)


def _is_stack(modules: nn.ModuleList, path: str, streams: Mapping[str, bool]) -> bool:
    """Whether the modules are composite and most of those that ran hand on what they took in."""
    inside = dict(modules.named_children())  # a list may hold None beside its modules
    if not inside or not all(any(True for _ in child.children()) for child in inside.values()):
        return False
    if len(inside) > 1 and all(isinstance(child, nn.ModuleList) for child in inside.values()):  # nobody runs a list
        ran = [any(handing_on) for name in inside if (handing_on := _inside(f"{path}.{name}", streams))]
    else:
        ran = [streams[f"{path}.{name}"] for name in inside if f"{path}.{name}" in streams]
    return 2 * sum(ran) > len(ran)


def _inside(path: str, streams: Mapping[str, bool]) -> list[bool]:
    """Of the modules inside a list that ran, whether they hand on what they took in."""
    return [handed for name, handed in streams.items() if name.startswith(f"{path}.")]


def _beside(model: nn.Module, path: str, order: Mapping[str, int]) -> list[str]:
    """Lists beside a stack, as long as it is, whose modules run between its own."""
    parent = path.rpartition(".")[0]
    turns = _turns(model, path, order)
    found = []
    for name, module in model.get_submodule(parent).named_children():
        where = f"{parent}.{name}" if parent else name
        if where == path or not isinstance(module, nn.ModuleList) or len(_children(model, where)) != len(turns) or len(turns) < 2:
            continue
        others = _turns(model, where, order)
        if _alternate(turns, others) or _alternate(others, turns):
            found.append(where)
    return found


def _alternate(turns: Sequence[int], others: Sequence[int]) -> bool:
    return all(left < turn < right for (left, right), turn in zip(pairwise(turns), others, strict=False))


def _turns(model: nn.Module, path: str, order: Mapping[str, int]) -> list[int]:
    """When the modules of a list were done, lists in it with their first module; those that never ran come last."""
    return [_turn(model, child, order) for child in _children(model, path)]


def _turn(model: nn.Module, path: str, order: Mapping[str, int]) -> int:
    inside = model.get_submodule(path)
    if path not in order and isinstance(inside, nn.ModuleList):
        return min(_turns(model, path, order), default=len(order))
    return order.get(path, len(order))


def _children(model: nn.Module, path: str) -> list[str]:
    modules = model.get_submodule(path)
    assert isinstance(modules, nn.ModuleList)
    return [f"{path}.{number}" for number, module in enumerate(modules) if module is not None]
