"""Runs read back from their reports, to be put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resect.errors import DataError, UsageError, shown
from resect.explain import explain, telling
from resect.files import check_file, read_json, whole_file
from resect.report import Comparison, EvaluationReport, RunReport, comparison, comparison_html, is_page

READ: dict[str, type[RunReport] | type[EvaluationReport]] = {"run": RunReport, "evaluation": EvaluationReport}


@telling("compare the runs")
def compare(runs: Sequence[str], output: str | Path | None = None) -> Comparison:
    """Puts runs side by side: run directories, their `report.json`, or what `resect evaluate --json` printed.

    `output` gets a page with the figures and what quality costs in size. Raises `UsageError` for runs that were measured
    differently, `DataError` for reports that cannot be read, `CheckpointError` for an `output` that is anything but such a page.
    """
    read_from: list[str | Path] = [*runs, *(Path(run) / "report.html" for run in runs)]  # beside what is read: a run's own page
    if output is not None:
        check_file(output, overwrite=True, alike=is_page, inputs=read_from)
    if len(set(runs)) < len(runs):
        raise UsageError("A run was named twice. Name each once.")
    read = {_short(run, runs): _read(run) for run in runs}
    try:
        found = comparison(read)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as problem:
        if isinstance(problem, UsageError):
            raise
        raise DataError(
            f"The reports of {', '.join(map(shown, runs))} lack what a comparison shows, or contradict themselves "
            f"({type(problem).__name__}: {shown(str(problem))[1:-1]}). Name reports as resect wrote them."
        ) from problem
    if output is not None:
        with whole_file(output, overwrite=True, alike=is_page, inputs=read_from) as partial:
            partial.write_text(comparison_html(found), encoding="utf-8")
    return found


def _short(run: str, runs: Sequence[str]) -> str:
    """The last part of a run's path, or all of it where two end alike."""
    name = Path(run).name or run
    return name if sum((Path(other).name or other) == name for other in runs) == 1 else run


def _read(run: str) -> RunReport | EvaluationReport:
    try:
        path = Path(run).expanduser()
        file = path / "report.json" if path.is_dir() else path
        values: Any = read_json(file, what="the report", error=DataError)
    except (OSError, ValueError, RuntimeError, DataError) as problem:
        said = str(problem) if isinstance(problem, DataError) else f"{shown(run)}: {problem}."
        raise DataError(f"{said} Name a run directory or a report.json.") from problem
    kind = str(values.get("kind")) if isinstance(values, dict) else None
    if kind == "recovery":
        raise UsageError(
            f"{run} is a recovery, which measures its own held-out text alone. Measure it beside the others, "
            f"`resect evaluate DENSE {run} --text TEXT --json > FILE`, and compare FILE."
        )
    if kind not in READ:
        raise UsageError(f"{file} is not the report of a run or an evaluation (its kind is {shown(kind)}).")
    try:
        return READ[kind].model_validate(values)
    except ValidationError as problem:
        raise DataError(f"{file} was written by another version, or is damaged: {explain(problem, READ[kind])}") from problem
