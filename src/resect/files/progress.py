"""What a long run has done so far, on disk: it goes on after a power cut as if there had been none."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resect.errors import CheckpointError, DamagedProgress, ResectError, UsageError
from resect.files.outputs import remove
from resect.files.reading import read_json
from resect.files.writing import (
    flush_file,
    flush_folder,
    is_out_of_space,
    is_write_failure,
    write_text,
)

CLAIM = "asked.json"
"""Says what the progress is of."""
HALF_CLAIM = f".{CLAIM}.partial"
"""What a process leaves that dies while it writes its claim."""
RECOVERY = "recovery"
"""Where a recovery notes its states, in the progress of a run that ends with one."""
SUPERSEDED = "superseded"
"""Notes of a shot that a later one has replaced what it left."""
OWN = re.compile(
    r"\.?[\w.-]+\.(json|safetensors|partial)|(shot|state|text|instructions)-\d+|training|recovery|\.entering"
)
"""Names that a damaged claim leaves to tell progress by."""
KINDS = (".json", ".safetensors")
"""Notes and sets of tensors, by their suffixes."""
_DIGEST = "digest"


class Progress:
    """A directory of named sets of tensors and of notes, each of them whole or not there, and with a digest.

    `asked` is what the run was asked for; a directory that was filled for another request is refused. Without `resume` earlier
    progress is removed, but never a directory that holds anything else. With it everything is read once: what does not match its
    digest counts as not done, like all that came after it, and a warning says so. Sets of tensors in a `temporary` directory,
    which nobody resumes, need not be on the disk before the work goes on.
    """

    def __init__(
        self, directory: str | Path, asked: Any, *, resume: bool = False, temporary: bool = False
    ) -> None:
        self.directory = Path(directory)
        self._flush = not temporary
        described = json.dumps(asked, sort_keys=True, default=str)
        self._key = digest_of_text(described)
        with noting_progress(self.directory):
            claim(self.directory, described, resume=resume)
            if resume:
                self._mend()

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Notes a set of tensors under a name that may have slashes."""
        path = self._path(name)
        with noting_progress(path):
            self._make_folder(path.parent)
            write_tensors(path, tensors, key=self._key + name, flush=self._flush)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors under a name, if they were noted. Raises `CheckpointError` where they were damaged since this began."""
        path = self._path(name)
        return read_tensors(path, key=self._key + name) if path.exists() else None

    def need(self, name: str) -> dict[str, Tensor]:
        """The tensors under a name that must have been noted; `CheckpointError` where they are gone.

        What needs them counts as not done then, so that a run that is resumed makes them anew.
        """
        found = self.get(name)
        if found is None:
            self._forget([name])
            raise CheckpointError(
                f"{self._path(name)} is gone. It counts as not done now, like all that came after it: resume once more."
            )
        return found

    def note(self, name: str, **facts: Any) -> None:
        """Notes that something is done, with some facts."""
        path = self.directory / f"{name}.json"
        with noting_progress(path):
            self._make_folder(path.parent)
            write_note(path, facts, key=self._key + name)

    def facts(self, name: str) -> dict[str, Any] | None:
        """The facts noted with something that is done. Raises `CheckpointError` where they were damaged since this began."""
        path = self.directory / f"{name}.json"
        return read_note(path, key=self._key + name) if path.exists() else None

    def noted(self, name: str) -> bool:
        """Whether something is done."""
        return (self.directory / f"{name}.json").exists()

    def folder(self, name: str) -> Path:
        """An empty folder for files that need not outlast a power cut; its name begins with a dot."""
        path = self.directory / name
        path = path.with_name(f".{path.name}")
        with noting_progress(path):
            remove(path)
            path.mkdir(parents=True)
        return path

    def drop(self, name: str) -> None:
        """Frees a set, a folder of them, or a folder for files that need not outlast a power cut."""
        path = self.directory / name
        with noting_progress(path):
            self._path(name).unlink(missing_ok=True)
            remove(path)
            remove(path.with_name(f".{path.name}"))

    def supersede(self, shot: int, *, by: str) -> None:
        """Notes that what a shot left is replaced: it may go once `by`, which is noted, is on the disk."""
        self.note(f"shot-{shot}/{SUPERSEDED}", by=by)

    def _make_folder(self, folder: Path) -> None:
        """Creates a folder whose name outlasts a power cut, as what is noted in it does."""
        missing = [folder]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        if folder.exists():
            return
        folder.mkdir(parents=True)
        if self._flush:
            for made in missing:
                flush_folder(made.parent)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _mend(self) -> None:
        """Takes back what is damaged, with what came after it."""
        for path in sorted(self.directory.rglob(".*")):
            remove(path)
        damaged = [name for name in self._names() if not self._is_sound(name)]
        damaged = damaged or [name for name in self._names() if self._is_orphan(name)]
        if not damaged:
            return
        warnings.warn(DamagedProgress(damaged_message(self.directory, damaged)), stacklevel=4)
        self._forget(damaged)

    def _forget(self, damaged: Iterable[str]) -> None:
        """Takes back what is damaged or gone, with what came after it."""
        shots = [re.match(r"shot-(\d+)/", name) for name in damaged]
        if all(shots):
            self._take_back(min(int(shot[1]) for shot in shots if shot))
        else:
            self._clear()

    def _names(self) -> Iterator[str]:
        """Every set and note, as a path below the directory; a recovery's states are its own to check.

        What others left there, a file manager or somebody's notes, is none of them.
        """
        for path in sorted(self.directory.rglob("*")):
            name = path.relative_to(self.directory).as_posix()
            if path.suffix in KINDS and name != CLAIM and not name.startswith(f"{RECOVERY}/"):
                yield name

    def _is_sound(self, file: str) -> bool:
        name, _, kind = file.rpartition(".")
        read = {"safetensors": read_tensors, "json": read_note}.get(kind)
        try:
            return (
                read is not None and read(self.directory / file, key=self._key + name) is not None
            )
        except CheckpointError:
            return False

    def _is_orphan(self, file: str) -> bool:
        """Whether a note says that something replaced a shot which is not there."""
        name, _, _ = file.rpartition(".")
        if not name.endswith(f"/{SUPERSEDED}"):
            return False
        return not self.noted(str((self.facts(name) or {}).get("by")))

    def _take_back(self, shot: int) -> None:
        """Removes a shot and all after it; and the one before, if that was superseded: what it left is gone already."""
        if shot > 1 and self.noted(f"shot-{shot - 1}/{SUPERSEDED}"):
            self._take_back(shot - 1)
            return
        for path in self.directory.glob("shot-*"):
            if int(path.name.removeprefix("shot-")) >= shot:
                remove(path)

    def _clear(self) -> None:
        for path in self.directory.iterdir():
            if path.name != CLAIM:
                remove(path)


def claim(directory: Path, described: str, *, resume: bool) -> bool:
    """Makes a directory the progress of what is `described`; whether it has been that before, and is gone on with.

    Raises `UsageError` for a directory that holds something else, or the progress of something else where `resume` is asked
    for. A claim that is damaged says nothing any more: the progress begins anew, with a warning.
    """
    path = directory / CLAIM
    holds = (
        {entry.name for entry in directory.iterdir()} - {HALF_CLAIM}
        if directory.is_dir()
        else set()
    )
    if (
        os.path.lexists(directory)
        and not directory.is_dir()
        or (holds and not _is_progress(directory, holds))
    ):
        raise UsageError(
            f"{directory} holds something else than the progress of a run. Name another directory."
        )
    if resume and holds:
        claimed = _read_claim(path)
        if claimed == described:
            return True
        if claimed is not None:
            raise UsageError(asked_otherwise(directory))
        warnings.warn(DamagedProgress(damaged_message(directory, [CLAIM])), stacklevel=4)
    clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_note(path, {"asked": described}, key=CLAIM)
    flush_folder(directory.parent)
    return False


def asked_otherwise(directory: Path) -> str:
    """A sentence about progress that another request has noted."""
    return (
        f"{directory} holds the progress of a run that was asked for something else. Resume with the same recipe, "
        "model, calibration text and seed, or begin anew without resume."
    )


def clear(directory: Path) -> None:
    """Removes progress, its claim last: what is left of a removal that was cut short is still known as progress.

    Raises `OSError`.
    """
    if not directory.is_dir():
        return
    clear(directory / RECOVERY)
    for path in directory.iterdir():
        if path.name != CLAIM:
            remove(path)
    flush_folder(directory)
    shutil.rmtree(directory)


def is_progress(directory: Path) -> bool:
    """Whether a directory holds the progress of a run of resect's, or nothing."""
    holds = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {"a file"}
    holds.discard(HALF_CLAIM)
    return not holds or _is_progress(directory, holds)


def _is_progress(directory: Path, holds: set[str]) -> bool:
    """Whether a claim of ours is there, or the remains of one among nothing else than progress has.

    Where the method itself notes nothing, the progress of a recovery stands alone.
    """
    if holds == {RECOVERY}:
        return is_progress(directory / RECOVERY)
    return CLAIM in holds and (
        _read_claim(directory / CLAIM) is not None or all(OWN.fullmatch(name) for name in holds)
    )


def _read_claim(path: Path) -> str | None:
    """What a claim says was asked for; None for one that is damaged."""
    try:
        asked = read_note(path, key=CLAIM).get("asked")
    except ResectError:
        return None
    return asked if isinstance(asked, str) else None


def damaged_message(directory: Path, names: Iterable[str]) -> str:
    """A sentence about what does not match its digest."""
    listed = list(names)
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{directory}: {listed[0]}{more} was damaged since it was noted, and counts as not done. It is made anew."


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, key: str = "", flush: bool = True
) -> None:
    """A safetensors file with a digest of the tensors in it, which appears whole and is on the disk then.

    Without `flush` it may get there later. `key` says what the tensors are of, and is part of the digest.
    Raises `OSError` or `SafetensorError`.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(stored, partial, {_DIGEST: digest(stored, key=key)})
        if flush:
            flush_file(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if flush:
        flush_folder(path.parent)


def read_tensors(path: Path, *, key: str = "") -> dict[str, Tensor]:
    """The tensors that `write_tensors` wrote under the same `key`. Raises `CheckpointError` for others, and for damaged ones."""
    try:
        with safe_open(path, "pt") as file:
            noted = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError, ValueError, RuntimeError) as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem}. It was damaged since it was noted."
        ) from problem
    if noted != digest(tensors, key=key):
        raise CheckpointError(f"{path} was damaged since it was noted.")
    return tensors


def write_note(path: Path, facts: Mapping[str, Any], *, key: str = "") -> None:
    """A JSON file with facts and a digest of them. Raises `OSError`."""
    text = json.dumps(facts)
    write_text(path, json.dumps({_DIGEST: digest_of_text(key + text), "facts": json.loads(text)}))


def read_note(path: Path, *, key: str = "") -> dict[str, Any]:
    """The facts that `write_note` wrote under the same `key`. Raises `CheckpointError` for others, and for damaged ones."""
    note = read_json(path)
    facts = note.get("facts") if isinstance(note, dict) else None
    if not isinstance(facts, dict) or note.get(_DIGEST) != digest_of_text(key + json.dumps(facts)):
        raise CheckpointError(f"{path} was damaged since it was noted.")
    return facts


def digest(tensors: Mapping[str, Tensor] | Iterable[Tensor], *, key: str = "") -> str:
    """A number that tells tensors apart: names, types, shapes and values, to the bit."""
    found = hashlib.blake2b(key.encode(), digest_size=20)
    named = (
        sorted(tensors.items())
        if isinstance(tensors, Mapping)
        else [("", tensor) for tensor in tensors]
    )
    for name, tensor in named:
        found.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def digest_of_text(text: str) -> str:
    """A number that tells texts apart."""
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def digest_of_file(path: Path) -> str:
    """A number that tells files apart. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


@contextmanager
def noting_progress(place: Path) -> Iterator[None]:
    """What a disk says against noting progress, as an error of ours."""
    try:
        yield
    except ResectError:
        raise
    except Exception as problem:
        if not (isinstance(problem, OSError) or is_write_failure(problem)):
            raise
        reason = "the disk is full" if is_out_of_space(problem) else str(problem)
        raise CheckpointError(
            f"Asked to note progress in {place}; {reason}. What was noted before is whole: see to it, and resume."
        ) from problem
