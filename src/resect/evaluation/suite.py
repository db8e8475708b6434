"""Tasks by the names that people give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from resect.errors import UsageError
from resect.evaluation.harness import HarnessTask, harness_tasks
from resect.evaluation.offline import is_offline, offline_tasks
from resect.evaluation.tasks import SEVEN, Task

AnyTask: TypeAlias = Task | HarnessTask


def tasks_named(names: Sequence[str]) -> list[AnyTask]:
    """The tasks of some names: ``demo``, ``demo:piqa`` and JSONL files are read here, ``seven`` and others are the harness's.

    Raises `UsageError` for a name that nobody knows or that comes twice, and where the harness is needed but not installed.
    """
    spelled = [one for name in names for one in (SEVEN if name == "seven" else [name])]
    outside = [name for name in spelled if not is_offline(name)]
    found = iter(harness_tasks(outside) if outside else [])
    tasks: list[AnyTask] = []
    for name in spelled:
        tasks += offline_tasks(name) if is_offline(name) else [next(found)]
    twice = {task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1}
    if twice:
        raise UsageError(f"The task {min(twice)} was asked for twice. Name every task once.")
    return tasks
