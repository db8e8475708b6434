"""A short part of the campaign (`make faults`): the harness itself, some faults in some runs, some damage to some files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults import injection
from tests.faults.children import forked
from tests.faults.disk import Disk, fingerprint, read_tree, write_tree
from tests.faults.mutations import FORMS, mutations


@pytest.fixture(scope="module", autouse=True)
def _shims() -> Iterator[None]:
    """Replaced functions do nothing without an active shim; they are put back all the same."""
    injection.install()
    yield
    injection.uninstall()


def test_a_child_gives_back_what_it_has_or_says_how_it_ended() -> None:
    assert forked(lambda: 6 * 7).value == 42
    assert "ZeroDivisionError" in forked(lambda: 1 // 0).value
    assert forked(lambda: os._exit(3)).how == "died"
    assert forked(lambda: [None for _ in iter(int, 1)], seconds=0.2).how == "hung"


def test_every_call_of_a_small_writer_is_counted_fails_and_kills(tmp_path: Path) -> None:
    file = tmp_path / "work" / "a.txt"

    def write() -> None:
        file.parent.mkdir()
        with file.open("w") as opened:
            opened.write("four")
            opened.flush()
            os.fsync(opened.fileno())
        file.replace(tmp_path / "work" / "b.txt")
        (tmp_path / "work" / "b.txt").unlink()
        file.parent.rmdir()

    def counted(shim: injection.Shim) -> list[str]:
        injection.start(shim)
        write()
        return [kind for kind, _ in shim.calls]

    kinds = forked(lambda: counted(injection.Shim(str(tmp_path)))).value
    assert kinds == ["mkdir", "open", "write", "fsync", "replace", "unlink", "rmdir"]
    for number in range(len(kinds)):
        write_tree(str(tmp_path), {})
        failed = forked(partial(counted, injection.Shim(str(tmp_path), at=number)))
        assert "OSError" in failed.value or "PermissionError" in failed.value, failed
        write_tree(str(tmp_path), {})
        assert (
            forked(partial(counted, injection.Shim(str(tmp_path), at=number, kill=True))).how
            == "killed"
        )
        assert bool(read_tree(str(tmp_path))) == (number > 0)
    write_tree(str(tmp_path), {})
    forked(lambda: counted(injection.Shim(str(tmp_path), at=2, kill=True, half=True)))
    assert read_tree(str(tmp_path)) == {"work": None, "work/a.txt": b"fo"}


def test_a_power_cut_takes_what_was_not_synced(tmp_path: Path) -> None:
    root, old, new = str(tmp_path), tmp_path / "old", tmp_path / "new"
    old.write_text("old")
    disk = Disk(root)
    new.write_text("new!")
    disk.look()
    assert dict(disk.crashes())["nothing that was not synced"] == {"old": b"old"}
    assert dict(disk.crashes())["names are there, contents are empty"] == {
        "old": b"old",
        "new": b"",
    }
    assert dict(disk.crashes())["names are there, contents end half-way"] == {
        "old": b"old",
        "new": b"ne",
    }
    disk.sync(str(new))
    os.replace(new, old)
    disk.look()
    left = dict(disk.crashes())
    assert left["nothing that was not synced"] == {"old": b"old"}
    assert left["names are there, contents are empty"] == {"old": b"new!"}  # its content was synced
    assert left["all but the change of old"] == {"old": b"old"}
    disk.sync(root)
    assert dict(disk.crashes())["nothing that was not synced"] == {"old": b"new!"}
    os.rename(old, tmp_path / "aside")
    os.rename(_written(new), old)
    disk.look()
    left = dict(disk.crashes())
    assert disk.now() == {"aside": b"new!", "old": b"newer"}
    assert all(
        b"new!" in tree.values() for tree in left.values()
    )  # what was on the disk is there under one of its names


def _written(file: Path) -> Path:
    file.write_text("newer")
    return file


def test_states_that_differ_in_random_names_are_one() -> None:
    one, other = ({f".out.partial-{number}/a": b"1"} for number in ("0f3a9c21", "77aa0b1c"))
    assert fingerprint(one) == fingerprint(other) != fingerprint({".out.partial-0f3a9c21/a": b"2"})


@pytest.mark.parametrize("form", ["bytes", *FORMS])
def test_mutations_differ_and_are_the_same_again(form: str) -> None:
    data = {
        "jsonl": b'{"a": [1, "b"]}\n{"a": 2}',
        "safetensors": b"\x0d\0\0\0\0\0\0\0" + b'{"a": [1, 2]}' + bytes(40),
    }
    text = data.get(form, b'{"a": [1, "b"], "c": {"d": 0.5}, "long": "0123456789"}')
    found = list(mutations(text, form, count=12, seed=3))
    assert len({mutation.data for mutation in found} | {text}) == 13
    assert found == list(mutations(text, form, count=12, seed=3))
