"""A per-layer model filled up with zeros until all layers are alike, so that a stock configuration says it.

Filling up is a cut read backwards: the largest layer of each kind gives the sizes, the graph of such a model says which
positions every unit owns, and each layer's weights take those of as many units as it has. Everything else is zero, so
attention heads and channels that were added put out nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resect.checkpoint import find_stock, record_of, save
from resect.checkpoint.save import logit_difference, shortened, tolerance
from resect.checkpoint.silence import quiet
from resect.checkpoint.stock import Shapes, Stock, blank, shapes_of
from resect.errors import UsageError
from resect.export.formats import Asked, Format
from resect.export.hf import same_sums
from resect.graph import Group, trace
from resect.surgery.positions import SLICED, missing

Positions = dict[str, dict[int, Tensor]]


def padded(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A stock model that computes what `model` computes, and facts about it. `model` is not changed.

    Raises `UsageError` where layers differ in more than the number of heads and channels.
    """
    record = record_of(model)
    stock_class: type[PreTrainedModel] = getattr(type(model), "stock_class", type(model))
    config = shortened(model, stock_class, record)
    made: list[tuple[PreTrainedModel, float]] = []

    def accept(stock: Stock) -> str:
        found = _filled(model, stock)
        difference = logit_difference(found, model)
        made[:] = [(found, difference)]
        allowed = tolerance(model.dtype)
        return (
            "" if difference <= allowed else f"logits would be off by {difference:.1e} of their spread, {allowed:.0e} is allowed"
        )

    reasons = []
    for target in _targets(model, config, stock_class):
        stock, reason = find_stock(target, config, stock_class, accept=accept)
        if stock is not None:
            break
        reasons.append(reason)
    else:
        raise UsageError(
            f"Asked to fill layers up until they are alike; no stock configuration says the result: {reasons[0].rstrip('.')}. "
            "Use --format hf, or prune with --layout uniform."
        )
    found, difference = made[0]
    added = sum(p.numel() for p in found.parameters()) - sum(p.numel() for p in model.parameters())
    return found, {"added_zeros": added, "logit_difference": difference}


def check(asked: Asked) -> None:
    """Raises `UsageError` for layers that cannot be filled up."""
    if record_of(asked.model)["gathered"]:
        raise UsageError(
            "Asked to fill layers up; single layers keep only some of their rows and columns, which no stock layer does. "
            "Use --format hf."
        )


def _targets(model: PreTrainedModel, config: Any, stock_class: type[PreTrainedModel]) -> Iterator[Shapes]:
    """Shapes to fill layers up to: those of the largest; then with as many heads as the dense model has.

    Some families want heads to be as wide together as the stream.
    """
    largest = _largest(model, config, stock_class)
    yield largest
    dense = blank(config, stock_class)
    shapes = {name: list(shape) for name, shape in largest.items()}
    whole = shapes_of(dense)
    for group in trace(dense).of_kind("heads"):
        for member in group.members:
            shapes[member.parameter][member.axis] = whole[member.parameter][member.axis]
    yield {name: tuple(shape) for name, shape in shapes.items()}


def _largest(model: PreTrainedModel, config: Any, stock_class: type[PreTrainedModel]) -> Shapes:
    """Every parameter's shape if each layer were as large as the largest."""
    shapes, dense = shapes_of(model), shapes_of(blank(config, stock_class))
    largest: Shapes = {}
    for name, shape in shapes.items():
        kind = _layer_free(name)
        largest[kind] = tuple(map(max, shape, largest.get(kind, shape)))
    if nowhere := sorted({_layer_free(name) for name in dense} - set(largest)):
        raise UsageError(
            f"Asked to fill layers up; no layer has {nowhere[0]} any more, and a stock model has it in all. Use --format hf."
        )
    return {name: largest[_layer_free(name)] for name in dense}


def _layer_free(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _filled(model: PreTrainedModel, stock: Stock) -> PreTrainedModel:
    """The stock model with the weights of `model` where its graph says, and zeros elsewhere."""
    empty = blank(stock.config, stock.model_class)
    state, shapes = model.state_dict(), shapes_of(empty)
    gone = _gone(trace(empty).groups, shapes, shapes_of(model))
    filled = {name: _spread(state.get(name), shape, gone.get(name, {}), model.dtype) for name, shape in shapes.items()}
    with quiet():
        made: Any = stock.model_class.from_pretrained(None, config=stock.config, state_dict=filled, dtype=model.dtype)
    found: PreTrainedModel = made.to(model.device).eval()
    if model.can_generate():
        found.generation_config = copy.deepcopy(model.generation_config)
    return found


def _gone(groups: Sequence[Group], shapes: Shapes, sizes: Shapes) -> Positions:
    """For every parameter and axis, the positions of the last units of each group, as many as a layer lacks."""
    gone: Positions = {}
    for group in (group for group in groups if group.kind in SLICED):
        for member in group.members:
            name, axis = member.parameter, member.axis
            if name not in sizes or sizes[name][axis] == shapes[name][axis]:
                continue
            lost, rest = divmod(shapes[name][axis] - sizes[name][axis], member.index.shape[1])
            if rest or lost > group.units:
                raise UsageError(
                    f"Asked to fill layers up; {name} has {sizes[name][axis]} positions, no whole units. Use --format hf."
                )
            gone.setdefault(name, {})[axis] = member.index[group.units - lost :].flatten()
    return gone


def _spread(tensor: Tensor | None, shape: Sequence[int], gone: Mapping[int, Tensor], dtype: torch.dtype) -> Tensor:
    """The tensor with zeros at the positions that it lacks; zeros alone where a sub-layer is gone."""
    if tensor is None:
        return torch.zeros(*shape, dtype=dtype)
    for axis, positions in gone.items():
        stays = missing(shape[axis], positions).nonzero().flatten()
        larger = list(tensor.shape)
        larger[axis] = shape[axis]
        tensor = tensor.new_zeros(larger).index_copy(axis, stays.to(tensor.device), tensor)
    return tensor


def write(asked: Asked, path: Path) -> dict[str, Any]:
    """Writes the directory; gives how many zeros were added."""
    found, facts = padded(asked.model)
    saved = save(found, path, tokenizer=asked.tokenizer, about=asked.about)
    return {"layout": saved.layout, "model_type": saved.model_type, **facts}


FORMAT = Format(
    name="hf-padded",
    consumer="transformers",
    suffix="",
    quantisations=("none",),
    write=write,
    check=check,
    limits=same_sums,
)
