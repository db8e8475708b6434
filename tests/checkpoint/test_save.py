"""What `save` writes, `load` and transformers read back: the same function, or nothing at all."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from resect.checkpoint import Saved, load, load_tokenizer, save, skeleton, verify
from resect.errors import CheckpointError
from tests.checkpoint.hand import channels, cut_by_hand, heads, merged, residual
from tests.models import (
    FAMILIES,
    assert_same_function,
    assert_untouched,
    random_tokens,
    snapshot,
    tiny,
    tiny_tokenizer,
)


class Plan:
    def to_json(self) -> str:
        return '{"groups": {}}'


def uniform(model: PreTrainedModel) -> PreTrainedModel:
    mlp = channels(range(3), range(20), biases=getattr(model.config, "mlp_bias", False))
    return cut_by_hand(model, merged(mlp, heads(model, dict.fromkeys(range(3), [1]))))


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    slices = merged(channels([0, 2], {0: range(0, 56, 2), 2: range(41)}), heads(model, {2: [1]}))
    return cut_by_hand(model, slices, removed=["model.layers.1"])


def assert_loads(saved: Saved, expected: PreTrainedModel) -> None:
    """Through resect and through transformers, on the meta device and for real."""
    shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton(saved.directory).state_dict().items()} == shapes
    assert_same_function(load(saved.directory), expected, random_tokens())
    stock = AutoModelForCausalLM.from_pretrained(saved.directory, trust_remote_code=saved.layout == "per-layer")
    assert_same_function(stock, expected, random_tokens())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_biases", "qwen2", "gemma2", "smollm3"])
def test_uniform_is_stock(family: str, tmp_path: Path) -> None:
    cut = uniform(FAMILIES[family]())
    saved = save(cut, tmp_path / "model")
    assert (saved.layout, saved.relabelled_from, saved.reason) == ("uniform", None, "")
    assert saved.changes["num_attention_heads"] == 3
    assert saved.difference == 0.0
    assert not (tmp_path / "model" / "modeling_resect.py").exists()
    assert_loads(saved, cut)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2_sliding", "gemma2", "smollm3"])
def test_per_layer_ships_its_code(family: str, tmp_path: Path) -> None:
    cut = uneven(FAMILIES[family]())
    saved = save(cut, tmp_path / "model")
    assert saved.layout == "per-layer"
    assert "sizes differ from layer to layer" in saved.reason
    assert saved.model_type.startswith("resect_")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 2
    assert_loads(saved, cut)


@pytest.mark.parametrize("family", ["llama_tied", "gemma"])
def test_tied_embeddings_narrow_together(family: str, tmp_path: Path) -> None:
    """Gemma scales embeddings by the square root of their width, so no narrower stock Gemma computes the same."""
    model = FAMILIES[family]()
    cut = cut_by_hand(model, merged(residual(model, range(36), 60), channels([0], range(20))))
    saved = save(cut, tmp_path / "per-layer")
    assert saved.layout == "per-layer"
    assert_loads(saved, cut)
    even = save(cut_by_hand(model, residual(model, range(36), 60)), tmp_path / "uniform")
    assert even.layout == {"llama_tied": "uniform", "gemma": "per-layer"}[family]
    assert ("logits are off" in even.reason) == (family == "gemma")


def test_only_blocks_removed_is_stock(tmp_path: Path) -> None:
    """Gemma 2 alternates sliding and full attention: the list of layer types shortens with the layers."""
    for family in ("llama", "gemma2", "smollm3"):
        cut = cut_by_hand(FAMILIES[family](), {}, removed=["model.layers.1"])
        saved = save(cut, tmp_path / family)
        assert (saved.layout, saved.changes) == ("uniform", {})
        assert_loads(saved, cut)


@pytest.mark.parametrize(("family", "relative"), [("llama", "mistral"), ("llama_biases", "granite")])
def test_a_relative_stands_in(family: str, relative: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    cut = cut_by_hand(model, residual(model, range(1, 60, 2), 60))
    cut = cut_by_hand(model, residual(model, range(31), 60))
    saved = save(cut, tmp_path / "model")
    assert (saved.layout, saved.model_type, saved.relabelled_from) == ("uniform", relative, "llama")
    assert saved.difference < 1e-5
    assert_loads(saved, cut)


def test_right_shapes_are_not_enough(tmp_path: Path) -> None:
    """A cut model with another head count in mind has the shapes of a stock model, and not its function."""
    model = tiny("GPT2", n_embd=48, n_head=6, n_layer=2, n_positions=80, vocab_size=101)
    attributes: dict[str, dict[str, float]] = {
        f"transformer.h.{layer}.attn": {"num_heads": 4, "head_dim": 12} for layer in range(2)
    }
    cut = cut_by_hand(model, {}, attributes=attributes)
    for layer in range(2):
        cut.get_submodule(f"transformer.h.{layer}.attn").scaling = 12**-0.5  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="logits are off"):
        save(cut, tmp_path / "model")  # the record, too, forgot the scaling
    for values in attributes.values():
        values["scaling"] = 12**-0.5
    saved = save(cut, tmp_path / "model")
    assert saved.layout == "per-layer"
    assert "logits are off" in saved.reason
    assert_loads(saved, cut)


def test_cutting_what_was_loaded_adds_up(tmp_path: Path) -> None:
    """A per-layer model, loaded, cut again and saved again, is one model with one record."""
    first = uneven(FAMILIES["llama"]())
    loaded = load(save(first, tmp_path / "first").directory)
    second = cut_by_hand(loaded, channels([1], range(30)))
    saved = save(second, tmp_path / "second")
    assert saved.layout == "per-layer"
    assert_loads(saved, second)
    record = json.loads((tmp_path / "second" / "resect.json").read_text())["record"]
    assert record["removed"] == ["model.layers.1"]
    assert record["shapes"]["model.layers.2.mlp.up_proj.weight"] == [30, 60]
    assert record["shapes"]["model.layers.0.mlp.up_proj.weight"] == [28, 60]


def test_a_dense_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = FAMILIES["opt"]()
    saved = save(model, tmp_path / "model")
    assert (saved.layout, saved.changes, saved.model_type) == ("uniform", {}, "opt")
    assert_loads(saved, model)


def test_types_and_generation_settings_survive(tmp_path: Path) -> None:
    model = uniform(FAMILIES["llama"]()).to(torch.bfloat16)  # type: ignore[arg-type]
    model.generation_config.eos_token_id = [2, 7]
    saved = save(model, tmp_path / "model")
    assert saved.difference == 0.0
    loaded = load(saved.directory, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == [2, 7]
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("cut", [uniform, uneven])
def test_everything_needed_lies_in_the_directory(cut: object, tmp_path: Path) -> None:
    model = uniform(FAMILIES["llama"]()) if cut is uniform else uneven(FAMILIES["llama"]())
    model.train()
    before = snapshot(model)
    saved = save(model, tmp_path / "m", tokenizer=tiny_tokenizer(), plan=Plan(), extra_files={"report/index.html": "<p>"})
    assert_untouched(model, before)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    code = {"m/modeling_resect.py"} if cut is uneven else set()
    tokenizer = {"m/tokenizer.json", "m/tokenizer_config.json"}
    usual = {"m/config.json", "m/generation_config.json", "m/model.safetensors", "m/README.md", "m/resect.json"}
    assert names == usual | tokenizer | code | {"m/plan.json", "m/report/index.html"}
    assert (tmp_path / "m/plan.json").read_text() == Plan().to_json()
    readme = (tmp_path / "m/README.md").read_text()
    assert ("trust_remote_code=True" in readme) == ("resect.load" in readme) == (cut is uneven)
    for tokens in (AutoTokenizer.from_pretrained(saved.directory), load_tokenizer(saved.directory)):
        assert tokens("Hi there")["input_ids"] == tiny_tokenizer()("Hi there")["input_ids"]
    facts = json.loads((tmp_path / "m/resect.json").read_text())
    assert facts["layout"] == saved.layout
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_refuses_to_replace_and_to_leave_the_directory(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes.txt"):
        save(model, tmp_path)
    for name in ("../notes.txt", str(tmp_path / "notes.txt")):
        with pytest.raises(CheckpointError, match="stay inside"):
            save(model, tmp_path / "new", extra_files={name: "theirs"})
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_or_out_of_space(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are written, then the disk fills up or the user gives up: the old checkpoint is still whole."""
    model = uniform(FAMILIES["llama"]())
    old = save(model, tmp_path / "model")
    stamp = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            assert (directory / "model.safetensors").exists()
            raise error

    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        save(uneven(FAMILIES["llama"]()), tmp_path / "model", tokenizer=Tokenizer(), overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == stamp
    assert os.listdir(tmp_path) == ["model"]
    monkeypatch.undo()
    assert_loads(old, model)


def test_verify_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = uneven(FAMILIES["llama_tied"]())
    directory = save(model, tmp_path / "model").directory
    assert verify(directory, model, tokens=random_tokens()) <= 1e-5
    module = importlib.import_module("resect.checkpoint.verify")
    zeros = torch.zeros(2, 24, 101)
    for found, match in ((zeros, "off by"), (zeros[0], "off by inf"), (zeros / 0, "off by nan")):
        monkeypatch.setattr(module, "_reloaded_outputs", lambda *_, found=found: found)
        with pytest.raises(CheckpointError, match=match):
            verify(directory, model)


def test_what_does_not_load_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    directory = save(model, tmp_path / "model").directory
    monkeypatch.setattr("subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no such class"))
    with pytest.raises(CheckpointError, match=r"fresh process failed: no such class"):
        verify(directory, model)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        verify(tmp_path / "nothing", model)
