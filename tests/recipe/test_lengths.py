"""Lengths beyond the positions are refused by every command before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from resect.errors import UsageError
from resect.recipe import (
    analysis,
    bench,
    evaluate,
    evaluation_section,
    read_recipe,
    read_recovery_recipe,
    run,
    run_recovery,
)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, text, out: run(read_recipe(None, recipe(model, text, out, calibration={"length": 81, "source": text}))),
        lambda model, text, out: run(read_recipe(None, recipe(model, text, out, evaluation={"texts": text, "windows": 81}))),
        lambda model, text, out: run(
            read_recipe(None, recipe(model, text, out, recovery={"data": text, "settings": {"length": 81}}))
        ),
        lambda model, text, out: run_recovery(
            read_recovery_recipe(None, {"model": model, "output": out, "data": text, "settings": {"length": 81}})
        ),
        lambda model, text, out: evaluate([model], asked=evaluation_section({"texts": text, "windows": 81})),
        lambda model, text, out: analysis(model, out, text=text, window=81),
        lambda model, text, out: bench([model], out, lengths=[70], decode=20),
    ],
)
def test_lengths_are_refused_before_weights_are_read(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    def read(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(UsageError, match="80 positions"):
        call(str(dense), str(text), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def recipe(model: str, text: str, output: str, **changes: Any) -> dict[str, Any]:
    return {"model": model, "output": output, "calibration": {"source": text, "length": 16}, **changes}
