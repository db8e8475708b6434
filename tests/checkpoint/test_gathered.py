"""Layers that keep only some of their own rows and columns, as files: loaded through every door, the same function."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from resect.checkpoint import load, record_of, save, skeleton, verify
from resect.surgery import gather
from resect.surgery.modeling_resect import Gathered
from tests.checkpoint.hand import channels, cut_by_hand, heads, merged
from tests.models import FAMILIES, assert_same_function, random_tokens

Kept = dict[str, tuple[Tensor | None, Tensor | None]]
PATHS = {
    "llama": {"self_attn.q_proj": "rc", "mlp.gate_proj": "c", "mlp.down_proj": "r"},
    "llama_tied": {"self_attn.v_proj": "rc", "mlp.gate_proj": "c", "mlp.down_proj": "r"},
    "gpt2": {"attn.c_attn": "rc", "mlp.c_fc": "c", "mlp.c_proj": "rc"},
}


def chosen(model: PreTrainedModel, family: str) -> Kept:
    """The same third of rows and columns for layers of the same size, so that their indices are equal."""
    kept: Kept = {}
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        sides = next((sides for leaf, sides in PATHS[family].items() if path.endswith(leaf)), "")
        sizes = () if not sides else module.weight.shape[::-1] if family == "gpt2" else module.weight.shape
        indices = [torch.arange(0, size, 3) if side in sides else None for side, size in zip("rc", sizes, strict=False)]
        if indices:
            kept[path] = (indices[0], indices[1])
    return kept


def zeroed(model: PreTrainedModel, kept: Kept, *, transposed: bool) -> PreTrainedModel:
    """The model with zeros in all other rows and columns."""
    model = copy.deepcopy(model)
    for path, (rows, columns) in kept.items():
        module: Any = model.get_submodule(path)
        weight, bias = module.weight.data.T if transposed else module.weight.data, module.bias
        if columns is not None:
            weight[:, [number for number in range(weight.shape[1]) if number not in columns]] = 0
        for tensor in (weight, *([bias.data] if bias is not None else [])):
            if rows is not None:
                tensor[[number for number in range(len(tensor)) if number not in rows]] = 0
    return model


@pytest.mark.parametrize("family", PATHS)
def test_a_gathered_model_loads_through_every_door(family: str, tmp_path: Path) -> None:
    """Every block alike: shapes that a stock configuration might say, were they not of single layers."""
    model = FAMILIES[family]()
    kept = chosen(model, family)
    expected = zeroed(model, kept, transposed=family == "gpt2")
    small: Any = gather(copy.deepcopy(model), kept)
    saved = save(small, tmp_path / "model")
    assert saved.layout == "per-layer"
    assert saved.reason == "single layers keep only some of their rows and columns"
    assert saved.difference <= 1e-6
    assert saved.parameters == sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in small.state_dict().items()}
    for other in (small, load(saved.directory), AutoModelForCausalLM.from_pretrained(saved.directory, trust_remote_code=True)):
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in other.state_dict().items()} == shapes
        assert_same_function(other, expected, random_tokens())
    assert {name: (t.shape, t.dtype) for name, t in skeleton(saved.directory).state_dict().items()} == shapes
    stored = load_file(tmp_path / "model" / "model.safetensors")
    path = next(iter(kept))
    assert stored[f"{path}.columns"].tolist() == kept[path][1].tolist()  # type: ignore[union-attr]
    record = json.loads((tmp_path / "model" / "resect.json").read_text())["record"]
    assert set(record["gathered"]) == set(kept)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fresh_process_loads_it(family: str, tmp_path: Path) -> None:
    """With transformers and the code in the directory alone; it is the masked model that it computes."""
    model = FAMILIES[family]()
    kept = chosen(model, family)
    expected = zeroed(model, kept, transposed=family == "gpt2")
    small: Any = gather(model, kept)
    assert verify(save(small, tmp_path / "model").directory, expected) <= 1e-4


def test_stock_configurations_are_not_even_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tried")

    monkeypatch.setattr(importlib.import_module("resect.checkpoint.save"), "find_stock", refuse)
    model: Any = gather(FAMILIES["llama"](), {"lm_head": (None, torch.arange(0, 60, 2))})
    assert save(model, tmp_path / "model").layout == "per-layer"
    with pytest.raises(AssertionError, match="tried"):
        save(FAMILIES["llama"](), tmp_path / "dense")


def test_half_precision_rounds_no_index(tmp_path: Path) -> None:
    """bfloat16 has no 257."""
    model: Any = FAMILIES["llama"]()
    model.to(torch.bfloat16)
    model.resize_token_embeddings(300)
    small: Any = gather(model, {"lm_head": (torch.arange(1, 300, 2), None)})
    directory = save(small, tmp_path / "model").directory
    for loaded in (load(directory, dtype=torch.bfloat16), load(directory), copy.deepcopy(small).half()):
        assert loaded.lm_head.rows.tolist() == list(range(1, 300, 2))
        assert loaded.lm_head.rows.dtype == torch.int64


def test_heads_channels_and_blocks_first(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    slices = merged(channels([0, 2], {0: range(0, 56, 2), 2: range(41)}), heads(model, {2: [1]}))
    cut = cut_by_hand(model, slices, removed=["model.layers.1"])
    kept: Kept = {
        "model.layers.0.mlp.up_proj": (torch.arange(3, 20), torch.arange(0, 60, 2)),
        "model.layers.1.self_attn.o_proj": (torch.arange(11), torch.tensor([5])),
        "model.layers.1.mlp.up_proj": (torch.tensor([], dtype=torch.int64), None),
    }
    expected = zeroed(cut, kept, transposed=False)
    small: Any = gather(cut, kept)
    saved = save(small, tmp_path / "model")
    gathered = record_of(small)["gathered"]
    assert gathered["model.layers.2.self_attn.o_proj"] == {"rows": 11, "columns": 1}
    assert gathered["model.layers.2.mlp.up_proj"] == {"rows": 0, "columns": None}
    assert "model.layers.1.mlp.up_proj" not in gathered
    assert_same_function(load(saved.directory), expected, random_tokens())
    assert verify(saved.directory, expected) <= 1e-4


@pytest.mark.parametrize("remote", [False, True])
def test_what_was_loaded_is_gathered_and_saved_again(remote: bool, tmp_path: Path) -> None:
    first: Any = gather(FAMILIES["llama"](), {"model.layers.0.mlp.up_proj": (torch.arange(9), torch.arange(30))})
    directory = save(first, tmp_path / "first").directory
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True) if remote else load(directory)
    gone = cut_by_hand(loaded, {}, removed=["model.layers.1"])
    kept: Kept = {"model.layers.1.mlp.down_proj": (None, torch.arange(1, 56, 2))}
    expected = zeroed(gone, kept, transposed=False)
    second: Any = gather(gone, kept)
    saved = save(second, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "resect.json").read_text())["record"]["gathered"] == {
        "model.layers.0.mlp.up_proj": {"rows": 9, "columns": 30},
        "model.layers.2.mlp.down_proj": {"rows": None, "columns": 28},
    }
    assert_same_function(load(saved.directory), expected, random_tokens())


def test_the_bare_model_loads_too(tmp_path: Path) -> None:
    small: Any = gather(
        FAMILIES["llama"](), {"lm_head": (None, torch.arange(7)), "model.layers.1.mlp.up_proj": (torch.arange(9), None)}
    )
    directory = save(small, tmp_path / "model").directory
    bare = AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert type(bare.layers[1].mlp.up_proj).__name__ == Gathered.__name__
    tokens = random_tokens()
    expected = small.model(tokens, use_cache=False).last_hidden_state
    assert torch.allclose(bare(tokens, use_cache=False).last_hidden_state, expected, atol=1e-5)
