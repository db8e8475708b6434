"""Results as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from resect.report.figures import Figure, agreement_figures, before_and_after, figures, interval, metric
from resect.report.inspection import Inspection
from resect.report.layers import LayerRow, bar, kinds_of, layer_rows, spans
from resect.report.picture import inspection_tree
from resect.report.recovery import facts_tables
from resect.report.results import EvaluationReport, Measured, RunReport
from resect.report.words import asked, budget_lines, measuring, protected_lines, protocol, provenance, vocabulary_lines

FROZEN_SHOWN = 12
"""Lines of frozen axes shown; the JSON form has all."""
LAYERS_SHOWN = 48
BY_MODEL = ("bits", "accuracy")
"""Kinds of figures with a row of their own, where models are compared: they are many."""


def run_tables(report: RunReport) -> Group:
    """Before and after, what each layer keeps, and what the models write."""
    planned = report.status == "planned"
    table = _table()
    for column in ("", "dense", "planned" if planned else "pruned", "change"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for figure in before_and_after(report):
        table.add_row(figure.name, *figure.texts(), figure.change())
    parts: list[RenderableType] = [
        Text(asked(report), style="bold"),
        table,
        Text("What stays", style="bold"),
        layer_table(report),
    ]
    parts += [Text(f"{kind} stay whole: {why}", style="yellow") for kind, why in report.withheld.items()]
    parts += [Text(line) for line in (*budget_lines(report), *protected_lines(report), *vocabulary_lines(report))]
    if report.recovery:
        parts += [Text("Recovery", style="bold"), *facts_tables(report.recovery)]
    if report.prompts and report.pruned.generations:
        parts += [Text("Greedy continuations", style="bold"), _generations(report)]
    parts.append(Text(provenance(report), style="dim"))
    return Group(*parts)


def layer_table(report: RunReport) -> Table:
    """A line per run of layers that keep the same, with a bar per kind."""
    rows = layer_rows(report.groups)
    table = _table()
    table.add_column("layers")
    for kind in kinds_of(rows):
        table.add_column(kind)
    for row in rows[:LAYERS_SHOWN]:
        table.add_row(spans(row.layers) or "all", *(_cell(row, kind) for kind in kinds_of(rows)))
    if len(rows) > LAYERS_SHOWN:
        table.add_row("...", f"{len(rows) - LAYERS_SHOWN} more lines in plan.json")
    return table


def comparison_table(report: EvaluationReport) -> Group:
    """A row per model."""
    table = _table()
    table.add_column("model", overflow="fold")
    rows = figures(report.models)
    columns = [figure for figure in rows if figure.kind not in BY_MODEL]
    for figure in columns:
        heading = figure.heading or figure.name
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split("\n"))))
    for place, model in enumerate(report.models):
        table.add_row(model.name, *(figure.texts()[place] for figure in columns))
    parts: list[RenderableType] = [table]
    if any(model.perplexities for model in report.models):
        parts.append(Text(f"text @window, tokens predicted: perplexity. {protocol(report.models)}", style="dim"))
    if len(columns) < len(rows):
        parts.append(_by_model([figure for figure in rows if figure.kind in BY_MODEL], report.models))
    if any(model.tasks for model in report.models):
        parts.append(Text(measuring(report.models), style="dim"))
    parts += _beside(report)
    for prompt_number, prompt in enumerate(report.prompts):
        written = _table()
        written.add_column("model")
        written.add_column("greedy continuation", overflow="fold")
        for model in report.models:
            written.add_row(model.name, Text(model.generations[prompt_number].strip()))
        parts += [Text(f"Prompt: {prompt}", style="bold"), written]
    return Group(*parts)


def _by_model(rows: Sequence[Figure], models: Sequence[Measured]) -> Table:
    """A row per figure, a column per model."""
    table = _table()
    table.add_column("")
    for model in models:
        table.add_column(model.name, justify="right", overflow="fold")
    for figure in rows:
        table.add_row(figure.name, *figure.texts())
    return table


def _beside(report: EvaluationReport) -> list[RenderableType]:
    """What changed from the first model to every other."""
    first, *others = report.models
    parts: list[RenderableType] = []
    if report.differences:
        found = {(one.figure, one.model): interval(one) for one in report.differences}
        table = _table()
        table.add_column(f"beside {first.name}")
        for model in others:
            table.add_column(model.name, justify="right", overflow="fold")
        for name in dict.fromkeys(one.figure for one in report.differences):
            table.add_row(name, *(found.get((name, model.name), "-") for model in others))
        parts += [table, Text(f"In brackets {report.differences[0].level:.0%} of a paired bootstrap.", style="dim")]
    closeness = agreement_figures(others)
    return [*parts, _by_model(closeness, others)] if closeness else parts


def inspection_tables(found: Inspection) -> Group:
    """The network as a tree of modules and coupled groups, then what the groups of every kind hold and what is frozen."""
    head = Text(
        f"{found.model}: {found.architecture}, {found.parameters:,} parameters, {found.block_parameters:,} of them in "
        f"{found.blocks} blocks; {metric(found.macs)}MACs on 1 x 64 tokens"
    )
    parts: list[RenderableType] = [head, Text(), inspection_tree(found), Text()]
    parts += [Text("Units", style="bold"), _unit_table(found)]
    parts += [Text("What all of them hold", style="bold"), _share_table(found)]
    parts += [
        Text(f"Norms that run over {kind}: {', '.join(norms)}. They normalise what stays.", style="dim")
        for kind, norms in found.mixed.items()
    ]
    if found.frozen:
        parts += [Text("Kept whole", style="bold"), _frozen_table(found)]
    return Group(*parts)


def _unit_table(found: Inspection) -> Table:
    table = _table()
    for column in ("kind", "layers", "groups", "units in each", "parameters per unit"):
        table.add_column(column, justify="left" if column in ("kind", "layers") else "right", overflow="fold")
    for row in found.units:
        layers = row.layers or "all"
        table.add_row(row.title, layers, str(row.groups), f"{row.units:,}", f"{row.unit_parameters:,}")
    return table


def _share_table(found: Inspection) -> Table:
    table = _table()
    for column in ("kind", "parameters", "of the blocks", "of the model"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in found.shares:
        table.add_row(row.kind, f"{row.parameters:,}", f"{row.of_blocks:.1%}", f"{row.of_model:.1%}")
    return table


def _frozen_table(found: Inspection) -> Table:
    table = _table()
    table.add_column("parameter", max_width=44, overflow="fold")
    table.add_column("axis", justify="right")
    for column in ("positions", "layers", "because"):
        table.add_column(column, overflow="fold")
    for row in found.frozen[:FROZEN_SHOWN]:
        inside = row.parameter.removeprefix(f"{found.block_path}.*.") if row.layers else row.parameter
        sizes = ", ".join(f"{size:,}" for size in row.sizes)
        table.add_row(inside.removesuffix(".weight"), str(row.axis), sizes, row.layers or "-", row.reason)
    if len(found.frozen) > FROZEN_SHOWN:
        table.add_row(f"and {len(found.frozen) - FROZEN_SHOWN} more, see --json", "", "", "", "")
    return table


def _generations(report: RunReport) -> Table:
    table = _table()
    table.add_column("prompt", ratio=1, overflow="fold")
    table.add_column("dense", ratio=2, overflow="fold")
    table.add_column("pruned", ratio=2, overflow="fold")
    dense: Sequence[str] = report.dense.generations or ["-"] * len(report.prompts)
    for row in zip(report.prompts, dense, report.pruned.generations, strict=True):
        table.add_row(*(Text(text.strip()) for text in row))
    return table


def _cell(row: LayerRow, kind: str) -> str:
    if kind not in row.sizes:
        return ""
    kept, units = row.sizes[kind]
    return f"{bar(kept, units)} {kept:,} of {units:,}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)
