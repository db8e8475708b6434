"""Tiny language models of every supported family, and assertions in the words of the field.

Every size differs from every other where the family allows it, so that nothing lines up by accident, and every
parameter is drawn at random (biases and norm weights too), so that no term is zero or one by luck.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from resect.graph import Graph
    from resect.plan import Plan

torch.set_num_threads(1)  # models this small run many times slower on several threads

VOCABULARY = 101
"""4 special tokens, newline, tab and the 95 printable ASCII characters."""

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Fields under their common names. Head dimension 8 makes 6 heads 48 wide, which is none of 60, 56, 101.
_WIDE = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 56}
# The same for families that derive head_dim from hidden_size.
_NARROW = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 56}
_LAYERS = {"num_hidden_layers": 3, "max_position_embeddings": 80, "vocab_size": VOCABULARY, **_SPECIAL}


def tiny(name: str, **fields: Any) -> PreTrainedModel:
    """A causal language model of class `<name>ForCausalLM` from config fields: float32, eval mode, random everywhere.

    The same fields give the same weights in every process.
    """
    config = getattr(transformers, f"{name}Config")(**fields)
    architecture = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model: PreTrainedModel = getattr(transformers, architecture)(config).eval()
    seed = zlib.crc32(repr((name, sorted(fields.items()))).encode())
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Sizeable random values for every parameter: nothing stays at 0, 1 or a small initial value."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            values = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.copy_(values * _spread(module, name, parameter) + _offset(module, name))


def _offset(module: nn.Module, name: str) -> float:
    """Norm weights scatter around 1, everything else around 0."""
    return 1.0 if _is_norm(module) and name == "weight" else 0.0


def _spread(module: nn.Module, name: str, parameter: Tensor) -> float:
    if isinstance(module, nn.Embedding):
        return 0.4  # tied embeddings give logits of scale 0.4 * sqrt(hidden size)
    if parameter.ndim < 2 or _is_norm(module):
        return 0.3
    fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
    return float(1.5 / fan_in**0.5)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _llama(**fields: Any) -> PreTrainedModel:
    return tiny("Llama", **{**_WIDE, **_LAYERS, **fields})


def _falcon(**fields: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "ffn_hidden_size": 56, "tie_word_embeddings": False}
    return tiny("Falcon", **{**sizes, **_LAYERS, **fields})


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_mha": lambda: _llama(num_key_value_heads=6),
    "llama_mqa": lambda: _llama(num_key_value_heads=1),
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "llama_biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "mistral": lambda: tiny("Mistral", **_WIDE, **_LAYERS, sliding_window=5),
    "qwen2": lambda: tiny("Qwen2", **_NARROW, **_LAYERS, tie_word_embeddings=True),
    "qwen2_sliding": lambda: tiny(
        "Qwen2", **_NARROW, **_LAYERS, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: tiny("Qwen3", **_WIDE, **_LAYERS),
    "phi": lambda: tiny("Phi", **_NARROW, **_LAYERS),
    "phi_qk": lambda: tiny("Phi", **_NARROW, **_LAYERS, qk_layernorm=True),
    "phi3": lambda: tiny("Phi3", **_NARROW, **_LAYERS, sliding_window=5),
    "gemma": lambda: tiny("Gemma", **_WIDE, **_LAYERS),
    "gemma2": lambda: tiny("Gemma2", **_WIDE, **_LAYERS, query_pre_attn_scalar=7, sliding_window=5),
    "olmo2": lambda: tiny("Olmo2", **_NARROW, **_LAYERS),
    "opt": lambda: tiny(
        "OPT", hidden_size=48, num_attention_heads=6, ffn_dim=56, word_embed_proj_dim=48, dropout=0.0, **_LAYERS
    ),
    "gpt2": lambda: tiny(
        "GPT2", n_embd=48, n_head=6, n_inner=56, n_layer=3, n_positions=80, vocab_size=VOCABULARY, **_SPECIAL
    ),
    "gpt_neox": lambda: tiny("GPTNeoX", hidden_size=48, num_attention_heads=6, intermediate_size=56, **_LAYERS),
    "gpt_neox_serial": lambda: tiny(
        "GPTNeoX",
        hidden_size=48,
        num_attention_heads=6,
        intermediate_size=56,
        use_parallel_residual=False,
        attention_bias=False,
        **_LAYERS,
    ),
    "bloom": lambda: tiny("Bloom", hidden_size=48, n_head=6, n_layer=3, vocab_size=VOCABULARY, **_SPECIAL),
    "falcon_gqa": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon_mqa": lambda: _falcon(multi_query=True, tie_word_embeddings=True),
    "falcon_alibi": lambda: _falcon(multi_query=False, alibi=True, bias=True, parallel_attn=False),
    "glm": lambda: tiny("Glm", **_WIDE, **_LAYERS),
    "glm4": lambda: tiny("Glm4", **_WIDE, **_LAYERS),
    "stablelm": lambda: tiny("StableLm", **_NARROW, **_LAYERS, use_qkv_bias=True),
    "stablelm_qk": lambda: tiny("StableLm", **_NARROW, **_LAYERS, qk_layernorm=True, use_parallel_residual=True),
    "cohere": lambda: tiny("Cohere", **_NARROW, **_LAYERS, logit_scale=0.7),
    "cohere_qk": lambda: tiny("Cohere", **_NARROW, **_LAYERS, logit_scale=0.7, use_qk_norm=True),
    "starcoder2": lambda: tiny("Starcoder2", **_NARROW, **_LAYERS, sliding_window=5),
    "smollm3": lambda: tiny("SmolLM3", **_NARROW, **_LAYERS, no_rope_layer_interval=2),
}
"""Builders of the tiny models by name; a name is the family, with a variant after the underscore."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per ASCII character, 101 in all, made for the models of this file."""
    characters = ["\n", "\t", *map(chr, range(32, 127))]
    words = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_tokens(sequences: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random ordinary tokens [sequences, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (sequences, length), generator=generator)


@torch.no_grad()
def logits_without_cache(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [N, T, vocabulary] of one forward pass."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@torch.no_grad()
def logits_with_cache(model: nn.Module, tokens: Tensor, *, prefill: int = 5) -> Tensor:
    """The same logits [N, T, vocabulary], from a prefill and then token by token through the KV cache."""
    output = model(tokens[:, :prefill], use_cache=True)
    pieces = [output.logits]
    for position in range(prefill, tokens.shape[1]):
        output = model(tokens[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def assert_same_logits(found: Tensor, expected: Tensor, *, tolerance: float = 1e-4, what: str = "logits") -> None:
    """The largest difference is at most `tolerance` of the logit scale, taken as their standard deviation."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert found.isfinite().all(), f"{what}: not finite"
    scale = expected.std().item()
    assert scale > 1e-2, f"{what}: a model whose logits do not vary (scale {scale:.1e}) shows nothing"
    difference = (found - expected).abs().max().item() / scale
    assert difference <= tolerance, f"{what}: off by {difference:.2e} of the logit scale, {tolerance:.0e} allowed"


def assert_same_function(model_a: nn.Module, model_b: nn.Module, tokens: Tensor, tolerance: float = 1e-4) -> None:
    """Both models give the same logits, without a KV cache and with one."""
    expected = logits_without_cache(model_b, tokens)
    assert_same_logits(logits_without_cache(model_a, tokens), expected, tolerance=tolerance, what="without cache")
    assert_same_logits(logits_with_cache(model_a, tokens), expected, tolerance=tolerance, what="with cache")


@dataclass(frozen=True)
class Snapshot:
    """All that a step which only looks at a model must leave alone."""

    tensors: Mapping[str, tuple[int, Tensor]]
    gradients: Mapping[str, Tensor | None]
    requires_grad: Mapping[str, bool]
    training: Mapping[str, bool]
    hooks: Mapping[str, int]
    attributes: Mapping[str, frozenset[str]]
    config: str
    grad_enabled: bool
    random_state: Tensor


def snapshot(model: nn.Module) -> Snapshot:
    """A copy of everything observable of a model: values, gradients, modes, hooks, attribute names, config."""
    config = getattr(model, "config", None)
    return Snapshot(
        tensors={name: (id(tensor), tensor.detach().clone()) for name, tensor in _tensors(model)},
        gradients={
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        requires_grad={name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        training={name: module.training for name, module in model.named_modules()},
        hooks=_hooks(model),
        attributes={name: frozenset(vars(module)) for name, module in model.named_modules()},
        config=repr(config),
        grad_enabled=torch.is_grad_enabled(),
        random_state=torch.get_rng_state(),
    )


def assert_untouched(model: nn.Module, before: Snapshot) -> None:
    """The model is bit for bit what it was: tensors, gradients, flags, hooks, attributes, config."""
    after = snapshot(model)
    assert after.tensors.keys() == before.tensors.keys(), "parameters or buffers appeared or vanished"
    for name, (identity, tensor) in after.tensors.items():
        assert identity == before.tensors[name][0], f"{name} is another tensor object now"
        assert _same_bits(tensor, before.tensors[name][1]), f"{name} changed"
    for name, gradient in after.gradients.items():
        old = before.gradients[name]
        same = gradient is old or (gradient is not None and old is not None and _same_bits(gradient, old))
        assert same, f"{name}.grad changed"
    for part in ("requires_grad", "training", "hooks", "attributes", "config", "grad_enabled"):
        found, expected = getattr(after, part), getattr(before, part)
        assert found == expected, f"{part} changed{_changes(found, expected)}"
    assert torch.equal(after.random_state, before.random_state), "the global random state changed"


def _changes(found: object, expected: object) -> str:
    if not (isinstance(found, Mapping) and isinstance(expected, Mapping)):
        return ""
    changed = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
    return f": {sorted(changed)[:5]}"


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks hang on each module and parameter."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        kinds = [kind for kind in vars(module) if kind.endswith("_hooks")]
        counts[name] = sum(len(getattr(module, kind) or ()) for kind in kinds)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        counts[f"parameter {name}"] = sum(len(hooks or ()) for hooks in own)
    return counts


def random_plan(graph: Graph, seed: int, *, uniform: bool, kinds: Iterable[str]) -> Plan:
    """A plan that removes random units of every group of the given kinds, never all of a group, nor all sub-layers or blocks.

    Uniform: groups of one kind and size lose equally many. Otherwise each group draws its own number, perhaps none.
    """
    from resect.plan import Kept, Plan  # here, so that the models serve tests of rooms that know no plan

    generator = torch.Generator().manual_seed(seed)
    wanted = set(kinds)
    common: dict[tuple[str, int], int] = {}
    groups: dict[str, Kept] = {}
    for group in graph.groups:
        if group.kind not in wanted - {"sublayers", "blocks"} or group.units < 2 or group.units == group.least:
            continue
        highest = min(max(1, group.units * 2 // 3), group.units - group.least)
        if uniform:
            size = (group.kind, group.units)
            removed = common.setdefault(size, _draw(1, highest, generator))
        else:
            removed = _draw(0, highest, generator)
        keep = _draw_units(group.units, group.units - removed, generator)
        keep = tuple(sorted({*keep, *group.named}))
        groups[group.name] = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)
    for kind in ("sublayers", "blocks"):  # of one unit each
        whole = [group for group in graph.groups if group.kind == kind and kind in wanted]
        for index in _draw_units(len(whole), _draw(1, len(whole) - 1, generator), generator) if len(whole) > 1 else ():
            groups[whole[index].name] = Kept(kind=kind, layer=whole[index].layer, units=1, keep=())
    return Plan(groups=groups)


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _draw_units(units: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(sorted(torch.randperm(units, generator=generator)[:count].tolist()))


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """An independent copy to cut or mask."""
    return copy.deepcopy(model)
