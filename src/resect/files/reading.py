"""Text and JSON out of files that strangers made: whatever reading them raises is an error of ours, with the file's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resect.errors import CheckpointError, ResectError

LARGEST = 1 << 30
"""Bytes of a text file that is read whole; nobody's plan or configuration is as large."""
SHOWN = 300
"""Characters of a foreign message that are repeated."""


@contextmanager
def reading(what: str, *, error: type[ResectError] = CheckpointError) -> Iterator[None]:
    """Inside the block whatever is raised, but errors of ours, becomes an `error`: `what` cannot be read, and why.

    `what` names the file, and what it is: "the plan runs/a/plan.json". The cause is kept. Memory that runs out is not the
    file's fault and passes.
    """
    try:
        yield
    except (ResectError, MemoryError):
        raise
    except Exception as problem:
        raise error(f"{_capital(what)} cannot be read: {_reason(problem)}") from problem


def read_text(
    file: str | Path, *, what: str = "the file", error: type[ResectError] = CheckpointError
) -> str:
    """The text of a UTF-8 file. Raises `error` for one that is missing, unreadable, no
    ordinary file, no UTF-8, or larger than `LARGEST`."""
    path = Path(file)
    with reading(f"{what} {path}", error=error):
        size = path.stat().st_size
        if not path.is_file():
            raise error(f"{_capital(what)} {path} is no ordinary file. Name one.")
        if size > LARGEST:
            raise error(
                f"{_capital(what)} {path} has {size:,} bytes; at most {LARGEST:,} are read. Is it the right file?"
            )
        return path.read_text(encoding="utf-8")


def read_json(
    file: str | Path, *, what: str = "the file", error: type[ResectError] = CheckpointError
) -> Any:
    """The value in a JSON file. Raises `error` like `read_text`, and for what is no JSON, or nested too deep."""
    text = read_text(file, what=what, error=error)
    return parse_json(text, what=f"{what} {file}", error=error)


def parse_json(text: str, *, what: str, error: type[ResectError] = CheckpointError) -> Any:
    """The value of a JSON text; `what` names where it comes from. Raises `error` like `plain_json`."""
    try:
        return plain_json(text)
    except ValueError as problem:
        raise error(f"{_capital(what)} is not JSON: {_reason(problem)}") from problem


def plain_json(text: str | bytes) -> Any:
    """The value of a JSON text; `ValueError` for whatever is wrong with it: nesting, digits and NaN too."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _reason(problem: Exception) -> str:
    """What an error says, in one line that ends with a full stop."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.strerror}."
    if isinstance(problem, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {problem.start})."
    words = " ".join(str(problem).split()) or type(problem).__name__
    shortened = words if len(words) <= SHOWN else f"{words[:SHOWN]} ..."
    return shortened if shortened.endswith((".", "...")) else f"{shortened}."


def _capital(what: str) -> str:
    return what[:1].upper() + what[1:]
