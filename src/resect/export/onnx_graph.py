"""ONNX: tokens and the keys and values so far to logits and the keys and values after, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from resect.checkpoint.silence import quiet
from resect.errors import UsageError
from resect.evaluation import evaluating
from resect.export.formats import Asked, Format, Limits

LIMITS = Limits(2e-3, 1e-6)
PAST, NEW = 3, 2
"""Tokens of the example: neither is 0 or 1, which would be taken for constants."""


class Step(nn.Module):
    """A model as a function from new tokens and a cache to logits and a longer cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits [batch, new, vocabulary], then keys and values of every layer [batch, heads, past + new, head size]."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        present = (tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values))
        return output.logits, *present


def check(asked: Asked) -> None:
    """Raises `UsageError` for a model whose cache is not one of keys and values in every layer."""
    if asked.model.dtype != torch.float32:
        raise UsageError(
            f"Asked to write ONNX of a model in {asked.model.dtype}; onnxruntime on a CPU takes float32. Load it so."
        )
    silent = [name for name, module in asked.model.named_modules() if type(module).__name__ == "Silent"]
    if silent:
        raise UsageError(
            f"Asked to write ONNX; sub-layers are gone ({', '.join(silent[:3])}), and the graph wants keys and values in every "
            "layer. Write --format hf-padded and export that directory, or use --format pt2, which has no cache."
        )


def write(asked: Asked, path: Path) -> dict[str, Any]:
    """Writes model.onnx, its weights beside it, configuration, tokenizer and README."""
    path.mkdir()
    past = example_cache(asked.model)
    names = [f"past.{number // 2}.{'value' if number % 2 else 'key'}" for number in range(len(past))]
    auto = torch.export.Dim.DYNAMIC
    with quiet(), evaluating(asked.model):
        program = torch.onnx.export(
            Step(asked.model),
            (torch.ones(2, NEW, dtype=torch.long), past),
            dynamo=True,
            input_names=["input_ids", *names],
            output_names=["logits", *(name.replace("past", "present") for name in names)],
            dynamic_shapes=({0: auto, 1: auto}, [{0: auto, 2: auto} for _ in past]),
            verbose=False,
        )
    assert program is not None
    program.save(path / "model.onnx", external_data=True)
    asked.model.config.save_pretrained(path)
    if asked.tokenizer is not None:
        asked.tokenizer.save_pretrained(path)
    heads = [tensor.shape[1] for tensor in past[::2]]
    return {"inputs": ["input_ids", *names[:2], "..."], "kv_heads": heads[0] if len(set(heads)) == 1 else heads}


@torch.no_grad()
def example_cache(model: PreTrainedModel) -> list[Tensor]:
    """Keys and values after a few tokens, as the model makes them: each layer has its own number of heads."""
    tokens = torch.ones(2, PAST, dtype=torch.long)
    with evaluating(model):
        cache = model(input_ids=tokens, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


FORMAT = Format(
    name="onnx",
    consumer="onnxruntime",
    suffix="",
    quantisations=("none",),
    write=write,
    check=check,
    limits=lambda asked: LIMITS,
    writers={"onnx": "onnx", "onnxscript": "onnxscript"},
    readers={"onnxruntime": "onnxruntime"},
    extra="onnx",
)
