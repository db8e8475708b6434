"""A corpus: rows of text as they were stored, and the two ways to read them.

For calibration rows become documents, for perplexity they become one text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

LONGEST = 1 << 20
"""Characters of a line above which it is cut."""
SPLIT = 1 << 20
"""Characters that are split in lines at a time."""
_FIRST_LINE = re.compile(r"^.*\S.*$", re.MULTILINE)
_ARTICLE = re.compile(r" ?= (?!= ).+(?<! =) = ?")
"""A WikiText level-one heading, `` = Robert Boulter = ``; deeper ones double the signs."""


@dataclass(frozen=True)
class Corpus:
    """Rows of one source.

    A plain text file is one row; WikiText has a row per line, blank ones empty, others with their newline.
    """

    rows: list[str]
    detail: dict[str, Any] = field(default_factory=dict)
    """Where the rows come from, plain JSON."""

    def documents(self) -> list[str]:
        """The distinct documents that hold any text: WikiText articles, otherwise the rows themselves."""
        documents = _articles(self.rows) if is_wikitext(self.rows) else self.rows
        return list(dict.fromkeys(text for text in documents if text.strip()))

    def whole(self) -> str:
        """All rows as one evaluation text, joined with a blank line as published perplexities are."""
        return "\n\n".join(self.rows)


@dataclass(frozen=True)
class Rows:
    """Rows with all their columns; a source of plain text gives its documents in the column ``text``."""

    rows: list[dict[str, Any]]
    detail: dict[str, Any] = field(default_factory=dict)
    """Where the rows come from, plain JSON."""


def is_wikitext(rows: Iterable[str]) -> bool:
    """Whether the first line that is not blank is a WikiText article heading."""
    first = next((line[0] for line in map(_FIRST_LINE.search, rows) if line), "")
    return _ARTICLE.fullmatch(first) is not None


def wikitext_lines(text: str) -> list[str]:
    """The rows of a WikiText raw file as the hub stores them: a blank line is "", others keep their newline."""
    return [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]


def sections(text: str, characters: int) -> Iterator[str]:
    """Consecutive pieces of a long text; joined they are the text.

    Cut at the first blank line after `characters`, or at any line end after twice as many; lines of more than `LONGEST`
    are cut in their middle. A text of up to twice that size stays whole.
    """
    if len(text) <= 2 * characters:
        yield text
        return
    piece: list[str] = []
    size = 0
    for line in _short_lines(text, 2 * characters):
        piece.append(line)
        size += len(line)
        if size >= 2 * characters or (size >= characters and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _short_lines(text: str, part: int) -> Iterator[str]:
    """The lines of a text with their ends; those of more than `LONGEST` (and more than a part) in parts."""
    longest = max(LONGEST, part)
    for line in text.splitlines(keepends=True) if len(text) <= longest else _split(text):
        if len(line) <= longest:
            yield line
            continue
        for start in range(0, len(line), part):
            yield line[start : start + part]


def _split(text: str) -> Iterator[str]:
    """What `splitlines(keepends=True)` gives, one by one."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + SPLIT) + 1 or len(text)
        yield from text[start:end].splitlines(keepends=True)
        start = end


def _articles(rows: Iterable[str]) -> list[str]:
    """WikiText rows put together again, one text per article."""
    articles: list[list[str]] = [[]]
    for row in rows:
        if _ARTICLE.fullmatch(row.rstrip("\n")):
            articles.append([])
        articles[-1].append(row or "\n")
    return ["".join(article) for article in articles]
