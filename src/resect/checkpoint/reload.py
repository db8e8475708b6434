"""Run as a process of its own by `verify`: loads a directory as a stranger would and writes down what it puts out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from resect.checkpoint.silence import quiet
from resect.checkpoint.weights import check_complete
from resect.surgery import outputs_of


@torch.no_grad()
def main(directory: str, inputs: str, outputs: str, shipped_code: str, dtype: str) -> None:
    """Reads what the model is called with from one file, writes what it puts out (`outputs`) to a safetensors file.

    It computes in `dtype`, whatever the weights are stored in.
    """
    trusted = shipped_code == "shipped-code"
    with quiet():
        loaded: Any = _class(directory, trusted).from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            trust_remote_code=trusted,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = loaded
    check_complete(model, report, directory)
    args, kwargs = torch.load(inputs, weights_only=True)
    found = outputs_of(model.eval(), (args, kwargs))
    save_file({"outputs": found.contiguous()}, outputs)


def _class(directory: str, trusted: bool) -> Any:
    """What loads the model: the Auto class that its code is listed under, or the class that the configuration names."""
    fields = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    name = str((fields.get("architectures") or ["AutoModelForCausalLM"])[0])
    listed = [auto for auto, place in (fields.get("auto_map") or {}).items() if str(place).rpartition(".")[2] == name]
    if trusted:
        return getattr(transformers, listed[-1] if listed else "AutoModelForCausalLM")
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def forget_modules() -> None:
    """Takes folders of code that another process copied off the path: this one has its own."""
    sys.path[:] = [place for place in sys.path if not os.path.isdir(os.path.join(place, "transformers_modules"))]


if __name__ == "__main__":
    forget_modules()
    main(*sys.argv[1:])
