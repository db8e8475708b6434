"""lm-evaluation-harness itself, on a few items in a file, beside the same items read here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from resect.errors import UsageError
from resect.evaluation import Answers, harness, tasks_named
from tests.models import FAMILIES, assert_untouched, snapshot, tiny_tokenizer

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks of the harness in a folder, in the place of its thousands."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "pets.jsonl"
    rows = [{"query": f"Pet {i}:", "choices": ["cat " * (i % 3 + 1) + "!", "dog", "a fish"], "gold": i % 3} for i in range(7)]
    file.write_text("\n".join(map(json.dumps, rows)))
    for name in ("pets", "arc_challenge"):
        (tmp_path / f"{name}.yaml").write_text(YAML.format(name=name, file=file))
    whole = tasks.TaskManager

    def few(*_: Any, **__: Any) -> Any:
        return whole(include_path=str(tmp_path), include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", few)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", ["pets", "arc_challenge"])  # reported by acc, by acc_norm
def test_the_harness_gives_the_same_answers(name: str, shots: int, folder: Path) -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    before = snapshot(model)
    (outside,) = tasks_named([name])
    found = outside.answered(model, tokenizer, shots=shots, limit=6)
    assert_untouched(model, before)
    (inside,) = tasks_named([str(folder / "pets.jsonl")])
    here = inside.answered(model, tokenizer, shots=shots, limit=6)
    assert (found.task, found.shots, len(found.correct)) == (name, shots, 6)
    assert (found.acc, found.acc_norm) == (here.acc, here.acc_norm)
    if name == "pets":
        assert found == Answers("pets", "acc", here.chosen, here.correct, shots, here.acc, here.acc_norm)
    else:
        assert (found.metric, found.accuracy) == ("acc_norm", found.acc_norm)
        assert tuple(choice == i % 3 for i, choice in enumerate(found.chosen)) == found.correct


@pytest.mark.filterwarnings("ignore")
def test_tasks_that_are_not_there(folder: Path) -> None:
    with pytest.raises(UsageError, match="no task 'petz'. Did you mean 'pets'"):
        tasks_named(["petz"])
    with pytest.raises(UsageError, match="no task 'qqqqqqqq'. Known: arc_challenge"):
        tasks_named(["qqqqqqqq"])
    with pytest.raises(UsageError, match="no task 'sevn'. Did you mean 'seven'"):
        tasks_named(["sevn"])


def test_tasks_without_choices() -> None:
    with pytest.raises(UsageError, match="essay is not one of choosing"):
        harness._answers(harness.HarnessTask("essay", "acc", None), [{"doc_id": 0, "exact_match": 1.0}], 0)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"The task boolq needs .* pip install 'resect\[eval\]'"):
        tasks_named(["seven"])
    with pytest.raises(UsageError, match=r"Did you mean 'hellaswag' with 'helaswag'\? .*resect\[eval\]"):
        tasks_named(["boolq", "helaswag"])
    with pytest.raises(UsageError, match=r"not installed\. Say: pip"):
        tasks_named(["lambada_openai"])
