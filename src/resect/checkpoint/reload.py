"""Run as a process of its own by `verify`: loads a directory as a stranger would and writes down its logits."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resect.checkpoint.silence import quiet
from resect.checkpoint.weights import check_complete


@torch.no_grad()
def main(directory: str, tokens: str, logits: str, shipped_code: str) -> None:
    """Reads `tokens` [N, T] from one safetensors file, writes `logits` [N, T, vocabulary] to another."""
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            trust_remote_code=shipped_code == "shipped-code",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = loaded
    check_complete(model, report, directory)
    found = model.eval()(load_file(tokens)["tokens"], use_cache=False).logits
    save_file({"logits": found.contiguous()}, logits)


def forget_modules() -> None:
    """Takes folders of code that another process copied off the path: this one has its own."""
    sys.path[:] = [place for place in sys.path if not os.path.isdir(os.path.join(place, "transformers_modules"))]


if __name__ == "__main__":
    forget_modules()
    main(*sys.argv[1:])
