"""The report of a recovery: as a value, as tables for a terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from resect.explain import inline
from resect.recovery import Facts
from resect.report.charts import losses_table
from resect.report.machine import machine, versions
from resect.report.parts import Table as Rows
from resect.report.parts import markdown
from resect.report.results import SCHEMA, Record
from resect.report.sections import made_with, seconds


class RecoveryReport(Record):
    """A recovery: what was asked, what came of it, what it took."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["recovery"] = "recovery"
    recipe: dict[str, Any]
    facts: Facts
    saved: dict[str, Any] | None = None
    """How the directory loads."""
    zeros_kept: int = 0
    """Zeros of a sparsity pattern, none of which moved."""
    adapter: str | None = None
    """Where the low-rank terms lie, and what they load onto; None where all weights were trained."""
    reload_difference: float | None = None
    seconds: dict[str, float] = {}
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}


def recovery_report(recipe: Mapping[str, Any], facts: Facts) -> RecoveryReport:
    """The report of what was asked for and what came of it, so far."""
    return RecoveryReport(recipe=dict(recipe), facts=facts, versions=versions(), machine=machine())


def recovery_tables(report: RecoveryReport) -> Group:
    """Before and after for every source, the rounds of a dynamic mixture, and what was left out."""
    return Group(Text(recovery_asked(report), style="bold"), *facts_tables(report.facts), *map(Text, recovery_lines(report)))


def recovery_markdown(report: RecoveryReport) -> str:
    """The same, with the loss over steps and everything needed to judge and repeat it."""
    parts = [f"# {inline(recovery_asked(report))}", *map(inline, recovery_lines(report)), *facts_markdown(report.facts)]
    parts += ["## Seconds", markdown(seconds(report.seconds)), "## Made with", markdown(made_with(report))]
    return "\n\n".join(parts) + "\n"


def facts_tables(facts: Facts) -> list[RenderableType]:
    """What was measured and what was trained, for a terminal."""
    parts: list[RenderableType] = [_table(facts_losses(facts))]
    if facts.rounds:
        rounds = facts_rounds(facts)
        parts += [Text(rounds.caption, style="bold"), _table(rounds)]
    return [*parts, *map(Text, facts_lines(facts))]


def facts_markdown(facts: Facts, *, level: str = "##") -> list[str]:
    """The same as Markdown, with the loss over steps; headings have this level."""
    parts = [markdown(facts_losses(facts)), *map(inline, facts_lines(facts))]
    if facts.rounds:
        rounds = facts_rounds(facts)
        parts += [f"{level} {rounds.caption}", markdown(rounds)]
    parts.append(f"{level} Loss over steps")
    for training in facts.trainings:
        parts += [f"{level}# {inline(training.name)}", markdown(losses_table(training.losses, training.held_out))]
    return parts


def recovery_asked(report: RecoveryReport) -> str:
    """What was asked for."""
    return f"{report.recipe['model']}: recovered on {_training(report)}"


def recovery_card(report: RecoveryReport) -> list[str]:
    """Lines for the card of the model: what it was trained on, and what it predicts of what was held out."""
    sources = ", ".join(counts.source for counts in report.facts.sources)
    return [f"* Recovered: on {inline(f'{_training(report)} of {sources}')}", "", markdown(facts_losses(report.facts))]


def _training(report: RecoveryReport) -> str:
    settings, facts = report.recipe["settings"], report.facts
    what = "all weights" if settings["full"] else f"rank {settings['rank']}"
    tokens = sum(training.tokens for training in facts.trainings)
    teacher, listened = report.recipe["teacher"], settings["distillation"]
    if teacher:
        what += f", {'taught by' if listened['weight'] or listened['hidden'] else 'measured beside'} {teacher}"
    return f"{tokens:,} tokens ({what})"


def recovery_lines(report: RecoveryReport) -> list[str]:
    """Zeros that stayed, and how the low-rank terms load."""
    lines = [f"{report.zeros_kept:,} zeros of the sparsity pattern are still zero."] if report.zeros_kept else []
    return lines + ([f"Low-rank terms alone: {report.adapter}."] if report.adapter else [])


def facts_losses(facts: Facts) -> Rows:
    """Held-out perplexity and what each source gave, a row each."""
    head = ["held-out perplexity", "before", "after", *(["dense"] if facts.dense else []), "examples", "held out"]
    rows = []
    for counts in facts.sources:
        nats = [facts.before, facts.after, *([facts.dense] if facts.dense else [])]
        values = [f"{math.exp(one[counts.source]):.2f}" for one in nats]
        rows.append([facts.names[counts.source], *values, f"{counts.examples:,}", f"{counts.held_out:,}"])
    return Rows("Held-out perplexity of every source", head, rows)


def facts_rounds(facts: Facts) -> Rows:
    """A row per round: the weighted gap, then gap and share of the examples of every source."""
    sources = list(dict.fromkeys(source for one in facts.rounds for source in one.gaps))
    rows = []
    for one in facts.rounds:
        cells = [
            f"{one.gaps[source]:.3f}" + (f" ({one.weights[source]:.0%})" if one.weights else "") if source in one.gaps else ""
            for source in sources
        ]
        rows.append([f"{one.stage} {one.number}", f"{one.weighted:.4f}", *cells])
    head = ["round", "weighted", *(facts.names[source] for source in sources)]
    return Rows("Behind the dense model, nats per token (share of the examples)", head, rows)


def facts_lines(facts: Facts) -> list[str]:
    """What was trained for how long, and what was left out."""
    tokens = sum(training.tokens for training in facts.trainings)
    seconds = sum(training.seconds for training in facts.trainings)
    steps = sum(training.steps for training in facts.trainings)
    best = f"; the state after step {facts.trainings[0].best_step} was the best" if len(facts.trainings) == 1 else ""
    part = "" if facts.reached in (None, 1.0) else f", on matrices that hold {100 * facts.reached:.1f} % of its blocks"
    lines = [
        f"{facts.trainable:,} parameters trained (the model has {facts.parameters:,}{part}) in {steps:,} steps, "
        f"{seconds:,.0f} s, {tokens / seconds if seconds else 0:,.0f} tokens/s, processes: {facts.processes}{best}."
    ]
    for counts in facts.sources:
        left = [f"{number:,} rows skipped: {reason}" for reason, number in counts.skipped.items()]
        left += [f"{counts.truncated:,} rows cut off at the length"] if counts.truncated else []
        if counts.remainder:
            left.append(f"{counts.remainder:,} at the end of {counts.tokens + counts.remainder:,} tokens fill no window")
        lines += [f"{facts.names[counts.source]}: {'; '.join(left)}."] if left else []
    return lines


def _table(rows: Rows) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(rows.header):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows.rows:
        table.add_row(*map(Text, row))
    return table
