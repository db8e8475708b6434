"""One type for all weights of a loaded model: the one that was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

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


def note_storage(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Notes on a loaded model what its checkpoint stores weights in, as the fields of its configuration say."""
    text = fields.get("text_config")
    said = [part.get(name) for part in (fields, text) if isinstance(part, Mapping) for name in ("dtype", "torch_dtype")]
    named = next((str(name).removeprefix("torch.") for name in said if name), "")
    model.resect_storage = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(named)  # type: ignore[assignment]


def storage_of(model: Any) -> torch.dtype:
    """The type that a model's weights are stored in: its own, or that of the checkpoint that it was read from if narrower."""
    noted: torch.dtype | None = getattr(model, "resect_storage", None)
    return noted if noted is not None and model.dtype in (torch.float32, torch.float64) else model.dtype


@torch.no_grad()
def round_to_storage(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Rounds weights, in place, to what they will be stored as; their type stays. What is measured then is what is written."""
    stored, own = dtype or storage_of(model), model.dtype
    if stored != own and not _is_packed(model):
        model.resect_storage = stored  # type: ignore[assignment]
        settle_dtype(model, stored)
        settle_dtype(model, own)


@contextmanager
def blocks_as_said(storage: Any) -> Iterator[None]:
    """Widens what is stored in blocks of eight bits by the block size that a configuration says.

    `storage` is its `quantization_config`, whatever that holds. transformers divides a side by the
    number of its scales instead. Where the last block is not full that is no whole number, an error,
    or another block size: 48 rows in blocks of 32 have two scales, and became two blocks of 24.
    """
    block = storage.get("weight_block_size") if isinstance(storage, Mapping) else None
    operation: Any = Fp8Dequantize
    plain = operation._dequantize_one

    def widened(self: Any, stored: Tensor, scales: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, columns = stored.shape[-2:]
        full = _full_blocks(stored, scales, block)
        if full is None:
            return plain(self, stored, scales, *args, **kwargs)  # type: ignore[no-any-return]
        whole = stored.new_zeros(*stored.shape[:-2], *full, dtype=torch.float32)
        whole[..., :rows, :columns] = stored.float()
        found: Tensor = plain(self, whole, scales, *args, **kwargs)[..., :rows, :columns]
        return found.contiguous()

    operation._dequantize_one = widened
    try:
        yield
    finally:
        operation._dequantize_one = plain


def _full_blocks(stored: Tensor, scales: Tensor, block: Any) -> tuple[int, int] | None:
    """Rows and columns with the last blocks filled up; None where they are full, or the scales are of other blocks."""
    if not _is_pair(block) or not stored.is_floating_point() or scales.dim() < 2:
        return None
    grid = tuple(-(-size // of) for size, of in zip(stored.shape[-2:], block, strict=True))
    full = grid[0] * block[0], grid[1] * block[1]
    if tuple(scales.shape[-2:]) != grid or full == tuple(stored.shape[-2:]):
        return None
    return full


def _is_pair(block: Any) -> bool:
    return (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    )


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
