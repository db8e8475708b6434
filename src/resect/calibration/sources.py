"""Names of sources, and the corpus that each stands for."""

from __future__ import annotations

from pathlib import Path

from resect.calibration.corpora import Corpus, Rows
from resect.calibration.files import names_file, nearest_file, read_file, read_file_rows
from resect.calibration.hub import HUB, INSTRUCTIONS, names_data_set, read_hub, read_hub_rows
from resect.calibration.passages import read_passages
from resect.errors import DataError, UsageError, nearest

SELF = "self"
"""The source that needs no text: the model writes its own."""


def read_texts(source: str, *, split: str = "train") -> list[str]:
    """The distinct documents of a source: a file, a hub data set, or ``demo``.

    A text file is one document, a WikiText file one per article, a JSON or JSONL file one per row.
    `split` is ``train`` for calibration and ``test`` for measuring; files have no splits and give all they hold.
    Errors: `DataError` for what is missing or unreadable, `UsageError` for ``self``, which has no stored text.
    """
    return read_corpus(source, split=split).documents()


def read_rows(source: str, *, split: str = "train") -> Rows:
    """The rows of a source with all their columns: JSON and JSONL files, hub data sets named without a column.

    Every other source of text gives its documents in the column ``text``.
    Errors: `DataError` for what is missing or unreadable, `UsageError` for ``self``, which has no stored text.
    """
    if source in INSTRUCTIONS or (source not in HUB and not names_file(source) and 0 < source.count(":") < 3):
        return read_hub_rows(source, split)
    rows = read_file_rows(source) if source not in HUB and names_file(source) else None
    if rows is not None:
        return rows
    corpus = read_corpus(source, split=split)
    return Rows([{"text": text} for text in corpus.documents()], corpus.detail)


def read_corpus(source: str, *, split: str) -> Corpus:
    """The rows of a source, by the first that fits: ``demo``, a short name, a file, ``name:config:split:column``."""
    if source == SELF:
        raise UsageError(
            "The source 'self' is text that the model writes: it can calibrate, but there is nothing stored to read. "
            "Name a file, a data set or 'demo'."
        )
    if source == "demo":
        return read_passages(split)
    if source not in HUB and names_file(source):
        return read_file(source)
    if names_data_set(source):
        return read_hub(source, split)
    names = ["demo", SELF, *HUB]
    hint = nearest_file(Path(source).expanduser(), names) or nearest(source, names)
    raise DataError(
        f"There is no file {source!r} and no text of that name. {hint} Any hub data set: NAME:CONFIG:SPLIT:COLUMN."
    )
