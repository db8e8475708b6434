"""GGUF files, written with the gguf package and read by llama.cpp."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resect.errors import UsageError
from resect.export.formats import Asked, Format, Limits
from resect.export.gguf_families import BLOCK, Prepared, model_type, prepared
from resect.export.gguf_tokenizer import write_tokenizer

Type = gguf.GGMLQuantizationType
TYPES = {
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
}
"""What matrices are stored as; vectors are always float32."""
LIMITS = {
    "f32": Limits(2e-3, 1e-5),
    "f16": Limits(5e-2, 1e-4),
    "bf16": Limits(None, 1e-2),
    **dict.fromkeys(("q8_0", "q4_0", "q4_1"), Limits(None, 2e-2)),
}
"""Besides what rounding does: that can move the logarithm of a small probability by a nat, so the divergence counts there."""
TABLE = Limits(5e-2, 1e-4)
"""Where the activation is GELU: llama.cpp looks it up in a table of float16."""
LARGEST_F16 = 65504
EMBEDDINGS = ("token_embd", "output")
"""Of four-bit files, these keep eight bits."""


def check(asked: Asked) -> None:
    """Raises `UsageError` for a model, tokenizer or type that llama.cpp does not take."""
    found = prepared(asked.model, _multiple(asked.quantize))
    if asked.tokenizer is None:
        raise UsageError("Asked to write GGUF; there is no tokenizer, and llama.cpp reads none but the file's own. Give one.")
    write_tokenizer(None, asked.tokenizer, len(_embedding(found)))
    width = _embedding(found).shape[1]
    if asked.quantize.startswith("q") and width % BLOCK:
        raise UsageError(
            f"Asked to write GGUF as {asked.quantize}; the residual width is {width}, rows are stored {BLOCK} values at a time. "
            f"Prune residual channels with --align {BLOCK}, or take f16."
        )
    if asked.quantize == "f16":
        largest = max(float(tensor.abs().max()) for tensor in found.state.values())
        if largest > LARGEST_F16:
            raise UsageError(f"Asked to write GGUF as f16; a weight of {largest:.3g} is more than f16 holds. Take bf16 or f32.")


def write(asked: Asked, path: Path) -> dict[str, Any]:
    """Writes the file; gives architecture, sizes by layer, context and notes."""
    found = prepared(asked.model, _multiple(asked.quantize))
    writer = gguf.GGUFWriter(path, found.architecture)
    _write_sizes(writer, found, asked)
    write_tokenizer(writer, asked.tokenizer, len(_embedding(found)))
    others = []
    for name, tensor in _tensors(found):
        kind = _type(name, tensor.shape, asked.quantize)
        if tensor.dim() > 1 and kind not in (TYPES[asked.quantize][0], Type.Q8_0):
            others.append(name)
        writer.add_tensor(name, _bytes(tensor.numpy(), kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    notes = [*found.notes, *([f"{len(others)} matrices whose rows are no multiple of {BLOCK} stay f16"] if others else [])]
    return {"architecture": found.architecture, "context_length": found.context, "notes": notes, **_sizes(found)}


def stored(asked: Asked) -> PreTrainedModel:
    """A copy of the model whose matrices are as precise as in the file."""
    model, found = copy.deepcopy(asked.model), prepared(asked.model, _multiple(asked.quantize))
    names = gguf.get_tensor_name_map(_architecture(found), len(found.layers))
    columns = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters():
        rows = parameter.data.float().T if name in columns else parameter.data.float()
        width = rows.shape[-1] + (-rows.shape[-1] % BLOCK if _is_down(name) else 0)
        again = _rounded(rows, _type(_name(names, name) or name, (*rows.shape[:-1], width), asked.quantize))
        parameter.data = (again.T if name in columns else again).to(parameter.dtype).contiguous()
    return model


def limits(asked: Asked) -> Limits:
    """How far llama.cpp may be off."""
    table = model_type(asked.model) in ("gemma2", "gpt2")
    return TABLE if table and asked.quantize == "f32" else LIMITS[asked.quantize]


@contextmanager
def rounding(asked: Asked, model: PreTrainedModel) -> Iterator[None]:
    """llama.cpp rounds what goes into a matrix product as it stores the matrix; for types of four and eight bits, to eight."""
    products = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    kind = Type.Q8_0 if asked.quantize.startswith("q") else TYPES[asked.quantize][0]

    def before(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_rounded(given[0], kind), *given[1:])

    hooks = [module.register_forward_pre_hook(before) for module in products]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(values: Tensor, kind: Type) -> Tensor:
    """What is left of values that were stored as a type, row by row."""
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values.float(), (0, -width % BLOCK)).contiguous()
    again = torch.from_numpy(gguf.dequantize(_bytes(padded.cpu().numpy(), kind), kind)).reshape(padded.shape)
    return again[..., :width].to(values)


def _tensors(found: Prepared) -> Iterator[tuple[str, Tensor]]:
    """The weights under their names in the file."""
    names = gguf.get_tensor_name_map(_architecture(found), len(found.layers))
    for name, tensor in found.state.items():
        new = _name(names, name)
        if new is None:
            raise UsageError(f"Asked to write GGUF; llama.cpp's {found.architecture} has no place for {name}. Use --format hf.")
        yield new, tensor.contiguous()


def _name(names: gguf.TensorNameMap, name: str) -> str | None:
    if name == "rope_freqs.weight":
        return name
    if name.endswith(".self_attn.qkv_proj.weight"):
        return f"blk.{name.split('.')[2]}.attn_qkv.weight"
    return names.get_name(name, try_suffixes=(".weight", ".bias"))


def _write_sizes(writer: gguf.GGUFWriter, found: Prepared, asked: Asked) -> None:
    config: Any = asked.model.config.get_text_config()
    sizes = _sizes(found)
    writer.add_name(asked.about.base_model or model_type(asked.model))
    writer.add_description("parts removed by resect")
    writer.add_file_type(TYPES[asked.quantize][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(found.layers))
    writer.add_context_length(found.context)
    writer.add_embedding_length(_embedding(found).shape[1])
    writer.add_vocab_size(len(_embedding(found)))
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_feed_forward_length(sizes["channels"])
    writer.add_key_length(found.head)
    writer.add_value_length(found.head)
    if found.architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(found.head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if found.architecture == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _sizes(found: Prepared) -> dict[str, Any]:
    """Heads, key-value heads and channels: one number where all layers agree."""
    sizes = {name: [getattr(layer, name) for layer in found.layers] for name in ("heads", "kv_heads", "channels")}
    even = len(set(found.layers)) == 1
    return {name: values[0] if even else values for name, values in sizes.items()}


def _type(name: str, shape: Any, quantize: str) -> Type:
    """What a tensor is stored as."""
    kind = TYPES[quantize][0]
    if len(shape) < 2 or name.startswith("position_embd"):
        return Type.F32
    if quantize.startswith("q4") and name.rpartition(".")[0] in EMBEDDINGS:
        kind = Type.Q8_0
    return Type.F16 if quantize.startswith("q") and shape[-1] % BLOCK else kind


def _bytes(array: Any, kind: Type) -> Any:
    if kind in (Type.F32, Type.F16):
        return array.astype(np.float32 if kind == Type.F32 else np.float16)
    return gguf.quantize(array, kind)


def _multiple(quantize: str) -> int:
    return BLOCK if quantize.startswith("q") else 1


def _is_down(name: str) -> bool:
    return name.endswith((".mlp.down_proj.weight", ".mlp.c_proj.weight"))


def _embedding(found: Prepared) -> Tensor:
    """The table of tokens [vocabulary, width]."""
    names = ("model.embed_tokens.weight", "transformer.wte.weight")
    return next(found.state[name] for name in names if name in found.state)


def _architecture(found: Prepared) -> gguf.MODEL_ARCH:
    return {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[found.architecture]


FORMAT = Format(
    name="gguf",
    consumer="llama.cpp",
    suffix=".gguf",
    magic=b"GGUF",
    quantisations=tuple(TYPES),
    write=write,
    check=check,
    limits=limits,
    stored=stored,
    rounding=rounding,
    readers={"xllamacpp": "xllamacpp"},
    extra="llama-cpp",
)
