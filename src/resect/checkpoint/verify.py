"""Proof that a checkpoint holds the model: a fresh process loads it, and its logits are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from resect.checkpoint.configuration import read_configuration
from resect.checkpoint.example import Inputs, example_of, on_cpu, relative_difference
from resect.checkpoint.precision import storage_of
from resect.checkpoint.save import tolerance
from resect.checkpoint.shipped import shipped_code
from resect.environment import python
from resect.errors import CheckpointError
from resect.files import temporary_folder
from resect.surgery import outputs_of
from resect.surroundings import unaffected


@torch.no_grad()
@unaffected()
def verify(directory: str | Path, model: PreTrainedModel, *, tokens: Tensor | None = None, inputs: Any = None) -> float:
    """The largest difference of what `model` and what a fresh process loads put out, relative to its spread.

    The process uses transformers alone, with the code shipped in `directory` where no stock configuration describes
    the model. `tokens` [N, T] are random if not given; another network is run with inputs like its example, or like
    `inputs`. Raises `CheckpointError` when loading fails or the difference is more than rounding.
    """
    example = ((), {"input_ids": tokens, "use_cache": False}) if tokens is not None else example_of(model, inputs)
    with temporary_folder(f"to verify {directory}") as folder:
        found = _reloaded_outputs(Path(directory).resolve(), on_cpu(example), folder, model)
    difference = relative_difference(found, outputs_of(model, _on(model, example)).cpu())
    allowed = tolerance(storage_of(model))
    if not difference <= allowed:
        raise CheckpointError(
            f"Reloaded {directory} in a fresh process; its logits are off by {difference:.1e} of their spread, "
            f"{allowed:.0e} is allowed. Do not use this checkpoint, and please report how it was made."
        )
    return difference


def _is_ours(auto_map: Any) -> bool:
    """Whether all the code that a configuration names is in the file that `save` puts there."""
    names = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    return all(str(name).startswith("modeling_resect.") for name in names)


def _on(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The inputs where the model is."""
    moved: Inputs = tree_map_only(Tensor, lambda tensor: tensor.to(model.device), inputs)
    return moved


def _reloaded_outputs(directory: Path, inputs: Inputs, folder: Path, model: PreTrainedModel) -> Tensor:
    """What a model that a process of its own loads puts out."""
    given, wanted = folder / "inputs.pt", folder / "outputs.safetensors"
    torch.save(inputs, given)
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(f"Asked to verify {directory}; it has no config.json. Name a directory that was saved.")
    auto_map = read_configuration(config).get("auto_map")
    # Code that lies there is run if it is resect's, or the model's own, which somebody trusted when it was loaded.
    shipped = bool(auto_map) and (_is_ours(auto_map) or shipped_code(model) is not None)
    words = ["-m", "resect.checkpoint.reload", str(directory), str(given), str(wanted), "shipped-code" if shipped else "stock"]
    words.append(str(model.dtype).removeprefix("torch."))
    variables = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}  # shipped code leaves no copy behind
    run = python(*words, variables=variables, folder=folder)
    if run.returncode:
        raise CheckpointError(f"Reloading {directory} in a fresh process failed: {run.stderr.strip()[-1500:]}")
    return load_file(wanted)["outputs"]
