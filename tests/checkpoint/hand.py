"""Models cut by hand: slices and records written out, so that these tests need no graph, plan or surgery."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Slices = Mapping[str, Mapping[int, Sequence[int]]]
"""Parameter name -> axis -> positions that stay."""


def cut_by_hand(
    model: PreTrainedModel,
    slices: Slices,
    *,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    removed: Iterable[str] = (),
) -> PreTrainedModel:
    """A cut copy of `model` with its `resect_record`; weights tied before are tied after."""
    model = copy.deepcopy(model)
    removed = list(removed)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, leaf))
    shapes = {}
    for name, axes in slices.items():
        old = model.get_parameter(name)
        new = old.detach()
        for axis, keep in axes.items():
            new = new.index_select(axis, torch.tensor(keep))
        for module, leaf in places[id(old)]:
            setattr(module, leaf, nn.Parameter(new) if module is places[id(old)][0][0] else places[id(old)][0][0].weight)
        shapes[name] = list(new.shape)
    _set(model, attributes or {})
    _drop(model, sorted(removed, key=lambda name: int(name.rpartition(".")[2])))
    model.resect_record = {"shapes": shapes, "attributes": dict(attributes or {}), "removed": removed}  # type: ignore[assignment]
    return model


def _set(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            if name.startswith("config."):
                module.config = copy.copy(module.config)
                setattr(module.config, name.removeprefix("config."), value)
            else:
                setattr(module, name, value)


def _drop(model: PreTrainedModel, removed: Sequence[str]) -> None:
    gone = [int(name.rpartition(".")[2]) for name in removed]
    for field in ("layer_types", "no_rope_layers"):
        if gone and getattr(model.config, field, None):
            setattr(model.config, field, [kind for i, kind in enumerate(getattr(model.config, field)) if i not in gone])
    if gone:
        model.config.num_hidden_layers -= len(gone)
    for name in reversed(removed):
        parent, _, index = name.rpartition(".")
        blocks = model.get_submodule(parent)
        assert isinstance(blocks, nn.ModuleList)
        del blocks[int(index)]
        for number, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number  # type: ignore[assignment]


def channels(layers: Iterable[int], keep: Sequence[int] | Mapping[int, Sequence[int]], *, biases: bool = False) -> Slices:
    """MLP channels of a Llama-like model: the rows of gate and up, the columns of down."""
    slices: dict[str, Mapping[int, Sequence[int]]] = {}
    for layer in layers:
        kept = keep[layer] if isinstance(keep, Mapping) else keep
        path = f"model.layers.{layer}.mlp"
        for name in (f"{path}.gate_proj", f"{path}.up_proj"):
            slices |= {f"{name}.weight": {0: kept}, **({f"{name}.bias": {0: kept}} if biases else {})}
        slices[f"{path}.down_proj.weight"] = {1: kept}
    return slices


def heads(model: PreTrainedModel, keep: Mapping[int, Sequence[int]]) -> Slices:
    """Key-value heads of a Llama-like model with the query heads that read them; `keep` by layer. Biases follow."""
    slices: dict[str, Mapping[int, Sequence[int]]] = {}
    for layer, kept in keep.items():
        attention = model.get_submodule(f"model.layers.{layer}.self_attn")
        size, queries = attention.head_dim, attention.num_key_value_groups
        assert isinstance(size, int)
        assert isinstance(queries, int)
        few = [head * size + i for head in kept for i in range(size)]
        many = [head * queries * size + i for head in kept for i in range(queries * size)]
        for name, rows in (("q_proj", many), ("k_proj", few), ("v_proj", few)):
            path = f"model.layers.{layer}.self_attn.{name}"
            slices[f"{path}.weight"] = {0: rows}
            if model.get_submodule(path).bias is not None:
                slices[f"{path}.bias"] = {0: rows}
        slices[f"model.layers.{layer}.self_attn.o_proj.weight"] = {1: many}
    return slices


def residual(model: PreTrainedModel, keep: Sequence[int], old: int) -> Slices:
    """Residual channels of a Llama-like model: every axis of size `old`, which no other axis may share."""
    return {
        name: {axis: keep for axis, size in enumerate(parameter.shape) if size == old}
        for name, parameter in model.named_parameters()
        if old in parameter.shape
    }


def merged(*parts: Slices) -> Slices:
    """Slices of several kinds together."""
    slices: dict[str, dict[int, Sequence[int]]] = {}
    for part in parts:
        for name, axes in part.items():
            slices.setdefault(name, {}).update(axes)
    return slices
