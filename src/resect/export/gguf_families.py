"""Which architecture of llama.cpp computes what a model computes, and the model's weights as that architecture reads them.

Native architectures take one size for all layers. `deci` (Llama's mathematics, biases where there are some) and `openelm`
(fused projections, norms over queries and keys, tied head) take sizes layer by layer; models whose mathematics they share go
there when their layers differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resect.errors import UsageError

State = dict[str, Tensor]

ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")
BLOCK = 32
"""Values that a quantised type of llama.cpp stores together."""
PADDED = "Write --format hf-padded, which fills them up with zeros, and export that directory."


@dataclass(frozen=True)
class Layer:
    """How many heads, key-value heads and channels a layer has; 0 where a sub-layer is gone."""

    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Prepared:
    """A model as an architecture of llama.cpp reads it: weights under their names in transformers, float32."""

    architecture: str
    state: State
    layers: list[Layer]
    head: int
    context: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """A model type of transformers: its architecture for equal layers, the one for layers that differ, and its activation."""

    native: str
    uneven: str | None
    activation: tuple[str, ...]
    prepare: Callable[[PreTrainedModel, Family, int], Prepared]


def prepared(model: PreTrainedModel, multiple: int = 1) -> Prepared:
    """The model ready to be written, channels filled up to a multiple with zeros.

    Raises `UsageError` for a model that no architecture computes, naming the axis and the way out.
    """
    kind = model_type(model)
    if kind not in FAMILIES:
        raise UsageError(
            f"Asked to write a {kind} model as GGUF; that is done for {', '.join(FAMILIES)}. "
            "Use --format hf, and llama.cpp's own converter for a uniform layout."
        )
    if any(type(module).__name__ == "Gathered" for module in model.modules()):
        raise UsageError(
            "Asked to write GGUF; single layers keep only some of their rows and columns, and llama.cpp has no such layer. "
            "Use --format hf."
        )
    family = FAMILIES[kind]
    config = model.config.get_text_config()
    activation = next((getattr(config, name) for name in ACTIVATIONS if getattr(config, name, None)), None)
    if activation not in family.activation:
        raise UsageError(
            f"Asked to write GGUF; llama.cpp computes {kind} with {family.activation[0]}, this model with {activation}. "
            "Use --format hf."
        )
    return family.prepare(model, family, multiple)


def model_type(model: PreTrainedModel) -> str:
    """The model type of the stock class, whoever built the model."""
    stock: Any = getattr(type(model), "stock_class", type(model))
    return str(stock.config_class.model_type)


def architecture(family: Family, kind: str, layers: list[Layer], *, why_not: str = "") -> str:
    """The architecture for such layers; raises `UsageError` where none takes them."""
    uneven = [name for name in ("heads", "kv_heads", "channels") if len({getattr(layer, name) for layer in layers}) > 1]
    if not uneven:
        return family.native
    if family.uneven is None or why_not:
        named = ", ".join("key-value heads" if name == "kv_heads" else name for name in uneven)
        sizes = [getattr(layer, uneven[0]) for layer in layers]
        shown = ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "")
        raise UsageError(
            f"Asked to write a {kind} model as GGUF; its layers differ in {named} ({shown}), and llama.cpp's "
            f"{family.native} wants the same in all of them{why_not}. {PADDED} Or prune with --layout uniform."
        )
    return family.uneven


def _llama_like(model: PreTrainedModel, family: Family, multiple: int) -> Prepared:
    """Decoders with `self_attn.{q,k,v,o}_proj` and a gated `mlp`."""
    kind, config = model_type(model), model.config.get_text_config()
    state, head = _state(model), _head_size(model)
    _check_scaling(model, head, kind)
    if kind == "granite":
        _check_multipliers(config)
    layers = [_layer(state, number, head) for number in range(config.num_hidden_layers)]
    tied = "lm_head.weight" not in state
    why_not = (
        "" if tied or family.uneven != "openelm" else "; openelm, which takes each layer as it is, ties the head to the embedding"
    )
    name = architecture(family, kind, layers, why_not=why_not)
    width = state["model.embed_tokens.weight"].shape[1]
    if name == "qwen2" and layers[0].heads * head != width:  # there, heads are as wide together as the stream
        name = "deci"
    for number, layer in enumerate(layers):
        _fill(state, number, layer, head, width, attention=not (name == "deci" and number))
    _pad_channels(state, multiple)
    layers = [_layer(state, number, head) for number in range(len(layers))]
    if name in ("llama", "deci"):
        _interleave(state, head)
    if name == "openelm":
        _fuse(state)
    factors = _rotary_factors(model, config, head)
    if factors is not None:
        if name not in ("llama", "deci"):
            raise UsageError(f"Asked to write GGUF; llama.cpp's {name} has no rotary frequencies of its own. Use --format hf.")
        state["rope_freqs.weight"] = factors
    context, notes = _context(config)
    return Prepared(name, state, layers, head, context, notes)


def _gemma2(model: PreTrainedModel, family: Family, multiple: int) -> Prepared:
    """Norms count from one; embeddings are scaled by the root of their width; windows slide in every other layer."""
    config: Any = model.config.get_text_config()
    state, head = _state(model), _head_size(model)
    layers = [_layer(state, number, head) for number in range(config.num_hidden_layers)]
    name = architecture(family, "gemma2", layers)
    width = state["model.embed_tokens.weight"].shape[1]
    scale: Any = model.get_submodule("model.embed_tokens").scalar_embed_scale
    if not math.isclose(scale, math.sqrt(width)):
        raise UsageError(
            "Asked to write GGUF; the residual width was cut, and llama.cpp scales gemma2's embeddings by its root. "
            "Use --format hf, or leave residual channels whole."
        )
    alternating = ["full_attention" if number % 2 else "sliding_attention" for number in range(len(layers))]
    if list(config.layer_types) != alternating:
        raise UsageError(
            "Asked to write GGUF; windows no longer slide in every other layer, as llama.cpp's gemma2 has them: blocks are gone. "
            "Use --format hf, or leave the blocks whole."
        )
    if not (config.attn_logit_softcapping and config.final_logit_softcapping):
        raise UsageError("Asked to write GGUF; llama.cpp's gemma2 always caps logits, this model does not. Use --format hf.")
    theirs = width // layers[0].heads if len(layers) == 46 else head  # 46 layers: the 27B model, which scales otherwise
    factor = math.sqrt(theirs / config.query_pre_attn_scalar)
    _pad_channels(state, multiple)
    for key in state:
        if key.endswith("norm.weight"):
            state[key] = state[key] + 1
        elif key.endswith("q_proj.weight"):
            state[key] = state[key] * factor
    layers = [_layer(state, number, head) for number in range(len(layers))]
    return Prepared(name, state, layers, head, config.max_position_embeddings)


def _gpt2(model: PreTrainedModel, family: Family, multiple: int) -> Prepared:
    """Fused projections stored by columns, learned positions, heads as wide together as the stream."""
    config: Any = model.config
    state = _state(model)
    width = state["transformer.wte.weight"].shape[1]
    head = model.config.hidden_size // model.config.num_attention_heads
    layers = []
    for number in range(config.num_hidden_layers):
        names = (f"transformer.h.{number}.attn.c_proj.weight", f"transformer.h.{number}.mlp.c_proj.weight")
        heads, channels = (state[name].shape[0] if name in state else 0 for name in names)
        layers.append(Layer(heads // head, heads // head, channels))
    name = architecture(family, "gpt2", layers)
    if layers[0].heads * head != width:
        raise UsageError(
            f"Asked to write a gpt2 model as GGUF; {layers[0].heads} heads of {head} are left, and gpt2, in llama.cpp as in "
            f"transformers, wants them to be as wide together as the stream, {width}. {PADDED}"
        )
    for key in [key for key in state if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]:
        state[key] = state[key].T.contiguous()
    _pad_channels(state, multiple)
    padded = state["transformer.h.0.mlp.c_proj.weight"].shape[1]
    layers = [Layer(layer.heads, layer.kv_heads, padded) for layer in layers]
    return Prepared(name, state, layers, head, config.n_positions)


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "deci", ("silu",), _llama_like),
    "mistral": Family("llama", "deci", ("silu",), _llama_like),
    "granite": Family("llama", "deci", ("silu",), _llama_like),
    "qwen2": Family("qwen2", "deci", ("silu",), _llama_like),
    "qwen3": Family("qwen3", "openelm", ("silu",), _llama_like),
    "gemma2": Family("gemma2", None, ("gelu_pytorch_tanh",), _gemma2),
    "gpt2": Family("gpt2", None, ("gelu_new", "gelu_pytorch_tanh"), _gpt2),
}


def _state(model: PreTrainedModel) -> State:
    """Every parameter once, float32; a tied head is left out."""
    return {name: parameter.detach().cpu().float() for name, parameter in model.named_parameters()}


def _head_size(model: PreTrainedModel) -> int:
    sizes = {getattr(module, "head_dim", None) for module in model.modules()} - {None}
    if len(sizes) != 1:
        raise UsageError(f"Asked to write GGUF; heads have sizes {sorted(map(str, sizes))}, not one. Use --format hf.")
    size = sizes.pop()
    assert isinstance(size, int)
    return size


def _layer(state: State, number: int, head: int) -> Layer:
    rows = [
        len(state.get(f"model.layers.{number}.{name}.weight", ()))
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ]
    return Layer(rows[0] // head, rows[1] // head, rows[2])


def _fill(state: State, number: int, layer: Layer, head: int, width: int, *, attention: bool) -> None:
    """Puts zeros where a sub-layer was: one head, unless `attention` need not be there, and a block of channels."""
    path = f"model.layers.{number}"
    norms = {f"{path}.input_layernorm.weight": torch.ones(width), f"{path}.post_attention_layernorm.weight": torch.ones(width)}
    state.update({name: weight for name, weight in norms.items() if name not in state})
    if not layer.heads and attention:
        for name in ("q_proj", "k_proj", "v_proj"):
            state[f"{path}.self_attn.{name}.weight"] = torch.zeros(head, width)
        state[f"{path}.self_attn.o_proj.weight"] = torch.zeros(width, head)
        if any(name.endswith("q_norm.weight") for name in state):
            state[f"{path}.self_attn.q_norm.weight"] = state[f"{path}.self_attn.k_norm.weight"] = torch.ones(head)
    elif not layer.heads:
        del state[f"{path}.input_layernorm.weight"]
    if not layer.channels:
        for name in ("gate_proj", "up_proj"):
            state[f"{path}.mlp.{name}.weight"] = torch.zeros(BLOCK, width)
        state[f"{path}.mlp.down_proj.weight"] = torch.zeros(width, BLOCK)


def _pad_channels(state: State, multiple: int) -> None:
    """Zeros after the channels of every layer, up to a multiple: what goes in and out of them is zero."""
    for name, weight in state.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith((".mlp.gate_proj", ".mlp.up_proj", ".mlp.c_fc")):
            missing = -len(weight) % multiple
            state[name] = nn.functional.pad(weight, (0, missing) if weight.dim() == 1 else (0, 0, 0, missing))
        elif module.endswith((".mlp.down_proj", ".mlp.c_proj")) and leaf == "weight":
            state[name] = nn.functional.pad(weight, (0, -weight.shape[1] % multiple))


def _interleave(state: State, head: int) -> None:
    """Rotary halves of a head, side by side: llama.cpp turns neighbours where transformers turns halves."""
    for name, weight in state.items():
        if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
            halves = weight.reshape(-1, 2, head // 2, *weight.shape[1:])
            state[name] = halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _fuse(state: State) -> None:
    """One projection for queries, keys and values."""
    for name in [name for name in state if name.endswith(".self_attn.q_proj.weight")]:
        path = name.removesuffix("q_proj.weight")
        state[f"{path}qkv_proj.weight"] = torch.cat([state.pop(f"{path}{part}_proj.weight") for part in "qkv"])


def _check_scaling(model: PreTrainedModel, head: int, kind: str) -> None:
    found = (getattr(module, "scaling", None) for module in model.modules())
    scales = {scale for scale in found if isinstance(scale, float)}
    if any(not math.isclose(scale, head**-0.5, rel_tol=1e-6) for scale in scales):
        raise UsageError(
            f"Asked to write GGUF; this {kind} scales attention by {sorted(scales)}, not by 1/sqrt({head}). Use --format hf."
        )


def _check_multipliers(config: Any) -> None:
    for name in ("embedding_multiplier", "logits_scaling", "residual_multiplier"):
        if getattr(config, name) != 1:
            raise UsageError(
                f"Asked to write GGUF; this granite has {name} {getattr(config, name)}; only 1 is written. Use --format hf."
            )


def _rotary_factors(model: PreTrainedModel, config: Any, head: int) -> Tensor | None:
    """By what rotary frequencies are divided; None where they are the plain ones."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or parameters.get("partial_rotary_factor", 1) != 1:
        raise UsageError(f"Asked to write GGUF; rotary embeddings of type {kind!r} are not written. Use --format hf.")
    if kind == "default":
        return None
    found: Any = model.get_submodule("model.rotary_emb").inv_freq
    plain = parameters["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors: Tensor = (plain / found.cpu().double()).float()
    return factors


def _context(config: Any) -> tuple[int, list[str]]:
    """The longest text, and what there is to say of it: within a sliding window it makes no difference."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if not (window and sliding and window < longest):
        return longest, []
    return window, [f"context of {window} tokens, not {longest}: llama.cpp has no sliding window for this architecture"]
