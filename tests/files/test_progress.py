"""What a run notes is whole, told from what was damaged since, and gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resect.errors import CheckpointError, DamagedProgress, UsageError
from resect.files import progress as room
from resect.files.progress import CLAIM, Progress, digest, is_progress

SCORES = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True]), "c": torch.zeros(0, 2)}
HALF = {"w": torch.ones(3, dtype=torch.bfloat16)}


def filled(directory: Path) -> Progress:
    """Progress of two shots, the first superseded, as LLM Surgeon leaves it."""
    progress = Progress(directory, {"keep": 0.5})
    progress.put("shot-1/scores", SCORES)
    progress.put("shot-2/weights/a.b", HALF)
    progress.note("shot-2/made-up", loss=0.1, plan=["x", {"y": (1, 2)}])
    progress.supersede(1, by="shot-2/made-up")
    progress.put("shot-3/scores", SCORES)
    return progress


def resumed(directory: Path) -> Progress:
    return Progress(directory, {"keep": 0.5}, resume=True)


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_goes_on_with_what_was_noted(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    again = resumed(tmp_path / "p")
    found = again.get("shot-1/scores")
    assert found is not None
    assert digest(found) == digest(SCORES)
    assert again.need("shot-2/weights/a.b")["w"].dtype == torch.bfloat16
    assert again.facts("shot-2/made-up") == {"loss": 0.1, "plan": ["x", {"y": [1, 2]}]}
    assert again.noted("shot-1/superseded")
    assert again.get("nothing") is None
    assert again.facts("nothing") is None
    with pytest.raises(CheckpointError, match="is gone"):
        again.need("nothing")


def test_begins_where_nothing_was_noted(tmp_path: Path) -> None:
    assert not resumed(tmp_path / "p").noted("shot-1/superseded")
    (tmp_path / "p" / f".{CLAIM}.partial").write_text("half a cl")
    (tmp_path / "p" / CLAIM).unlink()
    assert not resumed(tmp_path / "p").noted("shot-1/superseded")


def test_begins_anew_without_resume(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    Progress(tmp_path / "p", {"keep": 0.5})
    assert names(tmp_path / "p") == {CLAIM}


def test_refuses_what_another_run_noted(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    with pytest.raises(UsageError, match="something else. Resume"):
        Progress(tmp_path / "p", {"keep": 0.6}, resume=True)
    assert resumed(tmp_path / "p").noted("shot-2/made-up")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("file", ["thesis.txt", CLAIM, "shot-1/mine.txt"])
def test_somebody_elses_directory_is_left_alone(tmp_path: Path, file: str, resume: bool) -> None:
    path = tmp_path / "p" / file
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (tmp_path / "p" / "other.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else than the progress"):
        Progress(tmp_path / "p", "", resume=resume)
    assert names(tmp_path / "p") == {file, "other.txt"}


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def flip_last(path: Path) -> None:
    """One bit of the last value, or of what closes a note."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [flip, flip_last, truncate, empty, zero]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("shot-3/scores.safetensors", {"shot-1/scores.safetensors", "shot-1/superseded.json"}),
        ("shot-2/made-up.json", set()),
        ("shot-2/weights/a.b.safetensors", set()),
        ("shot-1/scores.safetensors", set()),
        ("shot-1/superseded.json", set()),
    ],
)
def test_what_was_damaged_counts_as_not_done(
    tmp_path: Path, file: str, left: set[str], damage: Callable[[Path], None]
) -> None:
    filled(tmp_path / "p")
    damage(tmp_path / "p" / file)
    with pytest.warns(DamagedProgress, match="counts as not done. It is made anew"):
        again = resumed(tmp_path / "p")
    sets = {"shot-2/weights/a.b.safetensors", "shot-2/made-up.json"} if left else set()
    assert names(tmp_path / "p") == {CLAIM, *left, *sets}
    again.put("shot-1/scores", SCORES)
    resumed(tmp_path / "p")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_claim_begins_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    filled(tmp_path / "p")
    damage(tmp_path / "p" / CLAIM)
    with pytest.warns(DamagedProgress, match=f"{CLAIM} was damaged"):
        resumed(tmp_path / "p")
    assert names(tmp_path / "p") == {CLAIM}


def test_sets_that_were_swapped_or_come_from_another_run_count_as_damaged(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    first, third = (tmp_path / "p" / f"shot-{shot}" / "scores.safetensors" for shot in (1, 3))
    third.replace(first)
    with pytest.warns(DamagedProgress):
        resumed(tmp_path / "p")
    filled(tmp_path / "p")
    Progress(tmp_path / "other", {"keep": 0.6}).put("shot-3/scores", SCORES)
    (tmp_path / "other" / "shot-3" / "scores.safetensors").replace(third)
    with pytest.warns(DamagedProgress):
        resumed(tmp_path / "p")


def test_damage_outside_of_shots_begins_anew(tmp_path: Path) -> None:
    filled(tmp_path / "p").note("state", step=3)
    flip(tmp_path / "p" / "state.json")
    with pytest.warns(DamagedProgress, match=r"state\.json"):
        resumed(tmp_path / "p")
    assert names(tmp_path / "p") == {CLAIM}


def test_damage_after_the_start_is_an_error(tmp_path: Path) -> None:
    progress = filled(tmp_path / "p")
    flip(tmp_path / "p" / "shot-1" / "scores.safetensors")
    flip(tmp_path / "p" / "shot-2" / "made-up.json")
    with pytest.raises(CheckpointError, match="damaged"):
        progress.get("shot-1/scores")
    with pytest.raises(CheckpointError, match="damaged|JSON"):
        progress.facts("shot-2/made-up")


def test_what_was_on_its_way_is_removed(tmp_path: Path) -> None:
    progress = filled(tmp_path / "p")
    (progress.folder("shot-3/entering") / "x.safetensors").write_text("half")
    (tmp_path / "p" / "shot-3" / ".scores.safetensors.partial").write_text("half")
    before = names(tmp_path / "p")
    resumed(tmp_path / "p")
    assert names(tmp_path / "p") == {name for name in before if "/." not in name}


def test_a_failing_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = filled(tmp_path / "p")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "flush_file", full)
    with pytest.raises(CheckpointError, match="disk is full. What was noted before is whole"):
        progress.put("shot-3/scores", HALF)
    monkeypatch.undo()
    assert digest(resumed(tmp_path / "p").need("shot-3/scores")) == digest(SCORES)


def test_a_digest_tells_names_types_shapes_and_values_apart() -> None:
    one = torch.ones(2)
    tensors = [one, one.int(), one[:, None], one * 2, -one, torch.ones(3)]
    found = {digest({"a": tensor}) for tensor in tensors} | {digest({"b": one}), digest({"a": one}, key="x")}
    assert len(found) == len(tensors) + 2
    assert digest({"a": one, "b": one * 2}) == digest({"b": one * 2, "a": one})


def test_a_set_that_is_gone_is_made_anew_when_resumed(tmp_path: Path) -> None:
    progress = filled(tmp_path / "p")
    (tmp_path / "p" / "shot-2" / "weights" / "a.b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is gone. It counts as not done now"):
        progress.need("shot-2/weights/a.b")
    again = resumed(tmp_path / "p")
    assert not again.noted("shot-2/made-up")
    assert names(tmp_path / "p") == {CLAIM}  # the first shot was superseded


def test_a_directory_in_the_place_of_a_set_is_damage(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    file = tmp_path / "p" / "shot-2" / "made-up.json"
    file.unlink()
    file.mkdir()
    with pytest.warns(DamagedProgress, match=r"made-up\.json"):
        assert not resumed(tmp_path / "p").noted("shot-2/made-up")


def test_a_file_of_others_costs_no_progress(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    before = names(tmp_path / "p")
    (tmp_path / "p" / "Thumbs.db").write_text("a picture")
    resumed(tmp_path / "p")
    assert names(tmp_path / "p") == before | {"Thumbs.db"}


@pytest.mark.parametrize("temporary", [False, True])
def test_only_what_may_be_resumed_waits_for_the_disk(
    temporary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(tmp_path / "progress", {}, temporary=temporary)
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    progress.put("a/b", {"x": torch.arange(3)})
    assert (len(flushed) == 0) == temporary
    found = progress.need("a/b")
    assert torch.equal(found["x"], torch.arange(3))


def test_a_shot_whose_successor_is_not_there_is_made_anew(tmp_path: Path) -> None:
    """A power cut that lost the name of a folder left it superseded by nothing."""
    filled(tmp_path / "p")
    for shot in ("shot-2", "shot-3"):
        shutil.rmtree(tmp_path / "p" / shot)
    with pytest.warns(DamagedProgress, match=r"shot-1/superseded\.json"):
        again = resumed(tmp_path / "p")
    assert again.get("shot-1/scores") is None
    assert names(tmp_path / "p") == {CLAIM}


def test_names_of_folders_are_on_the_disk_before_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(tmp_path / "p", {})
    flushed: list[str] = []
    monkeypatch.setattr(
        "resect.files.progress.flush_folder", lambda folder: flushed.append(folder.name)
    )
    progress.put("shot-1/weights/a", HALF)
    assert flushed == ["shot-1", "p", "weights"]
    progress.put("shot-1/weights/b", HALF)
    assert flushed[3:] == ["weights"]


def test_half_a_claim_alone_is_progress(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / f".{CLAIM}.partial").write_text("half a cl")
    assert is_progress(tmp_path / "p")
    (tmp_path / "p" / "notes.txt").write_text("mine")
    assert not is_progress(tmp_path / "p")
