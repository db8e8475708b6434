"""Whatever reading a stranger's file raises is an error of ours that names it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from resect.errors import CheckpointError, DataError
from resect.files import parse_json, read_json, read_text, reading


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 10_000, "is not JSON: Exceeds the limit"),
        (b"\xff\xfe", r"not UTF-8 \(byte 0\)"),
        (b"", "is not JSON"),
    ],
)
def test_damaged_json(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^The plan {file} .*{says}") as refused:
        read_json(file, what="the plan")
    assert len(str(refused.value)) < 600
    assert refused.value.__cause__ is not None


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, says in (("pipe", "no ordinary file"), (".", "no ordinary file"), ("loop", "Too many levels"), ("no", "No such")):
        with pytest.raises(DataError, match=says):
            read_text(tmp_path / name, error=DataError)
    with pytest.raises(DataError, match="null"):
        read_text(tmp_path / "a\0b", error=DataError)
    monkeypatch.setattr(sys.modules["resect.files.reading"], "LARGEST", 3)
    (tmp_path / "large").write_text("four")
    with pytest.raises(DataError, match="has 4 bytes; at most 3"):
        read_text(tmp_path / "large", error=DataError)


def test_values_come_through(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, "\u00e9"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "\u00e9"]}
    assert parse_json("3", what="it") == 3


def test_memory_that_runs_out_is_not_the_files_fault() -> None:
    with pytest.raises(MemoryError), reading("the file x"):
        raise MemoryError
    with pytest.raises(CheckpointError, match="The file x cannot be read: KeyError|cannot be read: 'y'"), reading("the file x"):
        raise KeyError("y")
