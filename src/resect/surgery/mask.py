"""Masking: the dense model with the units a plan removes switched off, the reference that a cut is held against."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resect.errors import ModelError
from resect.graph import Graph, trace
from resect.plan import Plan
from resect.surgery.modeling_resect import set_tensor
from resect.surgery.positions import kept_positions, removed_blocks


def mask(model: nn.Module, plan: Plan, graph: Graph | None = None) -> nn.Module:
    """The model with everything the plan removes set to zero, in place; its shapes stay.

    A normalisation that runs over removed units (`Group.mixed`) takes its statistics over what stays, as it will after the cut.
    """
    _apply(model, plan, graph or trace(model))
    return model


@contextmanager
def masked(model: nn.Module, plan: Plan, graph: Graph | None = None) -> Iterator[nn.Module]:
    """The model masked while the context lasts, bit-identical afterwards."""
    graph = graph or trace(model)
    parameters = dict(model.named_parameters())
    before = [(parameters[name], index, _slices(parameters[name], index).clone()) for name, index in _gone(graph, plan)]
    handles = _apply(model, plan, graph)
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for parameter, index, values in reversed(before):
                parameter[index] = values


def _apply(model: nn.Module, plan: Plan, graph: Graph) -> list[RemovableHandle]:
    parameters = dict(model.named_parameters())
    narrowed = [
        _narrow(model.get_submodule(path), path, graph, plan)
        for path in dict.fromkeys(path for name, kept in plan.groups.items() if kept.removed for path in graph.group(name).mixed)
    ]
    with torch.no_grad():
        for name, index in _gone(graph, plan):
            parameters[name][index] = 0
    return narrowed


Index = tuple[Tensor | slice, ...]


def _gone(graph: Graph, plan: Plan) -> Iterator[tuple[str, Index]]:
    """Everything that a plan removes, as parameter and index."""
    for name, axes in kept_positions(graph, plan).items():
        for axis, keep in axes.items():
            lost = torch.ones(graph.shapes[name][axis], dtype=torch.bool)
            lost[keep] = False
            yield name, (*([slice(None)] * axis), lost.nonzero().flatten())
    for block in removed_blocks(graph, plan):
        yield from ((name, (slice(None),)) for name in graph.shapes if name.startswith(f"{block}."))


def _slices(parameter: Tensor, index: Index) -> Tensor:
    return parameter.detach()[index]


def _narrow(module: nn.Module, path: str, graph: Graph, plan: Plan) -> RemovableHandle:
    """Makes a normalisation compute over the positions that stay, and put zeros elsewhere."""
    positions = {
        name.removeprefix(f"{path}."): axes[0]
        for name, axes in kept_positions(graph, plan).items()
        if name.startswith(f"{path}.")
    }
    if not positions:
        raise ModelError(f"{path} normalises over removed units but has no weight that says where they are; keep them whole.")
    keep = next(iter(positions.values()))
    small = copy.deepcopy(module)
    for name, index in positions.items():
        set_tensor(small, name, small.get_parameter(name).detach()[index.to(small.get_parameter(name).device)])

    def narrow(_: nn.Module, inputs: Sequence[Any], output: Tensor) -> Tensor:
        index = keep.to(output.device)
        return torch.zeros_like(output).index_copy(-1, index, small(inputs[0].index_select(-1, index)))

    return module.register_forward_hook(narrow)
