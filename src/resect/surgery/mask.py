"""Masking: the dense model with the units a plan removes switched off, the reference that a cut is held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from resect.graph import Contest, Frame, Graph, Watcher, trace
from resect.graph.atoms import Axis, coordinates, length
from resect.plan import Plan
from resect.surgery.attributes import group_counts
from resect.surgery.caches import forget
from resect.surgery.modeling_resect import first_tensor, set_attributes, set_tensor
from resect.surgery.positions import changed, kept_positions, missing, removed_blocks, removed_sublayers, take
from resect.surroundings import plain, unaffected, unwrapped


@unaffected("changes")
def mask(model: nn.Module, plan: Plan, graph: Graph | None = None) -> nn.Module:
    """The model with everything the plan removes switched off, in place; its shapes stay.

    Slices of parameters are zero, removed blocks hand on what they take in, removed experts are never chosen.
    A normalisation that runs over removed units (`Group.mixed`) takes its statistics over what stays, as it will after the cut.
    """
    _apply(model, plan, graph or trace(model))
    return model


@contextmanager
def masked(model: nn.Module, plan: Plan, graph: Graph | None = None) -> Iterator[nn.Module]:
    """The model masked while the context lasts, bit-identical afterwards."""
    model = unwrapped(model, "changes")
    with plain(model):
        graph = graph or trace(model)
        parameters = tensors(model)
        before = [(parameters[name], index, _slices(parameters[name], index).clone()) for name, index in _gone(graph, plan)]
        handles = _apply(model, plan, graph)
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        with plain(model), torch.no_grad():
            for parameter, index, values in reversed(before):
                parameter[index] = values
        forget(model)


def _apply(model: nn.Module, plan: Plan, graph: Graph) -> list[RemovableHandle]:
    """Zeros in place, and hooks that run before those of others: what these see is the masked network."""
    forget(model)
    parameters = tensors(model)
    narrowed = {
        path: _narrowed(model, path, graph, plan)
        for path in dict.fromkeys(path for group, _ in changed(graph, plan) for path in group.mixed)
        if path in graph.witness.frames  # others run in training alone
    }
    with torch.no_grad():
        for name, index in _gone(graph, plan):
            parameters[name][index] = 0
    silenced = [one.silences[0].path for one in removed_sublayers(graph, plan)]
    hooks: list[tuple[str, Hook]] = [(path, _put_out_zeros) for path in silenced]
    hooks += [(path, _hand_on) for path in removed_blocks(graph, plan)]
    hooks += narrowed.items()
    # The last one of a module that is registered runs first.
    handles = [
        model.get_submodule(path).register_forward_hook(hook, with_kwargs=True, prepend=True) for path, hook in hooks
    ]
    return [*handles, *_losing(model, graph, plan)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict((*model.named_parameters(), *model.named_buffers()))


Index = tuple[Tensor | slice, ...]
Hook = Callable[[nn.Module, Any, Any, Any], Any]
"""Takes a module, its positional and named arguments, and what it put out."""


def _gone(graph: Graph, plan: Plan) -> Iterator[tuple[str, Index]]:
    """Everything that a plan removes, as parameter and index."""
    for name, axes in kept_positions(graph, plan).items():
        for axis, keep in axes.items():
            if (name, axis) not in graph.spared:
                yield name, (*([slice(None)] * axis), missing(graph.shapes[name][axis], keep).nonzero().flatten())


def _slices(parameter: Tensor, index: Index) -> Tensor:
    return parameter.detach()[index]


def _hand_on(block: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any], output: Any) -> Any:
    """A removed block puts out what it took in."""
    taken = first_tensor((inputs, keywords))
    return taken if isinstance(output, Tensor) else (taken, *output[1:])


def _put_out_zeros(module: nn.Module, inputs: Any, keywords: Any, output: Any) -> Any:
    """A removed sub-layer adds nothing."""
    return torch.zeros_like(output) if isinstance(output, Tensor) else (torch.zeros_like(output[0]), *output[1:])


def _losing(model: nn.Module, graph: Graph, plan: Plan) -> list[RemovableHandle]:
    """Makes removed units lose wherever units compete: hooks that switch it on while such a module runs."""
    names = {id(module): name for name, module in model.named_modules()}
    lost: dict[str, dict[Contest, Tensor]] = {}
    for group, keep in changed(graph, plan):
        gone = missing(group.units, keep)
        for rivals in group.rivals:
            lost.setdefault(rivals.contest.module, {})[rivals.contest] = rivals.index[gone].flatten()
    handles: list[RemovableHandle] = []
    for path, contests in lost.items():
        module = model.get_submodule(path)
        running: list[ExitStack] = []

        def enter(module: nn.Module, inputs: Any, path: str = path, running: Any = running, contests: Any = contests) -> None:
            stack, losing = ExitStack(), Losing(names, path, contests)
            stack.enter_context(losing.watching())
            stack.enter_context(losing)
            running.append(stack)

        def leave(module: nn.Module, inputs: Any, output: Any, running: Any = running) -> None:
            running.pop().close()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    return handles


class Losing(Watcher):
    """Puts minus infinity at the removed positions of operators in which positions compete."""

    def __init__(self, names: Mapping[int, str], path: str, contests: Mapping[Contest, Tensor]) -> None:
        super().__init__(names, path)
        self._contests = {(contest.module, contest.operator, contest.turn): (contest, gone) for contest, gone in contests.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs one operator."""
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        found = self._contests.get((self.where, name, self.turns[self.where][name]))
        if found:
            contest, gone = found
            args = (args[0].index_fill(contest.axis, gone.to(args[0].device), -torch.inf), *args[1:])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _narrowed(model: nn.Module, path: str, graph: Graph, plan: Plan) -> Hook:
    """A hook that makes a normalisation compute over the positions that stay, and put zeros elsewhere, call by call."""
    lost = {group.name: missing(group.units, keep) for group, keep in changed(graph, plan)}
    calls = [_Narrowed.of(model, path, graph, plan, frame, lost) for frame in graph.witness.frames[path]]
    turns = count()

    def narrow(_: nn.Module, inputs: Any, keywords: Any, output: Any) -> Any:
        return calls[next(turns) % len(calls)](inputs, keywords, output)

    return narrow


@dataclass(frozen=True)
class _Narrowed:
    """One call of a normalisation: what stays of the axes that it takes in and puts out, and a copy that computes over it."""

    small: nn.Module
    entering: list[dict[int, Tensor]]
    leaving: list[dict[int, Tensor]]

    @classmethod
    def of(
        cls, model: nn.Module, path: str, graph: Graph, plan: Plan, frame: Frame, lost: Mapping[str, Tensor]
    ) -> _Narrowed:
        entering, leaving = ([_staying(axes, graph, lost) for axes in given] for given in (frame.entering, frame.leaving))
        sizes = {
            length(axes[place]): len(stays)
            for axes, keep in zip(frame.entering, entering, strict=True)
            for place, stays in keep.items()
        }
        return cls(_small(model, path, graph, plan, sizes), entering, leaving)

    def __call__(self, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        if not any(self.entering) and not any(self.leaving):
            return output
        values, structure = tree_flatten((inputs, keywords))
        taken, named = tree_unflatten(map(_taken, values, self.entering), structure)
        whole, structure = tree_flatten(output)
        small = tree_leaves(self.small(*taken, **named))
        return tree_unflatten(map(_scattered, small, self.leaving, whole), structure)


def _small(model: nn.Module, path: str, graph: Graph, plan: Plan, sizes: Mapping[int, int]) -> nn.Module:
    """A copy of a module as it will be after the cut, in which axes of some sizes get others."""
    module, everything = model.get_submodule(path), tensors(model)
    own = tensors(module)
    kept = {id(everything[name]): axes for name, axes in kept_positions(graph, plan).items()}  # they may be tied to another's
    small = copy.deepcopy(module)
    inside = {name: kept[id(tensor)] for name, tensor in own.items() if id(tensor) in kept}
    flat = all(own[name].ndim == 1 for name in inside)
    for name, value in vars(module).items():  # some norms note their width, and insist on it
        if flat and type(value) in (int, tuple) and value in {*sizes, *((size,) for size in sizes)}:
            setattr(small, name, sizes[value] if type(value) is int else (sizes[value[0]],))
    for name, axes in inside.items():
        set_tensor(small, name, take(tensors(small)[name].detach(), axes))
    set_attributes(small, {"": group_counts(model, graph, plan).get(path, {})})
    return small


def _staying(axes: Sequence[Axis], graph: Graph, lost: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The positions that stay of every axis that loses some."""
    found: dict[int, Tensor] = {}
    for place, axis in enumerate(axes):
        gone = torch.zeros(length(axis), dtype=torch.bool)
        for atom, coordinate in coordinates(axis).items():
            name = graph.witness.groups.get(atom, "")
            if name in lost:
                gone |= lost[name][coordinate] & (coordinate >= 0)
        if gone.any():
            found[place] = (~gone).nonzero().flatten()
    return found


def _taken(value: Any, keep: Mapping[int, Tensor]) -> Any:
    return take(value, keep) if isinstance(value, Tensor) else value


def _scattered(value: Any, keep: Mapping[int, Tensor], whole: Any) -> Any:
    """A tensor with zeros where positions are missing."""
    for axis, index in keep.items():
        shape = [*value.shape[:axis], whole.shape[axis], *value.shape[axis + 1 :]]
        value = value.new_zeros(shape).index_copy(axis, index.to(value.device), value)
    return value
