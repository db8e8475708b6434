from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from resect.calibration import read_texts
from resect.calibration.files import read_file, split_column
from resect.errors import DataError, UsageError

WIKITEXT = " \n = First = \n \n One . \n = = Part = = \n Two . \n = Second = \n \n Three . \n"


def written(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_text_file_is_one_document_with_its_sha256(tmp_path: Path) -> None:
    file = written(tmp_path, "a.txt", "one\n\ntwo\r\nthree")
    corpus = read_file(file)
    assert corpus.documents() == ["one\n\ntwo\nthree"] == [corpus.whole()]
    assert corpus.detail == {
        "kind": "file",
        "file": file,
        "sha256": hashlib.sha256(b"one\n\ntwo\r\nthree").hexdigest(),
    }


def test_a_wikitext_file_is_one_document_per_article(tmp_path: Path) -> None:
    documents = read_texts(written(tmp_path, "wiki.raw", WIKITEXT))
    assert documents == [" = First = \n\n One . \n = = Part = = \n Two . \n", " = Second = \n\n Three . \n"]


def test_jsonl_gives_the_text_column_or_the_named_one(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i}", "body": f"body {i}"}) for i in range(3)]
    file = written(tmp_path, "a.jsonl", "\n".join(lines) + "\n\n")
    assert read_texts(file) == ["text 0", "text 1", "text 2"]
    assert read_texts(f"{file}:body") == ["body 0", "body 1", "body 2"]


@pytest.mark.parametrize("text", ['[{"text": "a"}, {"text": "b"}]', '{"text": "a"}\n{"text": "b"}\n'])
def test_json_is_a_list_of_objects_or_one_a_line(tmp_path: Path, text: str) -> None:
    assert read_texts(written(tmp_path, "a.json", text)) == ["a", "b"]


def test_documents_are_distinct_and_never_blank(tmp_path: Path) -> None:
    file = written(tmp_path, "a.json", json.dumps([{"text": text} for text in ["a", " ", "b", "a", ""]]))
    assert read_texts(file) == ["a", "b"]


def test_a_file_name_may_hold_a_colon(tmp_path: Path) -> None:
    file = written(tmp_path, "a.json:b", "prose")
    assert split_column(file) == (Path(file), "text")
    assert read_texts(file) == ["prose"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "holds none"),
        ("a.txt", " \n\n", "holds none"),
        ("a.txt", b"abc\xff\xfe", "not UTF-8: byte 0xff at offset 3"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b", "id": 1}\n', "line 2 has no column 'text'. Columns: 'body', 'id'"),
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": 3}\n', "holds a int, text was expected"),
        ("a.jsonl", '"just text"\n', "line 1 holds a str"),
        ("a.json", '[{"text": "a"}', "is not JSON"),
        ("a.json", '[{"text": ""}]', "holds none"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_texts(written(tmp_path, name, text))


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    near = written(tmp_path, "corpus.txt", "prose")
    with pytest.raises(DataError, match="There is no file") as error:
        read_texts(str(tmp_path / "corups.txt"))
    assert f"Did you mean {near!r}?" in str(error.value)
    with pytest.raises(DataError, match="There is no directory"):
        read_texts(str(tmp_path / "nowhere" / "corpus.txt"))


def test_a_directory_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory"):
        read_texts(str(tmp_path))


def test_an_unknown_name_gets_the_nearest_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="Did you mean 'wikitext2'"):
        read_texts("wikitext")
    with pytest.raises(DataError, match="Known: bookcorpus, c4, demo, ptb, self, wikitext2"):
        read_texts("zzz")


def test_self_has_no_stored_text() -> None:
    with pytest.raises(UsageError, match="nothing stored to read"):
        read_texts("self")
