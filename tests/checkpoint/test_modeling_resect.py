"""Replaying a surgery record on the dense architecture, and the classes that do it while loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from resect.checkpoint import save
from resect.surgery import modeling_resect
from resect.surgery.modeling_resect import lengthen, removed_blocks, resize, shorten
from tests.checkpoint.hand import channels, cut_by_hand, heads, merged, residual
from tests.models import FAMILIES, assert_same_function, logits_with_cache, random_tokens


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """A Llama-like model with different heads and channels in every layer and the middle block gone."""
    slices = merged(channels([0, 2], {0: range(0, 56, 2), 2: range(41)}), heads(model, {0: [1], 2: [0, 1]}))
    return cut_by_hand(model, slices, removed=["model.layers.1"])


def blank(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_resize_gives_the_shapes_of_the_cut_model(device: str) -> None:
    model = FAMILIES["llama_tied"]()
    cut = uneven(model)
    fresh = blank(model) if device == "meta" else FAMILIES["llama_tied"]()
    assert resize(fresh, cut.resect_record) is fresh  # type: ignore[arg-type]
    assert shapes(fresh) == shapes(cut)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert next(fresh.parameters()).device.type == device


def test_resize_keeps_ties_where_the_tied_axis_shrinks() -> None:
    model = FAMILIES["llama_tied"]()
    cut = cut_by_hand(model, residual(model, range(0, 60, 3), 60))
    fresh = resize(blank(model), cut.resect_record)  # type: ignore[arg-type]
    assert shapes(fresh) == shapes(cut)
    head: Any = fresh.get_submodule("lm_head")
    embedding: Any = fresh.get_submodule("model.embed_tokens")
    assert head.weight is embedding.weight
    assert (head.in_features, embedding.embedding_dim) == (20, 20)


def test_resize_corrects_what_layers_note_of_their_size() -> None:
    model = FAMILIES["gpt2"]()
    record = {
        "shapes": {
            "transformer.h.0.mlp.c_fc.weight": [48, 30],
            "transformer.h.0.mlp.c_fc.bias": [30],
            "transformer.h.0.mlp.c_proj.weight": [30, 48],
            "transformer.h.0.ln_1.weight": [40],
        },
        "attributes": {"transformer.h.0.attn": {"num_heads": 5, "config.n_head": 5}},
        "removed": [],
    }
    fresh: Any = resize(blank(model), record)
    first, last = fresh.transformer.h[0].mlp.c_fc, fresh.transformer.h[0].mlp.c_proj
    assert (first.nx, first.nf, last.nx, last.nf) == (48, 30, 30, 48)
    assert fresh.transformer.h[0].ln_1.normalized_shape == (40,)
    attention, other = fresh.transformer.h[0].attn, fresh.transformer.h[1].attn
    assert (attention.num_heads, attention.config.n_head) == (5, 5)
    assert (other.num_heads, other.config.n_head, fresh.config.n_head) == (6, 6, 6)


def test_removal_renumbers_and_shortens() -> None:
    model = FAMILIES["gemma2"]()
    kinds = list(model.config.layer_types)
    fresh = blank(model)
    resize(fresh, {"shapes": {}, "attributes": {}, "removed": ["model.layers.1"]})
    assert [layer.self_attn.layer_idx for layer in fresh.model.layers] == [0, 1]
    assert fresh.config.num_hidden_layers == 2
    assert fresh.config.layer_types == [kinds[0], kinds[2]]


def test_a_record_of_another_model_is_refused() -> None:
    model = FAMILIES["llama"]()
    empty: dict[str, Any] = {"shapes": {}, "attributes": {}, "removed": []}
    with pytest.raises(ValueError, match=r"up_proj.weight of shape \(57, 60\).*\(56, 60\).*another model"):
        resize(blank(model), {**empty, "shapes": {"model.layers.0.mlp.up_proj.weight": [57, 60]}})
    with pytest.raises(ValueError, match="transformer.h.0.x"):
        resize(blank(model), {**empty, "shapes": {"transformer.h.0.x": [1]}})
    with pytest.raises(ValueError, match="removes blocks"):
        resize(blank(model), {**empty, "removed": ["model.layers.3"]})


def test_shorten_and_lengthen_are_inverse() -> None:
    config = FAMILIES["smollm3"]().config
    long = list(config.no_rope_layers)
    shorten(config, [0, 2], blocks=3)
    assert (config.num_hidden_layers, config.no_rope_layers) == (1, long[1:2])
    lengthen(config, [0, 2])
    assert config.num_hidden_layers == 3
    assert len(config.no_rope_layers) == 3
    assert config.no_rope_layers[1] == long[1]


def test_removed_blocks() -> None:
    assert removed_blocks({"removed": ["model.layers.10", "model.layers.9"]}) == ("model.layers", [9, 10])
    assert removed_blocks({}) == ("", [])


def test_classes_are_made_on_demand() -> None:
    made = modeling_resect.ResectLlamaForCausalLM
    assert made is modeling_resect.ResectLlamaForCausalLM
    assert issubclass(made, LlamaForCausalLM)
    assert made.config_class is modeling_resect.ResectLlamaConfig
    assert made.config_class.model_type == "resect_llama"
    for name in ("ResectNothing", "LlamaConfig", "Resectpipeline"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_resect, name)


def test_a_record_free_config_is_the_dense_model() -> None:
    config = modeling_resect.ResectLlamaConfig(**LlamaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=5).to_diff_dict())
    with torch.device("meta"):
        assert len(modeling_resect.ResectLlamaForCausalLM(config).model.layers) == 1


@pytest.fixture
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, str]:
    """A per-layer model and the directory it was saved to."""
    directory = tmp_path_factory.mktemp("shipped") / "model"
    cut = uneven(FAMILIES["qwen3"]())
    assert save(cut, directory).layout == "per-layer"
    return cut, str(directory)


def test_shipped_code_loads_generates_and_saves_again(
    shipped: tuple[PreTrainedModel, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cut, directory = shipped
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert "transformers_modules" in type(loaded).__module__
    assert_same_function(loaded, cut, random_tokens())
    prompt = random_tokens(1, 5)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
        "eos_token_id": None,
    }
    dynamic, static = (loaded.generate(prompt, **options, **kind) for kind in ({}, {"cache_implementation": "static"}))
    assert torch.equal(dynamic, static)
    generate: Any = cut.generate
    assert torch.equal(dynamic, generate(prompt, **options))
    again = tmp_path_factory.mktemp("again")
    loaded.save_pretrained(again)
    assert_same_function(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True), cut, random_tokens())


def test_shipped_code_serves_the_bare_model_and_the_config(shipped: tuple[PreTrainedModel, str]) -> None:
    cut, directory = shipped
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("resect_qwen3", 2, 60)
    bare = AutoModel.from_pretrained(directory, trust_remote_code=True)
    tokens = random_tokens()
    expected = cut.base_model(tokens, use_cache=False).last_hidden_state
    assert torch.allclose(bare(tokens, use_cache=False).last_hidden_state, expected, atol=1e-5)


def test_remote_code_is_not_run_unasked(shipped: tuple[PreTrainedModel, str]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(shipped[1], trust_remote_code=False)


def test_attention_implementation_reaches_private_configurations(shipped: tuple[PreTrainedModel, str]) -> None:
    _, directory = shipped
    loaded = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    attention = loaded.model.layers[0].self_attn
    modeling_resect.set_attributes(loaded, {"model.layers.0.self_attn": {"config.num_attention_heads": 3}})
    before = logits_with_cache(loaded, random_tokens())
    loaded.set_attn_implementation("eager")
    assert attention.config is not loaded.config
    assert attention.config._attn_implementation == loaded.config._attn_implementation == "eager"
    assert torch.allclose(logits_with_cache(loaded, random_tokens()), before, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
def test_adapters_train_on_it(shipped: tuple[PreTrainedModel, str]) -> None:
    peft = pytest.importorskip("peft")
    loaded = AutoModelForCausalLM.from_pretrained(shipped[1], trust_remote_code=True)
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    adapted(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    merged_model = adapted.merge_and_unload()
    assert shapes(merged_model) == shapes(shipped[0])
