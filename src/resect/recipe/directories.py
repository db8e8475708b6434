"""Directories that runs write: whole or not there, with a place beside them where long runs note what is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resect.checkpoint import Saved
from resect.errors import UsageError
from resect.files import beside
from resect.files.progress import CLAIM, asked_otherwise, clear, is_progress


def facts(saved: Saved, directory: Path) -> dict[str, Any]:
    """What was saved, as plain values, under the name that was asked for."""
    return asdict(replace(saved, directory=str(directory), changes=dict(saved.changes)))


def fill(directory: Path, files: Mapping[str, str]) -> None:
    """Writes text files, `{name: text}`."""
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


@contextmanager
def resumable(progress: Path) -> Iterator[None]:
    """Adds to whatever stops the block where it can go on."""
    try:
        yield
    except BaseException as problem:
        holds = [file.name for file in progress.iterdir()] if progress.is_dir() else []
        if holds == [CLAIM]:
            discard(progress)
        elif holds:
            problem.add_note(f"What is done is noted in {progress}: run the same again with --resume (resume=True) to go on.")
        raise


def discard(progress: Path) -> None:
    """Removes what a run noted, as far as that can be done: its result is safe."""
    with suppress(OSError):
        clear(progress)


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Adds to whatever stops the block a note of how things stand, unless there is a more exact one."""
    try:
        yield
    except BaseException as problem:
        if not getattr(problem, "__notes__", None):
            problem.add_note(note)
        raise


def check_unclaimed(progress: Path) -> None:
    """`UsageError` for progress of another method's, where this one notes none: it would be gone in the end."""
    if (progress / CLAIM).exists():
        raise UsageError(asked_otherwise(progress))


def progress_of(directory: Path, *, resume: bool, overwrite: bool) -> Path:
    """Where a run notes what is done; `UsageError` where something else is there, or something would be lost.

    With `resume` there need not be any: a run that is always started so begins when it is started first.
    """
    progress = beside(directory, "{}.progress")
    if not progress.exists():
        return progress
    if not is_progress(progress):
        raise UsageError(
            f"{progress} is where the run notes what is done, and holds something else. Move it away, or name another directory."
        )
    if any(progress.iterdir()) and not (resume or overwrite):
        raise UsageError(
            f"{progress} holds what an earlier run has done. Go on with it (--resume, resume=True), or begin anew (--overwrite)."
        )
    return progress
