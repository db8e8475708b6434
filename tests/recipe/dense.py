"""A tiny dense model with a tokenizer on disk, text for it, and a recipe that takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import FAMILIES, tiny_tokenizer

SENTENCES = [
    "The river ran low that summer, and the boats lay on the mud.",
    "Nobody counted the days; the bells did that, and the tide.",
    "She wrote it down in pencil: bread, salt, two yards of rope.",
    "When the wind turned they could hear the mill across the fields.",
]


def write_dense(folder: Path, family: str = "llama") -> Path:
    """A model directory as `save_pretrained` writes it."""
    FAMILIES[family]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, *, repeats: int = 12) -> Path:
    """A text file, no two lines alike."""
    lines = [f"{number}: {sentence}" for number in range(repeats) for sentence in SENTENCES]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def small_recipe(model: Path, text: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Values of a recipe for the tiny model: 6 samples of 24 tokens."""
    values: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "keep": 0.7,
        "calibration": {"source": str(text), "samples": 6, "length": 24},
        "evaluation": {"texts": [str(text)], "windows": [16, 32], "limit": 256},
    }
    return {**values, **changes}
