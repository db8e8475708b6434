"""Directories that runs write: whole or not there, with a place beside them where long runs note what is done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resect.checkpoint import Saved, whole_directory
from resect.errors import CheckpointError, UsageError


def facts(saved: Saved, directory: Path) -> dict[str, Any]:
    """What was saved, as plain values, under the name that was asked for."""
    return asdict(replace(saved, directory=str(directory), changes=dict(saved.changes)))


def fill(directory: Path, files: Mapping[str, str]) -> None:
    """Writes text files, `{name: text}`."""
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


@contextmanager
def placed(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, renamed when whole; errors speak of the name that was asked for."""
    partial = directory
    try:
        with whole_directory(directory, overwrite=overwrite) as partial:
            yield partial
    except CheckpointError as problem:
        said = str(problem).replace(str(partial), str(directory))
        raise CheckpointError(said) from problem


@contextmanager
def resumable(progress: Path) -> Iterator[None]:
    """Adds to whatever stops the block where it can go on."""
    try:
        yield
    except BaseException as problem:
        if progress.exists() and [file.name for file in progress.iterdir()] == ["asked.json"]:
            shutil.rmtree(progress)
        elif progress.exists():
            problem.add_note(f"What is done is noted in {progress}: run the same again with --resume (resume=True) to go on.")
        raise


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Adds to whatever stops the block a note of how things stand, unless there is a more exact one."""
    try:
        yield
    except BaseException as problem:
        if not getattr(problem, "__notes__", None):
            problem.add_note(note)
        raise


def progress_of(directory: Path, *, resume: bool, overwrite: bool) -> Path:
    """Where a run notes what is done; `UsageError` where there is nothing to resume, or something to be lost."""
    progress = directory.with_name(f"{directory.name}.progress")
    if resume and not progress.exists():
        raise UsageError(f"Nothing to resume: there is no {progress}. Run without resume.")
    if progress.exists() and not (resume or overwrite):
        raise UsageError(
            f"{progress} holds what an earlier run has done. Go on with it (--resume, resume=True), or begin anew (--overwrite)."
        )
    return progress
