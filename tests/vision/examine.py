"""What discovery finds in one classification network, and whether cutting it computes what masking it computes."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import resect
from resect.errors import ModelError
from resect.graph import Graph
from resect.plan import Plan
from tests.models import random_plan
from tests.vision.images import build, images, lively

TOLERANCE = 1e-4
"""Largest difference of the outputs as a share of their standard deviation, in float32."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    parameters: int = 0
    side: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    prunable: float = 0.0
    """The share of all parameters that goes with all units of all groups but blocks."""
    frozen: dict[str, int] = field(default_factory=dict)
    """Positions that are kept whole, by reason."""
    differences: dict[str, float] = field(default_factory=dict)
    """By kind, the largest difference between cut and masked outputs."""
    left_out: dict[str, int] = field(default_factory=dict)
    """By kind, groups left out of the plan, because the network's own code does not take their new sizes."""
    refused: dict[str, str] = field(default_factory=dict)
    """Kinds that could not be cut at all, and why."""
    problem: str = ""
    traced: float = 0.0
    """Seconds of the trace."""
    seconds: float = 0.0

    @property
    def verified(self) -> bool:
        """Whether every kind that is offered was cut, and the cut network computes what the masked one computes."""
        right = all(value <= TOLERANCE for value in self.differences.values())
        return bool(self.differences) and right and not self.problem and not self.refused


def examine(name: str, *, seed: int = 0) -> Row:
    """Traces a network with random weights, then cuts it, kind by kind."""
    row, start = Row(name), time.perf_counter()
    try:
        model = lively(build(name), seed)
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        x = images(model, seed)
        row.side = x.shape[-1]
        before = time.perf_counter()
        graph = resect.trace(model, (x,))
        row.traced = time.perf_counter() - before
        describe(row, graph)
        for kind in row.groups:
            _compare(row, model, graph, x, kind, seed)
    except Exception as problem:  # the table says what went wrong
        row.problem = _said(problem)
    row.seconds = time.perf_counter() - start
    return row


def describe(row: Row, graph: Graph) -> None:
    """Fills in what was found."""
    row.groups = dict(Counter(group.kind for group in graph.groups))
    everything = {group.name: group.units for group in graph.groups if group.kind != "blocks"}
    row.prunable = 1 - graph.parameter_count(everything) / graph.parameter_count()
    reasons = Counter[str]()
    for item in graph.frozen:
        reasons[re.sub(r"\.\d+(?=\.|$)", ".N", item.reason)] += item.size
    row.frozen = dict(reasons.most_common(12))


def plan_for(graph: Graph, kind: str, seed: int) -> Plan:
    """A random plan of one kind that removes something."""
    plans = (random_plan(graph, number, uniform=False, kinds=[kind]) for number in range(seed, seed + 100))
    return next((plan for plan in plans if any(kept.removed for kept in plan.groups.values())), Plan(groups={}))


def difference(model: nn.Module, plan: Plan, graph: Graph, x: Tensor) -> float:
    """How far cut and masked outputs are apart, as a share of their standard deviation."""
    small = resect.cut(copy.deepcopy(model), plan, graph)
    with resect.masked(model, plan, graph):
        expected = outputs(model, x)
    return float((outputs(small, x) - expected).abs().max() / expected.std().clamp_min(1e-30))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """All that a network puts out, in one row."""
    with torch.no_grad():
        return torch.cat([value.flatten().double() for value in tree_leaves(model(x)) if isinstance(value, Tensor)])


def _compare(row: Row, model: nn.Module, graph: Graph, x: Tensor, kind: str, seed: int) -> None:
    """Cuts one kind; groups whose new sizes the network's code does not take are left out, where surgery names them."""
    plan = plan_for(graph, kind, seed)
    while plan.groups:
        try:
            row.differences[kind] = difference(model, plan, graph, x)
        except ModelError as problem:
            row.refused[kind] = _said(problem)
            left = {name: kept for name, kept in plan.groups.items() if name not in problem.groups}
            if len(left) == len(plan.groups):
                return
            row.left_out[kind] = row.left_out.get(kind, 0) + len(plan.groups) - len(left)
            plan = Plan(groups=left)
            if not any(kept.removed for kept in left.values()):
                return
        else:
            row.refused.pop(kind, None)
            return


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:400]
