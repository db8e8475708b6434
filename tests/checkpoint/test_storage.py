"""What weights are stored in: the type of the checkpoint, unless another is asked for; what is measured is what is stored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import resect
from resect.checkpoint import load, round_to_storage, save, verify
from resect.errors import UsageError
from tests.models import FAMILIES


def stored(directory: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a directory, and the type that its configuration says."""
    return load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())["dtype"]


def pruned(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a checkpoint that is stored in a type, computed in float32, without some channels."""
    model: Any = FAMILIES["llama"]()
    model.to(dtype).save_pretrained(directory)
    loaded = load(directory)
    assert loaded.dtype == torch.float32
    resect.prune(loaded, keep=0.8, settings={"criterion": "l2"})
    return loaded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoint_keeps_its_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pruned(tmp_path / "dense", dtype)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(model, tmp_path / "out")
    tensors, said = stored(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert f"torch.{said}" == str(dtype)
    assert all(torch.equal(tensor, own[name].to(dtype)) for name, tensor in tensors.items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())  # the model itself stays
    before, after = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "out"))
    assert after < before
    assert verify(tmp_path / "out", model) <= (1e-4 if dtype == torch.float32 else 3e-2)


def test_rounded_first_the_fresh_process_gives_the_same(tmp_path: Path) -> None:
    model = pruned(tmp_path / "dense", torch.bfloat16)
    for parameter in model.parameters():  # as an update of what stays leaves it
        parameter.data += 1e-3 * torch.randn_like(parameter)
    round_to_storage(model)
    assert model.dtype == torch.float32
    save(model, tmp_path / "out")
    assert verify(tmp_path / "out", model) <= 1e-5
    tensors, _ = stored(tmp_path / "out")
    assert all(torch.equal(tensor.float(), model.state_dict()[name]) for name, tensor in tensors.items())


def test_another_type_is_asked_for(tmp_path: Path) -> None:
    model = pruned(tmp_path / "dense", torch.bfloat16)
    save(model, tmp_path / "out", dtype=torch.float32)
    assert stored(tmp_path / "out")[1] == "float32"
    assert verify(tmp_path / "out", model) <= 1e-4


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_a_cut_model_says_how_it_is_saved(layout: Any, tmp_path: Path) -> None:
    model: Any = FAMILIES["llama"]()
    resect.prune(model, keep=0.8, layout=layout, settings={"criterion": "l2"})
    with pytest.raises(UsageError, match=r"Use resect\.save\(model, directory\)"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(UsageError, match=r"Use resect\.save"):
        copy.deepcopy(model).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "step", state_dict=model.state_dict())  # as the Trainer does
    assert (tmp_path / "step" / "model.safetensors").exists()
    save(model, tmp_path / "out")
    assert not load(tmp_path / "out").training
