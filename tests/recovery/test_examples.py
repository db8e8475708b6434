"""Rows as tokens and labels: exactly the response is learnt, no token is lost, and what is left out is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resect.errors import DataError
from resect.recovery import Recovery
from resect.recovery.examples import Conversation, collate, labelled, packed, read_pool
from resect.recovery.facts import Counts
from resect.statistics import IGNORED
from tests.models import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


def spelled(example: Any) -> tuple[str, str]:
    """The whole text, and what of it is learnt."""
    tokenizer = tiny_tokenizer()
    learnt = example.labels[example.labels != IGNORED]
    assert all(a in (IGNORED, b) for a, b in zip(example.labels.tolist(), example.tokens.tolist(), strict=True))
    return str(tokenizer.decode(example.tokens)), str(tokenizer.decode(learnt))


def test_of_instructions_exactly_the_response_and_its_end_are_learnt(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    pool = read_pool(write(tmp_path / "a.jsonl", rows), tiny_tokenizer(), Recovery(length=400), seed=0)
    found = dict(map(spelled, [*pool.train, *pool.held_out]))
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\nhi</s>"
    )
    assert found == {with_input: "3</s>", without: "hi</s>"}
    assert pool.counts.predicted == 5
    assert (len(pool.train), len(pool.held_out)) == (1, 1)


def test_of_conversations_every_turn_of_the_assistant_is_learnt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "d.")]
    row = {"messages": [{"role": role, "content": text} for role, text in messages]}
    pool = read_pool(write(tmp_path / "a.jsonl", [row, row]), tokenizer, Recovery(length=100), seed=0)
    assert spelled(pool.train[0]) == ("[u]a?</s>\n[a]b.</s>\n[u]c?</s>\n[a]d.</s>\n", "b.</s>d.</s>")


def test_instructions_in_the_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    source = write(tmp_path / "a.jsonl", [{"instruction": "a", "input": "b", "output": "c"}] * 2)
    pool = read_pool(source, tokenizer, Recovery(length=100, template="chat"), seed=0)
    assert spelled(pool.train[0]) == ("[u]a\n\nb</s>\n[a]c</s>\n", "c</s>")


def test_a_token_across_the_border_belongs_to_the_response() -> None:
    class Pairs:
        """Takes two characters for one token where it can."""

        eos_token_id = 0

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]}

    example = labelled(Conversation("abcdef", [(3, 6)], plain=True), Pairs())
    assert [label != IGNORED for label in example.labels.tolist()] == [False, True, True, True]


def test_rows_that_give_nothing_are_counted_by_reason(tmp_path: Path) -> None:
    good = {"instruction": "Go.", "output": "yes"}
    rows: list[dict[str, Any]] = [good, good, {"instruction": "Go.", "output": "  "}, {"instruction": "Go."}]
    rows += [{"instruction": 3, "output": "x"}]
    rows += [{"instruction": "Go on. " * 60, "output": "never reached"}, {"instruction": "Go.", "output": "long " * 60}]
    counts = read_pool(write(tmp_path / "a.jsonl", rows), tiny_tokenizer(), Recovery(length=200), seed=0).counts
    assert counts.skipped == {
        "empty response": 1,
        "missing columns": 1,
        "no text in the columns": 1,
        "no response within the length": 1,
    }
    assert (counts.rows, counts.examples, counts.truncated) == (7, 3, 1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "answer": "b"}], "columns 'prompt', 'answer'.*'instruction' and 'output'"),
        ([{"instruction": "a", "output": ""}] * 3, r"0 examples.*3 x empty response"),
        ([{"text": "too short"}], "0 examples of 64 tokens.*10 tokens fill no window"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_pool(write(tmp_path / "a.jsonl", rows), tiny_tokenizer(), Recovery(length=64), seed=0)


def test_packing_loses_no_token_but_the_counted_remainder() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["The river ran low.", " ", "Nobody counted the days;", "x"]
    counts = Counts(source="", kind="text", rows=4)
    examples = packed(texts, tokenizer, length=7, counts=counts)
    stream = [token for text in texts if text.strip() for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    found = [token for example in examples for token in example.tokens.tolist()]
    assert found == stream[: len(found)]
    assert len(stream) - len(found) == counts.remainder == len(stream) % 7 > 0
    assert counts.skipped == {"no text": 1}
    assert all(example.labels.tolist() == [IGNORED, *example.tokens.tolist()[1:]] for example in examples)


def test_batches_are_padded_on_the_right_to_a_multiple_of_eight() -> None:
    tokenizer = tiny_tokenizer()
    examples = [labelled(Conversation(text, [(2, len(text))], plain=True), tokenizer) for text in ("abc", "abcdefgh")]
    batch = collate(examples, padding=9)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [*examples[0].tokens.tolist(), *[9] * 12]
    assert batch["labels"][0].tolist() == [*examples[0].labels.tolist(), *[IGNORED] * 12]
    assert batch["attention_mask"].sum(1).tolist() == [4, 9]
