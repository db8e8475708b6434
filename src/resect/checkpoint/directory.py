"""A directory that is either whole or not there: written beside its place, flushed, then renamed into it."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resect.errors import CheckpointError


def check_directory(directory: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute path that `directory` names, if something may be written there; ask before long work.

    Raises `CheckpointError` for a file, for a directory that holds something unless `overwrite`, and, even then, for
    one that is certainly no model: a home, a checkout, or a parent of where the program runs.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"Asked to save to {target}, which is a file. Name a directory.")
    holds = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if not holds:
        return target
    if target in (Path.home(), Path.cwd(), *Path.cwd().parents) or ".git" in holds:
        raise CheckpointError(
            f"Asked to save to {target}, which is no place for a model to replace. Name a directory of its own."
        )
    if not overwrite:
        raise CheckpointError(
            f"Asked to save to {target}, which holds {', '.join(holds[:4])}{', ...' if len(holds) > 4 else ''}. "
            "Name another directory, or ask to overwrite (--overwrite, overwrite=True)."
        )
    return target


@contextmanager
def whole_directory(directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the name `directory` when the block ends well, and is gone otherwise.

    What was there before stays untouched until then. Raises `CheckpointError` like `check_directory` and when the disk
    fails.
    """
    target = check_directory(directory, overwrite=overwrite)
    made = _make_parents(target.parent)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir()
        yield partial
        _flush(partial)
        _swap(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)
        if _out_of_space(error):
            raise CheckpointError(
                f"Asked to save to {target}; the disk is full. Nothing was changed there. Free some space, or name another disk."
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"Asked to save to {target}; {error}. Nothing was changed there.") from error
        raise


@contextmanager
def whole_file(file: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write; it takes the name `file` when the block ends well, and is gone otherwise.

    It has the suffix of `file`. Raises `CheckpointError` like `check_file` and when the disk fails.
    """
    target = check_file(file, overwrite=overwrite)
    made = _make_parents(target.parent)
    partial = target.with_name(f".{target.stem}.partial-{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _remove_empty(made)
        if _out_of_space(error):
            raise CheckpointError(f"Asked to write {target}; the disk is full. Free some space, or name another disk.") from error
        if isinstance(error, OSError):
            raise CheckpointError(f"Asked to write {target}; {error}. Nothing was changed there.") from error
        raise


def check_file(file: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute path that `file` names, if it may be written; ask before long work. Raises `CheckpointError` else."""
    target = Path(file).expanduser().resolve()
    if target.is_dir():
        raise CheckpointError(f"Asked to write the file {target}, which is a directory. Name a file in it.")
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"Asked to write {target}, which exists. Name another file, or ask to overwrite (--overwrite, overwrite=True)."
        )
    return target


def _make_parents(parent: Path) -> list[Path]:
    """Creates what is missing above the directory; gives it innermost first, to be undone."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Asked to save below {parent}; {error}. Name another directory.") from error
    return missing


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return


def _flush(directory: Path) -> None:
    """Everything in the directory is on the disk, and as readable as the directory itself, when this returns."""
    readable = directory.stat().st_mode & 0o666  # safetensors writes files for their owner only
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(readable)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, target: Path) -> None:
    """Renames `partial` to `target`; what was there is moved aside first, and back if the rename fails."""
    if not target.exists():
        os.rename(partial, target)
        return
    aside = target.with_name(f".{target.name}.replaced-{uuid.uuid4().hex[:8]}")
    os.rename(target, aside)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _out_of_space(error: BaseException) -> bool:
    """Whether an error says that the disk is full; safetensors says it in words of its own."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)
