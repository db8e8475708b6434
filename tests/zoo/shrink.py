"""A small model of any causal language model type that transformers can build.

The type's own default configuration is taken and its fields are made small by rules on their names; none is written by
hand for a family except what `OVERRIDES` says, where a default leaves a required field empty or two fields depend on
each other in a way that no name tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

LAYERS, HEADS, KV_HEADS, HEAD, WIDTH, HIDDEN, VOCABULARY = 4, 8, 4, 16, 128, 72, 101
DEPTHS = "num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_decoder_layers|num_encoder_layers|num_blocks"

Size = int | Callable[[Any], Any]
# The first pattern that matches the whole name of a field decides, given the value it has by default.
SIZES: tuple[tuple[str, Size], ...] = (
    (r"(.*_period|full_attention_interval|.*sparse_step|.*attn_every.*)", lambda value: min(value or 1, 2)),
    (r".*layer_offset", lambda value: min(value or 0, 1)),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_nextn.*)", lambda value: min(value or 0, 1)),
    (r".*num_kv_shared_layers", 0),
    (rf".*({DEPTHS})", LAYERS),
    (r".*vocab_size.*", VOCABULARY),
    (r".*(max_position_embeddings|n_positions|max_seq_len|seq_length|n_ctx|max_target_positions|context_length)", 64),
    (r".*(num_key_value_heads|multi_query_group_num|num_kv_heads|kv_n_heads)", lambda value: KV_HEADS if value != 1 else 1),
    (r".*(num_global_key_value_heads)", KV_HEADS),
    (r".*(num_attention_heads|n_heads?|num_heads|attention_heads|linear_num_(key|value)_heads|index_n_heads)", HEADS),
    (r"qk_head_dim", 2 * HEAD),
    (r".*(head_dim|rotary_dim|d_kv|kv_channels|attention_head_size|head_size|mamba_d_head|d_head|dim_head)", HEAD),
    (r".*(experts_per_tok(en)?|moe_k|moe_topk|top_?k(_experts)?|num_selected_experts)", lambda value: min(value or 2, 2)),
    (r".*(n|num)_shared_experts", lambda value: min(value or 0, 1)),
    (r".*(experts|zero_expert_num)", lambda value: 4 if value is None or value > 1 else value),
    (r".*(n_group|topk_group|num_expert_groups?)", 1),
    (r"q_lora_rank", 20),
    (r".*(lora_rank|low_rank_dim|_rank|rank|lora_dim)", 12),
    (r".*shared_expert_intermediate_size", 28),
    (r".*(moe_.*intermediate_size|expert_ffn_hidden_size|moe_ffn.*|expert_dim)", 24),
    (r".*(intermediate_size.*|ffn_dim|n_inner|ffn_hidden_size|d_ff|d_inner|dim_ff|inner_dim|intermediate_dim)", HIDDEN),
    (r".*(hidden_size_per_layer_input)", lambda value: value and 16),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|lru_width|emb_dim|embedding_dim|width|embd)", WIDTH),
    (r"(dim|word_embed_proj_dim)", WIDTH),
    (r".*(state_size|d_state)", 8),
    (r".*(sliding_window|window_size|chunk_size)", lambda value: value and min(value, 16)),
    (r".*token_id", lambda value: value if value is None or value < VOCABULARY - 1 else 1),
)

INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
DOUBLE = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD}
# What no rule can tell, by type.
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"mamba_n_heads": 2 * WIDTH // HEAD},
    "falcon_h1": {"mamba_n_heads": 2 * WIDTH // HEAD, "mamba_d_ssm": 2 * WIDTH},
    "granitemoehybrid": {"mamba_n_heads": 2 * WIDTH // HEAD, "layer_types": ["mamba", "attention"] * 2},
    "mamba2": {"num_heads": 2 * WIDTH // HEAD},
    "zamba2": {**DOUBLE, "n_mamba_heads": 2 * WIDTH // HEAD, "mamba_headdim": HEAD, "hybrid_layer_ids": [3]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "moe_intermediate_size": 24},
    "blt": {"decoder_config": {"hidden_size_global": WIDTH}, "encoder_hash_byte_group_vocab": 211},
    "dots3_note": {"num_key_value_heads": HEADS, "head_dim": 2 * HEAD},
    "dots3_note_text": {"num_key_value_heads": HEADS, "head_dim": 2 * HEAD},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {**DOUBLE, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def shrink(model_type: str) -> PreTrainedConfig:
    """The small configuration of a type. Raises whatever the type's own validation raises."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class.from_dict(overlaid(small(config_class().to_dict()), OVERRIDES.get(model_type, {})))


def overlaid(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the fields of `over`, of configurations inside it too."""
    deep = {name: overlaid(values[name], over[name]) for name in over if isinstance(values.get(name), dict)}
    return {**values, **over, **deep}


def build(model_type: str, *, device: str = "meta") -> PreTrainedModel:
    """The small model of a type, with whatever weights its constructor gives."""
    config = shrink(model_type)
    architecture = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    if not isinstance(config, architecture.config_class):  # a decoder inside a larger model
        parts = (getattr(config, name) for name in config.sub_configs)
        config = next((part for part in parts if isinstance(part, architecture.config_class)), config)
    with torch.device(device):
        model: PreTrainedModel = architecture._from_config(config)
    return model.eval()


def small(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, and of those inside it, made small."""
    depth = next((values[name] for name in values if re.fullmatch(DEPTHS, name) and isinstance(values[name], int)), 0)
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("transformers_version", "architectures", "dtype", "_name_or_path") or "task_specific" in name:
            continue
        if name == "per_layer_config" and value:
            result[name] = {str(LAYERS - 1): small(next(iter(value.values())))}
        elif isinstance(value, dict) and not name.startswith(("rope", "quant", "id2", "label2")):
            result[name] = small(value)
        elif isinstance(value, list) and depth and len(value) == depth:
            result[name] = sample(value)
        elif value is None or type(value) is int:
            result[name] = size(name, value)
        else:
            result[name] = value
    if "kv_lora_rank" in result and "num_key_value_heads" in result:  # latent attention: every head has keys of its own
        result["num_key_value_heads"] = result["num_attention_heads"]
    return result


def size(name: str, value: int | None) -> int | None:
    """The small value of a field; one that is left empty is filled only where the name says that it counts something."""
    for pattern, rule in SIZES:
        if re.fullmatch(pattern, name):
            if value is None and not re.fullmatch(r"(.*head_dim|num_key_value_heads|num_experts_per_tok|n_routed_experts)", name):
                return None
            return rule(value) if callable(rule) else rule
    return value


def sample(entries: list[Any]) -> list[Any]:
    """As many entries as there will be layers, of every kind that occurs, in their order."""
    first = [at for at, entry in enumerate(entries) if entry not in entries[:at]]
    rest = [at for at in range(len(entries)) if at not in first]
    return [entries[at] for at in sorted([*first, *rest][:LAYERS])]
