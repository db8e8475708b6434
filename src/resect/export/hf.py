"""Directories that transformers loads: stock where a configuration says it, else with the code beside it; int8 by torchao."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from resect.checkpoint import save
from resect.checkpoint.silence import quiet
from resect.errors import UsageError
from resect.export.formats import Asked, Format, Limits, require
from resect.export.vllm import obstacles


def same_sums(asked: Asked) -> Limits:
    """The same sums in another order, in the model's own precision."""
    return Limits(1e-3, 1e-6) if asked.model.dtype == torch.float32 else Limits(0.3, 1e-2)


def check(asked: Asked) -> None:
    """Raises `UsageError` where torchao is needed and not there, or has no layer to round."""
    if asked.quantize != "int8":
        return
    require({"torchao": "torchao"}, "quant", "Quantising to int8")
    if not _rounded(asked.model):
        raise UsageError(
            f"Asked for int8 weights; torchao rounds layers of type Linear, and {type(asked.model).__name__} has none but its "
            "head. Use --format gguf --quantize q8_0, or no --quantize."
        )


def _rounded(model: PreTrainedModel) -> set[str]:
    """The layers whose weights torchao makes int8 of: linear ones, but not the head."""
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}


def write(asked: Asked, path: Path) -> dict[str, Any]:
    """Writes the directory; gives its layout and what stands between it and vLLM."""
    saved = save(asked.model, path, tokenizer=asked.tokenizer, about=asked.about)
    if asked.quantize == "int8":
        _quantise(path)
    facts = {"layout": saved.layout, "model_type": saved.model_type, "relabelled_from": saved.relabelled_from}
    return {**facts, "vllm_obstacles": obstacles(path)}


def stored(asked: Asked) -> PreTrainedModel:
    """The model with int8 weights, where these were asked for."""
    if asked.quantize == "none":
        return asked.model
    from torchao.quantization import quantize_

    model = copy.deepcopy(asked.model)
    chosen = _rounded(model)
    quantize_(model, _int8(), filter_fn=lambda module, name: name in chosen)
    return model


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _quantise(path: Path) -> None:
    """The weights of a directory as int8, by transformers' own way through torchao."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=True, quantization_config=TorchAoConfig(_int8()), use_safetensors=True, local_files_only=True
        )
        for file in path.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(path)


FORMAT = Format(
    name="hf",
    consumer="transformers",
    suffix="",
    quantisations=("none", "int8"),
    write=write,
    check=check,
    limits=same_sums,
    stored=stored,
)
