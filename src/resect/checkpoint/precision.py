"""One type for all weights of a loaded model: the one that was asked for."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resect.errors import CheckpointError


def settle_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Every parameter and stored buffer of floating point in `dtype`, in place; no mark of another storage is left.

    Loaders widen what was stored in eight bits to a type of their own choice. What the model's class keeps in float32
    when it computes in less (`_keep_in_fp32_modules_strict`, for float16 `_keep_in_fp32_modules` too) stays there:
    routers' corrections and the like are not meant to be rounded. Buffers that are computed keep the type they are computed in.
    Raises `CheckpointError` for weights that are packed in a format of another library.
    """
    if _is_packed(model):
        return
    kept = _kept_in_float32(model, dtype)
    stored = model.state_dict(keep_vars=True)
    for name, tensor in stored.items():
        wanted = torch.float32 if kept and re.search(kept, name) else dtype
        if tensor.is_floating_point() and tensor.dtype != wanted:
            with torch.no_grad():
                tensor.data = tensor.data.to(wanted)
    _forget_storage(model)
    wrong = {name: one.dtype for name, one in model.named_parameters() if not one.is_floating_point()}
    if wrong:
        name, found = next(iter(wrong.items()))
        raise CheckpointError(f"{name} is stored as {found}, which cannot be widened here. Get a copy that is not quantised.")


def _is_packed(model: PreTrainedModel) -> bool:
    """Whether some weights are tensors of another library, which unpacks them as it computes."""
    return any(type(tensor.data) is not Tensor for tensor in model.parameters())


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """A pattern for the names of what the model's class keeps in float32; empty where nothing is."""
    names = list[str]()
    if dtype in (torch.float16, torch.bfloat16):
        names += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    if dtype == torch.float16:
        names += getattr(model, "_keep_in_fp32_modules", None) or []
    return "|".join(rf"(^|\.){name}($|\.)" for name in sorted(names))


def _forget_storage(model: Any) -> None:
    """Takes away the marks of a quantised checkpoint: while they stay, transformers refuses to save and to train."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    steps = [step for one in getattr(model, "_weight_conversions", None) or () for step in getattr(one, "operations", None) or ()]
    if any(type(step).__module__.startswith("transformers.integrations") for step in steps):
        model._weight_conversions = None  # they would store it in eight bits again
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
