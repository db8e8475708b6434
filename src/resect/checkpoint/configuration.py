"""What a `config.json` says, read with distrust: an object of known sizes, or an error that names the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from resect.errors import CheckpointError
from resect.files import read_text
from resect.surgery.modeling_resect import PREFIX

Fields = Mapping[str, Any]

LARGEST_SIZE = 2**48
"""Of any size in a configuration; larger ones are no sizes of anything that could be stored."""
MOST_LAYERS = 10_000
MOST_EXPERTS = 100_000
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Fields, with or without an underscore, that may name code on the hub (`owner/kernel`)."""
POSITIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
"""Sizes that are 1 or more wherever they are numbers, by the names that every configuration answers to."""
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
"""The same, where a configuration has them."""
UNSEEN = ("num_attention_heads", "num_experts_per_tok")
"""Sizes that change what a model computes, and that the shapes of its weights may not tell."""
PREDICTION_HEADS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Fields that count heads which predict further tokens; transformers loads and runs none of them."""


def read_configuration(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file beside a model. Raises `CheckpointError` for all that is none, and for doubled names."""
    path = Path(file)
    what = f"the file {path}"
    if not path.is_file():
        raise CheckpointError(f"{what[0].upper()}{what[1:]} is no file that can be read.")
    text = read_text(path, what="the file")
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as problem:
        said = "it is nested too deep" if isinstance(problem, RecursionError) else str(problem)[:300]
        raise CheckpointError(f"The file {path} is not JSON: {said}.") from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"The file {path} holds a {type(value).__name__}; it should be an object.")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some pairs; a name that stands there twice may mean either value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:100]!r} stands there twice")
    return found


def check_fields(fields: Fields, file: str | Path, *, trust_remote_code: bool) -> None:
    """Refuses, before transformers reads it, a configuration that would ask, run code, or take all memory."""
    model_type = fields.get("model_type")
    auto_map = fields.get("auto_map")
    if not isinstance(model_type, str) and not (trust_remote_code and auto_map):
        raise CheckpointError(f"{file} names no model type (`model_type`), so nothing says what it describes.")
    for name, wanted in (("auto_map", dict), ("quantization_config", dict), ("architectures", list)):
        if fields.get(name) is not None and not isinstance(fields[name], wanted):
            raise CheckpointError(f"{file}: {name} is {str(fields[name])[:100]!r}; it should be a {wanted.__name__}.")
    if not all(isinstance(name, str) for name in fields.get("architectures") or ()):
        raise CheckpointError(f"{file}: architectures is {str(fields['architectures'])[:100]}; it should list names.")
    if auto_map and not trust_remote_code and not _is_known(str(model_type)):
        raise CheckpointError(
            f"{file} says that the model has code of its own (auto_map), and transformers has none for the type "
            f"{model_type!r}. Where you trust that code: --trust-remote-code, trust_remote_code=True."
        )
    weights = fields.get("transformers_weights")
    if weights is not None and not is_plain_name(weights, (".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{file} names the weights {str(weights)[:100]!r}; only .safetensors files beside it are read."
        )
    for place, name, value in numbers(fields):
        _check_number(file, place, name, value)
    for place, figure in _rotary_figures(fields):
        if not (math.isfinite(figure) and figure > 0):
            raise CheckpointError(f"{file}: {place} is {figure}; it must be a number above 0.")
    for name in _implementations(fields):
        raise CheckpointError(f"{file} asks for {name[:100]!r}, code on the hub, to compute with. Take that field out.")


def _rotary_figures(fields: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """The figures that rotary positions are computed from: where they stand, and the number."""
    for name, value in fields.items() if isinstance(fields, Mapping) else ():
        where = f"{place}.{name}" if place else str(name)
        is_rotary = name == "rope_theta" or (name == "factor" and "rope" in place)
        if is_rotary and isinstance(value, int | float) and not isinstance(value, bool):
            yield where, value
        else:
            yield from _rotary_figures(value, where)


def _is_known(model_type: str) -> bool:
    return model_type in CONFIG_MAPPING or model_type.startswith("resect_")


def is_plain_name(name: Any, suffixes: str | tuple[str, ...] = ".safetensors") -> bool:
    """Whether something names a file in the same directory, with one of the suffixes."""
    if not isinstance(name, str) or not name.endswith(suffixes):
        return False
    return Path(name).name == name and not any(sign in name for sign in "\\\0:")


def numbers(fields: Any, place: str = "") -> Iterator[tuple[str, str, int]]:
    """All whole numbers in a configuration: where, under which name, and the number."""
    if isinstance(fields, Mapping):
        for name, value in fields.items():
            where = f"{place}.{name}" if place else str(name)
            if isinstance(value, int) and not isinstance(value, bool):
                yield where, str(name), value
            else:
                yield from numbers(value, where)
    elif isinstance(fields, list):
        for value in fields:
            yield from numbers(value, place)


def _check_number(file: str | Path, place: str, name: str, value: int) -> None:
    limit = LARGEST_SIZE
    if re.search(r"(layers?|blocks?|depth)$", name):
        limit = MOST_LAYERS
    elif re.search(r"experts$", name):
        limit = MOST_EXPERTS
    if abs(value) > limit:
        raise CheckpointError(f"{file}: {place} is {str(value)[:40]}; no model is that large (at most {limit}).")


def _implementations(fields: Any) -> Iterator[str]:
    """Kernels on the hub that a configuration names."""
    if not isinstance(fields, Mapping):
        return
    for name, value in fields.items():
        if str(name).strip("_").removesuffix("_internal") in IMPLEMENTATIONS:
            named = value.values() if isinstance(value, Mapping) else [value]
            yield from (str(one) for one in named if "/" in str(one))
        else:
            yield from _implementations(value)


def check_causal(fields: Fields, file: str | Path) -> None:
    """Raises `CheckpointError` where the weights were saved from a class that is no causal language model."""
    names = [str(name) for name in fields.get("architectures") or ()]
    if not names or any(name in causal_classes() or name.startswith(PREFIX) for name in names):
        return
    auto_map = fields.get("auto_map")
    if isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map:
        return
    if names[0] in known_classes():
        raise CheckpointError(
            f"{file} says that the weights are those of a {names[0]}, which is no causal language model: "
            "what predicts tokens would be made up. Name a model that was saved with its language head (...ForCausalLM)."
        )


def causal_classes() -> set[str]:
    """The names of transformers' causal language models."""
    return _names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def known_classes() -> set[str]:
    """The names of all models in transformers' tables."""
    tables = [name for name in vars(modeling_auto) if name.endswith("MAPPING_NAMES")]
    return {name for table in tables for name in _names(table)}


def _names(table: str) -> set[str]:
    found = set[str]()
    for value in getattr(modeling_auto, table).values():
        found |= {value} if isinstance(value, str) else set(value)
    return found


def check_sizes(config: PreTrainedConfig, fields: Fields, file: str | Path, *, weights: bool) -> list[str]:
    """Refuses sizes that are 0 or less, and sizes that nobody wrote down.

    What a class of transformers fills in by itself describes another model. With `weights` their shapes tell the most; the
    names of the sizes that they may not tell, and that are not written, are given back.
    """
    check_positive(config, file)
    text = config.get_text_config()
    stated = _stated(fields)
    absent = [name for name in (*POSITIVE, *UNSEEN[1:]) if not _is_stated(text, name, stated)]
    if text is not config:
        absent = [name for name in absent if name not in ("vocab_size", "num_attention_heads", "intermediate_size")]
    required = [name for name in absent if name != "intermediate_size" and not weights]
    if required:
        raise CheckpointError(
            f"{file} does not say {', '.join(_written(text, name) for name in required)}. "
            "Nothing is assumed about sizes: write them there."
        )
    return [name for name in absent if name in UNSEEN]


def check_positive(config: PreTrainedConfig, file: str | Path) -> None:
    """Refuses sizes that are 0 or less, and heads that do not share evenly."""
    text = config.get_text_config()
    for name in (*POSITIVE, *OPTIONAL):
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise CheckpointError(f"{file}: {_written(text, name)} is {value}; it is 1 or more.")
    heads, shared = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise CheckpointError(f"{file}: {heads} heads of attention cannot share {shared} heads of keys and values evenly.")


def _stated(fields: Any) -> set[str]:
    """The names of all fields of a configuration and of those inside it."""
    found = set[str]()
    if isinstance(fields, Mapping):
        found |= set(fields)
        for value in fields.values():
            found |= _stated(value)
    return found


def _written(config: PreTrainedConfig, name: str) -> str:
    return config.attribute_map.get(name, name)


def _is_stated(config: PreTrainedConfig, name: str, stated: set[str]) -> bool:
    """Whether a size stands in the file under one of its names, or is no field of this configuration."""
    if not isinstance(getattr(config, name, None), int):
        return True
    aliases = {alias for alias, target in config.attribute_map.items() if target == name}
    return bool({name, _written(config, name), *aliases} & stated)


def forget_prediction_heads(config: PreTrainedConfig) -> None:
    """The configuration promises no heads for further tokens any more, in place."""
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        for name in PREDICTION_HEADS:
            if getattr(part, name, None):
                setattr(part, name, 0)


def prediction_heads(config: PreTrainedConfig) -> int:
    """How many layers the configuration promises that predict further tokens."""
    found = [getattr(config.get_text_config(), name, None) for name in PREDICTION_HEADS]
    return max((value for value in found if isinstance(value, int)), default=0)


