"""Data sets of the Hugging Face hub, by short name or as ``name:config:split:column``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from tqdm import tqdm

from resect.calibration.corpora import Corpus, Rows
from resect.calibration.files import check_texts
from resect.errors import DataError, UsageError, nearest, shown

Taken = TypeVar("Taken")

STREAMED_ROWS = 10_000
"""Rows read from the front of a data set that nobody described here: some megabytes of ordinary documents."""


@dataclass(frozen=True)
class HubSet:
    """One data set: where it is, which column holds text, and how much of it is read."""

    path: str
    config: str | None
    column: str
    splits: Mapping[str, str]
    """Our split to the data set's: ``train`` for calibration, ``test`` for measuring."""
    rows: int | None
    """Read as a stream and stop after this many rows; None: fetch and keep it all."""
    converted: bool = False
    """Read the hub's own parquet conversion: the repository holds a loading script, which `datasets` 4 refuses."""
    about: str = ""


HUB: dict[str, HubSet] = {
    "wikitext2": HubSet(
        path="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        column="text",
        splits={"train": "train", "test": "test"},
        rows=None,
        about="Merity et al. 2016, arXiv 1609.07843. Wikipedia articles, a row a line; perplexity is measured on test.",
    ),
    "c4": HubSet(
        path="allenai/c4",
        config="en",
        column="text",
        splits={"train": "train", "test": "validation"},
        rows=10_000,
        about="Raffel et al. 2019, arXiv 1910.10683. Web pages, a row each; 305 GB, so the first rows only.",
    ),
    "ptb": HubSet(
        path="ptb-text-only/ptb_text_only",
        config="penn_treebank",
        column="sentence",
        splits={"train": "train", "test": "validation"},
        rows=None,
        converted=True,
        about="Marcus et al. 1993. News sentences without case; LLM-Pruner (arXiv 2305.11627) measures on validation.",
    ),
    "bookcorpus": HubSet(
        path="bookcorpus/bookcorpus",
        config="plain_text",
        column="text",
        splits={"train": "train"},
        rows=100_000,
        converted=True,
        about="Zhu et al. 2015, arXiv 1506.06724. Sentences of novels; LLM-Pruner calibrates on it. No held-out split.",
    ),
}


INSTRUCTIONS: dict[str, str] = {"alpaca": "yahma/alpaca-cleaned"}
"""Short names of instruction sets: read as rows with all their columns."""


def names_data_set(source: str) -> bool:
    """Whether a source reads as a hub data set: a short name, or ``name:…``."""
    return source in HUB or ":" in source


def read_hub(source: str, split: str) -> Corpus:
    """The rows of a hub data set, blank ones included.

    A split named in the source wins over `split`. `DataError`: it cannot be reached, or has no such config, split or
    column.
    """
    chosen = HUB[source] if source in HUB else _described(source, split)
    if split not in chosen.splits:
        known = ", ".join(chosen.splits)
        raise UsageError(f"{source!r} was asked for split {split!r}; it has {known}. Name another data set or file.")
    name = chosen.splits[split]
    where = ":".join([chosen.path, chosen.config or "", name, chosen.column])
    rows = _read(chosen, name, where, lambda found: _column(found, chosen.column, where))
    if not any(row.strip() for row in rows):
        raise DataError(f"data set {source!r} holds no text in column {chosen.column!r} of {name!r}. Name another.")
    detail = {"kind": "hub", **asdict(chosen), "split": name, "rows": len(rows)}
    return Corpus(rows, {key: value for key, value in detail.items() if key not in {"splits", "converted", "about"}})


def read_hub_rows(source: str, split: str) -> Rows:
    """The rows of a hub data set with all their columns: ``alpaca``, or ``name:config:split`` without a column."""
    name = INSTRUCTIONS.get(source)
    chosen = replace(_described(name or source, split), rows=None if name else STREAMED_ROWS, column="")
    where = ":".join([chosen.path, chosen.config or "", chosen.splits[split]])
    rows = _read(chosen, chosen.splits[split], where, lambda found: _whole_rows(found, where))
    return Rows(rows, {"kind": "hub", "path": chosen.path, "config": chosen.config, "split": chosen.splits[split]})


def _described(source: str, split: str) -> HubSet:
    """What ``name[:config[:split[:column]]]`` asks for; empty parts take the defaults."""
    name, *parts = source.split(":")
    if not name or len(parts) > 3:
        raise UsageError(
            f"{source!r} is no source of text: a hub data set is written NAME:CONFIG:SPLIT:COLUMN. {nearest(name, HUB)}"
        )
    config, own_split, column = [*parts, "", "", ""][:3]
    return HubSet(name, config or None, column or "text", {split: own_split or split}, STREAMED_ROWS)


def _read(
    chosen: HubSet, split: str, where: str, take: Callable[[Iterable[Mapping[str, object]]], Iterable[Taken]]
) -> list[Taken]:
    """What `take` makes of the rows."""
    import datasets  # seconds to import, and needed here only

    try:
        data = datasets.load_dataset(**_request(chosen, split), streaming=chosen.rows is not None)
        rows = tqdm(itertools.islice(data, chosen.rows), f"reading {where}", total=chosen.rows, unit="row", delay=1)
        return list(take(rows))
    except (DataError, KeyboardInterrupt):
        raise
    except ConnectionError as error:
        raise DataError(
            f"data set {where} cannot be fetched: {_first_line(error)}. Without a network give a text or JSONL file, "
            "'demo', or no source at all: the model then writes its own text."
        ) from error
    except Exception as error:  # the library and all that it calls may raise anything
        raise DataError(
            f"data set {where} cannot be read: {_first_line(error)}. "
            "A hub data set is written NAME:CONFIG:SPLIT:COLUMN."
        ) from error


def _request(chosen: HubSet, split: str) -> dict[str, Any]:
    if chosen.converted:
        files = f"hf://datasets/{chosen.path}@refs/convert/parquet/{chosen.config}/{split}/*.parquet"
        return {"path": "parquet", "data_files": files, "split": "train"}
    return {"path": chosen.path, "name": chosen.config, "split": split}


def _column(rows: Iterable[Mapping[str, object]], column: str, where: str) -> Iterable[str]:
    for number, row in enumerate(rows, start=1):
        text = row.get(column, row)
        if text is row:
            raise DataError(f"data set {where} has no column {column!r}. Columns: {shown(list(row))[1:].removesuffix(']')}.")
        if text is not None:
            if not isinstance(text, str):
                found = type(text).__name__
                raise DataError(f"data set {where}: column {column!r} holds a {found}, text was expected.")
            check_texts(text, f"data set {where}, row {number}")
            yield text


def _whole_rows(rows: Iterable[Mapping[str, object]], where: str) -> Iterable[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        check_texts(row, f"data set {where}, row {number}")
        yield dict(row)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
