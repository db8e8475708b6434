"""What a long run has done so far, on disk: it goes on after a power cut as if there had been none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resect.errors import CheckpointError, UsageError


class Progress:
    """A directory of named sets of tensors, each of them whole or not there.

    `asked` is what the run was asked for; a directory that was filled for another request is refused. Without `resume` earlier
    progress is removed, but never a directory that holds anything else.
    """

    def __init__(self, directory: str | Path, asked: Any, *, resume: bool = False) -> None:
        self.directory = Path(directory)
        described = json.dumps(asked, sort_keys=True, default=str)
        note = self.directory / "asked.json"
        if not note.exists() and self.directory.is_dir() and {file.name for file in self.directory.iterdir()} - {".asked.json"}:
            raise UsageError(f"{self.directory} holds something else than the progress of a run. Name another directory.")
        if not resume:
            shutil.rmtree(self.directory, ignore_errors=True)
        elif note.exists() and note.read_text(encoding="utf-8") != described:
            raise UsageError(
                f"{self.directory} holds the progress of a run that was asked for something else. Resume with the same recipe, "
                "model, calibration text and seed, or begin anew without resume."
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(note, described)
        except OSError as problem:
            raise CheckpointError(f"Asked to note progress in {self.directory}; {problem}. Name another directory.") from problem

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Notes a set of tensors under a name that may have slashes."""
        path = self._path(name)
        partial = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as problem:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"Asked to note progress in {path}; {problem}. Free some space and resume.") from problem

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors under a name, if they were noted."""
        path = self._path(name)
        return load_file(path) if path.exists() else None

    def note(self, name: str, **facts: Any) -> None:
        """Notes that something is done, with some facts."""
        path = self.directory / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(facts))

    def facts(self, name: str) -> dict[str, Any] | None:
        """The facts noted with something that is done."""
        path = self.directory / f"{name}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def noted(self, name: str) -> bool:
        """Whether something is done."""
        return (self.directory / f"{name}.json").exists()

    def folder(self, name: str) -> Path:
        """An empty folder for files that need not outlast a power cut."""
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def drop(self, name: str) -> None:
        """Frees a set, or a folder of them."""
        self._path(name).unlink(missing_ok=True)
        shutil.rmtree(self.directory / name, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
