"""Removing what a plan does not keep: the model gets smaller, in place."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from resect.errors import UsageError
from resect.graph import Graph, kept_length, trace
from resect.plan import Plan
from resect.surgery.attributes import shape_attributes
from resect.surgery.modeling_resect import resize, set_tensor
from resect.surgery.positions import changed, kept_positions, removed_blocks, removed_sublayers, take


class Record(BaseModel):
    """What surgery did, so that it can be replayed on an empty dense model.

    Shapes of parameters, attributes of modules, stand-ins for removed sub-layers and what is idle without them, removed blocks.
    """

    shapes: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, Any]] = {}
    silent: dict[str, dict[str, int]] = {}
    removed: list[str] = []


def cut(model: nn.Module, plan: Plan, graph: Graph | None = None) -> nn.Module:
    """The model without the units that the plan removes, in place; parameters, ties and dtypes stay what they were.

    What was done is kept on the model as `resect_record`. `graph` is the model's own, traced when not given.
    Raises `UsageError` for a plan of another network and `ModelError` when the network's code cannot take the new sizes;
    the model is then unchanged.
    """
    if getattr(model, "resect_record", None):
        raise UsageError("The model is cut already, and a plan counts units of the dense model. Load the dense model again.")
    graph = graph or trace(model)
    record = plan_record(model, plan, graph)
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    positions = kept_positions(graph, plan)
    for name in record.shapes:
        with torch.no_grad():
            set_tensor(model, name, take(tensors.pop(name), positions[name]))
    resize(model, {**record.model_dump(), "shapes": {}})
    model.resect_record = record  # type: ignore[assignment]
    return model


def plan_record(model: nn.Module, plan: Plan, graph: Graph) -> Record:
    """What cutting will do to the model, without doing it."""
    blocks = removed_blocks(graph, plan)
    silences = [silence for sublayer in removed_sublayers(graph, plan) for silence in sublayer.silences]
    gone = tuple(f"{path}." for path in (*blocks, *(silence.path for silence in silences)))
    shapes = {
        name: [len(axes[axis]) if axis in axes else size for axis, size in enumerate(graph.shapes[name])]
        for name, axes in kept_positions(graph, plan).items()
    }
    attributes = shape_attributes(model, graph, plan, shapes)
    units = {group.name: len(keep) for group, keep in changed(graph, plan)}
    kept = {atom: units.get(name, atom.size) for atom, name in graph.witness.groups.items()}
    return Record(
        shapes={name: shape for name, shape in shapes.items() if not name.startswith(gone)},
        attributes={path: values for path, values in attributes.items() if not f"{path}.".startswith(gone)},
        silent={one.path: {"width": kept_length(one.width, kept), "returns": one.returns} for one in silences},
        removed=blocks,
    )
