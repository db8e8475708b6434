"""What discovery finds in one model type, and whether cutting it computes what masking it computes."""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import resect
from resect.errors import ModelError
from resect.graph import Graph
from resect.plan import Plan
from resect.surgery import kept_tokens
from tests.models import random_plan
from tests.zoo.shrink import build

INSIDE = ("heads", "channels", "experts")
UNUSED = "not used in the traced run"
TOLERANCE = 1e-4
"""Largest logit difference as a share of the logits' standard deviation, in float32."""


@dataclass
class Row:
    """One line of the table."""

    type: str
    parameters: int = 0
    blocks: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    prunable: float = 0.0
    """The share of the block parameters in use that heads, channels and experts together hold."""
    unused: float = 0.0
    """The share of block parameters that the run never used: cross-attention of a decoder by itself."""
    frozen: dict[str, int] = field(default_factory=dict)
    """Parameters' axes that are kept whole, by reason."""
    differences: dict[str, float] = field(default_factory=dict)
    """By kind, the largest difference between cut and masked logits, as a share of their standard deviation."""
    exact: dict[str, float | None] = field(default_factory=dict)
    """The same in float64, or None where the network does not run in it; code that rounds on its way differs there, too."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Groups without their block's number that surgery refused, and why; the others of their kind were cut."""
    refused: dict[str, str] = field(default_factory=dict)
    """Kinds that surgery refused, and why."""
    problem: str = ""
    seconds: float = 0.0

    @property
    def verified(self) -> bool:
        """Whether every kind that is offered was cut and computes what the masked model computes."""
        return not self.problem and not self.refused and all(value <= TOLERANCE for value in self.differences.values())


def examine(model_type: str, *, seed: int = 0, row: Row | None = None, double: bool = True) -> Row:
    """Traces the small model of a type on the meta device, then cuts a real one, kind by kind; fills in `row` if given.

    Without `double` nothing is compared in float64.
    """
    row = row or Row(model_type)
    start = time.perf_counter()
    try:
        graph = resect.trace(build(model_type))
        row.seconds = time.perf_counter() - start
        describe(row, graph)
        model = lively(build(model_type, device="cpu"), seed)
        if not graph.witness.fake:  # it looks at values: at its own from now on
            graph = resect.trace(model)
        model.set_experts_implementation("eager")  # type: ignore[operator]  # the kernel for grouped products takes widths of 16 bytes only
    except Exception as problem:  # the table says what went wrong
        row.problem = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        return row
    for kind in dict.fromkeys(group.kind for group in graph.groups):
        try:
            row.differences[kind], row.exact[kind] = _compare(row, model, graph, kind, seed, double)
        except Exception as problem:
            row.refused[kind] = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return row


def _compare(
    row: Row, model: nn.Module, graph: Graph, kind: str, seed: int, double: bool
) -> tuple[float, float | None]:
    """The differences for a random plan of a kind, without the groups that surgery refuses by name."""
    plans = (random_plan(graph, number, uniform=False, kinds=[kind]) for number in range(seed, seed + 50))
    plan = next(plan for plan in plans if plan.removed())
    while True:
        try:
            return differences(model, graph, plan, seed, double=double)
        except ModelError as problem:
            refused = {graph.blocks.within(name) for name in problem.groups}
            left = {name: kept for name, kept in plan.groups.items() if graph.blocks.within(name) not in refused}
            plan = Plan(groups=left)
            if not refused or not plan.removed():
                raise
            row.left_out.update(dict.fromkeys(refused, " ".join(str(problem).split())))


def describe(row: Row, graph: Graph) -> None:
    """Fills in what was found."""
    row.parameters = graph.parameter_count()
    row.blocks = graph.blocks.count
    row.groups = dict(Counter(group.kind for group in graph.groups))
    idle = {item.parameter for item in graph.frozen if item.reason == UNUSED}
    idle = {name for name in idle if graph.blocks.layer_of(name) is not None}
    row.unused = sum(math.prod(graph.shapes[name]) for name in idle) / max(graph.parameter_count(blocks_only=True), 1)
    blocks = graph.parameter_count(blocks_only=True) * (1 - row.unused)
    removed = {group.name: group.units for group in graph.of_kind(*INSIDE) if group.layer is not None}
    gone = graph.parameter_count(blocks_only=True) - graph.parameter_count(removed, blocks_only=True)
    row.prunable = gone / blocks if blocks else 0.0
    row.frozen = dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".N", item.reason) for item in graph.frozen))


def lively(model: nn.Module, seed: int) -> nn.Module:
    """The model with noise on all it has learned, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(parameter.nan_to_num(0.0) + 0.05 * noise)
    return model.eval()


def differences(
    model: nn.Module, graph: Graph, plan: Plan, seed: int, *, double: bool = True
) -> tuple[float, float | None]:
    """How far cut and masked logits are apart, as a share of their standard deviation: in float32, and in float64."""
    cut = resect.cut(copy.deepcopy(model), plan, graph)
    found = difference(model, cut, graph, plan, seed)
    if not double:
        return found, None
    try:
        return found, difference(copy.deepcopy(model).double(), cut.double(), graph, plan, seed)
    except RuntimeError:  # code that makes float32 of its own
        return found, None


def difference(model: nn.Module, cut: nn.Module, graph: Graph, plan: Plan, seed: int) -> float:
    """How far the logits of a cut network are from the masked one's, as a share of their standard deviation."""
    tokens = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(seed))
    keep = kept_tokens(graph, plan)
    new = tokens if keep is None else tokens % len(keep)
    tokens = tokens if keep is None else keep[new]
    with resect.masked(model, plan, graph):
        expected = logits(model, tokens) if keep is None else logits(model, tokens)[..., keep]
    found = logits(cut, new)
    spread = expected.double().std().clamp_min(1e-30)
    return float((found.double() - expected.double()).abs().max() / spread)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's logits without a cache."""
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens, use_cache=False).logits
    return output
