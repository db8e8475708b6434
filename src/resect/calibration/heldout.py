"""Held-out text, tokenised as published perplexities are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resect.calibration.corpora import wikitext_lines
from resect.calibration.sources import read_corpus
from resect.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluation_tokens(source: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None) -> Tensor:
    """The tokens [n] of a whole text, tokenised once and without begin-of-text; the first `limit` where one is given.

    A text file is taken as it stands; rows of JSON files, hub data sets and ``demo`` (their held-out split) are joined
    with a blank line. A file whose first line is a WikiText heading (`` = Title = ``) is put in rows first, see
    `wikitext_rows`, so that the raw file and the hub's wikitext2 give the same text.
    """
    if limit is not None and limit < 2:
        raise UsageError(f"Evaluation was limited to {limit} tokens; perplexity needs at least 2.")
    tokens = tokenizer(evaluation_text(source), add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise DataError(f"{source!r} gives {len(tokens)} tokens to evaluate on, 2 are needed. Give a longer text.")
    return torch.tensor(tokens[:limit], dtype=torch.long)


def evaluation_text(source: str) -> str:
    """The whole of a held-out text, as `evaluation_tokens` reads it."""
    return read_corpus(source, split="test").whole()


def wikitext_rows(text: str) -> str:
    """A WikiText raw file joined as the field joins it for perplexity.

    Rows are the lines up to the last newline; a blank row is "", others keep their newline; rows are joined with a
    blank line.
    """
    return "\n\n".join(wikitext_lines(text))
