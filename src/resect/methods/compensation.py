"""Making up for what a plan removes: the layers that read removed units are updated, whatever method chose them.

Source: LLM Surgeon (arXiv 2312.17244), section 3.4, for columns. With the inputs of the pruned prefix it is a ridge regression
of what a layer put out on what it takes in now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from resect.graph import Graph
from resect.plan import Plan
from resect.ranges import Numbers
from resect.statistics import Chain, Data, Moments, Prefix, collect_curvature, prepared
from resect.surgery import Loss, masked, reading, without_columns, without_columns_after, without_columns_under

Known = Callable[[str], Moments | None]


class Compensation(Numbers):
    """Settings of the update."""

    inputs: Literal["dense", "pruned"] = "dense"
    """What layers are thought to take in: what they do before the cut, or what is left after everything before them was cut."""
    damping: float = Field(default=0.01, ge=0)


def compensate(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    data: Data,
    asked: Compensation,
    *,
    known: Known = lambda path: None,
    damping_gradients: float | None = None,
) -> None:
    """Updates, in place, the layers that read units which the plan removes; their columns of these are zero afterwards.

    `known(path)` gives moments of a layer that were collected before; those of others are collected. Gradients count only where
    moments have a second term, and are damped by `damping_gradients`. Where the blocks of the network do not talk through their
    hidden states alone, and for units that run through all of them, inputs are those before the cut.
    """
    with prepared(model):
        chain = Chain.to_predict(model, graph, data.batches[0], data.objective) if asked.inputs == "pruned" else None
        at_once = plan.of_layer(None) if chain else plan
        if losses := reading(model, graph, at_once):
            _at_once(model, graph, losses, data, asked, known, damping_gradients)
        if chain:
            _after_prefix(model, chain, graph, plan, data, asked.damping)


def _at_once(
    model: nn.Module,
    graph: Graph,
    losses: Sequence[Loss],
    data: Data,
    asked: Compensation,
    known: Known,
    damping_gradients: float | None,
) -> None:
    """With the inputs that the layers have now."""
    by_path = {loss.layer.path: loss for loss in losses}
    updated: dict[str, Tensor] = {}  # written when all is measured

    def update(path: str, moments: Moments) -> None:
        layer, columns = by_path[path].layer, by_path[path].columns
        curvature = moments.curvature(path, damping=asked.damping, damping_gradients=damping_gradients)
        found = without_columns_under(layer.matrix(), curvature, columns)
        updated[path] = found.to(layer.weight.dtype)

    for path in by_path:
        if moments := known(path):
            update(path, moments)
    if unknown := [path for path in by_path if path not in updated]:
        collect_curvature(model, data.batches, graph, unknown, update, fisher="activations", objective=data.objective)
    for path, matrix in updated.items():
        by_path[path].layer.write(matrix)


def _after_prefix(model: nn.Module, chain: Chain, graph: Graph, plan: Plan, data: Data, damping: float) -> None:
    """With what is left of the inputs after everything before a layer was cut and updated."""
    prefix = Prefix(chain, data.batches, data.objective.counted)
    for number in prefix.blocks():
        part = plan.of_layer(number)
        losses = [loss for loss in reading(model, graph, part) if graph.blocks.layer_of(loss.layer.path) == number]
        routed = {loss.layer.path for loss in losses if not prefix.sees_all(loss.layer)}
        moments = prefix.moments([loss.layer for loss in losses if loss.layer.path in routed])
        weights = {loss.layer.path: loss.layer.matrix() for loss in losses}
        updated = {}
        with masked(model, part, graph):
            for loss in losses:
                layer, weight = loss.layer, weights[loss.layer.path]
                if layer.path in routed:
                    A = moments[layer.path].curvature(layer.path, damping=damping).A
                    updated[layer.path] = without_columns(weight, A, loss.columns)
                else:
                    inputs, crossing = prefix.measure([layer])[layer.path].means()
                    updated[layer.path] = without_columns_after(weight, inputs, crossing, loss.columns, damping=damping)
                layer.write(updated[layer.path])
            prefix.advance()
        for loss in losses:  # what was masked came back
            loss.layer.write(updated[loss.layer.path])
