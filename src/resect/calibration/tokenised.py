"""Texts as tokens in bounded memory: a long text goes through the tokenizer in sections, short ones go together.

Tokenizers hold about 150 bytes for every character that they are given at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from resect.calibration.corpora import sections

SECTION = 1 << 23
"""Characters of a section of a long text; a text of up to twice as many is tokenised whole."""
SHORTEST = 1 << 20
CHARACTERS_PER_TOKEN = 64
"""More than any text has: one section is enough."""
TOGETHER = 64
"""Texts that are tokenised at once."""
Tokens = Sequence[int]


def sections_in_tokens(text: str, tokenizer: Any, *, limit: int | None = None) -> Iterator[Tokens]:
    """The tokens of a text, section by section, without special ones.

    Where no more than `limit` of them are asked for, the sections of a long text hold about as many.
    """
    size = SECTION
    if limit is not None and len(text) > 2 * SECTION:
        size = min(SECTION, max(SHORTEST, CHARACTERS_PER_TOKEN * limit))
    for section in sections(text, size):
        yield _tokens([section], tokenizer)[0]


def sections_in_places(text: str, tokenizer: Any) -> Iterator[tuple[Tokens, list[int]]]:
    """The same with the places in the text where the tokens end; fast tokenizers know them."""
    start = 0
    for section in sections(text, SECTION):
        found = tokenizer(
            section, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        yield found["input_ids"], [start + stop for _, stop in found["offset_mapping"]]
        start += len(section)


def texts_in_tokens(texts: Iterable[str], tokenizer: Any) -> Iterator[Tokens]:
    """The tokens of every text in turn, without special ones."""
    waiting: list[str] = []
    for text in texts:
        if len(text) > SECTION:
            yield from _tokens(waiting, tokenizer)
            waiting = []
            whole = array("q")
            for tokens in sections_in_tokens(text, tokenizer):
                whole.extend(tokens)
            yield whole
            continue
        waiting.append(text)
        if len(waiting) == TOGETHER or sum(map(len, waiting)) > SECTION:
            yield from _tokens(waiting, tokenizer)
            waiting = []
    yield from _tokens(waiting, tokenizer)


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found
