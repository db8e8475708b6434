"""A directory is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from resect.errors import CheckpointError, UsageError
from resect.files import begins, check_directory, check_file, claimed, outputs, whole_directory, whole_file, writing
from resect.files.outputs import MANIFEST, sibling


def half(directory: Path, error: BaseException, *, overwrite: bool) -> None:
    """Writes one file, then fails."""
    with whole_directory(directory, overwrite=overwrite) as partial:
        (partial / "half.txt").write_text("half")
        raise error


def contents(directory: Path) -> dict[str, str]:
    """Every file but the lists of files."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in files.items() if not name.endswith(MANIFEST)}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory that resect wrote."""
    target = tmp_path / "old"
    with whole_directory(target) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "kept.txt").write_text("kept")
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
    with pytest.raises(CheckpointError, match=r"holds deep, resect.json\..*overwrite"), whole_directory(old):
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

    monkeypatch.setattr(writing, "rename_with", lambda *arguments: False)  # a system without such a call
    monkeypatch.setattr(outputs, "_try_out", lambda target: None)
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
    (old / "checkout" / ".git" / "HEAD").write_text("ref")
    with pytest.raises(CheckpointError, match=r"did not write: \.git/HEAD"):
        check_directory(old / "checkout", overwrite=True)
    assert check_directory(old / "deep" / "new") == old / "deep" / "new"


def test_a_directory_below_one_that_is_written_is_written_at_once(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "new") as outer:
        with whole_directory(outer) as inner, whole_directory(outer / "deep") as deeper:
            (inner / "a.txt").write_text("a")
            (deeper / "b.txt").write_text("b")
            assert (inner, deeper) == (outer, outer / "deep")
        assert sorted(os.listdir(tmp_path)) == [".new.lock", outer.name]
    assert contents(tmp_path) == {"new/a.txt": "a", "new/deep/b.txt": "b"}
    assert os.listdir(tmp_path) == ["new"]


def test_a_list_of_its_files_is_written_with_a_directory(old: Path) -> None:
    assert json.loads((old / MANIFEST).read_text())["files"] == ["deep/kept.txt"]


@pytest.mark.parametrize("foreign", ["notes.txt", "deep/notes.txt", ".git/HEAD"])
def test_files_that_resect_did_not_write_are_never_removed(old: Path, foreign: str) -> None:
    (old / foreign).parent.mkdir(exist_ok=True)
    (old / foreign).write_text("mine")
    with pytest.raises(CheckpointError, match=f"did not write: {foreign}"), whole_directory(old, overwrite=True):
        raise AssertionError("never entered")
    assert contents(old) == {"deep/kept.txt": "kept", foreign: "mine"}


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"files": 3}', '{"files": []}', "null", "[" * 100_000])
def test_a_directory_with_a_damaged_list_is_not_replaced(old: Path, manifest: str) -> None:
    (old / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match="did not write"):
        check_directory(old, overwrite=True)


def test_what_is_read_is_not_replaced(old: Path, tmp_path: Path) -> None:
    for given in (old, old / "deep", old / "deep" / "kept.txt", f"{old}/deep/kept.txt:column"):
        with pytest.raises(CheckpointError, match="to read"):
            check_directory(old, overwrite=True, inputs=[given])
    (tmp_path / "link").symlink_to(old / "deep")
    with pytest.raises(CheckpointError, match="to read"):
        check_directory(old, overwrite=True, inputs=[tmp_path / "link"])
    assert check_directory(old, overwrite=True, inputs=[tmp_path, "demo", None, "no\0file", "~nobody/x"]) == old


def test_what_appears_meanwhile_stays(old: Path) -> None:
    with pytest.raises(CheckpointError, match="did not write: late"), whole_directory(old, overwrite=True):
        (old / "late").write_text("late")
    with pytest.raises(CheckpointError, match="holds file"), whole_directory(old / "new"):
        write(old / "new" / "file")
    assert contents(old) == {"deep/kept.txt": "kept", "late": "late", "new/file": "late"}


def write(path: Path) -> bytes:
    """What another program does meanwhile, and what it writes."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("late")
    return b"late"


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    mine, page = tmp_path / "thesis.html", begins(b"<!doctype ours>")
    mine.write_text("<p>mine")
    with pytest.raises(CheckpointError, match="another kind"), whole_file(mine, overwrite=True, alike=page):
        raise AssertionError("never entered")
    assert mine.read_text() == "<p>mine"
    mine.write_text("<!doctype ours> old")
    with pytest.raises(CheckpointError, match="exists"):
        check_file(mine)
    with whole_file(mine, overwrite=True, alike=page) as partial:
        partial.write_text("<!doctype ours> new")
        assert mine.read_text() == "<!doctype ours> old"
        assert partial.suffix == ".html"
    assert mine.read_text() == "<!doctype ours> new"
    assert os.listdir(tmp_path) == ["thesis.html"]


@pytest.mark.parametrize("flags", [True, False])
def test_a_file_that_appears_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: bool) -> None:
    if not flags:
        monkeypatch.setattr(writing, "rename_with", lambda *arguments: False)
    with pytest.raises(CheckpointError, match="appeared meanwhile"), whole_file(tmp_path / "a.gguf") as partial:
        partial.write_bytes(write(tmp_path / "a.gguf"))
    assert contents(tmp_path) == {"a.gguf": "late"}


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with claimed(target):
        code = f"from resect.files import claimed\nwith claimed({str(target)!r}): pass"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "CheckpointError: Asked to write" in child.stderr
        assert "another process is writing there" in child.stderr
        with claimed(target):  # claims of one thread nest
            pass
        errors: list[str] = []
        thread = threading.Thread(target=lambda: errors.append(_refusal(target)))
        thread.start()
        thread.join()
        assert "another process" in errors[0]
    assert os.listdir(tmp_path) == []


def _refusal(target: Path) -> str:
    try:
        with claimed(target):
            return ""
    except CheckpointError as refusal:
        return str(refusal)


def test_what_dead_processes_left_is_removed(old: Path) -> None:
    (old.parent / ".old.lock").write_text("")
    (sibling(old, "partial") / "deep").mkdir(parents=True)
    sibling(old, "replaced").mkdir()
    mine = [old.parent / ".old.partial-mine", old.parent / ".older.partial-12345678"]
    for path in mine:
        path.mkdir()
    with claimed(old):
        pass
    assert sorted(os.listdir(old.parent)) == sorted(["old", *(path.name for path in mine)])


def test_what_a_dead_process_moved_aside_comes_back(old: Path) -> None:
    old.rename(sibling(old, "replaced"))
    with claimed(old):
        assert contents(old) == {"deep/kept.txt": "kept"}
    assert os.listdir(old.parent) == ["old"]


@pytest.mark.parametrize("name", ["x" * 250, "a\0b", "loop/inside", "~nobody-here/x", "file/inside"])
def test_places_that_cannot_be_written_are_refused_first(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    where = name if name.startswith("~") else tmp_path / name
    with pytest.raises(CheckpointError, match="Asked to write"), whole_directory(where):
        raise AssertionError("never entered")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_a_folder_above_that_may_not_be_written_is_noticed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refused(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(os, call, refused)
    with pytest.raises(CheckpointError, match=r"Permission denied .*Name another place"), whole_directory(tmp_path / "run"):
        raise AssertionError("never entered")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_an_empty_mount_point_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with whole_directory(tmp_path) as partial:
        assert partial.parent == tmp_path
        (partial / "new.txt").write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["new.txt", MANIFEST]
    with pytest.raises(CheckpointError, match="no place for a model"):
        check_directory(tmp_path, overwrite=True)


def test_a_mount_point_that_was_half_filled_is_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    partial = sibling(tmp_path, "partial")
    partial.mkdir()
    (partial / MANIFEST).write_text('{"files": ["a.txt", "b/c.txt"]}')
    (tmp_path / "a.txt").write_text("half")
    with whole_directory(tmp_path) as fresh:
        (fresh / "new.txt").write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["new.txt", MANIFEST]


def test_libraries_that_write_have_errors_of_their_own(tmp_path: Path) -> None:
    for problem in (
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
        Exception("Read-only file system (os error 30)"),  # tokenizers
    ):
        with pytest.raises(CheckpointError, match="Nothing was changed"), whole_directory(tmp_path / "new"):
            raise problem
    with pytest.raises(CheckpointError, match="disk is full"), whole_directory(tmp_path / "new"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_full_temporary_folder_is_named_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"temporary folder to check; {tmp_path}: its disk is full"):
        fails_in_a_temporary_folder(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="elsewhere"):
        fails_in_a_temporary_folder(OSError(errno.EIO, "elsewhere", "/another/place"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="set TMPDIR"):
        fails_in_a_temporary_folder(AssertionError())


def fails_in_a_temporary_folder(problem: BaseException) -> None:
    with writing.temporary_folder("to check"):
        raise problem


def test_errors_speak_of_the_name_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{tmp_path}/new/deep is wrong$"), whole_directory(tmp_path / "new") as partial:
        raise UsageError(f"{partial}/deep is wrong")


def test_the_working_directory_is_filled_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir(0o700)
    monkeypatch.chdir(here)
    with whole_directory(".") as partial:
        (partial / "new.txt").write_text("new")
    assert sorted(os.listdir(".")) == ["new.txt", MANIFEST]  # the shell that sits there sees it
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_who_may_read_a_directory_stays_so(overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / "private"
    target.mkdir()
    if overwrite:
        with whole_directory(target) as partial:
            (partial / "old.txt").write_text("old")
    target.chmod(0o700)
    with whole_directory(target, overwrite=overwrite) as partial:
        (partial / "new.txt").write_text("new")
    assert target.stat().st_mode & 0o777 == 0o700
    assert (target / "new.txt").stat().st_mode & 0o777 == 0o600


def test_only_what_a_dead_process_moved_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount, outside = tmp_path / "mount", tmp_path / "outside.txt"
    mount.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mount)
    outside.write_text("mine")
    partial = sibling(mount, "partial")
    partial.mkdir()
    (partial / MANIFEST).write_text(json.dumps({"files": ["a.txt", "moved.txt", "../outside.txt", "/etc/x", "."]}))
    (partial / "a.txt").write_text("not moved")
    (mount / "moved.txt").write_text("moved")
    (mount / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"which holds a.txt\. "), whole_directory(mount):
        raise AssertionError("never entered")
    assert contents(tmp_path) == {"mount/a.txt": "mine", "outside.txt": "mine"}


def test_a_kill_while_a_place_is_tried_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", killed)
        with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "page.html"):
            raise AssertionError("never entered")
    with whole_file(tmp_path / "page.html") as partial:
        partial.write_text("page")
    assert contents(tmp_path) == {"page.html": "page"}
    assert os.listdir(tmp_path) == ["page.html"]


def test_neither_a_home_nor_a_working_directory_is_needed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(error: Exception) -> Any:
        def raising(*arguments: Any) -> Path:
            raise error

        return raising

    monkeypatch.setattr(Path, "home", missing(RuntimeError("Could not determine home directory.")))
    monkeypatch.setattr(Path, "cwd", missing(FileNotFoundError(2, "No such file or directory")))
    assert check_directory(old, overwrite=True) == old


def test_a_folder_that_may_not_be_looked_into_is_no_empty_one(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = old / "private"
    closed.mkdir()
    look = os.listdir

    def listdir(path: Path) -> list[str]:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(CheckpointError, match="private cannot be looked into: Permission denied"):
        check_directory(old, overwrite=True)
