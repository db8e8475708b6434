"""Numbers of blocks and heads in configurations follow a cut, and come back when the dense network is built again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

import resect
from resect.checkpoint import save
from resect.surgery.alignment import renumber_alignment
from resect.surgery.modeling_resect import lengthen, shorten
from tests.models import assert_same_function

WHISPER: dict[str, Any] = {
    "vocab_size": 200,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_mel_bins": 8,
    "max_source_positions": 15,
    "max_target_positions": 32,
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def without(graph: resect.Graph, keep: dict[str, list[int]]) -> resect.Plan:
    """The plan that keeps these units of some groups."""
    groups = {name: graph.group(name) for name in keep}
    facts = {name: {"kind": group.kind, "layer": group.layer, "units": group.units} for name, group in groups.items()}
    return resect.Plan.model_validate({"groups": {name: {**facts[name], "keep": units} for name, units in keep.items()}})


def whisper(pairs: list[list[int]]) -> tuple[PreTrainedModel, resect.Graph]:
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)).eval()
    settings: Any = model.generation_config
    settings.alignment_heads, settings.no_timestamps_token_id, settings.max_length = pairs, 150, 12
    settings._from_model_config = False  # as one that was read from a file
    settings.suppress_tokens = settings.begin_suppress_tokens = None
    texts = torch.randint(5, 60, (2, 7))
    inputs = {"input_features": torch.randn(2, 8, 30), "decoder_input_ids": texts, "use_cache": False}
    return model, resect.trace(model, inputs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_word_times_without_a_decoder_block(tmp_path: Path) -> None:
    model, graph = whisper([[2, 2], [2, 3], [1, 0], [0, 1]])
    resect.cut(model, without(graph, {"model.decoder.layers.0": []}), graph)
    assert (model.config.encoder_layers, model.config.decoder_layers, model.config.num_hidden_layers) == (2, 2, 2)
    settings: Any = model.generation_config
    assert settings.alignment_heads == [[1, 2], [1, 3], [0, 0]]
    sound, frames = torch.randn(1, 8, 30), torch.tensor([30])
    times: Any = model.generate(sound, return_token_timestamps=True, num_frames=frames)  # type: ignore[operator]
    assert times["token_timestamps"].shape[0] == 1
    saved = save(model, tmp_path / "out")
    assert saved.layout == "uniform"
    loaded: Any = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.alignment_heads == [[1, 2], [1, 3], [0, 0]]


def test_heads_for_alignment_follow_heads_and_blocks() -> None:
    stack = "model.decoder.layers"
    members = [SimpleNamespace(parameter=f"{stack}.2.encoder_attn.q_proj.weight")]
    heads = SimpleNamespace(name="heads", members=members)
    blocks = SimpleNamespace(lists=("model.encoder.layers", stack), modules=[(f"{stack}.{number}",) for number in range(3)])
    graph: Any = SimpleNamespace(blocks=blocks, of_kind=lambda kind: [heads])
    gone = {"kind": "blocks", "layer": 0, "units": 1, "keep": []}
    half = {"kind": "heads", "layer": 2, "units": 4, "keep": [0, 3]}
    plan = resect.Plan.model_validate({"groups": {f"{stack}.0": gone, "heads": half}})
    settings = SimpleNamespace(alignment_heads=[[2, 2], [2, 3], [1, 0], [1, 3], [0, 1]])
    model: Any = SimpleNamespace(generation_config=settings)
    renumber_alignment(model, plan, graph)
    assert settings.alignment_heads == [[1, 1], [0, 0], [0, 3]]
    settings.alignment_heads = [[0, 1], [2, 1]]
    renumber_alignment(model, plan, graph)
    assert settings.alignment_heads is None


def test_blocks_of_two_sorts(tmp_path: Path) -> None:
    """Dense blocks named by number: 1 and 3 of 4; without block 0 they are 0 and 2."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[1, 3],
    )
    model = Qwen2MoeForCausalLM(config).eval()
    graph = resect.trace(model)
    resect.cut(model, without(graph, {"model.layers.0": []}), graph)
    assert model.config.mlp_only_layers == [0, 2]
    saved = save(model, tmp_path / "out")
    assert saved.layout == "uniform"
    loaded = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_function(model, loaded, torch.randint(5, 90, (2, 9)))


def test_first_blocks_of_another_sort() -> None:
    config = transformers.DeepseekV3Config(first_k_dense_replace=2, num_hidden_layers=4)
    shorten(config, [1], blocks=4, path="model.layers")
    assert (config.first_k_dense_replace, config.num_hidden_layers) == (1, 3)
    lengthen(config, [1], path="model.layers")
    assert config.num_hidden_layers == 4
    assert config.first_k_dense_replace == 1  # block 1 goes again, whatever it is


@pytest.mark.parametrize(
    ("config", "path", "expected"),
    [
        (transformers.BartConfig(encoder_layers=3, decoder_layers=3), "model.decoder.layers", {"decoder_layers": 2}),
        (transformers.BartConfig(encoder_layers=3, decoder_layers=3), "model.encoder.layers", {"encoder_layers": 2}),
        (transformers.T5Config(num_layers=3, num_decoder_layers=3), "decoder.block", {"num_decoder_layers": 2}),
        (transformers.T5Config(num_layers=3, num_decoder_layers=3), "encoder.block", {"num_layers": 2}),
        (transformers.OPTConfig(num_hidden_layers=3), "model.decoder.layers", {"num_hidden_layers": 2}),
        (transformers.BertConfig(num_hidden_layers=3), "bert.encoder.layer", {"num_hidden_layers": 2}),
        (
            transformers.MllamaTextConfig(num_hidden_layers=3, cross_attention_layers=[2]),
            "layers",
            {"cross_attention_layers": [1]},
        ),
    ],
)
def test_depth_is_called_by_many_names(config: PreTrainedConfig, path: str, expected: dict[str, Any]) -> None:
    before = dict(vars(config))
    shorten(config, [0], blocks=3, path=path)
    changed = {name: value for name, value in vars(config).items() if value != before[name]}
    assert expected.items() <= changed.items()
    assert set(changed) <= {*expected, "num_hidden_layers", "layer_types", "layerdrop"}
    if "decoder_layers" in expected:
        assert "num_hidden_layers" not in changed  # the encoder's
    lengthen(config, [0], path=path)
    assert {name: getattr(config, name) for name in expected} == {name: before[name] for name in expected}
