"""Text, JSON and JSONL files as corpora."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resect.calibration.corpora import Corpus, Rows, is_wikitext, wikitext_lines
from resect.errors import DataError, ResectWarning, no_text, shown

ROW_SUFFIXES = (".jsonl", ".json")
"""Files of rows: one JSON object a line, or one list of objects."""
TEXT_SUFFIXES = (".txt", ".raw", ".text", ".md", ".utf8", ".tokens")
"""Names that mean a text file even where none is found; any other existing file is read as text too."""
LARGEST = 1 << 28
"""Bytes that are read of a file, its front; the rest only counts in the sha256."""
MOST_ROWS = 1 << 20
"""Rows that are read of a file."""
CHUNK = 1 << 20
SUFFIXES = {
    ".gz": "packed with gzip", ".bz2": "packed with bzip2", ".xz": "packed with xz", ".zst": "packed with zstd",
    ".zip": "a zip archive", ".tar": "a tar archive", ".parquet": "a Parquet table", ".arrow": "an Arrow table",
    ".csv": "a table of CSV", ".tsv": "a table of CSV", ".xlsx": "a spreadsheet", ".pdf": "a PDF",
}  # fmt: skip
"""Formats that are not read, by the end of the name."""
FORMATS = {
    b"\x1f\x8b": "packed with gzip", b"BZh": "packed with bzip2", b"\xfd7zXZ": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd", b"PK\x03\x04": "a zip archive", b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table", b"%PDF-": "a PDF",
    b"\xff\xfe": "UTF-16 (iconv -f utf-16 -t utf-8 makes it UTF-8)",
    b"\xfe\xff": "UTF-16 (iconv -f utf-16 -t utf-8 makes it UTF-8)",
}  # fmt: skip
"""The same by the first bytes."""


def names_file(source: str) -> bool:
    """Whether a source must be meant as a file: it exists, or its name ends like one."""
    path, _ = split_column(source)
    return _exists(path) or path.suffix in ROW_SUFFIXES + TEXT_SUFFIXES


def read_file(source: str) -> Corpus:
    """A file's rows: the whole of a text file (WikiText: its lines), one column of a JSON or JSONL file.

    The column is ``text`` or that of ``file:column``. Of a file of more than `LARGEST` bytes or `MOST_ROWS` rows the front is
    read, which a warning says. `DataError`: missing file, directory, another format, bytes that are not UTF-8, half a
    character or NUL, bad JSON, a row without the column, nothing but blanks.
    """
    path, column = split_column(source)
    found = _front(path)
    detail = dict(found.detail)
    if path.suffix in ROW_SUFFIXES:
        rows = [_cell(row, column, where=f"{path}, {place}") for place, row in _objects(found, path)]
        detail["column"] = column
    elif is_wikitext([found.text]):
        rows = wikitext_lines(found.text if found.text.endswith("\n") else found.text + "\n")
    else:
        rows = [found.text]
    if not any(row.strip() for row in rows):
        raise DataError(f"{path} was given as a source of text, but holds none ({found.size} bytes). Give another file.")
    return Corpus(rows, detail)


def read_file_rows(source: str) -> Rows | None:
    """The objects of a JSON or JSONL file with all their columns; None for other files, and where a column is named."""
    path = Path(source).expanduser()
    if path.suffix not in ROW_SUFFIXES:
        return None
    found = _front(path)
    rows = [_row(row, f"{path}, {place}") for place, row in _objects(found, path)]
    if not rows:
        raise DataError(f"{path} was given as a source, but holds no rows ({found.size} bytes). Give another file.")
    return Rows(rows, dict(found.detail))


def split_column(source: str) -> tuple[Path, str]:
    """The path and the column of ``file.jsonl:column``; the column is ``text`` where none is given."""
    path, colon, column = source.rpartition(":")
    if colon and path.endswith(ROW_SUFFIXES) and not _exists(Path(source).expanduser()):
        return Path(path).expanduser(), column or "text"
    return Path(source).expanduser(), "text"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name that a file can have, or a folder that may not be looked into
        return False


def nearest_file(path: Path, names: Iterable[str] = ()) -> str:
    """A sentence naming the file beside a missing one, or the one of `names`, that is closest; "" when none is."""
    folder = path.parent
    try:
        if not folder.is_dir():
            return f"There is no directory {folder}."
        known = {other.name: str(other) for other in folder.iterdir()} | {name: name for name in names}
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, known, n=1)
    return f"Did you mean {known[close[0]]!r}?" if close else ""


@dataclass(frozen=True)
class _Front:
    """What is read of a file: all of it, or its first `LARGEST` bytes up to the end of a line."""

    text: str
    size: int
    """Bytes of the whole file."""
    cut: bool
    detail: Mapping[str, Any]


def _front(path: Path) -> _Front:
    """The text of a file, with the sha256 of all its bytes; never more than `LARGEST` bytes of it are held."""
    data, size, digest = _read(path)
    for start, name in FORMATS.items():
        if data.startswith(start):
            raise _other_format(path, name)
    cut = size > len(data)
    if cut:
        end = data.rfind(b"\n") + 1
        data = data[:end] if 2 * end > len(data) else data[: _whole_characters(data)]
        warnings.warn(ResectWarning(f"{path} has {size:,} bytes; the first {len(data):,} are read."), stacklevel=5)
    detail: dict[str, Any] = {"kind": "file", "file": str(path), "sha256": digest}
    return _Front(_decode(data, path), size, cut, detail | ({"bytes": len(data), "of": size} if cut else {}))


def _read(path: Path) -> tuple[bytes, int, str]:
    """The first bytes of a file, how many there are in all, and the sha256 of all."""
    _check_place(path)
    digest, size, parts = hashlib.sha256(), 0, []
    try:
        for chunk in _chunks(path):
            digest.update(chunk)
            if size < LARGEST:
                parts.append(chunk[: LARGEST - size])
            size += len(chunk)
    except OSError as error:
        raise DataError(f"{path} was given as a source of text, but cannot be read: {error.strerror}.") from error
    return b"".join(parts), size, digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, piece by piece; a pipe that nobody writes into is refused instead of waited for."""
    pipe = stat.S_ISFIFO(path.stat().st_mode)
    with open(os.open(path, os.O_RDONLY | (os.O_NONBLOCK if pipe else 0)), "rb", buffering=0) as file:
        if pipe:
            first = file.read(CHUNK)  # None where somebody has the other end and has written nothing yet
            if first == b"":
                raise DataError(f"{path} was given as a source of text, but is a pipe, and nobody writes into it. Name a file.")
            os.set_blocking(file.fileno(), True)
            if first:
                yield first
        while chunk := file.read(CHUNK):
            yield chunk


def _check_place(path: Path) -> None:
    """Refuses what is no file of text, by its kind and its name."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"There is no file {path}. {nearest_file(path)}".rstrip()) from error
        said = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{shown(str(path))} was given as a source of text, but cannot be read: {said}.") from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} was given as a source of text, but is a directory. Name the files in it.")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise DataError(f"{path} was given as a source of text, but is a device or a socket. Name a file.")
    for suffix, name in SUFFIXES.items():
        if path.name.endswith(suffix):
            raise _other_format(path, name)


def _other_format(path: Path, name: str) -> DataError:
    return DataError(
        f"{path} was given as a source of text, but is {name}. Text, JSON and JSONL files are read: unpack it, or write its "
        'column of text as one JSON object a line, {"text": ...}, to a .jsonl file.'
    )


def _whole_characters(data: bytes) -> int:
    """How many bytes of UTF-8 end with a whole character."""
    end = len(data)
    while end and len(data) - end < 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(end - 1, 0)


def _decode(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} was given as a source of text, but is not UTF-8: "
            f"byte 0x{data[error.start]:02x} at offset {error.start}, line {line}. "
            "Convert it first (iconv -f latin1 -t utf-8, if that is what it is in), or name a text file."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line} holds the character NUL, which no text has. Name a text file.")
    return text.replace("\r\n", "\n")


def _objects(found: _Front, path: Path) -> Iterator[tuple[str, object]]:
    """(place, row) of a list of objects, or of one object a line."""
    if re.match(r"\s*\[", found.text):
        if found.cut:
            raise DataError(
                f"{path} is one list of {found.size:,} bytes; of so large a file only the front is read, and a list is read "
                "whole. Write one object a line."
            )
        for number, row in enumerate(_parse(found.text, str(path)), start=1):
            yield f"row {number}", row
        return
    if found.cut and not found.text.endswith("\n"):
        raise DataError(f"{path} has a line of more than {LARGEST // 2:,} bytes, and a row is read whole. Write shorter rows.")
    rows = 0
    for number, line in enumerate(_lines(found.text), start=1):
        if not line.strip():
            continue
        if rows == MOST_ROWS:
            warnings.warn(ResectWarning(f"{path} has more rows than {rows:,}; the first {rows:,} are read."), stacklevel=5)
            return
        rows += 1
        yield f"line {number}", _parse(line, f"{path}, line {number}")


def _lines(text: str) -> Iterator[str]:
    """The lines of a text one by one."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deep for a row of text.") from error
    except ValueError as error:
        at = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{where} is not JSON: {at.rstrip('.')}. "
            "A .jsonl file holds one object a line, a .json file that or one list of objects."
        ) from error


def _row(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, an object with columns was expected.")
    check_texts(row, where)
    return row


def _cell(row: object, column: str, *, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, an object with a column {column!r} was expected.")
    if column not in row:
        columns = shown(list(row))[1:].removesuffix("]") or "none"
        raise DataError(f"{where} has no column {column!r}. Columns: {columns}. Name one as FILE:COLUMN.")
    if not isinstance(row[column], str):
        raise DataError(f"{where}: column {column!r} holds a {type(row[column]).__name__}, text was expected.")
    check_texts(row[column], where)
    return str(row[column])


def check_texts(value: object, where: str) -> None:
    """`DataError` for texts in a value, or in its parts, that hold NUL or half a character: no tokenizer takes them."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and (fault := no_text(one)):
            raise DataError(f"{where} holds {fault}, in {shown(one, 60)}. Take that row out, or write the character whole.")
        if isinstance(one, Mapping):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
