"""Cut equals mask for any network: every number that it puts out, for random plans of each kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import resect
from resect.graph import Graph
from resect.plan import Plan
from tests.models import random_plan

TOLERANCE = 1e-4
"""Largest difference of an output as a share of its standard deviation, in float32."""

Inputs = Mapping[str, Any] | tuple[Any, ...]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every floating-point tensor that the model puts out."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return [tensor for tensor in tensors(output) if tensor.is_floating_point() and tensor.numel() > 1]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest, as a share of the standard deviation on the left."""
    pairs = [(a.double(), b.double()) for a, b in zip(left, right, strict=True)]
    assert pairs
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in pairs)
    return max(float((a - b).abs().max() / a.std().clamp_min(1e-30)) for a, b in pairs)


def assert_cut_equals_mask(model: nn.Module, graph: Graph, inputs: Inputs, plan: Plan) -> None:
    """For one plan that removes something."""
    assert any(kept.removed for kept in plan.groups.values())
    with resect.masked(model, plan, graph):
        expected = outputs(model, inputs)
    small = resect.cut(copy.deepcopy(model), plan, graph)
    assert difference(expected, outputs(small, inputs)) <= TOLERANCE
    assert sum(p.numel() for p in small.parameters()) == graph.parameter_count(plan.removed())


def plans(graph: Graph, seed: int = 1) -> dict[str, Plan]:
    """A random plan for each kind that has something to remove; the vocabulary has tests of its own."""
    kinds = dict.fromkeys(group.kind for group in graph.groups if group.kind != "vocabulary")
    drawn = {kind: random_plan(graph, seed, uniform=True, kinds=[kind]) for kind in kinds}
    return {kind: plan for kind, plan in drawn.items() if any(kept.removed for kept in plan.groups.values())}
