"""The tables of a run's report: Markdown and the HTML page show the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resect.report.figures import Figure, before_and_after, brief, metric, whole
from resect.report.layers import kinds_of, layer_rows, spans
from resect.report.parts import Table, Tile
from resect.report.results import RunReport
from resect.report.words import LOADS, protocol

ABOUT = {"size": "Size", "quality": "Quality", "accuracy": "Quality", "speed": "Speed"}
TILES = 8
TASKS_SHOWN = 2
"""Where more were answered, only their mean is part of the headline."""


def after(report: RunReport) -> str:
    """What the second model is called."""
    return "planned" if report.status == "planned" else "pruned"


def tiles(report: RunReport) -> list[Tile]:
    """The figures that say most; all of them are in the table."""
    found = [row for row in before_and_after(report) if row.change() and row.name != "block parameters"]
    tasks = [row for row in found if row.kind == "accuracy" and not row.name.startswith("mean of")]
    dropped = tasks if len(tasks) > TASKS_SHOWN else []
    return [_tile(row) for row in found if row not in dropped][:TILES]


def _tile(row: Figure) -> Tile:
    before, now = row.texts()
    change, bracket, between = row.change().partition(" [")
    points = " points" if row.kind == "accuracy" else ""
    return Tile(ABOUT.get(row.kind, "Quality"), row.name, change + points, before, now, bracket.strip() + between)


def headline(report: RunReport) -> Table:
    """Everything that was measured, before and after."""
    rows = [[figure.name, *figure.texts(), figure.change()] for figure in before_and_after(report)]
    return Table("Everything that was measured", ["", "dense", after(report), "change"], rows)


def kept(report: RunReport) -> Table:
    """Units that stay, layers that are alike in one row."""
    rows = layer_rows(report.groups)
    kinds = kinds_of(rows)
    cells = [[f"{row.sizes[k][0]:,} of {row.sizes[k][1]:,}" if k in row.sizes else "" for k in kinds] for row in rows]
    named = [[spans(row.layers) or "whole network", *some] for row, some in zip(rows, cells, strict=True)]
    return Table("Units that stay, by layer", ["layers", *kinds], named)


def scores(report: RunReport) -> Table | None:
    """A row per group: where its scores lie, and from which on units stay."""
    if report.saliency is None:
        return None
    sizes = {group.name: group for group in report.groups}
    shown = {0.0: "lowest", 0.5: "median", 1.0: "highest"}
    places = [place for place, level in enumerate(report.saliency.levels) if level in shown]
    rows = []
    for one in report.saliency.groups:
        of = f"{sizes[one.name].kept:,} of {sizes[one.name].units:,}" if one.name in sizes else "-"
        values = [f"{one.quantiles[place]:.3g}" for place in places]
        rows.append([one.name, of, *values, "-" if one.threshold is None else f"{one.threshold:.3g}"])
    header = ["group", "units that stay", *(shown[report.saliency.levels[place]] for place in places), "threshold"]
    return Table("Scores of the units of each group; those below the threshold go", header, rows)


def curve(report: RunReport) -> Table | None:
    """What sizes on the way are worth."""
    found = report.curve
    if found is None:
        return None
    dense = found.points[0]
    rows = [
        [
            whole(point.parameters),
            f"{100 * point.block_parameters / dense.block_parameters:.1f} %" if dense.block_parameters else "-",
            metric(point.macs).strip(),
            brief(point.perplexity),
        ]
        for point in found.points
    ]
    caption = f"Perplexity on {found.text} @{found.window} ({found.tokens:,} tokens) at sizes on the way, by masks"
    return Table(caption, ["parameters", "of block parameters", "MACs", "perplexity"], rows, words=0)


def shots(report: RunReport) -> Table | None:
    """What each of several shots left."""
    if len(report.shots) < 2:
        return None
    dense = report.dense
    rows = [
        [
            str(shot.number),
            whole(shot.parameters),
            f"{100 * shot.block_parameters / dense.block_parameters:.1f} %" if dense.block_parameters else "-",
            metric(shot.macs).strip(),
            f"{shot.loss:.4g}",
        ]
        for shot in report.shots
    ]
    header = ["shot", "parameters", "of block parameters", "MACs", "score of what went"]
    return Table("What each shot left", header, rows)


def prices(report: RunReport) -> Table | None:
    """What trials found of every group, in every shot."""
    tried = [shot for shot in report.shots if shot.prices]
    if not tried:
        return None
    rows = [[name, *(f"{shot.prices[name]:.2f}" for shot in tried)] for name in tried[0].prices]
    header = ["group", *(f"shot {shot.number}" for shot in tried)] if len(tried) > 1 else ["group", "measured over expected"]
    return Table("What removing a part of each group alone cost, measured over expected", header, rows)


def checks(report: RunReport) -> list[str]:
    """How the directory loads, and what was verified."""
    lines = []
    if report.saved is not None:
        saved = report.saved
        kind = f"Saved as `{saved['model_type']}`, {saved['layout']}"
        kind += f", relabelled from `{saved['relabelled_from']}`" if saved["relabelled_from"] else ""
        lines.append(f"{kind}. Loads with {LOADS[saved['layout']]}.")
        check = report.cut_equals_mask
        if check is not None:
            lines.append(f"Cut against mask: logits differ by {check['difference']:.1e}, {check['allowed']:.1e} is allowed.")
        if report.reload_difference is not None:
            lines.append(f"Reloaded in a fresh process: by {report.reload_difference:.1e} of their spread.")
    return lines


def perplexity_note(report: RunReport) -> str:
    """How perplexity was taken, and of which tokens."""
    found = [p for model in report.models for p in model.perplexities]
    if not found:
        return "Nothing was evaluated."
    digests = ", ".join(dict.fromkeys(f"{p.text} `{p.digest[:12]}`" for p in found))
    return f"Perplexity: {protocol(report.models)} Text tokens: {digests}."


def seconds(found: Mapping[str, float]) -> Table:
    """How long every stage took."""
    return Table("Seconds", ["stage", "seconds"], [[stage, f"{value:.1f}"] for stage, value in found.items()])


def made_with(report: Any) -> Table:
    """Versions and machine of a run or a recovery."""
    machine, recipe = report.machine, report.recipe
    memory, peak = machine.get("memory_bytes"), report.peak_memory_bytes
    rows = [[name, version] for name, version in report.versions.items()]
    rows.append(["processor", f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('threads')} threads"])
    rows += [["memory", f"{memory / 2**30:.1f} GiB"]] if memory else []
    rows += [["peak memory of the run", f"{peak / 2**30:.2f} GiB"]] if peak else []
    rows += [["accelerator", name] for name in machine.get("accelerators", [])]
    return Table("Made with", ["what", "which"], [*rows, ["device, dtype", f"{recipe['device']}, {recipe['dtype']}"]], words=2)

