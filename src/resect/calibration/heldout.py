"""Held-out text, tokenised as published perplexities are."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from resect.calibration.corpora import wikitext_lines
from resect.calibration.sources import read_corpus
from resect.calibration.tokenised import sections_in_places, sections_in_tokens
from resect.errors import DataError, UsageError
from resect.ranges import MOST, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    return HeldOut(tokens, token_sizes(text, tokenizer, len(tokens)))


def token_sizes(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor | None:
    """Bytes [count] of a text that each of its first `count` tokens adds to those before; None from a slow tokenizer.

    A character in several tokens belongs to the first of them; what a tokenizer drops, to the token after it.
    """
    if not tokenizer.is_fast or not count:
        return None
    ends: list[Tensor] = []
    have = 0
    bytes_before = last = 0
    for _, stops in sections_in_places(text, tokenizer):
        stops = stops[: count - have]
        have += len(stops)
        if not stops:
            continue
        section = text[last : max(stops)]
        reached = torch.tensor(stops).sub_(last).clamp_min_(0).cummax(0).values
        widths = _widths(section)
        ends.append(bytes_before + torch.cat([widths.new_zeros(1), widths.cumsum(0)])[reached])
        bytes_before += int(widths.sum())
        last += len(section)
        if have == count:
            break
    found = torch.cat(ends)
    return found.diff(prepend=found.new_zeros(1))


def _widths(text: str) -> Tensor:
    """Bytes of each character in UTF-8."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)
    return 1 + (points >= 0x80).long() + (points >= 0x800).long() + (points >= 0x10000).long()


def evaluation_tokens(source: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> Tensor:
    """The tokens [n] of a whole text, without begin-of-text; the first `limit` where one is given.

    Up to 16 million characters are tokenised at once, a longer text in sections, cut at line ends.

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
    tokens = array("q")
    for section in sections_in_tokens(text, tokenizer, limit=limit):
        tokens.extend(section)
        if limit is not None and len(tokens) >= limit:
            break
    if len(tokens) < 2:
        raise DataError(f"{source!r} gives {len(tokens)} tokens to evaluate on, 2 are needed. Give a longer text.")
    return torch.tensor(np.frombuffer(tokens, dtype=np.int64)[:limit])


def evaluation_text(source: str) -> str:
    """The whole of a held-out text, as `evaluation_tokens` reads it."""
    return read_corpus(source, split="test").whole()


def wikitext_rows(text: str) -> str:
    """A WikiText raw file joined as the field joins it for perplexity.

    Rows are the lines up to the last newline; a blank row is "", others keep their newline; rows are joined with a
    blank line.
    """
    return "\n\n".join(wikitext_lines(text))
