"""What is exported is what its reader computes: llama.cpp in a fresh process, stock classes, ONNX where it is installed."""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import resect
import resect.export as room
from resect.checkpoint import save
from resect.checkpoint.card import About, card
from resect.cli import app
from resect.errors import CheckpointError, UsageError
from resect.export import gguf_families, gguf_tokenizer, hub, obstacles, padded
from tests.models import FAMILIES, assert_same_function, assert_untouched, random_plan, random_tokens, snapshot, tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
REST: dict[str, Any] = {"intermediate_size": 72, "num_hidden_layers": 3, "max_position_embeddings": 80, "vocab_size": 262}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed: resect[llama-cpp]"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, splitting as GPT-2 does."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model(family: str, **fields: Any) -> PreTrainedModel:
    return tiny(family, **{**SIZES, **REST, **SPECIAL, **fields})


def pruned(
    dense: PreTrainedModel, *, uniform: bool, kinds: tuple[str, ...] = ("heads", "channels"), seed: int = 3
) -> PreTrainedModel:
    graph = resect.trace(dense)
    resect.cut(dense, random_plan(graph, seed, uniform=uniform, kinds=kinds), graph)
    return dense


@pytest.fixture(scope="module")
def uneven() -> PreTrainedModel:
    """A Llama whose layers have heads and channels of their own."""
    return pruned(model("Llama"), uniform=False)


@pytest.fixture(scope="module")
def even() -> PreTrainedModel:
    """A Llama that lost as much in every layer."""
    return pruned(model("Llama"), uniform=True)


@llama_cpp
@pytest.mark.parametrize(
    ("family", "fields", "uniform", "architecture"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}, True, "llama"),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, False, "deci"),
        ("Qwen2", {"tie_word_embeddings": True}, False, "deci"),
        ("Qwen3", {"tie_word_embeddings": True}, False, "openelm"),
        ("Gemma2", {"query_pre_attn_scalar": 7, "sliding_window": 12}, True, "gemma2"),
    ],
)  # fmt: skip
def test_llama_cpp_agrees(
    family: str, fields: dict[str, Any], uniform: bool, architecture: str, tokenizer: Any, tmp_path: Path
) -> None:
    small = pruned(model(family, **fields), uniform=uniform)
    before = snapshot(small)
    found = resect.export(small, format="gguf", output=tmp_path / "m.gguf", quantize="f32", tokenizer=tokenizer)
    assert_untouched(small, before)
    seen = found.verification
    assert found.facts["architecture"] == architecture
    assert seen is not None
    assert seen.difference < (5e-2 if family == "Gemma2" else 1e-4)  # Gemma's GELU is a table of float16 there
    assert (seen.agreement, seen.tokenizer) == (1.0, True)
    assert found.facts["from_cache"] > 0
    assert isinstance(found.facts["heads"], int) == uniform


@llama_cpp
def test_sub_layers_that_are_gone(tokenizer: Any, tmp_path: Path) -> None:
    """Attention and MLPs, in the first layer too: llama.cpp has no layer of attention alone, so zeros stand in."""
    small = pruned(model("Llama"), uniform=False, kinds=("sublayers", "channels"), seed=5)
    gone = [name for name, module in small.named_modules() if type(module).__name__ == "Silent"]
    assert {name.rpartition(".")[2] for name in gone} >= {"self_attn", "mlp"}
    found = resect.export(small, format="gguf", output=tmp_path / "m.gguf", quantize="f32", tokenizer=tokenizer)
    assert found.verification is not None
    assert found.verification.difference < 1e-4


@llama_cpp
def test_quantised_files_are_as_good_as_their_weights(uneven: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    sizes, costs = [], []
    for kind in ("f16", "q8_0", "q4_0"):
        found = resect.export(uneven, format="gguf", output=tmp_path / f"{kind}.gguf", quantize=kind, tokenizer=tokenizer)
        assert found.verification is not None
        sizes.append(found.bytes)
        costs.append(found.verification.cost)
    assert sizes == sorted(sizes, reverse=True)
    assert costs == sorted(costs)
    assert costs[0] < 1e-4 < costs[2]
    reader = gguf.GGUFReader(tmp_path / "q8_0.gguf")
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert down.tensor_type == gguf.GGMLQuantizationType.Q8_0  # filled up with zeros to whole blocks
    assert down.shape[0] % 32 == 0


@llama_cpp
@pytest.mark.parametrize("fault", ["rotary", "zeros"])
def test_a_wrong_file_does_not_appear(fault: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "rotary":
        monkeypatch.setattr(gguf_families, "_interleave", lambda state, head: None)
    else:
        last = "model.layers.2.mlp.down_proj.weight"
        state = gguf_families._state
        monkeypatch.setattr(gguf_families, "_state", lambda model: {**state(model), last: torch.zeros_like(state(model)[last])})
    with pytest.raises(CheckpointError, match="diverge by"):
        resect.export(model("Llama"), format="gguf", output=tmp_path / "m.gguf", quantize="q8_0", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padded_layers_compute_the_same(family: str, tmp_path: Path) -> None:
    small = pruned(FAMILIES[family](), uniform=False, kinds=("heads", "channels", "sublayers"), seed=1)
    before = snapshot(small)
    found, facts = padded(small)
    assert_untouched(small, before)
    assert type(found).__module__.startswith("transformers.")
    assert facts["added_zeros"] > 0
    assert_same_function(found, small, random_tokens(), tolerance=1e-4)
    if family == "gpt2":  # heads narrower than the stream, which neither llama.cpp nor transformers takes
        with pytest.raises(UsageError, match="differ in heads.*hf-padded"):
            gguf_families.prepared(small)
        assert gguf_families.prepared(found).architecture == "gpt2"
    save(found, tmp_path / "m")
    assert_same_function(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), small, random_tokens(), tolerance=1e-4)


def test_a_directory_is_whole_or_not_there(even: PreTrainedModel, tmp_path: Path) -> None:
    """Read by transformers in a fresh process; its files, its answer."""
    found = resect.export(even, format="hf", output=tmp_path / "out")
    assert found.verification is not None
    assert found.verification.difference < 1e-4
    assert found.facts["auto_model_difference"] == 0
    assert found.facts["vllm_obstacles"] == []
    assert {"config.json", "model.safetensors", "README.md"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "artefact").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert json.loads(found.to_json())["verification"]["limits"] == {"difference": 1e-3, "divergence": 1e-6}
    with pytest.raises(CheckpointError, match="overwrite"):
        resect.export(even, format="hf", output=tmp_path / "out")


def test_a_torch_program(uneven: PreTrainedModel, tmp_path: Path) -> None:
    """Of any length from two tokens on; read in a fresh process, and here."""
    before = snapshot(uneven)
    found = resect.export(uneven, format="pt2", output=tmp_path / "m.pt2")
    assert_untouched(uneven, before)
    assert found.verification is not None
    assert found.verification.difference < 1e-4
    program = torch.export.load(tmp_path / "m.pt2").module()
    for length in (2, 19):
        tokens = random_tokens(1, length)
        with torch.no_grad():
            torch.testing.assert_close(program(tokens), uneven(tokens).logits, rtol=0, atol=1e-4)


def test_onnx_agrees(tmp_path: Path) -> None:
    """onnxruntime in a fresh process continues with the cache that the graph hands over."""
    pytest.importorskip("onnxruntime", reason="resect[onnx]")
    small = pruned(model("Llama", num_hidden_layers=2), uniform=False)
    found = resect.export(small, format="onnx", output=tmp_path / "m")
    assert found.verification is not None
    assert found.verification.difference < 1e-4
    assert found.verification.agreement == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_int8_weights(even: PreTrainedModel, tmp_path: Path) -> None:
    """Quantised after pruning: a fresh process computes with the rounded weights, and the directory is smaller."""
    pytest.importorskip("torchao", reason="resect[quant], with which transformers takes ten seconds more to be imported")
    plain = resect.export(even, format="hf", output=tmp_path / "plain", verify=False)
    found = resect.export(even, format="hf", quantize="int8", output=tmp_path / "int8")
    assert found.verification is not None
    assert 0 < found.verification.cost < 5e-3
    assert found.verification.divergence < 1e-9
    assert found.bytes < 0.7 * plain.bytes  # tables stay as they are


def test_int8_weights_beside_a_head_of_another_name(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="resect[quant], with which transformers takes ten seconds more to be imported")
    found = resect.export(FAMILIES["gpt_neox"](), format="hf", quantize="int8", output=tmp_path / "int8")
    assert found.verification is not None
    assert 0 < found.verification.cost < 5e-2


# ---- requests that cannot be met ----


def refused(model: PreTrainedModel, match: str, tokenizer: Any, **options: Any) -> None:
    with pytest.raises(UsageError, match=match):
        resect.export(model, **{"format": "gguf", "output": "never.gguf", "tokenizer": tokenizer, "verify": False, **options})
    assert not Path("never.gguf").exists()


def test_models_that_a_format_cannot_take(tokenizer: Any) -> None:
    """The message names the axis and the way out."""
    refused(pruned(model("Qwen3"), uniform=False), r"(?s)differ in heads.*ties the head.*hf-padded", tokenizer)
    refused(pruned(model("Gemma2", query_pre_attn_scalar=16), uniform=False), r"gemma2 wants the same", tokenizer)
    refused(FAMILIES["gpt_neox"](), r"gpt_neox model as GGUF; that is done for llama", tokenizer)
    odd = tiny("Llama", **{**SIZES, **REST, **SPECIAL, "hidden_size": 60})
    refused(odd, r"residual width is 60.*--align 32", tokenizer, quantize="q8_0")
    refused(model("Llama", hidden_act="gelu"), "llama with silu, this model with gelu", tokenizer)
    refused(model("Llama"), "there is no tokenizer", None)
    refused(model("Llama"), r"Did you mean 'q8_0'\?$", tokenizer, quantize="q8")
    refused(model("Llama"), r"Known: none\. Other types: --format gguf", tokenizer, format="onnx", quantize="q8_0")
    refused(model("Llama"), "Did you mean 'gguf'", tokenizer, format="ggu")
    refused(model("Llama"), r"ends in \.gguf", tokenizer, output="folder")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    missing = ("xllamacpp", "onnxscript", "torchao")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(UsageError, match=r"resect\[llama-cpp\].*--no-verify"):
        resect.export(model("Llama"), format="gguf", output=tmp_path / "m.gguf", tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"onnxscript.*resect\[onnx\]"):
        resect.export(model("Llama"), format="onnx", output=tmp_path / "m", verify=False)
    with pytest.raises(UsageError, match=r"torchao.*resect\[quant\]"):
        resect.export(model("Llama"), format="hf", quantize="int8", output=tmp_path / "m", verify=False)
    unread = resect.export(model("Llama"), format="gguf", output=tmp_path / "m.gguf", tokenizer=tokenizer, verify=False)
    assert unread.verification is None
    assert (tmp_path / "m.gguf").exists()


def test_int8_needs_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's are of a type of its own, which torchao leaves as they are."""
    monkeypatch.setattr("resect.export.hf.require", lambda *_: None)
    with pytest.raises(UsageError, match="type Linear, and GPT2LMHeadModel has none but its head.*gguf --quantize q8_0"):
        resect.export(FAMILIES["gpt2"](), format="hf", quantize="int8", output="never", verify=False)


def test_context_stays_within_a_sliding_window(tokenizer: Any) -> None:
    found = gguf_families.prepared(model("Mistral", sliding_window=20))
    assert found.context == 20
    assert "no sliding window" in found.notes[0]


# ---- tokenizers ----


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            "smollm",
        ),
        (lambda: pre_tokenizers.Whitespace(), None),
    ],
)
def test_pre_tokenizers_by_name(split: Callable[[], Any], name: str | None, tokenizer: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    tokenizer.backend_tokenizer.pre_tokenizer = split()
    if name is None:
        with pytest.raises(UsageError, match="splits text by Whitespace"):
            gguf_tokenizer.write_tokenizer(None, tokenizer, 262)
    else:
        assert gguf_tokenizer._pre_tokenizer(gguf_tokenizer._document(tokenizer)) == name


@llama_cpp
def test_sentencepiece_in_llama_cpp(tmp_path: Path) -> None:
    """Pieces merged in the order of their merges, bytes for what no piece says."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "he", "th", "the", "▁the", "▁t"]
    merges = [("t", "h"), ("h", "e"), ("th", "e"), ("▁", "t"), ("▁", "the")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces_ = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    dense = model("Llama", vocab_size=len(pieces) + 3)
    found = resect.export(dense, format="gguf", output=tmp_path / "m.gguf", quantize="f32", tokenizer=pieces_)
    assert found.verification is not None
    assert found.verification.tokenizer is True


# ---- the model card, the hub, vLLM ----

REPORT: dict[str, Any] = {
    "recipe": {"model": "some/model", "method": "llm-pruner", "keep": 0.8, "of": "blocks", "layout": "uniform", "settings": {}},
    "calibration": {"source": ["c4"], "samples": 4, "length": 8, "seed": 42},
    "models": [
        {"name": "dense", "perplexities": [{"text": "t", "window": 128, "value": 10.0}]},
        {"name": "pruned", "perplexities": [{"text": "t", "window": 128, "value": 12.5}]},
    ],
}


def test_the_card_says_how_it_was_made(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    saved = save(FAMILIES["llama"](), tmp_path / "m")
    said = card(saved, has_tokenizer=False, about=About.of(tmp_path))
    front = said.split("---\n")[1]
    assert "base_model: some/model" in front
    assert "pipeline_tag: text-generation" in front
    assert "* Budget: 80% of blocks kept" in said
    assert "* Calibration: c4, 4 x 8 tokens, seed 42" in said
    assert "| perplexity, t, windows of 128 | 10.00 | 12.50 |" in said
    assert "base_model" not in card(saved, has_tokenizer=False)
    recipe = {**REPORT["recipe"], "budget": "latency:0.7@decode"}
    said = card(saved, has_tokenizer=False, about=About(recipe, REPORT))
    assert "* Budget: `latency:0.7@decode`\n" in said
    assert "80%" not in said  # the recipe has a share too, which nobody asked for
    assert About.of(tmp_path / "m").lines() == []


class FakeHub:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append(("create", {"name": name, **options}))
        return f"https://hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("folder", options))

    def upload_file(self, **options: Any) -> None:
        self.calls.append(("file", options))


def test_pushing_to_a_hub(tmp_path: Path) -> None:
    api = FakeHub()
    assert hub.push(tmp_path, "me/small", card="", api=api) == "https://hub/me/small"
    assert [name for name, _ in api.calls] == ["create", "folder"]
    assert api.calls[0][1] == {"name": "me/small", "private": True, "exist_ok": True}
    assert api.calls[1][1]["folder_path"] == tmp_path
    file, api = tmp_path / "m.gguf", FakeHub()
    file.write_bytes(b"")
    hub.push(file, "me/small", card="# card", private=False, api=api)
    assert [options.get("path_in_repo") for _, options in api.calls] == [None, "m.gguf", "README.md"]
    api.create_repo = lambda name, **options: (_ for _ in ()).throw(OSError("no route"))  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="could not be reached: no route. What was written stays"):
        hub.push(file, "me/small", card="", api=api)


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, asking a port where nobody listens."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        api = HfApi(endpoint=f"http://127.0.0.1:{nobody.getsockname()[1]}", token="hf_none")
        with pytest.raises(UsageError, match="'me/small'; the hub could not be reached"):
            hub.push(tmp_path, "me/small", card="", api=api)


def test_what_vllm_reads(even: PreTrainedModel, uneven: PreTrainedModel, tmp_path: Path) -> None:
    """Never run there: these are the fields and shapes that its transformers backend takes."""
    save(even, tmp_path / "even")
    heads = even.model.layers[0].self_attn.q_proj.out_features // 16
    assert obstacles(tmp_path / "even") == []
    assert obstacles(tmp_path / "even", tensor_parallel=7) == [f"{heads} heads do not divide among 7 devices"]
    save(uneven, tmp_path / "uneven")
    config = json.loads((tmp_path / "uneven" / "config.json").read_text())
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert ["fewer heads" in said for said in obstacles(tmp_path / "uneven")] == [True]
    del config["auto_map"]["AutoModel"]
    (tmp_path / "uneven" / "config.json").write_text(json.dumps(config))
    assert any("auto_map lacks" in said for said in obstacles(tmp_path / "uneven"))


@llama_cpp
def test_on_the_command_line(uneven: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    save(uneven, tmp_path / "run", tokenizer=tokenizer)
    words = ["export", str(tmp_path / "run"), "--format", "gguf", "-o", str(tmp_path / "m.gguf"), "--quantize", "f32"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["kind"], answer["facts"]["architecture"]) == ("export", "deci")
    assert answer["verification"]["difference"] < 1e-4
    again = CliRunner().invoke(app, words)
    assert (again.exit_code, "--overwrite" in again.stderr) == (1, True)
    shown = CliRunner().invoke(app, [*words, "--overwrite"])
    assert "in a fresh process" in shown.stdout
    assert "splits texts in the same way" in shown.stdout


def test_the_room_is_a_call() -> None:
    """`import resect.export` must not hide the function of that name."""
    assert callable(room)
    with pytest.raises(UsageError, match="Asked for the format 'x'"):
        resect.export("nothing", format="x", output="nowhere")
