"""The examples do what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_digits_lose_most_parameters_and_little_accuracy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["digits.py"])
    runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[2:]]
    found = {name.strip(): (int(size.replace(",", "")), float(share.rstrip("%"))) for name, size, share in rows}
    dense, dense_accuracy = found["dense"]
    assert dense_accuracy > 97
    for name in ("one shot", "five shots"):
        size, accuracy = found[name]
        assert size <= 0.3 * dense
        assert accuracy > dense_accuracy - 3
