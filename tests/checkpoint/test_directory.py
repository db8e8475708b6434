"""A directory is whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from resect.checkpoint.directory import check_directory, whole_directory
from resect.errors import CheckpointError


def half(directory: Path, error: BaseException, *, overwrite: bool) -> None:
    """Writes one file, then fails."""
    with whole_directory(directory, overwrite=overwrite) as partial:
        (partial / "half.txt").write_text("half")
        raise error


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory that holds something."""
    target = tmp_path / "old"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "kept.txt").write_text("kept")
    return target


def test_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with whole_directory(target) as partial:
        (partial / "new.txt").write_text("new")
        (partial / "new.txt").chmod(0o600)
        assert not target.exists()
        assert partial.parent == target.parent
    assert contents(tmp_path) == {"a/b/new.txt": "new"}
    assert (target / "new.txt").stat().st_mode & 0o777 == target.stat().st_mode & 0o666


def test_fills_an_empty_directory(tmp_path: Path) -> None:
    with whole_directory(tmp_path) as partial:
        (partial / "new.txt").write_text("new")
    assert contents(tmp_path) == {"new.txt": "new"}


def test_replaces_only_when_asked(old: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds deep\..*overwrite"), whole_directory(old):
        raise AssertionError("never entered")
    assert contents(old) == {"deep/kept.txt": "kept"}
    with whole_directory(old, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert contents(old.parent) == {"old/new.txt": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x")])
def test_a_failure_while_writing_leaves_everything_as_it_was(old: Path, error: BaseException) -> None:
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        half(old, error, overwrite=True)
    with pytest.raises(expected):
        half(old.parent / "new" / "er", error, overwrite=False)
    assert contents(old.parent) == {"old/deep/kept.txt": "kept"}
    assert os.listdir(old.parent) == ["old"]


def test_a_full_disk_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="disk is full. Nothing was changed"), whole_directory(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_while_renaming_puts_the_old_back(old: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    calls, rename = [], os.rename

    def failing_rename(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    with (
        pytest.raises(CheckpointError, match="broken. Nothing was changed"),
        whole_directory(old, overwrite=True) as partial,
    ):
        (partial / "new.txt").write_text("new")
    assert contents(old.parent) == {"old/deep/kept.txt": "kept"}
    assert os.listdir(old.parent) == ["old"]


def test_places_that_are_no_models_are_never_replaced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        check_directory(old / "deep" / "kept.txt", overwrite=True)
    monkeypatch.chdir(old / "deep")
    with pytest.raises(CheckpointError, match="no place for a model"):
        check_directory(old, overwrite=True)
    (old / "checkout" / ".git").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no place for a model"):
        check_directory(old / "checkout", overwrite=True)
    assert check_directory(old / "deep" / "new") == old / "deep" / "new"
