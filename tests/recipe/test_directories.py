"""Where runs note what is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from resect.errors import UsageError
from resect.files import progress as room
from resect.files.outputs import remove
from resect.files.progress import RECOVERY, Progress
from resect.recipe.directories import check_unclaimed, discard, progress_of


def test_an_empty_folder_is_nobodys_progress(tmp_path: Path) -> None:
    (tmp_path / "out.progress").mkdir()
    assert progress_of(tmp_path / "out", resume=False, overwrite=False) == tmp_path / "out.progress"


def test_a_recovery_alone_is_progress(tmp_path: Path) -> None:
    Progress(tmp_path / "out.progress" / "recovery", "a recovery").put("training", {})
    assert progress_of(tmp_path / "out", resume=True, overwrite=False).exists()
    with pytest.raises(UsageError, match="Go on with it"):
        progress_of(tmp_path / "out", resume=False, overwrite=False)
    discard(tmp_path / "out.progress")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_somebody_elses_folder_is_left_alone(tmp_path: Path, flags: dict[str, bool]) -> None:
    (tmp_path / "out.progress").mkdir()
    (tmp_path / "out.progress" / "thesis.json").write_text("{}")
    with pytest.raises(UsageError, match="holds something else"):
        progress_of(tmp_path / "out", **{"resume": False, "overwrite": False, **flags})
    assert os.listdir(tmp_path / "out.progress") == ["thesis.json"]


def test_a_removal_that_was_cut_short_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(tmp_path / "out.progress", "a run")
    progress.put("shot-1/scores", {})
    Progress(tmp_path / "out.progress" / "recovery", "its recovery").put("training", {})
    removed: list[Path] = []

    def cut_short(path: Path) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    monkeypatch.setattr(room, "remove", cut_short)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "out.progress")
    monkeypatch.undo()
    assert progress_of(tmp_path / "out", resume=False, overwrite=True).exists()
    discard(tmp_path / "out.progress")
    assert os.listdir(tmp_path) == []


def test_a_run_of_which_only_the_recovery_is_long_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = tmp_path / "out.progress"
    Progress(progress / RECOVERY, "a recovery").note("state", step=3)
    assert progress_of(tmp_path / "out", resume=True, overwrite=False) == progress
    with pytest.raises(UsageError, match="Go on with it"):
        progress_of(tmp_path / "out", resume=False, overwrite=False)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            discard(progress)  # cut short
    assert progress_of(tmp_path / "out", resume=False, overwrite=True) == progress
    discard(progress)
    (progress / RECOVERY).mkdir(parents=True)
    (progress / RECOVERY / "thesis.json").write_text("{}")
    with pytest.raises(UsageError, match="holds something else"):
        progress_of(tmp_path / "out", resume=False, overwrite=True)


def test_progress_of_another_method_is_refused_by_one_that_notes_none(tmp_path: Path) -> None:
    check_unclaimed(tmp_path / "out.progress")
    Progress(tmp_path / "out.progress" / RECOVERY, "a recovery")
    check_unclaimed(tmp_path / "out.progress")
    Progress(tmp_path / "other.progress", "a method").note("shot-1/collected")
    with pytest.raises(UsageError, match="asked for something else"):
        check_unclaimed(tmp_path / "other.progress")
