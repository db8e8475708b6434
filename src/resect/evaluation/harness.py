"""The edge to lm-evaluation-harness, which is an extra: `pip install 'resect[eval]'`. Imported only when it is asked for."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from resect.errors import DataError, UsageError, nearest
from resect.evaluation.mode import evaluating
from resect.evaluation.offline import PREFIX
from resect.evaluation.tasks import SEVEN, Answers, likeliest
from resect.surroundings import unaffected

BATCH = 8
"""Requests that run together; padded to one length, sorted by it."""
NAMES = ("seven", *SEVEN, "demo", *(PREFIX + name for name in SEVEN))
"""What is asked for most, so that a misspelt name may mean it."""
UNSEEDED = {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None}
"""The harness leaves the random numbers of everybody else alone; few-shot examples have a seed of their own."""


@dataclass(frozen=True)
class HarnessTask:
    """A multiple-choice task of lm-evaluation-harness, answered by its own evaluator."""

    name: str
    metric: str
    manager: Any

    @unaffected()
    def answered(
        self, model: PreTrainedModel, tokenizer: Any, *, shots: int = 0, limit: int | None = None, name: str = ""
    ) -> Answers:
        """The model's answers to the first `limit` items, with `shots` examples that lm-evaluation-harness draws.

        Raises `DataError` where the data set cannot be had and `UsageError` for a task without choices.
        """
        from lm_eval import simple_evaluate

        with evaluating(model):
            try:
                found = simple_evaluate(
                    model=_wrapped(model, tokenizer),
                    tasks=[self.name],
                    num_fewshot=shots,
                    limit=limit,
                    bootstrap_iters=0,
                    task_manager=self.manager,
                    **UNSEEDED,
                )
            except (ConnectionError, FileNotFoundError) as problem:
                raise DataError(
                    f"lm-evaluation-harness cannot fetch the data of {self.name}: {str(problem).strip().splitlines()[0]}. "
                    f"Without a network ask for demo, demo:TASK ({', '.join(SEVEN)}) or a .jsonl file."
                ) from problem
        assert found is not None  # it is on all processes but the first
        return _answers(self, sorted(found["samples"][self.name], key=lambda sample: sample["doc_id"]), shots)


def harness_tasks(names: Sequence[str]) -> list[HarnessTask]:
    """Tasks of lm-evaluation-harness by name; `UsageError` where it is not installed or has no such task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as problem:
        raise UsageError(
            f"The task {names[0]} needs lm-evaluation-harness, which is not installed. {_misspelt(names)}"
            "Say: pip install 'resect[eval]' (or ask for demo:TASK or a .jsonl file, which need nothing)."
        ) from problem
    manager = TaskManager()
    for name in names:
        if name not in manager.all_subtasks:
            close = difflib.get_close_matches(name, [*NAMES, *manager.all_subtasks], n=1)
            raise UsageError(f"There is no task {name!r}. {nearest(name, close or SEVEN)}")
    return [HarnessTask(name, SEVEN.get(name, "acc"), manager) for name in names]


def _misspelt(names: Sequence[str]) -> str:
    """A sentence about the first name that is nearly one of `NAMES`; the harness, which has thousands, cannot be asked."""
    for name in names:
        close = difflib.get_close_matches(name, NAMES, n=1)
        if close and name not in NAMES:
            return f"Did you mean {close[0]!r} with {name!r}? "
    return ""


def _wrapped(model: PreTrainedModel, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)


def _answers(task: HarnessTask, samples: Sequence[Mapping[str, Any]], shots: int) -> Answers:
    """What the harness noted of every item."""
    if not samples or task.metric not in samples[0]:
        raise UsageError(
            f"The task {task.name} is not one of choosing: lm-evaluation-harness gives no {task.metric} for its items. "
            f"Name another, like {', '.join(SEVEN)}."
        )
    every = {metric: [float(sample[metric]) for sample in samples] for metric in ("acc", "acc_norm") if metric in samples[0]}
    means = {metric: sum(values) / len(values) for metric, values in every.items()}
    return Answers(
        task=task.name,
        metric=task.metric,
        chosen=tuple(_chosen(sample, task.metric) for sample in samples),
        correct=tuple(value == 1 for value in every[task.metric]),
        shots=shots,
        acc=means["acc"],
        acc_norm=means.get("acc_norm"),
    )


def _chosen(sample: Mapping[str, Any], metric: str) -> int:
    """The number of the choice that the model took."""
    values = [float(value) for value, _ in sample["filtered_resps"]]
    choices = [continuation.removeprefix(" ") for _, continuation in sample["arguments"]]
    return likeliest(values, choices, metric)
