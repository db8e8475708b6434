"""Where a command writes: one process at a time, nothing replaced that resect did not write, and dead processes' leftovers gone.

Everything that belongs to an output but is not the result lies beside it, under names made of its own: `.NAME.lock`,
`.NAME.partial-x`, `.NAME.replaced-x` and `NAME.progress`. An output that is a mount point has them inside.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resect.errors import CheckpointError, ResectError
from resect.files.reading import read_json

try:
    import fcntl
except ImportError:  # no POSIX system: outputs are not locked there
    fcntl = None  # type: ignore[assignment]

MANIFEST = "resect.json"
"""Says of a directory that resect wrote it, and lists its files."""
UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer."""
TOKEN = 8
"""Letters that tell siblings apart."""
_held: dict[Path, int] = {}
"""Outputs that this process has claimed, and the thread that did."""


def located(output: str | Path) -> Path:
    """The absolute path of an output, links followed. Raises `CheckpointError` for names that no file can have."""
    try:
        return Path(output).expanduser().resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as problem:  # a link to itself, an unknown user, a NUL
        raise CheckpointError(
            f"Asked to write to {str(output)!r}; {problem}. Name another place."
        ) from problem


def beside(output: Path, name: str) -> Path:
    """Where something that belongs to an output lies: `{}` in `name` stands for the output's own name."""
    if is_mount(output):
        inside = name.format("output")
        return output / (inside if inside.startswith(".") else f".{inside}")
    return output.with_name(name.format(output.name))


def is_mount(path: Path) -> bool:
    """Whether a directory cannot be renamed, since a file system begins there."""
    return path.is_dir() and os.path.ismount(path)


def stays(path: Path) -> bool:
    """Whether a directory is filled where it is: a mount point, or where the program and its shell are."""
    return is_mount(path) or path == working_directory()


def working_directory() -> Path | None:
    """Where the program runs; None where that was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


@contextmanager
def claimed(output: str | Path) -> Iterator[Path]:
    """The absolute path of an output that no other process writes to while the block lasts; claims of one thread nest.

    What processes that died left beside it is removed. Raises `CheckpointError` where another process has it, and where nothing
    can be written beside it.
    """
    target = located(output)
    owner = _held.get(target)
    if owner == threading.get_ident():
        yield target
        return
    if owner is not None:
        raise _taken(target)
    made = make_parents(target.parent)
    try:
        with _locked(target) as exclusive:
            if exclusive:
                _tidy(target)
            _try_out(target)
            _held[target] = threading.get_ident()
            try:
                yield target
            finally:
                del _held[target]
    finally:
        remove_empty(made)


@contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Holds the lock of an output; False where the file system has no locks."""
    lock = beside(target, ".{}.lock")
    descriptor = _open_lock(lock, target)
    try:
        exclusive = descriptor is not None
        yield exclusive
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _open_lock(lock: Path, target: Path) -> int | None:
    """A descriptor that holds the lock; None where nothing can be locked.

    Between opening and locking, whoever had the lock may remove its file; then another is made.
    """
    if fcntl is None:
        return None
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as problem:
            raise cannot_write(target, problem) from problem
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, lock):
                return descriptor
            os.close(descriptor)
        except OSError as problem:
            os.close(descriptor)
            if problem.errno in (errno.EAGAIN, errno.EACCES):
                raise _taken(target) from problem
            if problem.errno in UNLOCKABLE:
                lock.unlink(missing_ok=True)
                return None
            raise cannot_write(target, problem) from problem


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _taken(target: Path) -> CheckpointError:
    return CheckpointError(
        f"Asked to write to {target}; another process is writing there. Wait until it has ended, or name another place."
    )


def _tidy(target: Path) -> None:
    """Removes what dead processes left beside an output, and gives back what one of them had moved aside."""
    aside = _siblings(target, "replaced")
    if aside and not os.path.lexists(target):
        os.rename(aside.pop(), target)
    for leftover in [*aside, *_siblings(target, "partial")]:
        if stays(target) and not (target / MANIFEST).exists():
            _take_back(leftover, target)
        remove(leftover)


def _take_back(partial: Path, target: Path) -> None:
    """Removes from a directory what a dead process had moved there, of a result that never became whole.

    What the list names and the dead process still had is somebody else's, as is anything elsewhere.
    """
    for first in {name.split("/")[0] for name in _listed(partial)} - {"", ".", ".."}:
        if not os.path.lexists(partial / first):
            remove(target / first)


def _siblings(target: Path, kind: str) -> list[Path]:
    """What lies beside an output under one of the names that `sibling` makes."""
    start = sibling(target, kind, "").name
    return sorted(
        path
        for path in sibling(target, kind, "").parent.iterdir()
        if _is_sibling(path.name, start, target.suffix)
    )


def _is_sibling(name: str, start: str, suffix: str) -> bool:
    token = name[len(start) :].removesuffix(suffix)
    return (
        name.startswith(start)
        and len(token) == TOKEN
        and all(letter in "0123456789abcdef" for letter in token)
    )


def sibling(target: Path, kind: str, token: str | None = None) -> Path:
    """A name beside an output for something that is on its way: `.NAME.KIND-x`."""
    token = uuid.uuid4().hex[:TOKEN] if token is None else token
    return beside(target, f".{{}}.{kind}-{token}")


def remove(path: Path) -> None:
    """Removes a file or a whole directory, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _try_out(target: Path) -> None:
    """Makes and renames a sibling, as the end of a long run will: what cannot be done is known at its start."""
    probe, renamed = sibling(target, "partial"), sibling(target, "partial")  # never taken for what was moved aside
    try:
        os.mkdir(probe)
        try:
            os.rename(probe, renamed)
        except OSError:
            os.rmdir(probe)
            raise
        os.rmdir(renamed)
    except OSError as problem:
        raise cannot_write(target, problem) from problem


def make_parents(parent: Path) -> list[Path]:
    """Creates what is missing above an output; gives it innermost first, to be undone by `remove_empty`."""
    try:
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise CheckpointError(
            f"Asked to write below {parent}; {_said(problem)}. Name another directory."
        ) from problem
    return missing


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes directories, innermost first, until one is not empty."""
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return


def contents(directory: Path) -> list[str]:
    """What a directory holds, by name, but for what `beside` puts into mount points. Raises `CheckpointError`."""
    try:
        names = sorted(os.listdir(directory)) if directory.is_dir() else []
    except OSError as problem:
        raise CheckpointError(f"{directory} cannot be looked into: {_said(problem)}.") from problem
    own = ".output." if is_mount(directory) else None
    return [name for name in names if own is None or not name.startswith(own)]


def foreign(directory: Path) -> list[str]:
    """The files of a directory, relative to it, that no run of resect wrote there: all of them, where none did.

    Raises `CheckpointError` for a folder in it that may not be looked into.
    """
    files = sorted(_files(directory, directory))
    listed = _listed(directory)
    partials = {f".{name}.partial" for name in listed}  # of `write_text` in a process that died
    own = {MANIFEST, *listed, *partials} if listed else set()
    return [name for name in files if name not in own]


def _files(folder: Path, above: Path) -> Iterator[str]:
    """The files and links below a folder, relative to one above it."""
    for name in contents(folder):
        path = folder / name
        if _is_folder(path):
            yield from _files(path, above)
        else:
            yield path.relative_to(above).as_posix()


def _listed(directory: Path) -> set[str]:
    """The files that resect.json says resect wrote; none where there is no such file, or a damaged one."""
    try:
        manifest = read_json(directory / MANIFEST)
    except ResectError:
        return set()
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def cannot_write(target: Path, problem: OSError) -> CheckpointError:
    """What stands in the way of writing an output, as an error."""
    return CheckpointError(
        f"Asked to write to {target}; {_said(problem)}. Nothing was changed there. Name another place."
    )


def _said(problem: OSError) -> str:
    """An operating system's words, and the file they are about."""
    words = problem.strerror or str(problem) or type(problem).__name__
    return f"{words} ({problem.filename})" if problem.filename else words
