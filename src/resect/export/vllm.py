"""What vLLM's transformers backend reads of a checkpoint. Its source was read; it was never run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from resect.checkpoint import skeleton
from resect.checkpoint.stock import blank, shapes_of


def obstacles(directory: str | Path, *, tensor_parallel: int = 1) -> list[str]:
    """What keeps vLLM from serving the directory, as far as its fields and shapes say; nothing for a uniform one.

    vLLM builds `AutoModel` of the configuration, gives it an embedding of `vocab_size` by `hidden_size`, and sets aside keys and
    values for `num_attention_heads` and `num_key_value_heads` of `head_dim` in every layer, each divided among devices.
    """
    config: dict[str, Any] = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    model = skeleton(directory)
    return [*_classes(config, model), *_sizes(model, tensor_parallel)]


def _classes(config: dict[str, Any], model: Any) -> list[str]:
    """Fields that name the code."""
    found = []
    own = str(config.get("model_type", "")).startswith("resect_")
    if own and not {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config.get("auto_map", {})):
        found.append("auto_map lacks AutoConfig, AutoModel or AutoModelForCausalLM")
    if not own and not hasattr(transformers, (config.get("architectures") or [""])[0]):
        found.append("architectures names no class of transformers")
    if not getattr(model, "_supports_attention_backend", False):
        found.append(f"{type(model).__name__} does not take attention from outside (_supports_attention_backend)")
    return found


def _sizes(model: Any, tensor_parallel: int) -> list[str]:
    """Sizes that vLLM takes from the configuration for all layers."""
    found = []
    table = tuple(model.get_input_embeddings().weight.shape)
    said = (model.config.vocab_size, model.config.hidden_size)
    if table != said:
        found.append(f"the embedding is {table[0]} x {table[1]}, the configuration says {said[0]} x {said[1]}")
    heads = getattr(model.config, "num_attention_heads", 0)
    if heads % tensor_parallel:
        found.append(f"{heads} heads do not divide among {tensor_parallel} devices")
    stock: Any = getattr(type(model), "stock_class", None)
    if stock is not None:
        dense = shapes_of(blank(_plain(model.config, stock), stock))
        wrong = [name for name, shape in shapes_of(model).items() if "attn" in name and shape[0] != dense[name][0]]
        if wrong:
            found.append(f"attention of some layers has fewer heads than the configuration's {heads}: {wrong[0]}")
    silent = [name for name, module in model.named_modules() if type(module).__name__ == "Silent"]
    return [*found, *([f"sub-layers are gone: {', '.join(silent[:3])}"] if silent else [])]


def _plain(config: Any, stock: Any) -> Any:
    """The dense configuration, of as many layers as are left."""
    fields = {name: value for name, value in config.to_dict().items() if name not in ("resect", "auto_map", "model_type")}
    return stock.config_class.from_dict(fields)
