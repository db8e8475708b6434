"""A uniform layout is one that a stock configuration says, whatever the blocks are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Lfm2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import resect
from resect.checkpoint import expressible_sizes, find_stock, inexpressible
from resect.checkpoint.stock import shapes_of
from resect.errors import UsageError
from resect.plan import places
from tests.models import FAMILIES, assert_same_function

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "deepseek": DeepseekV2Config(**SIZES, **LATENT, n_routed_experts=4, first_k_dense_replace=1),
    "router bias": DeepseekV3Config(**{**SIZES, "num_hidden_layers": 2}, **LATENT, n_routed_experts=8, first_k_dense_replace=0),
    "qwen": Qwen2MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    "lfm": Lfm2Config(
        **SIZES,
        num_key_value_heads=2,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    "gemma": Gemma2Config(
        **{**SIZES, "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2},
        num_key_value_heads=4,
        head_dim=8,
        sliding_window=16,
    ),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return model


@pytest.mark.parametrize(
    ("name", "kinds", "fields"),
    [
        ("deepseek", ["heads", "experts"], ["n_routed_experts"]),
        ("deepseek", ["channels"], ["intermediate_size", "moe_intermediate_size"]),
        ("router bias", ["experts"], ["n_routed_experts"]),
        ("qwen", ["channels"], ["intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"]),
        ("lfm", ["heads", "channels"], ["intermediate_size"]),
        ("gemma", ["heads", "channels"], ["intermediate_size"]),
    ],
)
def test_groups_at_the_same_place_get_one_size_that_a_field_says(
    name: str, kinds: list[str], fields: list[str], tmp_path: Any
) -> None:
    model = model_of(name)
    result = resect.prune(model, keep=0.8, align=4, settings={"kinds": kinds, "criterion": "l2", "selection": "local"})
    saved = resect.save(model, tmp_path / "out", plan=result.plan)
    assert saved.layout == "uniform"
    assert set(fields) <= set(saved.changes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not type(loaded).__name__.startswith("Resect")
    assert_same_function(model, loaded, torch.randint(5, 90, (2, 9)))


def test_numbers_of_heads_that_do_not_divide_are_not_offered() -> None:
    """Of 4 KV heads, 3 would make 6 query heads, which do not divide the 64 residual channels."""
    model = model_of("gemma")
    graph = resect.trace(model)
    found = expressible_sizes(model, graph, ["heads", "channels"])
    (heads,) = {found.sizes[group.name] for group in graph.of_kind("heads")}
    assert heads == (1, 2)
    assert found.withheld == {}
    assert {found.sizes[group.name] for group in graph.of_kind("channels")} == {tuple(range(1, 64))}


def test_sizes_that_cannot_be_said_are_refused_with_those_that_can() -> None:
    settings = {"criterion": "l2", "widths": {"heads": 3}}
    with pytest.raises(UsageError, match=r"3 heads of model.layers.0.self_attn.heads .* nearest numbers .* are 1, 2, 4"):
        resect.prune(model_of("gemma"), settings=settings)


def test_fields_that_size_two_places_tie_them() -> None:
    """One shared expert is as wide as one routed expert: `n_shared_experts * moe_intermediate_size`."""
    model = model_of("deepseek")
    graph = resect.trace(model)
    found = expressible_sizes(model, graph, ["channels"])
    tied = [set(names) for names in found.equal]
    assert {f"model.layers.{layer}.mlp{part}.channels" for layer in (1, 2, 3) for part in ("", ".shared_experts")} in tied


def test_one_field_of_encoder_and_decoder() -> None:
    """T5 says one number of channels for both stacks; its decoder has them in the third sub-layer, not the second."""
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(5, 60, (2, 7))
    graph = resect.trace(model, {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False})
    assert [len(groups) for groups in places(graph, "channels").values()] == [4]
    found = expressible_sizes(model, graph, ["heads", "channels"])
    assert found.withheld == {}
    assert {found.sizes[group.name] for group in graph.of_kind("channels")} == {tuple(range(1, 64))}


def test_fields_of_nested_configurations() -> None:
    """Gemma 3 with images has its sizes in `text_config`."""
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "sliding_window": 16}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90)
    model = Gemma3ForConditionalGeneration(config).eval()
    shapes = dict(shapes_of(model))
    for name, shape in shapes.items():
        if "language_model" in name and ".mlp." in name:
            shapes[name] = tuple(40 if size == 64 else size for size in shape)
    stock, reason = find_stock(shapes, model.config, type(model))
    assert stock is not None, reason
    assert stock.changes == {"text_config.intermediate_size": 40}
    assert stock.config.text_config.intermediate_size == 40


def test_a_plan_that_no_configuration_says_is_named_before_the_cut() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    group = graph.of_kind("channels")[0]
    kept = {"kind": group.kind, "layer": group.layer, "units": group.units, "keep": [0, 1]}
    plan = resect.Plan.model_validate({"groups": {group.name: kept}})
    assert "sizes differ from layer to layer" in inexpressible(model, graph, plan)
    assert inexpressible(model, graph, resect.Plan()) == ""


def test_shares_of_some_blocks_are_refused_in_the_uniform_layout() -> None:
    settings = {"share": 0.25, "blocks": {"channels": (1, 3)}, "kinds": ["channels"], "criterion": "l2"}
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match=r"none can express the sizes that were chosen \(.*differ from layer to layer"):
        resect.prune(model, settings=settings)
    assert model.config.intermediate_size == model.get_submodule("model.layers.1.mlp.up_proj").out_features


def test_a_refusal_says_why_the_experts_stay_whole() -> None:
    """Routers that choose groups of experts before experts."""
    fields = {**LATENT, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_routed_experts": 16}
    torch.manual_seed(0)
    config = DeepseekV3Config(**{**SIZES, "num_hidden_layers": 2}, **fields, first_k_dense_replace=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    wanted = r"experts were asked for.* These stay whole: .*\(positions see each other at aten.topk in model.layers.0.mlp"
    with pytest.raises(UsageError, match=wanted):
        resect.prune(model, layout="per-layer", settings={"criterion": "l2", "kinds": ["experts"]})
