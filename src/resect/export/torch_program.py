"""A `torch.export` program: tokens [1, sequence] to logits, of any length from two on, without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resect.checkpoint.silence import quiet
from resect.evaluation import evaluating
from resect.export.formats import Asked, Format
from resect.export.hf import same_sums

SHORTEST = 2
"""Tokens; torch.export takes an axis of length 1 for a constant."""


class Logits(nn.Module):
    """A model as a function from tokens to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary]."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def write(asked: Asked, path: Path) -> dict[str, Any]:
    """Writes the program; gives what its input may be."""
    example = torch.ones(1, 8, dtype=torch.long, device=asked.model.device)
    dynamic = {"input_ids": {1: torch.export.Dim.DYNAMIC}}
    with quiet(), evaluating(asked.model):
        program = torch.export.export(Logits(asked.model), (example,), dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, path)
    return {"shortest": SHORTEST, "input": "input_ids [1, sequence], int64", "output": "logits [1, sequence, vocabulary]"}


FORMAT = Format(
    name="pt2",
    consumer="torch",
    suffix=".pt2",
    magic=b"PK",  # a zip archive
    quantisations=("none",),
    write=write,
    check=lambda asked: None,
    limits=same_sums,
)
