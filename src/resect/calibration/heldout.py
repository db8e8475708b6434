"""Held-out text, tokenised as published perplexities are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resect.calibration.corpora import wikitext_lines
from resect.calibration.sources import read_corpus
from resect.errors import DataError, UsageError
from resect.ranges import MOST, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONG = 1 << 24
"""Characters of a text that is tokenised whole, whatever the limit."""
CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class HeldOut:
    """A text to measure on, in the tokens of one tokenizer."""

    tokens: Tensor
    """[n]"""
    sizes: Tensor | None
    """[n]: the bytes of the text (UTF-8) that each token adds; None where the tokenizer does not say where its tokens are."""


def held_out(source: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> HeldOut:
    """The `evaluation_tokens` of a text, and how many of its bytes each of them covers."""
    text = evaluation_text(source)
    tokens = _tokens(source, text, tokenizer, limit=limit)
    return HeldOut(tokens, token_sizes(_enough(text, limit), tokenizer, len(tokens)))


def token_sizes(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor | None:
    """Bytes [count] of a text that each of its first `count` tokens adds to those before; None from a slow tokenizer.

    A character in several tokens belongs to the first of them; what a tokenizer drops, to the token after it.
    """
    if not tokenizer.is_fast or not count:
        return None
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    stops = torch.tensor([stop for _, stop in found[:count]]).cummax(0).values
    points = torch.tensor(list(map(ord, text[: int(stops[-1])])), dtype=torch.long)
    widths = 1 + (points >= 0x80).long() + (points >= 0x800).long() + (points >= 0x10000).long()
    ends = torch.cat([points.new_zeros(1), widths.cumsum(0)])[stops]
    return ends.diff(prepend=ends.new_zeros(1))


def evaluation_tokens(source: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> Tensor:
    """The tokens [n] of a whole text, tokenised once and without begin-of-text; the first `limit` where one is given.

    A text file is taken as it stands; rows of JSON files, hub data sets and ``demo`` (their held-out split) are joined
    with a blank line. A file whose first line is a WikiText heading (`` = Title = ``) is put in rows first, see
    `wikitext_rows`, so that the raw file and the hub's wikitext2 give the same text.
    """
    _check_limit(limit)
    return _tokens(source, evaluation_text(source), tokenizer, limit=limit)


def _check_limit(limit: int | None) -> None:
    if limit is not None and whole("limit", limit, low=-MOST) < 2:
        raise UsageError(f"Evaluation was limited to {limit} tokens; perplexity needs at least 2.")


def _tokens(source: str, text: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None) -> Tensor:
    _check_limit(limit)
    tokens = tokenizer(_enough(text, limit), add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise DataError(f"{source!r} gives {len(tokens)} tokens to evaluate on, 2 are needed. Give a longer text.")
    return torch.tensor(tokens[:limit], dtype=torch.long)


def _enough(text: str, limit: int | None) -> str:
    """The front of a very long text that certainly holds the tokens of a limit, up to the end of a word; others whole."""
    size = LONG if limit is None else max(LONG, CHARACTERS_PER_TOKEN * limit)
    if limit is None or len(text) <= size:
        return text
    end = max(text.rfind(" ", 0, size), text.rfind("\n", 0, size))
    return text[: end if end > size // 2 else size]


def evaluation_text(source: str) -> str:
    """The whole of a held-out text, as `evaluation_tokens` reads it."""
    return read_corpus(source, split="test").whole()


def wikitext_rows(text: str) -> str:
    """A WikiText raw file joined as the field joins it for perplexity.

    Rows are the lines up to the last newline; a blank row is "", others keep their newline; rows are joined with a
    blank line.
    """
    return "\n\n".join(wikitext_lines(text))
