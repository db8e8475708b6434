"""Loads saved models in a process of its own and writes down their logits: `python -m tests.reload DIRECTORY`."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import resect.checkpoint
from tests.models import logits_with_cache, logits_without_cache


def main(root: Path) -> None:
    """Reads cases.json (names, layouts, tokens); writes logits.safetensors and errors.json."""
    cases = json.loads((root / "cases.json").read_text())
    tokens = torch.tensor(cases["tokens"])
    logits: dict[str, Tensor] = {}
    errors: dict[str, dict[str, str]] = {}
    for name, layout in cases["cases"].items():
        for loader in ("resect", "transformers"):
            try:
                model = load(root / name, loader, stock=layout == "uniform")
                logits[f"{name}/{loader} without cache"] = logits_without_cache(model, tokens).contiguous()
                logits[f"{name}/{loader} with cache"] = logits_with_cache(model, tokens).contiguous()
            except Exception:
                errors.setdefault(name, {})[f"{loader} error"] = traceback.format_exc()
    save_file(logits, root / "logits.safetensors")
    (root / "errors.json").write_text(json.dumps(errors))


def load(directory: Path, loader: str, *, stock: bool) -> nn.Module:
    """The model through resect (never remote code) or through transformers (remote code only if not stock)."""
    if loader == "resect":
        model: nn.Module = resect.checkpoint.load(str(directory))
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=not stock, dtype=torch.float32)
    return model.eval()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
