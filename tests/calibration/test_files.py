from __future__ import annotations

import gzip
import hashlib
import json
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from resect.calibration import files, read_rows, read_texts
from resect.calibration.corpora import LONGEST, sections
from resect.calibration.files import read_file, split_column
from resect.errors import DataError, ResectWarning, UsageError

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
        ("a.txt", b"one\ntwo\nthr\xffe", "byte 0xff at offset 11, line 3"),
        ("a.txt", b"one\ntwo\0", "line 2 holds the character NUL"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "half \\ud83d"}\n', r"line 3 holds half of a character, \\ud83d, at 6"),
        ("a.jsonl", '{"text": "a\\u0000b"}\n', "line 1 holds the character NUL at 2"),
        ("a.json", '[{"text": "a"}, {"text": "\\ude00"}]', "row 2 holds half of a character"),
        ("a.jsonl", '{"text": ' + "[" * 99999 + "\n", "line 1 is nested too deep"),
        ("a.jsonl", '{"text": ' + "9" * 9999 + "}\n", "line 1 is not JSON"),
        ("a.txt.gz", gzip.compress(b"prose", mtime=0), "is packed with gzip"),
        ("a.txt", gzip.compress(b"prose", mtime=0), "is packed with gzip"),
        ("a.txt", b"PAR1....", "is a Parquet table"),
        ("a.parquet", b"PAR1....", "is a Parquet table"),
        ("a.csv", ",text\n0,prose\n", "is a table of CSV"),
        ("a.txt", "prose".encode("utf-16"), "is UTF-16"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_texts(written(tmp_path, name, text))


def test_rows_for_recovery_are_checked_to_their_leaves(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("a", "b\ud83d")]
    file = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="line 2 holds half of a character"):
        read_rows(file)


@pytest.mark.parametrize("name", ["n" * 300 + ".txt", "a\0b.txt", "loop.txt", "/dev/null"])
def test_what_is_no_file_of_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(DataError, match=r"cannot be read|is a device"):
        read_texts(str(tmp_path / name))


def test_of_a_very_large_file_the_front_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST", 1 << 16)
    monkeypatch.setattr(files, "CHUNK", 1 << 14)
    line = "größer 🙂 " * (1 << 19)  # one line of some megabytes
    file = written(tmp_path, "a.txt", line)
    size = os.path.getsize(file)
    tracemalloc.start()
    with pytest.warns(ResectWarning, match=f"has {size:,} bytes; the first 65,5"):
        corpus = read_file(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 8
    assert line.startswith(corpus.rows[0])
    assert corpus.detail["sha256"] == hashlib.sha256(line.encode()).hexdigest()
    assert corpus.detail["of"] == size
    assert corpus.detail["bytes"] == len(corpus.rows[0].encode()) > (1 << 16) - 4
    rows = [json.dumps({"text": f"document {number}"}) for number in range(9999)]
    with pytest.warns(ResectWarning, match="the first 65,5"):
        read = read_file(written(tmp_path, "a.jsonl", "\n".join(rows))).rows
    assert read == [f"document {number}" for number in range(len(read))]
    with pytest.warns(ResectWarning), pytest.raises(DataError, match="a line of more than"):
        read_file(written(tmp_path, "a.jsonl", json.dumps({"text": line})))
    with pytest.warns(ResectWarning), pytest.raises(DataError, match="one list of"):
        read_file(written(tmp_path, "a.json", f"[{','.join(rows)}]"))


def test_of_very_many_rows_the_first_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_ROWS", 5)
    file = written(tmp_path, "a.jsonl", "\n\n".join(json.dumps({"text": str(number)}) for number in range(6)))
    with pytest.warns(ResectWarning, match="more rows than 5"):
        assert read_texts(file) == ["0", "1", "2", "3", "4"]


def test_a_line_without_end_is_tokenised_in_pieces() -> None:
    text = "x" * (2 * LONGEST + 5) + "\nnext\n"
    pieces = list(sections(text, 1000))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2000


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


def test_pipes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="nobody writes into it"):
        read_file(str(pipe))
    other = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)

    def write() -> None:
        os.write(writer, b"some text")
        os.close(writer)

    late = threading.Timer(0.05, write)
    late.start()
    assert read_file(str(pipe)).rows == ["some text"]
    late.join()
    os.close(other)
