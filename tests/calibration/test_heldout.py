from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resect.calibration import evaluation_tokens, held_out, texts_in_tokens, token_sizes, tokenised, wikitext_rows
from resect.calibration.corpora import is_wikitext, sections
from resect.errors import DataError, UsageError
from tests.models import tiny_tokenizer

RAW = " \n = Title = \n \n Prose . \n = = Part = = \n More . \n"
ROWS = ["", " = Title = \n", "", " Prose . \n", " = = Part = = \n", " More . \n"]


def text_of(source: str) -> str:
    return str(tiny_tokenizer().decode(evaluation_tokens(source, tiny_tokenizer())))


def test_wikitext_rows_are_joined_with_blank_lines() -> None:
    assert wikitext_rows(RAW) == "\n\n".join(ROWS)


def test_a_wikitext_file_is_put_in_rows_any_other_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text(RAW)
    (tmp_path / "plain.txt").write_text("Prose .\n\nMore .\n")
    assert text_of(str(tmp_path / "wiki.raw")) == wikitext_rows(RAW)
    assert text_of(str(tmp_path / "plain.txt")) == "Prose .\n\nMore .\n"


def test_rows_of_json_are_joined_with_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["one", "two", "one"]))
    assert text_of(str(tmp_path / "a.jsonl")) == "one\n\ntwo\n\none"


def test_tokens_begin_with_the_text_and_stop_at_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abcdef")
    tokenizer = tiny_tokenizer()
    tokens = evaluation_tokens(str(file), tokenizer)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == tokenizer.convert_tokens_to_ids(list("abcdef"))
    assert evaluation_tokens(str(file), tokenizer, limit=4).tolist() == tokens[:4].tolist()
    assert evaluation_tokens(str(file), tokenizer, limit=99).tolist() == tokens.tolist()


def test_too_little_to_evaluate_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    with pytest.raises(DataError, match="gives 1 tokens"):
        evaluation_tokens(str(file), tiny_tokenizer())
    with pytest.raises(UsageError, match="limited to 1"):
        evaluation_tokens(str(file), tiny_tokenizer(), limit=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RAW, True),
        (" = Title = \n", True),
        (" = = Part = = \n", False),
        ("a = b = c\n", False),
        ("Prose .\n = Title = \n", False),
        ("", False),
        ("\n\n", False),
    ],
)
def test_wikitext_is_known_by_its_first_heading(text: str, expected: bool) -> None:
    assert is_wikitext([text]) is is_wikitext(["", *text.splitlines(keepends=True)]) is expected


@pytest.mark.parametrize("text", ["", "a", "a\n" * 500, "word " * 100, "a\nb\n\n" * 300, "\n" * 99])
def test_sections_joined_are_the_text(text: str) -> None:
    pieces = list(sections(text, 50))
    assert "".join(pieces) == text
    assert all(len(piece) <= 102 for piece in pieces[:-1])


def test_sections_end_at_blank_lines_where_there_are_some() -> None:
    pieces = list(sections("line\n" * 9 + "\n" + "line\n" * 30, 40))
    assert pieces[0] == "line\n" * 9 + "\n"


def test_every_byte_belongs_to_one_token(tmp_path: Path) -> None:
    """Of a byte-level tokenizer that splits characters; one that drops what is between words."""
    text = "naïve €uro 🙂 ok"
    bytes_alone = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sizes = token_sizes(text, PreTrainedTokenizerFast(tokenizer_object=bytes_alone), len(text.encode()))
    assert sizes is not None
    assert len(sizes) == len(text.encode()) == int(sizes.sum())
    assert sizes.tolist()[:4] == [1, 1, 2, 0]  # ï is two tokens
    words = Tokenizer(models.WordLevel({"a": 0, "bc": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    split = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    assert token_sizes("a  bc é", split, 3).tolist() == [1, 4, 3]  # type: ignore[union-attr]
    assert token_sizes("a  bc é", split, 2).tolist() == [1, 4]  # type: ignore[union-attr]
    (tmp_path / "a.txt").write_text("abcdef")
    held = held_out(str(tmp_path / "a.txt"), tiny_tokenizer(), limit=4)
    assert held.sizes is not None
    assert (len(held.tokens), held.sizes.tolist()) == (4, [1, 1, 1, 1])


def test_a_long_text_goes_through_the_tokenizer_in_sections(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No call gets more than two sections; tokens, bytes of tokens and counts are those of the whole."""
    text = "".join(f"Zeile {n}, 🙂 naïve\n" for n in range(400))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    whole = held_out(str(tmp_path / "a.txt"), tokenizer)
    together = list(texts_in_tokens(["short", text, "end"], tokenizer))
    given: list[int] = []
    plain = type(tokenizer).__call__

    def watched(self: object, texts: str | list[str], **kwargs: object) -> object:
        given.append(sum(map(len, [texts] if isinstance(texts, str) else texts)))
        return plain(self, texts, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    monkeypatch.setattr(tokenised, "SECTION", 500)
    parts = held_out(str(tmp_path / "a.txt"), tokenizer)
    assert parts.tokens.equal(whole.tokens)
    assert parts.sizes is not None
    assert whole.sizes is not None
    assert parts.sizes.equal(whole.sizes)
    assert int(parts.sizes.sum()) == len(text.encode())
    found = list(texts_in_tokens(["short", text, "end"], tokenizer))
    assert [list(one) for one in found] == [list(one) for one in together]
    assert held_out(str(tmp_path / "a.txt"), tokenizer, limit=700).tokens.equal(whole.tokens[:700])
    assert max(given) < 1100
