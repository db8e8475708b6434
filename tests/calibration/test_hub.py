from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resect.calibration import HUB, evaluation_tokens, read_texts
from resect.calibration.hub import STREAMED_ROWS, read_hub
from resect.errors import DataError, UsageError
from tests.models import tiny_tokenizer

ROWS: list[dict[str, object]] = [
    {"text": "one", "sentence": "eins"},
    {"text": "", "sentence": None},
    {"text": "two", "sentence": "zwei"},
]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of the hub; every data set has the rows above."""
    asked: list[dict[str, Any]] = []

    def load_dataset(**request: Any) -> Iterator[dict[str, object]]:
        asked.append(request)
        return iter(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_every_short_name_has_a_source_a_train_split_and_a_note() -> None:
    assert set(HUB) == {"wikitext2", "c4", "ptb", "bookcorpus"}
    for chosen in HUB.values():
        assert chosen.path.count("/") == 1
        assert chosen.splits["train"] == "train"
        assert "19" in chosen.about or "20" in chosen.about


def test_a_small_set_is_fetched_whole_a_large_one_streamed(requests: list[dict[str, Any]]) -> None:
    assert read_texts("wikitext2") == ["one", "two"]
    read_texts("c4", split="test")
    assert requests == [
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train", "streaming": False},
        {"path": "allenai/c4", "name": "en", "split": "validation", "streaming": True},
    ]


def test_a_set_with_a_loading_script_is_read_from_its_conversion(requests: list[dict[str, Any]]) -> None:
    assert read_texts("ptb") == ["eins", "zwei"]
    assert requests[0]["path"] == "parquet"
    assert requests[0]["data_files"].startswith("hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/")


@pytest.mark.parametrize(
    ("source", "config", "split", "column"),
    [
        ("org/set:", None, "train", "text"),
        ("org/set:en", "en", "train", "text"),
        ("org/set::validation", None, "validation", "text"),
        ("org/set:en:validation:text", "en", "validation", "text"),
    ],
)
def test_a_described_set_is_streamed_and_its_own_split_wins(
    requests: list[dict[str, Any]], source: str, config: str | None, split: str, column: str
) -> None:
    corpus = read_hub(source, "train")
    assert corpus.rows == ["one", "", "two"]
    assert requests == [{"path": "org/set", "name": config, "split": split, "streaming": True}]
    assert corpus.detail == {
        "kind": "hub",
        "path": "org/set",
        "config": config,
        "split": split,
        "column": column,
        "rows": 3,
    }


def test_a_stream_stops_after_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(**request: Any) -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "again"}

    monkeypatch.setattr("datasets.load_dataset", endless)
    assert len(read_hub("org/set:en", "train").rows) == STREAMED_ROWS


def test_wikitext_of_the_hub_evaluates_like_the_raw_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = " \n = Title = \n \n Prose . \n"
    (tmp_path / "wiki.test.raw").write_text(raw)
    rows = [{"text": row} for row in ["", " = Title = \n", "", " Prose . \n"]]
    monkeypatch.setattr("datasets.load_dataset", lambda **_: iter(rows))
    tokenizer = tiny_tokenizer()
    from_hub = evaluation_tokens("wikitext2", tokenizer)
    assert from_hub.tolist() == evaluation_tokens(str(tmp_path / "wiki.test.raw"), tokenizer).tolist()


def test_a_real_data_set_in_a_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert read_texts(f"{tmp_path}::train:body") == ["one", "two"]
    with pytest.raises(DataError, match="has no column 'text'. Columns: 'body'"):
        read_texts(f"{tmp_path}:")
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(f"{tmp_path}::nosuchsplit:body")


def test_no_network_is_said_with_what_to_do_instead() -> None:
    with pytest.raises(DataError, match=r"cannot be fetched: .*'demo', or no source at all") as error:
        read_texts("wikitext2")
    assert "Salesforce/wikitext:wikitext-2-raw-v1:train:text" in str(error.value)


def test_what_cannot_be_meant_is_refused(requests: list[dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="'bookcorpus' was asked for split 'test'; it has train"):
        read_texts("bookcorpus", split="test")
    with pytest.raises(UsageError, match="NAME:CONFIG:SPLIT:COLUMN"):
        read_texts("a:b:c:d:e")
    with pytest.raises(DataError, match="has no column 'page'. Columns: 'text', 'sentence'"):
        read_texts("org/set:::page")
    assert len(requests) == 1


def test_a_column_must_hold_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda **_: iter([{"text": [1]}]))
    with pytest.raises(DataError, match="holds a list, text was expected"):
        read_texts("org/set:")
    monkeypatch.setattr("datasets.load_dataset", lambda **_: iter([{"text": " "}]))
    with pytest.raises(DataError, match="holds no text"):
        read_texts("org/set:")
