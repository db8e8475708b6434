"""Directories and files that are either whole or not there: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from resect.errors import CheckpointError, ResectError
from resect.files.outputs import (
    MANIFEST,
    claimed,
    contents,
    foreign,
    is_mount,
    located,
    remove,
    sibling,
    stays,
    working_directory,
)
from resect.files.reading import read_json

FORMAT = 1
"""Of manifests."""
EXCHANGE, NO_REPLACE = 2, 1
"""Flags of Linux's renameat2."""
HERE = -100
"""AT_FDCWD: paths are what they say."""
_on_their_way: set[Path] = set()
"""Directories that this process is filling, under their temporary names."""
Alike = Callable[[Path], bool]


def check_directory(
    directory: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Path:
    """The absolute path that `directory` names, if something may be written there; ask before long work.

    Raises `CheckpointError` for a file, and for a directory that holds something unless `overwrite`.
    Even then nothing is replaced but what resect wrote: refused are a directory with files that its
    resect.json doesn't list, a home, a directory above the one where the program runs, a mount point,
    and one that holds any of the `inputs` (paths, or names that are none).
    """
    target = located(directory)
    if os.path.lexists(target) and not target.is_dir():
        raise CheckpointError(
            f"Asked to write the directory {target}, which is a file. Name a directory."
        )
    holds = contents(target)
    if not holds:
        return target
    if not overwrite:
        raise CheckpointError(
            f"Asked to save to {target}, which holds {_some(holds)}. "
            "Name another directory, or ask to overwrite (--overwrite, overwrite=True)."
        )
    _check_replaceable(target, inputs)
    return target


@contextmanager
def claimed_directory(
    directory: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """The place of a directory that will be written, claimed for the block and checked before the long work in it."""
    with claimed(directory) as target:
        yield check_directory(target, overwrite=overwrite, inputs=inputs)


@contextmanager
def claimed_file(
    file: str | Path,
    *,
    overwrite: bool = False,
    alike: Alike | None = None,
    inputs: Iterable[str | Path | None] = (),
) -> Iterator[Path]:
    """The place of a file that will be written, claimed for the block and checked before the long work in it."""
    with claimed(file) as target:
        yield check_file(target, overwrite=overwrite, alike=alike, inputs=inputs)


def _check_replaceable(target: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuses to replace a directory that holds anything but a result of resect's."""
    here = working_directory()
    above = (here, *here.parents) if here else ()
    if target in above or target == _home() or is_mount(target):
        raise CheckpointError(
            f"Asked to overwrite {target}, which is no place for a model to replace. Name a directory of its own."
        )
    used = _used(target, inputs)
    if used is not None:
        raise CheckpointError(
            f"Asked to overwrite {target}, and to read {used} there. Name another directory."
        )
    others = foreign(target)
    if others:
        raise CheckpointError(
            f"Asked to overwrite {target}, which holds files that resect did not write: {_some(others)}. "
            "Move them away, or name another directory."
        )


def _home() -> Path | None:
    """The user's home; None for one without."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _used(target: Path, inputs: Iterable[str | Path | None]) -> Path | None:
    """The first input that an output holds, or is. `FILE:COLUMN` names a file too."""
    names = [str(name) for name in inputs if name]
    for name in [*names, *(name.rpartition(":")[0] for name in names)]:
        place = _existing(name)
        if place is not None and target in (place, *place.parents):
            return place
    return None


def _existing(name: str) -> Path | None:
    """The absolute path of something that is there; None for names of other things."""
    try:
        place = Path(name).expanduser().resolve()
        return place if name and place.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def check_file(
    file: str | Path,
    *,
    overwrite: bool = False,
    alike: Alike | None = None,
    inputs: Iterable[str | Path | None] = (),
) -> Path:
    """The absolute path that `file` names, if it may be written; ask before long work. Raises `CheckpointError` else.

    With `overwrite` a file is replaced if it is empty or `alike` says that it is of the kind that is to be written, and is none
    of the `inputs`.
    """
    target = located(file)
    if target.is_dir():
        raise CheckpointError(
            f"Asked to write the file {target}, which is a directory. Name a file in it."
        )
    if not os.path.lexists(target):
        return target
    if not overwrite:
        raise CheckpointError(
            f"Asked to write {target}, which exists. Name another file, or ask to overwrite (--overwrite, overwrite=True)."
        )
    if _used(target, inputs) is not None:
        raise CheckpointError(f"Asked to overwrite {target}, and to read it. Name another file.")
    if not _replaceable(target, alike):
        raise CheckpointError(
            f"Asked to overwrite {target}, which is a file of another kind. Name another file."
        )
    return target


def _replaceable(target: Path, alike: Alike | None) -> bool:
    try:
        return target.is_file() and (
            target.stat().st_size == 0 or (alike is not None and alike(target))
        )
    except OSError as problem:
        raise CheckpointError(
            f"Asked to overwrite {target}; it cannot be looked into: {problem.strerror}."
        ) from problem


def begins(*starts: bytes) -> Alike:
    """Whether a file begins with one of some bytes."""

    def alike(file: Path) -> bool:
        with file.open("rb") as opened:
            return opened.read(max(map(len, starts))).startswith(starts)

    return alike


@contextmanager
def whole_directory(
    directory: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the name `directory` when the block ends well, and is gone otherwise.

    What was there before stays untouched until then, and is replaced in one step. Who may read it
    stays so. resect.json in it lists the files. Below a directory that is written so already, it is
    that one which appears whole, and `directory` itself is given. Raises `CheckpointError` like
    `check_directory` and `claimed`, and when the disk fails; errors of ours speak of `directory`.
    """
    place = located(directory)
    if any(path in _on_their_way for path in (place, *place.parents)):
        check_directory(place, overwrite=overwrite, inputs=inputs).mkdir(exist_ok=True)
        yield place
        return
    with claimed(directory) as target:
        check_directory(target, overwrite=overwrite, inputs=inputs)
        partial = sibling(target, "partial")
        _on_their_way.add(partial)
        try:
            partial.mkdir()
            yield partial
            _list(partial)
            if target.is_dir():
                shutil.copymode(target, partial)
            _flush(partial)
            check_directory(target, overwrite=overwrite, inputs=inputs)
            _put(partial, target)
        except BaseException as problem:
            remove(partial)
            _raise_as(problem, partial, target)
        finally:
            _on_their_way.discard(partial)


@contextmanager
def whole_file(
    file: str | Path,
    *,
    overwrite: bool = False,
    alike: Alike | None = None,
    inputs: Iterable[str | Path | None] = (),
) -> Iterator[Path]:
    """A temporary sibling to write; it takes the name `file` when the block ends well, and is gone otherwise.

    It has the suffix of `file`. Raises `CheckpointError` like `check_file` and `claimed`, and when the disk fails.
    """
    with claimed(file) as target:
        check_file(target, overwrite=overwrite, alike=alike, inputs=inputs)
        partial = sibling(target, "partial")
        partial = partial.with_name(partial.name + target.suffix)
        try:
            yield partial
            flush_file(partial)
            if overwrite:
                check_file(target, overwrite=True, alike=alike, inputs=inputs)
                os.replace(partial, target)
            else:
                _rename_new(partial, target)
            flush_folder(target.parent)
        except BaseException as problem:
            remove(partial)
            _raise_as(problem, partial, target)


def _raise_as(problem: BaseException, partial: Path, target: Path) -> None:
    """Raises what stopped the writing of an output, in words about the output."""
    if isinstance(problem, ResectError):
        if str(partial) not in str(problem):
            raise problem
        told = type(problem)(str(problem).replace(str(partial), str(target)))
        raise told from problem
    if not (isinstance(problem, OSError) or is_write_failure(problem)):
        raise problem
    if is_out_of_space(problem):
        raise CheckpointError(
            f"Asked to save to {target}; the disk is full. Nothing was changed there. Free some space, or name another disk."
        ) from problem
    raise CheckpointError(
        f"Asked to save to {target}; {str(problem).replace(str(partial), str(target))}. Nothing was changed there."
    ) from problem


def write_text(path: Path, text: str) -> None:
    """Puts a text file in the place of what has its name; it is on the disk, and whole at any time. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder for what need not outlast the block. Raises `CheckpointError` that names it where it cannot be written.

    Inside the block, too, unless the system's error names a file elsewhere.
    """
    place = tempfile.gettempdir()
    try:
        with tempfile.TemporaryDirectory(prefix="resect-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except Exception as problem:
        if not _is_about(problem, place):
            raise
        reason = "its disk is full" if is_out_of_space(problem) else str(problem)
        raise CheckpointError(
            f"Asked for a temporary folder {purpose}; {place}: {reason}. Free some space there, or set TMPDIR to another folder."
        ) from problem


def _is_about(problem: Exception, folder: str) -> bool:
    """Whether an error is one of a disk, and names no file outside of the folder."""
    if isinstance(problem, OSError):
        return problem.filename is None or str(problem.filename).startswith(folder)
    return is_write_failure(problem)


def flush_file(path: Path) -> None:
    """What was written to a file is on the disk when this returns."""
    _flush_descriptor(path)


def flush_folder(path: Path) -> None:
    """Names given and taken in a folder are on the disk when this returns."""
    try:
        _flush_descriptor(path)
    except OSError as problem:
        if problem.errno not in (
            errno.EINVAL,
            errno.EACCES,
            errno.EISDIR,
        ):  # some systems do not flush folders
            raise


def _flush_descriptor(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _list(directory: Path) -> None:
    """Writes into resect.json which files resect wrote there."""
    manifest: dict[str, Any] = {"format": FORMAT}
    if (directory / MANIFEST).exists():
        manifest = read_json(directory / MANIFEST)
    files = sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )
    manifest["files"] = [name for name in files if name != MANIFEST]
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _flush(directory: Path) -> None:
    """Everything in the directory is on the disk, and as readable as the directory itself, when this returns."""
    readable = directory.stat().st_mode & 0o666  # safetensors writes files for their owner only
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir():
            flush_folder(path)
        else:
            path.chmod(readable)
            flush_file(path)


def _put(partial: Path, target: Path) -> None:
    """Gives the directory `partial` the name `target`; what has it goes in the same step."""
    if stays(target):
        _fill(partial, target)
    elif not contents(target):
        os.rename(
            partial, target
        )  # in the place of an empty directory too; the system refuses others
        flush_folder(target.parent)
    else:
        _replace(partial, target)


def _fill(partial: Path, target: Path) -> None:
    """Moves what a directory holds into an empty one above it; what says that it is whole comes last."""
    entries = sorted(partial.iterdir(), key=lambda entry: entry.name == MANIFEST)
    moved: list[Path] = []
    try:
        for entry in entries:
            os.rename(entry, target / entry.name)
            moved.append(target / entry.name)
    except BaseException:
        for path in moved:
            remove(path)
        raise
    flush_folder(target)
    partial.rmdir()


def _replace(partial: Path, target: Path) -> None:
    """Exchanges two directories in one step and removes the old one; where no system call does that, in two with a way back."""
    if rename_with(partial, target, EXCHANGE):
        flush_folder(target.parent)
        remove(partial)
        return
    aside = sibling(target, "replaced")
    os.rename(target, aside)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(aside, target)
        raise
    flush_folder(target.parent)
    remove(aside)


def _rename_new(partial: Path, target: Path) -> None:
    """Renames a file to a name that nothing has; `CheckpointError` where something has got it meanwhile."""
    taken = CheckpointError(
        f"Asked to write {target}, which appeared meanwhile. It was left as it is. Name another file."
    )
    try:
        if rename_with(partial, target, NO_REPLACE):
            return
    except FileExistsError as problem:
        raise taken from problem
    if os.path.lexists(target):
        raise taken
    os.rename(partial, target)


def rename_with(source: Path, target: Path, flag: int) -> bool:
    """Linux's rename with a flag; False where the system or the file system has none. Raises `OSError`."""
    rename = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if os.name == "posix"
        else None
    )
    if rename is None:
        return False
    if rename(HERE, os.fsencode(source), HERE, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error says that the disk is full; safetensors says it in words of its own."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def is_write_failure(error: BaseException) -> bool:
    """Whether an error of a library that writes files is one of the disk: they have errors of their own, tokenizers none."""
    said = str(error)
    if type(error) is Exception:
        return "(os error" in said
    if isinstance(error, SafetensorError):
        return "I/O error" in said or "IoError" in said or "os error" in said
    return isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in said or "inline_container" in said or "os error" in said
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
