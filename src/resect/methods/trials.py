"""Prices by trial: what removing a part of one group costs, measured, beside what its ladder says.

Quadratic losses are wrong by much the same factor all over a layer: on language models the last blocks lose more than they say,
those in the middle less. One trial of each group finds it. Not in any of the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, isfinite
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from tqdm import tqdm

from resect.evaluation import Onward, evaluating, first_block
from resect.graph import Graph, Group
from resect.plan import Plan
from resect.ranges import Numbers
from resect.saliency import Ladder
from resect.statistics import Data, loss_of
from resect.surgery import masked, reading


class Trials(Numbers):
    """How removals are tried."""

    predictions: int = Field(default=8192, ge=1)
    """So many are measured, of batches spread over all calibration data: tokens of a text, samples of a classifier."""
    share: float = Field(default=0.1, gt=0, le=1)
    """A trial removes what the ladders alone would, and this share of the units of a group at least."""
    bounds: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.7, 3.0)
    """The least and the most by which a price changes: one removal of few units on little text is no more certain than that."""

    @field_validator("bounds")
    @classmethod
    def _in_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not bounds[0] <= bounds[1]:
            raise ValueError(f"bounds = {list(bounds)}: the least factor comes first, then the most. Write [0.7, 3.0].")
        return bounds


def tried(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    ladders: Mapping[str, Ladder],
    data: Data,
    asked: Trials,
    *,
    plan: Plan,
    counts: Mapping[str, int],
    update: Callable[[Plan], None],
) -> dict[str, float]:
    """The factor by which the losses of each group are to be multiplied; 1 where nothing more can go.

    `plan` says what is gone already, `counts` how many units a trial takes off besides, the first of the ladder. `update(plan)`
    makes up for what a plan of one group removes, in place. The model is left bit-identical. On batches of tokens runs begin with
    the block of the group.
    """
    batches, found = spread(data.batches, asked.predictions), dict.fromkeys((group.name for group in groups), 1.0)
    with evaluating(model), masked(model, plan, graph):
        tokens = all(isinstance(batch, Tensor) and batch.ndim == 2 for batch in batches)
        onward = (Onward.of(model, graph, batches) if tokens else None) or Onward(model, (), batches)
        before = _nats(model, data, onward)
        downwards = sorted(groups, key=lambda group: first_block(graph, group))
        for group in tqdm(downwards, "trials", unit="group", leave=False, delay=2):
            onward.advance_to(first_block(graph, group))
            kept, order = plan.groups[group.name], ladders[group.name].order
            count = min(max(counts[group.name], ceil(asked.share * group.units)), len(order), len(kept.keep) - graph.least(group))
            if count < 1:
                continue
            keep = tuple(sorted(set(kept.keep) - set(order[:count].tolist())))
            alone = Plan(groups={group.name: kept.model_copy(update={"keep": keep})})
            with _as_they_are(model, graph, alone):
                update(alone)
                with masked(model, alone, graph):
                    measured = _nats(model, data, onward) - before
            expected = float(ladders[group.name].losses[:count].sum())
            least, most = asked.bounds
            found[group.name] = min(max(measured / expected, least), most) if isfinite(measured) and expected > 0 else most
    return found


def spread(batches: Sequence[Any], predictions: int) -> list[Any]:
    """Batches at even distances, as many as have so many tokens or samples, or all."""
    first = batches[0]
    tokens = first.get("input_ids") if isinstance(first, Mapping) else first
    size = tokens.numel() if isinstance(tokens, Tensor) else len(first[0])
    count = min(len(batches), ceil(predictions / size))
    return [batches[place * len(batches) // count] for place in range(count)]


def _nats(model: nn.Module, data: Data, onward: Onward) -> float:
    """Mean loss of a prediction."""
    total, predictions = 0.0, 0
    for number, batch in enumerate(onward.batches):
        with onward.passing(number):
            logits, labels = data.objective.predict(model, batch)
        total, predictions = total + float(loss_of(logits, labels)), predictions + len(labels)
    return total / max(predictions, 1)


@contextmanager
def _as_they_are(model: nn.Module, graph: Graph, plan: Plan) -> Iterator[None]:
    """Layers that lose inputs get their weights back afterwards."""
    layers = [loss.layer for loss in reading(model, graph, plan)]
    before = [(part, part.detach().clone()) for layer in layers for part in (layer.weight, layer.bias) if part is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, values in before:
                part.copy_(values)
