"""A transformers model whose layers have sizes of their own: the dense one, with a surgery record replayed on it.

This file needs torch and transformers only and is shipped, unchanged, beside every checkpoint that no stock
configuration can express. `config.json` there holds the dense configuration (with as many layers as are left) and,
under `resect`, the record: which parameters are smaller, which attributes of which modules follow, which layers keep
only some of their own rows and columns, and which blocks are gone. A model is built by the dense architecture's own
code, cut to the record's sizes while it is still empty, and then filled with the weights.

`Resect<Name>` stands for the transformers class `<Name>` cut this way, for every configuration and model class:
`ResectLlamaConfig`, `ResectLlamaModel`, `ResectLlamaForCausalLM`, ...
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

Record = Mapping[str, Any]
"""What was cut, in dense numbering: `{"shapes": {parameter: sizes}, "attributes": {module: {name: value}},
"silent": {module: {"width": size, "axis": from the end, "returns": items}},
"gathered": {module: {"rows": count, "columns": count}}, "removed": [block]}`;
a count that is None means all. Which rows and columns a gathered layer keeps lies beside its weight."""

PREFIX = "Resect"
# Between the keys that lead to a number inside an attribute: `lengths/h` is `module.lengths["h"]`.
INSIDE = "/"
# Attributes in which torch and transformers layers repeat the size of an axis of their weight.
SIZES = {
    **{"out_features": 0, "in_features": 1, "num_embeddings": 0, "embedding_dim": 1, "nx": 0, "nf": 1},
    **{"out_channels": 0, "in_channels": 1, "num_features": 0, "num_channels": 0},
}
# What a module does not hand on to the one that stands in for it.
OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl")
# Attributes in which every module keeps what torch needs.
RESERVED = frozenset((*vars(nn.Module()), *OWN))
# The parts of a record.
KINDS = {"shapes": dict, "attributes": dict, "silent": dict, "gathered": dict, "removed": list}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a stand-in may at most put out: zeros of so many channels, along one of so many axes, in a tuple of so many items.
MOST_WIDTH = 2**24
MOST_AXES = 8
MOST_RETURNS = 64
# Fields of a configuration that hold numbers of blocks.
NUMBERING = (
    *("mlp_only_layers", "cross_attention_layers", "global_attn_indexes", "deepstack_visual_indexes"),
    *("fullatt_block_indexes", "window_block_indices", "residual_block_indices", "moe_layers", "attn_layer_indices"),
    *("kv_source_layers", "local_layer_ids", "ple_layer_ids", "rope_scaling_layers"),
)
# Fields that say up to which block they are of another sort.
FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
# The two stacks of some networks, how fields that count blocks end, and those of them that mean the encoder.
SIDES = ("encoder", "decoder")
DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")
PLAIN = ("num_hidden_layers", "num_layers")
# Attributes by which the modules of a block know its number, and thereby its slot in the KV cache.
NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")


def resize(model: nn.Module, record: Record) -> nn.Module:
    """The dense `model` with the shapes, attributes and blocks of `record`, in place.

    The model is freshly built, usually on the meta device; weights that exist keep their leading slices, so what is
    left has the right sizes and sane values, not the cut model's. Tied parameters stay tied. Raises `ValueError` when
    the record was made for another model.
    """
    check(record)
    record = _localized(model, record)
    _set_shapes(model, _with_tied(model, record["shapes"]))
    set_attributes(model, record["attributes"])
    _count_channels(model)
    for name, counts in record["gathered"].items():
        put(model, name, _gathered(_submodule(model, name, name), name, **counts))
    remove(model, record["silent"], record["removed"])
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model


def check(record: Record) -> None:
    """Raises `ValueError` for a record whose parts are not of the types and sizes that surgery writes."""
    if not isinstance(record, Mapping):
        raise _damaged("it", record)
    for key, kind in KINDS.items():
        if not isinstance(record.get(key) or kind(), kind):
            raise _damaged(key, record[key])
    shapes, attributes, silent, gathered, removed = (record.get(key) or KINDS[key]() for key in KINDS)
    for name, sizes in shapes.items():
        if not _are_numbers(sizes) or min(sizes, default=0) < 0:
            raise _damaged(f"the shape of {name}", sizes)
    for module, values in attributes.items():
        if not isinstance(values, Mapping):
            raise _damaged(f"the attributes of {module}", values)
        for name, value in values.items():
            field = str(name).removeprefix("config.")
            sound = value is None or isinstance(value, int | float) or _are_numbers(value)
            first, *keys = field.split(INSIDE)
            named = first.isidentifier() and all(key.isidentifier() or key.isdecimal() for key in keys)
            if not named or "__" in field or first in RESERVED:
                sound = False
            elif keys:
                sound = type(value) is int
            if not sound:
                raise _damaged(f"{name} of {module}", value)
    for name, values in silent.items():
        given = {"axis": -1, **values} if isinstance(values, Mapping) else values
        ranges = {"width": (1, MOST_WIDTH), "axis": (-MOST_AXES, -1), "returns": (0, MOST_RETURNS)}
        _check_counts(f"the stand-in for {name}", given, ranges)
    for name, values in gathered.items():
        given = {key: 0 if value is None else value for key, value in values.items()} if isinstance(values, Mapping) else values
        _check_counts(f"what {name} keeps", given, {"rows": (0, MOST_WIDTH), "columns": (0, MOST_WIDTH)})
    for name in removed:
        if not isinstance(name, str) or not name.rpartition(".")[2].isdecimal():
            raise _damaged("a removed block", name)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is int for item in value)


def _check_counts(what: str, values: Any, limits: Mapping[str, tuple[int, int]]) -> None:
    """Refuses anything but an object of exactly these whole numbers, each within its limits."""
    if not isinstance(values, Mapping) or values.keys() != limits.keys():
        raise _damaged(what, values)
    for name, (least, most) in limits.items():
        if type(values[name]) is not int or not least <= values[name] <= most:
            raise _damaged(f"{name} of {what}", values[name])


def _damaged(what: str, value: Any) -> ValueError:
    return ValueError(f"The surgery record is damaged: {what[:300]} is {str(value)[:100]}.")


def shorten(config: PreTrainedConfig, indices: Iterable[int], *, blocks: int, path: str = "") -> None:
    """Makes `config` speak of the blocks that stay, in place: their number, lists with one entry a layer, their numbers.

    `indices` are the blocks that go, out of `blocks` in the list at `path`. A configuration that does not speak of
    `blocks` layers there is left alone.
    """
    gone = set(indices)
    depths = _depths(config, path, blocks)
    if not gone or not depths:
        return
    stay = [index for index in range(blocks) if index not in gone]
    for name, numbers in _numbering(config, blocks):
        setattr(config, name, [stay.index(number) for number in numbers if number in stay])
    for name, entries in _per_layer(config, path, blocks):
        setattr(config, name, type(entries)(entry for index, entry in enumerate(entries) if index not in gone))
    for name in FIRST:
        first = getattr(config, name, None)
        if type(first) is int and 0 < first <= blocks:
            setattr(config, name, sum(index < first for index in stay))
    for name in depths:
        setattr(config, name, len(stay))


def lengthen(config: PreTrainedConfig, indices: Iterable[int], *, path: str = "") -> None:
    """The inverse of `shorten`: makes room for the blocks `indices`, so that the dense model can be built, in place.

    What the lists say about those blocks is unknown and does not matter, since they are removed again: each takes the
    entry of a neighbour that stays.
    """
    gone = sorted(set(indices))
    left = next((count for count in _counts(config, path) if count), None)
    if not gone or left is None:
        return
    blocks = left + len(gone)
    stay = [index for index in range(blocks) if index not in gone]
    depths = _depths(config, path, left)
    for name, numbers in _numbering(config, left):
        setattr(config, name, [stay[number] for number in numbers])
    for name, entries in _per_layer(config, path, left):
        longer = list(entries)
        for index in gone:
            longer.insert(index, longer[min(index, len(longer) - 1)])
        setattr(config, name, type(entries)(longer))
    for name in FIRST:
        first = getattr(config, name, None)
        if type(first) is int and 0 < first <= left:
            setattr(config, name, stay[first - 1] + 1)
    for name in depths:
        setattr(config, name, blocks)


def _side(path: str) -> str:
    """Whether a list of blocks is the encoder's or the decoder's; empty where it does not say."""
    return next((part for part in path.split(".") if part in SIDES), "")


def _depths(config: PreTrainedConfig, path: str, blocks: int) -> list[str]:
    """The fields that count the blocks of a list, of those that say `blocks`."""
    return [name for name in _depth_fields(config, path) if getattr(config, name) == blocks]


def _counts(config: PreTrainedConfig, path: str) -> list[int]:
    return [getattr(config, name) for name in _depth_fields(config, path)]


def _depth_fields(config: PreTrainedConfig, path: str) -> list[str]:
    """The fields that count the blocks of a list: those of its side, in a network of an encoder and a decoder."""
    side = _side(path)
    named = [name for name, value in vars(config).items() if type(value) is int and name.endswith(DEPTHS)]
    if not side or not any("decoder" in name for name in named):
        return ["num_hidden_layers"] if type(getattr(config, "num_hidden_layers", None)) is int else []
    sided = [name for name in named if side in name]
    plain = [name for name in named if not any(other in name for other in SIDES) and name in PLAIN]
    return sided if side == "decoder" else [*sided, *plain]


def _numbering(config: PreTrainedConfig, blocks: int) -> list[tuple[str, list[int]]]:
    """The fields of `config` that hold numbers of blocks, in ascending order."""
    return [
        (name, list(value))
        for name, value in vars(config).items()
        if name in NUMBERING and isinstance(value, list | tuple) and _are_numbers(value)
        if list(value) == sorted({number for number in value if 0 <= number < blocks})
    ]


def removed_by_list(record: Record) -> dict[str, list[int]]:
    """The numbers of the removed blocks, by the module list that held them."""
    found: dict[str, list[int]] = {}
    for name in record.get("removed", ()):
        path, _, index = name.rpartition(".")
        found.setdefault(path, []).append(int(index))
    return {path: sorted(set(numbers)) for path, numbers in found.items()}


def removed_blocks(record: Record) -> tuple[str, list[int]]:
    """The module list that holds the blocks and the numbers of those removed from it: `("model.layers", [7, 9])`."""
    paths = [name.rpartition(".") for name in record.get("removed", ())]
    return (paths[0][0] if paths else ""), sorted(int(index) for _, _, index in paths)


class Resized:
    """What every `Resect...` model class adds to its stock class: the record, replayed before the weights arrive."""

    stock_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        record = getattr(config, "resect", None) or {}
        check(record)
        for path, numbers in removed_by_list(record).items():
            lengthen(config, numbers, path=path)
        # Code that builds a part through an Auto class looks the configuration's class up: it is the dense one meanwhile.
        own, auto_map = type(config), vars(config).pop("auto_map", None)
        config.__class__ = self.stock_class.config_class
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.__class__ = own
            if auto_map is not None:
                config.auto_map = auto_map
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
            if config is not whole and isinstance(config, self.stock_class.config_class or ()):
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
        "_auto_class": next(reversed(auto_classes(config_class, stock))),
    }
    return type(name, (Resized, stock), {**values, "__module__": __name__, "__doc__": f"`{stock.__name__}`, cut."})


def auto_classes(config_class: type, own: type | None = None) -> dict[str, str]:
    """The names of the dense classes of a configuration, by the Auto class that finds each; that of `own` comes last.

    A class that no Auto class knows is found by `AutoModelForCausalLM` if it generates, else by `AutoModel`.
    """
    found: dict[str, str] = {}
    for auto, kind in vars(modeling_auto).items():
        mapping = getattr(kind, "_model_mapping", None)
        if not auto.startswith("AutoModel") or mapping is None or config_class not in mapping:
            continue
        classes = mapping[config_class]
        several = classes if isinstance(classes, tuple) else (classes,)
        named = [one.__name__ for one in several if hasattr(transformers, one.__name__)]
        if named:
            found[auto] = own.__name__ if own is not None and own.__name__ in named else named[0]
    if own is None:
        return found
    mine = [auto for auto, name in found.items() if name == own.__name__]
    generates = issubclass(own, PreTrainedModel) and own.can_generate()
    place = mine[-1] if mine else "AutoModelForCausalLM" if generates else "AutoModel"
    if "AutoModelForCausalLM" in mine:
        place = "AutoModelForCausalLM"
    found.pop(place, None)
    return {**found, place: own.__name__}


def _localized(model: nn.Module, record: Record) -> Record:
    """The record in the names of `model`: those of a model with a head, or, below the prefix, of the bare one."""
    keys = tuple(KINDS)
    shapes, attributes, silent, gathered, removed = (record.get(key) or KINDS[key]() for key in keys)
    prefix = getattr(model, "base_model_prefix", "")
    start = prefix + "."
    names = (*shapes, *attributes, *silent, *gathered, *removed)
    if prefix and not hasattr(model, prefix) and any(name.startswith(start) for name in names):
        shapes = {name.removeprefix(start): size for name, size in shapes.items() if name.startswith(start)}
        named = {f"{name}." if name else "": values for name, values in attributes.items()}
        attributes = {name[len(start) : -1]: values for name, values in named.items() if name.startswith(start)}
        silent = {name.removeprefix(start): values for name, values in silent.items() if name.startswith(start)}
        gathered = {name.removeprefix(start): counts for name, counts in gathered.items() if name.startswith(start)}
        removed = [name.removeprefix(start) for name in removed if name.startswith(start)]
    return dict(zip(keys, (shapes, attributes, silent, gathered, removed), strict=True))


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
        if axis < len(new) and vars(module).get(name) == old[axis] != new[axis]
    }
    if tuple(vars(module).get("normalized_shape") or ()) == tuple(old):
        values["normalized_shape"] = tuple(new)
    return values


def _count_channels(model: nn.Module) -> None:
    """Channels in and out of convolutions as their weights have them; of transposed ones the weight is [in, out / groups]."""
    for module in model.modules():
        if isinstance(module, _ConvNd) and isinstance(getattr(module, "weight", None), torch.Tensor):
            outer, inner = module.weight.shape[0], module.weight.shape[1] * module.groups
            module.in_channels, module.out_channels = (outer, inner) if module.transposed else (inner, outer)


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
        known = {*vars(module), *(f"config.{name}" for name in fields if hasattr(getattr(module, "config", None), name))}
        inside = {name for name in values if INSIDE in name and name.split(INSIDE)[0] in known}
        if unknown := sorted(values.keys() - known - inside):
            raise ValueError(
                f"The surgery record sets {unknown[0]!r} of {path!r}, which the dense model has not. "
                "The record belongs to another model."
            )
        if fields:
            module.config = copy.copy(module.config)
        for name, value in fields.items():
            setattr(module.config, name, value)
        for name, value in values.items():
            if name in inside:
                first, *rest = name.split(INSIDE)
                try:
                    setattr(module, first, _replaced(getattr(module, first), rest, value))
                except (LookupError, AttributeError, TypeError):
                    raise ValueError(
                        f"The surgery record sets {name!r} of {path!r}, where the dense model has no number. "
                        "The record belongs to another model."
                    ) from None
            elif not name.startswith("config."):
                setattr(module, name, tuple(value) if isinstance(getattr(module, name, None), tuple) else value)


def _replaced(holder: Any, keys: Sequence[str], value: Any) -> Any:
    """A copy of a mapping, a sequence, a partial function or a plain object with another number at the end of some keys.

    Raises `LookupError`, `AttributeError` or `TypeError` where no number stands there.
    """
    if not keys:
        if type(holder) is not int:
            raise TypeError(f"{type(holder).__name__} is no number")
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(holder, functools.partial):
        given, named = [*holder.args], {**holder.keywords}
        if key.isdecimal():
            given[int(key)] = _replaced(given[int(key)], rest, value)
        else:
            named[key] = _replaced(named[key], rest, value)
        return functools.partial(holder.func, *given, **named)
    if isinstance(holder, tuple | list):
        place = int(key) if key.isdecimal() else len(holder)
        items = [*holder]
        items[place] = _replaced(holder[place], rest, value)
        return type(holder)(*items) if hasattr(holder, "_fields") else type(holder)(items)
    again = copy.copy(holder)
    if isinstance(holder, dict):
        (own,) = [one for one in holder if str(one) == key] or [key]
        again[own] = _replaced(holder[own], rest, value)
    else:
        object.__setattr__(again, key, _replaced(getattr(holder, key), rest, value))
    return again


class Shell(nn.Module):
    """What is left of a module that is gone: the numbers noted on it, its methods, and its parts, all without weights.

    Others may read the numbers, ask a weight for its dtype, or call a method that computes nothing, like one that resets
    a counter.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        noted = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "forward"}
        vars(self).update(noted, _gone=type(module))
        for name, parameter in module.named_parameters(recurse=False):
            self.register_buffer(name, parameter.new_empty(0), persistent=False)
        for name, child in module.named_children():
            self.add_module(name, _shell(child))

    def __getattr__(self, name: str) -> Any:
        """What `Module` finds, else the method or property of the class that is gone."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("_gone")
            if kind is None or name.startswith("__") or not hasattr(kind, name):
                raise
            found = inspect.getattr_static(kind, name)
            return found.__get__(self, kind) if hasattr(found, "__get__") else found


def _shell(module: nn.Module) -> nn.Module:
    """The shell of a module; lists and mappings of modules stay what they are."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        parts = [_shell(child) for child in module]
        return nn.ModuleList(parts) if isinstance(module, nn.ModuleList) else nn.Sequential(*parts)
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: _shell(child) for name, child in module.items()})
    return Shell(module)


class Silent(Shell):
    """Stands where a sub-layer was and puts out zeros, as wide as what it put out along one axis."""

    width: int
    axis: int
    returns: int

    def __init__(self, module: nn.Module, *, width: int, axis: int = -1, returns: int) -> None:
        super().__init__(module)
        vars(self).update(width=width, axis=axis, returns=returns)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros shaped like what goes in, `width` along `axis`, in a tuple of as many items as there were."""
        given = first_tensor((args, kwargs))
        self._keep_place(given, (*args, *kwargs.values()))
        shape = list(given.shape)
        shape[self.axis] = self.width
        zeros = given.new_zeros(shape)
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


class Gathered(nn.Module):
    """Stands where a linear layer or an ungrouped convolution was of which only some rows and columns are left.

    Puts out `W x[columns] + b` at its rows and zeros at all others, as wide as the dense layer; the rows of a convolution
    are its output channels, the columns its input channels. `rows` and `columns` [kept] number them in the dense layer,
    None where all stay. What the dense layer noted of its outer sizes stays, as do its hooks.
    """

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    padding_mode: str

    def __init__(self, module: nn.Module, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(module).items() if name not in OWN})
        self.outer_rows, self.outer_columns, self.spatial = outer_sizes(module)
        self.input_axis = 0 if isinstance(module, Conv1D) else 1
        self.register_parameter("weight", _slices(module.weight, {1 - self.input_axis: rows, self.input_axis: columns}))  # type: ignore[arg-type]
        self.register_parameter("bias", _slices(module.bias, {0: rows}))  # type: ignore[arg-type]
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What the dense layer would put out if all other rows and columns were zero, the bias of those rows too."""
        axis = -1 - self.spatial
        if self.columns is not None:
            input = input.index_select(axis, self.columns)
        found = self._convolved(input) if self.spatial else self._product(input)
        if self.rows is None:
            return found
        shape = list(found.shape)
        shape[axis] = self.outer_rows
        return found.new_zeros(shape).index_add_(axis, self.rows, found)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight if self.input_axis else self.weight.T, self.bias)

    def _convolved(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias, axis, padding = self.weight, self.bias, -1 - self.spatial, self.padding
        if not weight.numel():  # torch wants a channel in and one out: these hold zeros, and what comes out is dropped
            input, weight = _one_more(input, axis), _one_more(_one_more(weight, 0), 1)
            bias = None if bias is None else _one_more(bias, 0)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)  # type: ignore[arg-type]
            padding = 0
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        found = convolve(input, weight, bias, self.stride, padding, self.dilation)
        return found.narrow(axis, 0, len(self.weight))

    def extra_repr(self) -> str:
        """Rows and columns that are left, of how many."""
        rows, columns = self.weight.shape[1 - self.input_axis], self.weight.shape[self.input_axis]
        left = f"rows={rows} of {self.outer_rows}, columns={columns} of {self.outer_columns}"
        return f"{left}, bias={self.bias is not None}"


def outer_sizes(module: nn.Module) -> tuple[int, int, int]:
    """Rows and columns of a layer that `Gathered` can stand in for, and over how many axes it convolves.

    Raises `ValueError` for any other module.
    """
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return *weight.shape, 0
    if isinstance(module, Conv1D):
        return *reversed(weight.shape), 0
    if isinstance(module, CONVOLUTIONS) and module.groups == 1:
        return *weight.shape[:2], weight.dim() - 2
    what = type(module).__name__ + (f" of {module.groups} groups" if isinstance(module, CONVOLUTIONS) else "")
    raise ValueError(f"{what} is neither a linear layer nor an ungrouped convolution")


def _gathered(module: nn.Module, name: str, rows: int | None, columns: int | None) -> Gathered:
    """An empty layer of the right sizes; which rows and columns these are comes with the weights."""
    try:
        outer = outer_sizes(module)
    except ValueError as error:
        raise ValueError(f"The surgery record gathers {name!r}, but {error}. The record belongs to another model.") from None
    for what, count, size in (("rows", rows, outer[0]), ("columns", columns, outer[1])):
        if count is not None and not 0 <= count <= size:
            raise ValueError(
                f"The surgery record asks for {count} {what} of {name}; the dense model has {size}. "
                "The record belongs to another model."
            )
    device = module.weight.device
    return Gathered(module, *(None if count is None else torch.arange(count, device=device) for count in (rows, columns)))  # type: ignore[arg-type]


def _slices(parameter: nn.Parameter | None, positions: Mapping[int, torch.Tensor | None]) -> nn.Parameter | None:
    """A parameter, if there is one, at some positions of its axes; None stands for all of them."""
    kept = {axis: index for axis, index in positions.items() if index is not None}
    if parameter is None or not kept:
        return parameter
    tensor = parameter.detach()
    for axis, index in kept.items():
        tensor = tensor.index_select(axis, index)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _one_more(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """The tensor with zeros at one more position of an axis."""
    shape = list(tensor.shape)
    shape[axis] = 1
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


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
        module = _submodule(model, name, name)
        put(model, name, Silent(module, **values).train(module.training))
    _remove(model, removed)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(_submodule(model, parent, name), leaf, module)


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
            shorten(config, indices, blocks=len(blocks), path=parent)
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


def _per_layer(config: PreTrainedConfig, path: str, blocks: int) -> Iterator[tuple[str, Any]]:
    """The fields of `config` that hold one entry a layer; where a list has a side, those that name it."""
    sided = _depth_fields(config, path) != ["num_hidden_layers"]
    for name, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or len(value) != blocks or (sided and _side(path) not in name):
            continue
        if name != "architectures" and "token_id" not in name and name not in NUMBERING:
            yield name, value


def _submodule(model: nn.Module, path: str, asked: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"The surgery record names {asked!r}, which the dense model has not.") from None
