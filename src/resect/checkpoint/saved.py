"""What was written, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from resect.checkpoint.record import Record
from resect.errors import CheckpointError

FORMAT = 1


class Jsonable(Protocol):
    """A plan, as far as this room knows."""

    def to_json(self) -> str:
        """Plain JSON."""
        ...


@dataclass(frozen=True)
class Saved:
    """What was written and how it can be loaded."""

    directory: str
    layout: str
    """`uniform`: stock transformers loads it. `per-layer`: with the code beside it, or `resect.load`.

    `weights`: into a dense network that the caller builds, with `resect.load_into`.
    """
    model_type: str
    relabelled_from: str | None
    """The dense model's type, where a relative's configuration says what its own refuses."""
    changes: Mapping[str, Any]
    """Fields of the stock configuration that differ from the dense one."""
    reason: str
    """Why no stock configuration was found; empty for `uniform`."""
    difference: float
    """Largest logit difference between the cut model and the written one, relative to the logits' spread."""
    parameters: int


def describe(saved: Saved, record: Record, **more: Any) -> str:
    """`resect.json`: how the directory was made."""
    facts = asdict(replace(saved, directory="."))
    del facts["directory"]
    return json.dumps({"format": FORMAT, **facts, "threads": torch.get_num_threads(), "record": record, **more}, indent=1) + "\n"


def write_text(directory: Path, name: str, text: str) -> None:
    """A text file at a relative path inside `directory`."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"Asked to write {name!r} into the checkpoint; extra files stay inside it. Give a relative path.")
    path = directory / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
