"""A transformers model whose layers have sizes of their own: the dense one, with a surgery record replayed on it.

This file needs torch and transformers only and is shipped, unchanged, beside every checkpoint that no stock
configuration can express. `config.json` there holds the dense configuration (with as many layers as are left) and,
under `resect`, the record: which parameters are smaller, which attributes of which modules follow, and which blocks
are gone. A model is built by the dense architecture's own code, cut to the record's sizes while it is still empty,
and then filled with the weights.

`Resect<Name>` stands for the transformers class `<Name>` cut this way, for every configuration and model class:
`ResectLlamaConfig`, `ResectLlamaModel`, `ResectLlamaForCausalLM`, ...
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Record = Mapping[str, Any]
"""What was cut, in dense numbering: `{"shapes": {parameter: sizes}, "attributes": {module: {name: value}},
"silent": {module: {"width": size, "returns": items}}, "removed": [block]}`."""

PREFIX = "Resect"
# Attributes in which torch and transformers layers repeat the size of an axis of their weight.
SIZES = {
    **{"out_features": 0, "in_features": 1, "num_embeddings": 0, "embedding_dim": 1, "nx": 0, "nf": 1},
    **{"out_channels": 0, "in_channels": 1, "num_features": 0, "num_channels": 0},
}
# Attributes by which the modules of a block know its number, and thereby its slot in the KV cache.
NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")


def resize(model: nn.Module, record: Record) -> nn.Module:
    """The dense `model` with the shapes, attributes and blocks of `record`, in place.

    The model is freshly built, usually on the meta device; weights that exist keep their leading slices, so what is
    left has the right sizes and sane values, not the cut model's. Tied parameters stay tied. Raises `ValueError` when
    the record was made for another model.
    """
    record = _localized(model, record)
    _set_shapes(model, _with_tied(model, record["shapes"]))
    set_attributes(model, record["attributes"])
    remove(model, record["silent"], record["removed"])
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model


def shorten(config: PreTrainedConfig, indices: Iterable[int], *, blocks: int) -> None:
    """Makes `config` speak of the blocks that stay: the layer count and every list with one entry a layer, in place.

    `indices` are the blocks that go, out of `blocks`. A configuration that does not speak of `blocks` layers is left
    alone.
    """
    gone = set(indices)
    if not gone or getattr(config, "num_hidden_layers", None) != blocks:
        return
    for name, entries in _per_layer(config, blocks):
        setattr(config, name, type(entries)(entry for index, entry in enumerate(entries) if index not in gone))
    config.num_hidden_layers = blocks - len(gone)


def lengthen(config: PreTrainedConfig, indices: Iterable[int]) -> None:
    """The inverse of `shorten`: makes room for the blocks `indices`, so that the dense model can be built, in place.

    What the lists say about those blocks is unknown and does not matter, since they are removed again: each takes the
    entry of a neighbour that stays.
    """
    gone = sorted(set(indices))
    left = getattr(config, "num_hidden_layers", None)
    if not gone or left is None:
        return
    for name, entries in _per_layer(config, left):
        longer = list(entries)
        for index in gone:
            longer.insert(index, longer[min(index, len(longer) - 1)])
        setattr(config, name, type(entries)(longer))
    config.num_hidden_layers = left + len(gone)


def removed_blocks(record: Record) -> tuple[str, list[int]]:
    """The module list that holds the blocks and the numbers of those removed from it: `("model.layers", [7, 9])`."""
    paths = [name.rpartition(".") for name in record.get("removed", ())]
    return (paths[0][0] if paths else ""), sorted(int(index) for _, _, index in paths)


class Resized:
    """What every `Resect...` model class adds to its stock class: the record, replayed before the weights arrive."""

    stock_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        record = getattr(config, "resect", None) or {}
        lengthen(config, removed_blocks(record)[1])
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        resize(self, record)  # type: ignore[arg-type]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls.stock_class._can_set_attn_implementation())

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Sets it for the whole model, modules with a configuration of their own included."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        whole = self.config  # type: ignore[attr-defined]
        for module in self.modules():  # type: ignore[attr-defined]
            config: Any = getattr(module, "config", None)
            if config is not whole and type(config) is type(whole):
                config._attn_implementation_internal = whole._attn_implementation_internal


def __getattr__(name: str) -> type:
    """The `Resect` counterpart of a transformers class, made on first use."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        made = _config_class(name, stock)
    elif isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        made = _model_class(name, stock)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def _config_class(name: str, stock: type[PreTrainedConfig]) -> type:
    """`stock` under a model type of its own, with a record; `from_pretrained` and `save_pretrained` know this file."""
    values = {"model_type": f"resect_{stock.model_type}", "resect": None, "_auto_class": "AutoConfig"}
    return type(name, (stock,), {**values, "__module__": __name__, "__doc__": f"`{stock.__name__}` with a surgery record."})


def _model_class(name: str, stock: type[PreTrainedModel]) -> type:
    """`stock` with a record replayed."""
    config_class = stock.config_class
    assert config_class is not None
    values = {
        "stock_class": stock,
        "config_class": globals().get(PREFIX + config_class.__name__) or __getattr__(PREFIX + config_class.__name__),
        "_auto_class": "AutoModelForCausalLM" if stock.can_generate() else "AutoModel",
    }
    return type(name, (Resized, stock), {**values, "__module__": __name__, "__doc__": f"`{stock.__name__}`, cut."})


def _localized(model: nn.Module, record: Record) -> Record:
    """The record in the names of `model`: those of a model with a head, or, below the prefix, of the bare one."""
    shapes, attributes, silent, removed = (record.get(key) or {} for key in ("shapes", "attributes", "silent", "removed"))
    prefix = getattr(model, "base_model_prefix", "")
    start = prefix + "."
    names = (*shapes, *attributes, *silent, *removed)
    if prefix and not hasattr(model, prefix) and any(name.startswith(start) for name in names):
        shapes = {name.removeprefix(start): size for name, size in shapes.items() if name.startswith(start)}
        named = {f"{name}." if name else "": values for name, values in attributes.items()}
        attributes = {name[len(start) : -1]: values for name, values in named.items() if name.startswith(start)}
        silent = {name.removeprefix(start): values for name, values in silent.items() if name.startswith(start)}
        removed = [name.removeprefix(start) for name in removed if name.startswith(start)]
    return {"shapes": shapes, "attributes": attributes, "silent": silent, "removed": removed}


def _with_tied(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The shapes under every name of a tied parameter: while a checkpoint loads, what will be tied is not yet."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    pairs = [*tied.items(), *((source, target) for target, source in tied.items())]
    return {**{one: shapes[other] for one, other in pairs if other in shapes}, **shapes}


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts `tensor` in the place of a parameter or buffer, wherever it is tied; layers note their new size.

    A parameter stays a parameter with its `requires_grad`. The new tensor is not copied.
    """
    path, _, leaf = name.rpartition(".")
    old = getattr(model.get_submodule(path), leaf)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for module in model.modules():
        for own, found in [*module._parameters.items(), *module._buffers.items()]:
            if found is not None and found is old:
                setattr(module, own, new)
                if own == "weight":
                    for attribute, value in followers(module, old.shape, tensor.shape).items():
                        setattr(module, attribute, value)


def followers(module: nn.Module, old: Sequence[int], new: Sequence[int]) -> dict[str, Any]:
    """The attributes in which a layer repeats the shape of its weight, for a new shape."""
    values: dict[str, Any] = {
        name: new[axis]
        for name, axis in SIZES.items()
        if axis < len(new) and getattr(module, name, None) == old[axis] != new[axis]
    }
    if tuple(getattr(module, "normalized_shape", ())) == tuple(old):
        values["normalized_shape"] = tuple(new)
    return values


def _set_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Every tensor named takes its new shape, in all the places where it is tied."""
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(_submodule(model, path, name), leaf, None)
        new = tuple(shape)
        if not isinstance(old, torch.Tensor) or len(new) != old.dim() or any(a > b for a, b in zip(new, old.shape, strict=True)):
            found = tuple(old.shape) if isinstance(old, torch.Tensor) else "no such tensor"
            raise ValueError(
                f"The surgery record asks for {name} of shape {new}; the dense model has {found}. "
                "The record belongs to another model."
            )
        if new != tuple(old.shape):
            set_tensor(model, name, old.detach()[tuple(slice(size) for size in new)].clone())


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets the attributes of each module; `config.x` sets `x` in a configuration of the module's own."""
    for path, values in attributes.items():
        module = _submodule(model, path, path)
        fields = {name.removeprefix("config."): value for name, value in values.items() if name.startswith("config.")}
        if fields:
            module.config = copy.copy(module.config)
        for name, value in fields.items():
            setattr(module.config, name, value)
        for name, value in values.items():
            if not name.startswith("config."):
                setattr(module, name, tuple(value) if isinstance(getattr(module, name, None), tuple) else value)


class Silent(nn.Module):
    """Stands where a sub-layer was and puts out zeros, as wide as what it put out.

    Others may read the numbers that were noted on it, and the dtype of its weights, so those stay.
    """

    width: int
    returns: int

    def __init__(self, module: nn.Module, *, width: int, returns: int) -> None:
        super().__init__()
        noted = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "forward"}
        vars(self).update(noted, width=width, returns=returns)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_buffer(name, parameter.new_empty(0), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros [..., width], in a tuple of as many items as there were."""
        given = first_tensor((args, kwargs))
        self._keep_place(given, (*args, *kwargs.values()))
        zeros = given.new_zeros(*given.shape[:-1], self.width)
        return (zeros, *[None] * (self.returns - 1)) if self.returns else zeros

    def _keep_place(self, given: torch.Tensor, values: Iterable[Any]) -> None:
        """Counts the tokens in the attention's slot of a cache: the length of some slot tells the positions of all."""
        slot = next((getattr(self, name) for name in NUMBERS if type(getattr(self, name, None)) is int), None)
        caches = [value for value in values if isinstance(value, transformers.Cache)]
        if slot is None or getattr(self, "is_cross_attention", False):
            return
        for cache in caches:
            layers = getattr(cache, "layers", [])
            if slot >= len(layers) or hasattr(layers[slot], "get_seq_length"):
                place = given.new_zeros(given.shape[0], 1, given.shape[1], 1)
                cache.update(place, place, slot)


def first_tensor(value: Any) -> torch.Tensor:
    """The first tensor among the arguments of a call, in the order that they were given."""
    return next(_tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (found for item in value.values() for found in _tensors(item))
    elif isinstance(value, list | tuple):
        yield from (found for item in value for found in _tensors(item))


def remove(model: nn.Module, silent: Mapping[str, Mapping[str, int]], removed: Sequence[str]) -> None:
    """Puts stand-ins where sub-layers were, and takes blocks out."""
    for name, values in silent.items():
        parent, _, leaf = name.rpartition(".")
        module = _submodule(model, name, name)
        setattr(_submodule(model, parent, name), leaf, Silent(module, **values).train(module.training))
    _remove(model, removed)


def _remove(model: nn.Module, removed: Sequence[str]) -> None:
    """Deletes blocks from their lists; those left are renumbered, in the modules and in the configurations."""
    gone: dict[str, list[int]] = {}
    for name in removed:
        parent, _, index = name.rpartition(".")
        gone.setdefault(parent, []).append(int(index))
    for parent, numbers in gone.items():
        indices = sorted(set(numbers))
        blocks = _submodule(model, parent, parent)
        if not isinstance(blocks, nn.ModuleList) or indices[-1] >= len(blocks):
            raise ValueError(f"The surgery record removes blocks {indices} of {parent!r}, which the dense model has not.")
        for config in _configs(model, parent):
            shorten(config, indices, blocks=len(blocks))
        stay = [number for number in range(len(blocks)) if number not in indices]
        for new, old in enumerate(stay):
            _renumber(blocks[old], old, new)
        for number in reversed(indices):
            del blocks[number]


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for name in NUMBERS:
            if type(getattr(module, name, None)) is int and getattr(module, name) == old:
                setattr(module, name, new)


def _configs(model: nn.Module, path: str) -> list[PreTrainedConfig]:
    """Every configuration in use within a module or around it, once; a stack beside it may be as deep by chance."""
    modules = ((f"{name}." if name else "", module) for name, module in model.named_modules())
    near = (module for name, module in modules if f"{path}.".startswith(name) or name.startswith(f"{path}."))
    configs = (getattr(module, "config", None) for module in near)
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


def _per_layer(config: PreTrainedConfig, blocks: int) -> Iterator[tuple[str, Any]]:
    """The fields of `config` that hold one entry a layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == blocks and name != "architectures" and "token_id" not in name:
            yield name, value


def _submodule(model: nn.Module, path: str, asked: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"The surgery record names {asked!r}, which the dense model has not.") from None
