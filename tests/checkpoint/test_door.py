"""Nothing false comes in: what does not describe, fill or fit a model is refused before anything is computed with it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from resect.checkpoint import load, load_tokenizer, save, skeleton
from resect.checkpoint.source import find
from resect.errors import CheckpointError, ModelError, ResectWarning
from tests.checkpoint.hand import channels, cut_by_hand
from tests.models import FAMILIES, assert_same_function, random_tokens, tiny_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
INDEX = "model.safetensors.index.json"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny Llama as transformers saves it."""
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several files."""
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def changed(file: Path, change: Change) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def stored(directory: Path, change: Change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


class TestTensors:
    def test_missing_ones_are_named_and_counted(self, directory: Path) -> None:
        stored(directory, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(CheckpointError, match=r"1 tensors are missing \(model.layers.1.mlp.up_proj.weight\)"):
            load(directory)
        stored(directory, lambda weights: [weights.pop(name) for name in list(weights) if ".0." in name])
        with pytest.raises(CheckpointError, match=r"10 tensors are missing \(model.layers.0.*and 7 more"):
            load(directory)

    def test_layers_that_only_the_configuration_has(self, directory: Path) -> None:
        changed(directory / "config.json", lambda fields: fields.update(num_hidden_layers=12))
        with pytest.raises(CheckpointError, match=r"90 tensors are missing \(model.layers.2."):  # not .10.
            load(directory)

    def test_layers_that_only_the_weights_have(self, directory: Path) -> None:
        changed(directory / "config.json", lambda fields: fields.update(num_hidden_layers=1))
        with pytest.raises(CheckpointError, match=r"9 tensors have no place in it \(model.layers.1"):
            load(directory)

    def test_sizes_that_differ(self, directory: Path) -> None:
        changed(directory / "config.json", lambda fields: fields.update(intermediate_size=65))
        with pytest.raises(CheckpointError, match=r"6 tensors are of another size \(.*\[32, 64\], not \[32, 65\]"):
            load(directory)

    def test_tied_and_computed_ones_are_not_missing(self, tmp_path: Path) -> None:
        for name in ("llama_tied", "gpt2", "gemma2"):
            model = FAMILIES[name]()
            model.save_pretrained(tmp_path / name)
            assert_same_function(load(tmp_path / name), model, random_tokens())

    def test_what_the_library_calls_superfluous_is_silent(self, directory: Path) -> None:
        expected = load(directory)
        stored(directory, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
        assert_same_function(load(directory), expected, random_tokens())

    @pytest.mark.parametrize(
        ("model_class", "config"),
        [
            (LlamaForSequenceClassification, LlamaConfig(**SMALL)),
            (LlamaModel, LlamaConfig(**SMALL)),
            (BertForSequenceClassification, BertConfig(**SMALL)),
        ],
    )
    def test_classes_that_predict_no_tokens_are_named(self, model_class: Any, config: Any, tmp_path: Path) -> None:
        model_class(config).save_pretrained(tmp_path / "other")
        for read in (load, skeleton):
            with pytest.raises(CheckpointError, match=f"{model_class.__name__}, which is no causal language model"):
                read(tmp_path / "other")

    def test_a_per_layer_directory(self, tmp_path: Path) -> None:
        place = Path(save(cut_by_hand(FAMILIES["llama"](), channels([0], range(20))), tmp_path / "cut").directory)
        stored(place, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
        with pytest.raises(CheckpointError, match=r"1 tensors are missing \(model.layers.0.mlp.up_proj.weight\)"):
            load(place)


class TestFurtherHeads:
    """Layers behind the last one that predict further tokens, as DeepSeek-V3 and GLM-4.5 publish them."""

    @pytest.fixture
    def published(self, tmp_path: Path) -> Path:
        config = Glm4MoeConfig(
            **SMALL | {"head_dim": 8}, num_key_value_heads=2, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
        )  # fmt: skip
        Glm4MoeForCausalLM(config).save_pretrained(tmp_path / "glm")
        stored(tmp_path / "glm", lambda weights: weights.update({"model.layers.2.eh_proj.weight": torch.ones(32, 64)}))
        changed(tmp_path / "glm" / "config.json", lambda fields: fields.update(num_nextn_predict_layers=1))
        return tmp_path / "glm"

    def test_they_are_warned_of_and_no_longer_promised(self, published: Path, tmp_path: Path) -> None:
        with pytest.warns(ResectWarning, match=r"heads that predict further tokens \(1 tensors: model.layers.2.eh_proj.weight\)"):
            model = load(published)
        assert model.config.num_nextn_predict_layers == 0
        save(model, tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("num_nextn_predict_layers", 0) == 0

    def test_without_the_promise_they_have_no_place(self, published: Path) -> None:
        changed(published / "config.json", lambda fields: fields.update(num_nextn_predict_layers=0))
        with pytest.raises(CheckpointError, match="1 tensors have no place in it"):
            load(published)


class TestPrecision:
    def test_eight_bits_are_widened_to_what_was_asked_for(self, tmp_path: Path) -> None:
        config = Qwen3Config(**SMALL | {"hidden_size": 128, "intermediate_size": 128}, num_key_value_heads=2, head_dim=32)
        model = Qwen3ForCausalLM(config)
        model.save_pretrained(tmp_path / "eight")
        name = "model.layers.1.mlp.up_proj.weight"

        def narrow(weights: dict[str, torch.Tensor]) -> None:
            for key in [key for key in weights if key.endswith("proj.weight")]:
                scale = weights[key].abs().max() / 448
                rows, columns = (-(-size // 128) for size in weights[key].shape)
                weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
                weights[f"{key}_scale_inv"] = scale.repeat(rows, columns)

        weight = model.get_parameter(name).detach()
        scale = weight.abs().max() / 448
        expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
        stored(tmp_path / "eight", narrow)
        storage = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        changed(tmp_path / "eight" / "config.json", lambda fields: fields.update(quantization_config=storage))
        for dtype in (torch.float32, torch.bfloat16):
            loaded = load(tmp_path / "eight", dtype=dtype)
            assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
            assert torch.equal(loaded.get_parameter(name), expected.to(dtype))
        loaded.save_pretrained(tmp_path / "again")
        assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
        assert {one.dtype for one in load_file(tmp_path / "again" / "model.safetensors").values()} == {torch.bfloat16}

    @pytest.mark.parametrize(("rows", "block"), [(48, 32), (40, 16)], ids=["two scales for 48", "three scales for 40"])
    def test_blocks_that_are_not_full(self, tmp_path: Path, rows: int, block: int) -> None:
        """Each scale belongs to as many rows and columns as the configuration says, the last one to fewer."""
        config = Qwen3Config(**SMALL | {"hidden_size": 128, "intermediate_size": rows}, num_key_value_heads=2, head_dim=32)
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / "eight")
        expected: dict[str, torch.Tensor] = {}

        def narrow(weights: dict[str, torch.Tensor]) -> None:
            for key in [key for key in weights if key.endswith("proj.weight")]:
                grid = [-(-size // block) for size in weights[key].shape]
                scales = torch.rand(grid) + 0.5
                weights[key] = weights[key].to(torch.float8_e4m3fn)
                weights[f"{key}_scale_inv"] = scales
                spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
                size = weights[key].shape
                expected[key] = weights[key].float() * spread[: size[0], : size[1]]

        stored(tmp_path / "eight", narrow)
        storage = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
        changed(tmp_path / "eight" / "config.json", lambda fields: fields.update(quantization_config=storage))
        loaded = load(tmp_path / "eight", dtype=torch.float32)
        for name in expected:
            torch.testing.assert_close(loaded.get_parameter(name).detach(), expected[name], rtol=1e-6, atol=0)

    def test_what_stays_in_float32_by_design(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
        loaded = load(tmp_path / "model", dtype=torch.bfloat16)
        wide = [name for name, one in loaded.named_parameters() if one.dtype == torch.float32]
        assert wide == ["model.norm.weight"]
        assert {one.dtype for one in load(tmp_path / "model").parameters()} == {torch.float32}

    def test_mixed_files_become_one_type(self, directory: Path) -> None:
        stored(directory, lambda weights: weights.update({name: one.half() for name, one in weights.items() if ".0." in name}))
        assert {parameter.dtype for parameter in load(directory).parameters()} == {torch.float32}


class TestAdapters:
    CONFIG = '{"base_model_name_or_path": "base", "peft_type": "LORA"}'

    def test_alone_and_beside_weights(self, directory: Path, tmp_path: Path) -> None:
        (directory / "adapter_config.json").write_text(self.CONFIG)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(self.CONFIG)
        for place in (directory, tmp_path / "adapter"):
            for read in (load, skeleton, load_tokenizer):
                with pytest.raises(CheckpointError, match=r"low-rank adapters.*base 'base'.*merge_and_unload"):
                    read(place)


    def test_weights_of_an_adapter_without_its_configuration(self, directory: Path) -> None:
        save_file({"a": torch.ones(1)}, directory / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"weights of an adapter.*merge_and_unload"):
            load(directory)


class TestIndex:
    def test_a_sound_one(self, sharded: Path) -> None:
        assert load(sharded).config.hidden_size == 32

    @pytest.mark.parametrize(
        "name",
        ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "weights.bin", "a\0.safetensors", 5, ".."],
    )
    def test_only_safetensors_files_beside_it(self, name: Any, sharded: Path) -> None:
        changed(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
        with pytest.raises(CheckpointError, match=r"lm_head.weight is in .*only .safetensors files beside it are read"):
            load(sharded)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not JSON"),
            ("[]", "holds a list"),
            ("{}", "has no `weight_map`"),
            ('{"weight_map": {}}', "has no `weight_map`"),
            ('{"weight_map": {"a": "b", "a": "c"}}', "'a' stands there twice"),
            ('{"a":' * 100_000, "nested too deep"),
        ],
    )
    def test_damaged_ones(self, text: str, message: str, sharded: Path) -> None:
        (sharded / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(sharded)

    def test_files_that_are_not_there(self, sharded: Path) -> None:
        name = json.loads((sharded / INDEX).read_text())["weight_map"]["lm_head.weight"]
        (sharded / name).unlink()
        with pytest.raises(CheckpointError, match=f"names {name}, which are not there"):
            load(sharded)

    def test_tensors_that_are_elsewhere(self, sharded: Path) -> None:
        names = json.loads((sharded / INDEX).read_text())["weight_map"]
        changed(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": names["model.norm.weight"]}))
        with pytest.raises(CheckpointError, match=r"holds lm_head.weight; it does not"):
            load(sharded)

    def test_a_tensor_in_two_files(self, sharded: Path) -> None:
        names = json.loads((sharded / INDEX).read_text())["weight_map"]
        file = sharded / names["lm_head.weight"]
        save_file(load_file(file) | {"model.norm.weight": torch.ones(32)}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model.norm.weight is in .*Which is meant"):
            load(sharded)

    def test_links_lead_into_the_cache_of_the_hub_or_nowhere(self, sharded: Path, tmp_path: Path) -> None:
        cache = tmp_path / "models--a--b"
        (cache / "blobs").mkdir(parents=True)
        shutil.copytree(sharded, cache / "snapshots" / "1")
        for file in (cache / "snapshots" / "1").glob("*.safetensors"):
            file.rename(cache / "blobs" / file.name)
            file.symlink_to(Path("..", "..", "blobs", file.name))
        assert_same_function(load(cache / "snapshots" / "1"), load(sharded), random_tokens())
        file = next(sharded.glob("*.safetensors"))
        file.rename(tmp_path / "elsewhere.safetensors")
        file.symlink_to(tmp_path / "elsewhere.safetensors")
        with pytest.raises(CheckpointError, match="is a link to"):
            load(sharded)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"[]", "holds a list"),
            (b"", "not JSON"),
            (b'{"a":' * 100_000, "nested too deep"),
            (b"\xff{}", "not UTF-8"),
            (b"\xef\xbb\xbf{}", "BOM"),
            (b'{"model_type": "llama", "model_type": "gpt2"}', "'model_type' stands there twice"),
            (b'{"model_type": "llama", "hidden_size": ' + b"9" * 100_000 + b"}", "not JSON"),
            (b"{}", "names no model type"),
            (b'{"model_type": ["llama"]}', "names no model type"),
            (b'{"model_type": "nothing"}', "config.json cannot be read.*nothing"),
        ],
    )
    def test_damaged_ones(self, text: bytes, message: str, directory: Path) -> None:
        (directory / "config.json").write_bytes(text)
        for read in (load, skeleton):
            with pytest.raises(CheckpointError, match=message):
                read(directory)

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": 63},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}},
            {"hidden_size": -32},
            {"num_attention_heads": 0},
            {"num_attention_heads": 7},
            {"num_key_value_heads": 0},
            {"num_key_value_heads": 3},
            {"vocab_size": 0},
            {"vocab_size": "many"},
            {"rope_parameters": 5},
            {"layer_types": 5},
            {"architectures": "x"},
            {"architectures": [5]},
            {"auto_map": [1]},
            {"quantization_config": "x"},
            {"transformers_weights": "../x.safetensors"},
            {"attn_implementation": "somebody/kernel"},
            {"num_hidden_layers": 10**9},
            {"max_position_embeddings": 10**15},
            {"vocab_size": 10**9},
            {"hidden_size": 2**30},
        ],
        ids=str,
    )
    def test_values_that_cannot_be_meant(self, fields: dict[str, Any], directory: Path) -> None:
        changed(directory / "config.json", lambda config: config.update(fields))
        for read in (load, skeleton):
            with pytest.raises(CheckpointError, match=r"config.json|configuration"):
                read(directory)

    def test_nothing_has_default_sizes(self, directory: Path) -> None:
        whole = (directory / "config.json").read_text()
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
            (directory / "config.json").write_text(whole)
            changed(directory / "config.json", lambda fields, name=name: fields.pop(name))  # type: ignore[misc]
            with pytest.raises(CheckpointError, match=f"config.json does not say {name}"):
                skeleton(directory)
            with pytest.raises(CheckpointError, match=r"do not fit|describes"):
                load(directory)
        (directory / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(CheckpointError, match=r"describes 6,738,415,616 parameters, its files hold"):
            load(directory)

    def test_sizes_that_no_weight_tells_are_written_down(self, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=100, n_embd=48, n_layer=1, n_head=4, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        changed(tmp_path / "gpt2" / "config.json", lambda fields: fields.pop("n_head"))
        with pytest.raises(CheckpointError, match="does not say n_head, and the weights do not tell it"):
            load(tmp_path / "gpt2")

    def test_code_of_its_own_is_never_asked_about(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked on the terminal"))
        own = {"model_type": "theirs", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}}
        changed(directory / "config.json", lambda fields: fields.update(own))
        for read in (load, skeleton):
            with pytest.raises(CheckpointError, match="code of its own.*--trust-remote-code"):
                read(directory)
        own = {"auto_map": {"AutoTokenizer": ["x.T", None]}, "tokenizer_class": "T"}
        (directory / "tokenizer_config.json").write_text(json.dumps(own))
        with pytest.raises(CheckpointError, match="tokenizer"):
            load_tokenizer(directory)

    @pytest.mark.parametrize("text", ["", "[]", '{"a":' * 100_000])
    def test_settings_for_generation_are_read_too(self, text: str, directory: Path) -> None:
        (directory / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"generation_config.json"):
            load(directory)


def test_generation_settings_that_a_disk_fails_to_give_are_not_replaced(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(directory / "generation_config.json", lambda fields: fields.update({"max_new_tokens": 7}))
    read, calls = GenerationConfig.from_pretrained.__func__, []  # type: ignore[attr-defined]

    def failing(kind: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 1:  # transformers takes those of config.json then, and says nothing
            raise OSError("input/output error")
        return read(kind, *arguments, **options)

    monkeypatch.setattr(GenerationConfig, "from_pretrained", classmethod(failing))
    generation: Any = load(directory).generation_config
    assert generation.max_new_tokens == 7


class TestPlaces:
    @pytest.mark.parametrize(
        "name", ["", " ", "a\0b", "x" * 300, "/" + "x" * 300, "./" + "y/" * 3000, "~nobodyatall/x", "/dev/zero"], ids=range(8)
    )
    def test_names_of_nothing(self, name: str) -> None:
        with pytest.raises(ModelError):
            load(name)

    def test_loops(self, tmp_path: Path) -> None:
        os.symlink("loop", tmp_path / "loop")
        with pytest.raises(CheckpointError, match="cannot be read: Too many levels"):
            find(tmp_path / "loop")

    @pytest.mark.parametrize("target", ["/proc/self/mem", "/dev/zero", "config.json", "/nowhere"])
    def test_links_in_the_place_of_the_configuration(self, target: str, directory: Path) -> None:
        (directory / "config.json").unlink()
        (directory / "config.json").symlink_to(target)
        for read in (load, skeleton):
            with pytest.raises(CheckpointError, match=r"config.json"):
                read(directory)

    def test_directories_in_the_place_of_files(self, directory: Path) -> None:
        (directory / "config.json").unlink()
        (directory / "config.json").mkdir()
        with pytest.raises(CheckpointError, match=r"config.json is no file"):
            load(directory)

    def test_what_may_not_be_read(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: Any, **options: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", refuse)
            with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
                find(directory)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_text", refuse)
            with pytest.raises(CheckpointError, match=r"config.json cannot be read: Permission denied"):
                find(directory)


class TestTokenizers:
    @pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b'{"a":' * 100_000, b'{"added_tokens": 5}'])
    def test_damaged_ones(self, text: bytes, directory: Path) -> None:
        (directory / "tokenizer.json").write_bytes(text)
        with pytest.raises(CheckpointError, match="tokenizer"):
            load_tokenizer(directory)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A per-layer directory with a record."""
    return Path(save(cut_by_hand(FAMILIES["llama"](), channels([0], range(20))), tmp_path / "cut").directory)


@pytest.mark.parametrize(
    "record",
    [
        5,
        {"removed": 5},
        {"removed": ["model.layers"]},
        {"removed": ["model.layers.99999999999"]},
        {"shapes": "x"},
        {"shapes": {"model.norm.weight": None}},
        {"shapes": {"model.norm.weight": [-1]}},
        {"shapes": {"model.norm.weight": [1.5]}},
        {"attributes": {"model.layers.0.mlp": 5}},
        {"attributes": {"model.layers.0.mlp": {"__class__": 1}}},
        {"attributes": {"model.layers.0.mlp": {"config._name_or_path": 1}}},
        {"attributes": {"model.layers.0.mlp": {"forward": 1}}},
        {"attributes": {"model.layers.0.mlp": {"hidden_size": "x"}}},
        {"attributes": {"nowhere": {"hidden_size": 1}}},
        {"silent": {"model.layers.0.mlp": {"width": 60, "returns": 10**9}}},
        {"silent": {"model.layers.0.mlp": {"width": 10**12, "returns": 0}}},
        {"silent": {"model.layers.0.mlp": {"width": 60}}},
        {"silent": {"nowhere": {"width": 60, "returns": 0}}},
        {"gathered": {"model.layers.0.mlp.up_proj": {"rows": 10**9, "columns": None}}},
        {"gathered": {"model.layers.0.mlp.up_proj": {"lines": 1}}},
        {"gathered": {"model.norm": {"rows": 1, "columns": None}}},
        {"more": 1},
    ],
    ids=str,
)
def test_damaged_records(record: Any, cut: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["resect"] = {**fields["resect"], **record} if isinstance(record, dict) else record

    changed(cut / "config.json", change)
    for read in (load, skeleton):
        with pytest.raises(CheckpointError, match="record") as caught:
            read(cut)
        assert str(cut) in str(caught.value)


def test_models_stay_models(directory: Path) -> None:
    """What is sound goes through every door as before."""
    model = load(directory)
    assert isinstance(model, PreTrainedModel)
    assert_same_function(load(directory, dtype=torch.float64).float(), model, random_tokens())


def test_tokens_that_only_the_conversion_added_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    room, tokenizer = sys.modules["resect.checkpoint.load"], tiny_tokenizer()
    count = len(tokenizer)
    before = tokenizer("a river").input_ids
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert max(tokenizer.get_vocab().values()) == count
    monkeypatch.setattr(room, "token_count", lambda path: count)
    room._forget_added_tokens(tokenizer, Path("m.gguf"))
    assert max(tokenizer.get_vocab().values()) == count - 1
    assert tokenizer("a river").input_ids == before
    assert count not in tokenizer("a <|endoftext|>").input_ids


class TestOtherCopies:
    """What strangers' checkpoints hold beside, or instead of, plain weights of today's transformers."""

    @pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
    def test_weights_that_are_codes_are_refused(self, kind: torch.dtype, directory: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        stored(directory, lambda weights: weights.update({name: weights[name].to(kind)}))
        with pytest.raises(CheckpointError, match=rf"{name} as .*quantization_config"):
            load(directory)

    def test_masks_of_older_versions_are_silent(self, tmp_path: Path) -> None:
        model = FAMILIES["gpt2"]()
        model.save_pretrained(tmp_path)
        places = [f"transformer.h.{layer}.attn" for layer in range(3)]
        masks = {f"{place}.bias": torch.ones(1, 1, 80, 80, dtype=torch.bool) for place in places}
        fillers = {f"{place}.masked_bias": torch.tensor(-1e4) for place in places}
        stored(tmp_path, lambda weights: weights.update(masks | fillers))
        assert_same_function(load(tmp_path), model, random_tokens())

    def test_a_vector_called_bias_is_no_mask(self, tmp_path: Path) -> None:
        FAMILIES["gpt_neox"]().save_pretrained(tmp_path)
        stored(tmp_path, lambda weights: weights.update({"gpt_neox.layers.0.attn.bias": torch.ones(48)}))
        with pytest.raises(CheckpointError, match=r"1 tensors have no place in it \(gpt_neox.layers.0.attn.bias"):
            load(tmp_path)

    def test_two_tables_under_one_name(self, tmp_path: Path) -> None:
        FAMILIES["llama_tied"]().save_pretrained(tmp_path / "model")
        stored(tmp_path / "model", lambda weights: weights.update({"lm_head.weight": torch.randn(101, 60)}))
        with pytest.warns(ResectWarning, match="holds? two that differ"):
            model = load(tmp_path / "model")
        save(model, tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
        assert_same_function(load(tmp_path / "saved"), model, random_tokens())

    def test_what_cannot_be_converted_is_named(self, tmp_path: Path) -> None:
        sizes = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(tmp_path)
        stored(tmp_path, lambda weights: weights.pop("model.layers.1.block_sparse_moe.experts.0.w1.weight"))
        with pytest.raises(CheckpointError, match=r"cannot be loaded: model.layers.1.*experts"):
            load(tmp_path)

    def test_files_of_a_tokenizer_that_are_links_to_nothing(self, directory: Path) -> None:
        tiny_tokenizer().save_pretrained(directory)
        (directory / "tokenizer_config.json").unlink()
        (directory / "tokenizer_config.json").symlink_to("gone")
        with pytest.raises(CheckpointError, match=r"tokenizer_config.json is no file"):
            load_tokenizer(directory)
