"""Text, JSON and JSONL files as corpora."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resect.calibration.corpora import Corpus, Rows, is_wikitext, wikitext_lines
from resect.errors import DataError

ROW_SUFFIXES = (".jsonl", ".json")
"""Files of rows: one JSON object a line, or one list of objects."""
TEXT_SUFFIXES = (".txt", ".raw", ".text", ".md", ".utf8", ".tokens")
"""Names that mean a text file even where none is found; any other existing file is read as text too."""


def names_file(source: str) -> bool:
    """Whether a source must be meant as a file: it exists, or its name ends like one."""
    path, _ = split_column(source)
    return path.exists() or path.suffix in ROW_SUFFIXES + TEXT_SUFFIXES


def read_file(source: str) -> Corpus:
    """A file's rows: the whole of a text file (WikiText: its lines), one column of a JSON or JSONL file.

    The column is ``text`` or that of ``file:column``. `DataError`: missing file, directory, bytes that are not UTF-8,
    bad JSON, a row without the column, nothing but blanks.
    """
    path, column = split_column(source)
    data = _bytes(path)
    text = _decode(data, path)
    detail: dict[str, Any] = {"kind": "file", "file": str(path), "sha256": hashlib.sha256(data).hexdigest()}
    if path.suffix in ROW_SUFFIXES:
        rows = [_cell(row, column, where=f"{path}, {place}") for place, row in _objects(text, path)]
        detail["column"] = column
    elif is_wikitext([text]):
        rows = wikitext_lines(text if text.endswith("\n") else text + "\n")
    else:
        rows = [text]
    if not any(row.strip() for row in rows):
        raise DataError(f"{path} was given as a source of text, but holds none ({len(data)} bytes). Give another file.")
    return Corpus(rows, detail)


def read_file_rows(source: str) -> Rows | None:
    """The objects of a JSON or JSONL file with all their columns; None for other files, and where a column is named."""
    path = Path(source).expanduser()
    if path.suffix not in ROW_SUFFIXES:
        return None
    data = _bytes(path)
    rows = [_row(row, f"{path}, {place}") for place, row in _objects(_decode(data, path), path)]
    if not rows:
        raise DataError(f"{path} was given as a source, but holds no rows ({len(data)} bytes). Give another file.")
    return Rows(rows, {"kind": "file", "file": str(path), "sha256": hashlib.sha256(data).hexdigest()})


def split_column(source: str) -> tuple[Path, str]:
    """The path and the column of ``file.jsonl:column``; the column is ``text`` where none is given."""
    path, colon, column = source.rpartition(":")
    if colon and path.endswith(ROW_SUFFIXES) and not Path(source).expanduser().exists():
        return Path(path).expanduser(), column or "text"
    return Path(source).expanduser(), "text"


def nearest_file(path: Path, names: Iterable[str] = ()) -> str:
    """A sentence naming the file beside a missing one, or the one of `names`, that is closest; "" when none is."""
    folder = path.parent
    if not folder.is_dir():
        return f"There is no directory {folder}."
    known = {other.name: str(other) for other in folder.iterdir()} | {name: name for name in names}
    close = difflib.get_close_matches(path.name, known, n=1)
    return f"Did you mean {known[close[0]]!r}?" if close else ""


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path} was given as a source of text, but is a directory. Name the files in it.")
    if not path.exists():
        raise DataError(f"There is no file {path}. {nearest_file(path)}".rstrip())
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} was given as a source of text, but cannot be read: {error.strerror}.") from error


def _decode(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} was given as a source of text, but is not UTF-8: "
            f"byte 0x{data[error.start]:02x} at offset {error.start}. "
            "Convert it first (iconv -f latin1 -t utf-8), or name a text file."
        ) from error
    return text.replace("\r\n", "\n")


def _objects(text: str, path: Path) -> Iterable[tuple[str, object]]:
    """(place, row) of a list of objects, or of one object a line."""
    if text.lstrip().startswith("["):
        return [(f"row {i}", row) for i, row in enumerate(_parse(text, str(path)), start=1)]
    lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(place, _parse(line, f"{path}, {place}")) for place, line in lines]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON: {error.msg} at character {error.pos}. "
            "A .jsonl file holds one object a line, a .json file that or one list of objects."
        ) from error


def _row(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, an object with columns was expected.")
    return row


def _cell(row: object, column: str, *, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, an object with a column {column!r} was expected.")
    if column not in row:
        columns = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where} has no column {column!r}. Columns: {columns}. Name one as FILE:COLUMN.")
    if not isinstance(row[column], str):
        raise DataError(f"{where}: column {column!r} holds a {type(row[column]).__name__}, text was expected.")
    return str(row[column])
