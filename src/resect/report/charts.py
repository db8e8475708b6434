"""Charts of runs and recoveries, in the terms of plotly; every number in them is in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from resect.recovery import Facts
from resect.report import sections
from resect.report.figures import brief, whole
from resect.report.layers import LayerRow, kinds_of, layer_rows
from resect.report.parts import Chart, Panels, Table
from resect.report.results import GroupScores, RunReport, ScoreHistogram

KINDS = ("heads", "channels", "experts", "residual", "sublayers", "blocks", "vocabulary")
MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
LOSSES_SHOWN = 200
"""Points of a training curve; more are averaged over neighbours."""


def colour(number: int) -> str:
    """One of the seven colours of a page."""
    return f"var(--c{number % 7 + 1})"


def colour_of(kind: str) -> str:
    """A kind has its colour in every chart."""
    return colour(KINDS.index(kind)) if kind in KINDS else colour(len(kind))


def kept(report: RunReport) -> Chart | None:
    """What stays of every layer, a panel per kind."""
    rows = [row for row in layer_rows(report.groups) if row.layers]
    kinds = kinds_of(rows)
    if not rows:
        return None
    panels, traces = Panels([f"{kind}, % that stay" for kind in kinds], {"barmode": "stack", "bargap": 0.18}), []
    for place, kind in enumerate(kinds):
        found = _by_layer(rows, kind)
        layers = list(found)
        stays = [100 * kept / units for kept, units in found.values()]
        text = [f"layer {layer}: {kept:,} of {units:,} {kind} stay" for layer, (kept, units) in found.items()]
        for values, paint in ((stays, colour_of(kind)), ([100 - value for value in stays], "var(--gone)")):
            bars = {"type": "bar", "x": layers, "y": values, "marker": {"color": paint}, "hovertext": text, "hoverinfo": "text"}
            traces.append(bars | panels.axes(place))
    layout = panels.laid_out(range=[0, 100], tickvals=[0, 50, 100]) | {"showlegend": False}
    layout["xaxis"] |= {"title": {"text": "layer"}, "showgrid": False}
    says = "A bar for every layer, full height where all units stay: " + "; ".join(_range(rows, kind) for kind in kinds)
    return Chart("kept", says + ".", traces, layout, sections.kept(report), 90 + 120 * len(kinds))


def _by_layer(rows: Sequence[LayerRow], kind: str) -> dict[int, tuple[int, int]]:
    return {layer: row.sizes[kind] for row in rows if kind in row.sizes for layer in row.layers}


def _range(rows: Sequence[LayerRow], kind: str) -> str:
    counts = [(kept, units) for kept, units in _by_layer(rows, kind).values()]
    low, high, units = min(kept for kept, _ in counts), max(kept for kept, _ in counts), max(units for _, units in counts)
    between = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{between} of {units:,} {kind} stay in each layer"


def histogram(report: RunReport) -> Chart | None:
    """Units by their score, those that stay over those that go, a panel per kind."""
    shown = [one for one in report.saliency.histograms if any(one.kept + one.removed)] if report.saliency else []
    if not shown:
        return None
    panels = Panels([f"{one.kind}, units" for one in shown], {"barmode": "stack", "bargap": 0.04})
    traces: list[dict[str, Any]] = []
    for place, one in enumerate(shown):
        middle = [(low + high) / 2 for low, high in zip(one.edges, one.edges[1:], strict=False)]
        for name, counts, paint in (("stay", one.kept, "var(--kept)"), ("go", one.removed, "var(--removed)")):
            text = [f"10^{x:.2f}: {count:,} {one.kind} {name}" for x, count in zip(middle, counts, strict=True)]
            bars = {"type": "bar", "x": middle, "y": counts, "marker": {"color": paint}, "hovertext": text, "hoverinfo": "text"}
            traces.append(bars | {"name": name, "legendgroup": name, "showlegend": not place} | panels.axes(place))
    layout = panels.laid_out(rangemode="tozero", nticks=4)
    low = min(edge for one in shown for edge in one.edges)
    high = max(edge for one in shown for edge in one.edges)
    layout["xaxis"] |= {"title": {"text": "score of a unit"}, **_powers(low, high)}
    nothing = sum(one.nothing for one in shown)
    says = "How many units have which score, and whether they stay or go, by kind."
    says += f" {nothing:,} units are worth nothing and not drawn." if nothing else ""
    return Chart("scores", says, traces, layout, _histogram_table(shown), 110 + 150 * len(shown))


def _powers(low: float, high: float) -> dict[str, Any]:
    """Ticks at few powers of ten for an axis of logarithms."""
    step = max(1, round((high - low) / 6))
    powers = range(math.ceil(low), math.floor(high) + 1, step)
    return {"tickvals": list(powers), "ticktext": [f"10<sup>{power}</sup>" for power in powers], "range": [low, high]}


def _histogram_table(shown: Sequence[ScoreHistogram]) -> Table:
    rows = []
    for one in shown:
        for place, (stay, go) in enumerate(zip(one.kept, one.removed, strict=True)):
            if stay or go:
                low, high = (f"{10**edge:.3g}" for edge in one.edges[place : place + 2])
                rows.append([one.kind, low, high, f"{stay:,}", f"{go:,}"])
    return Table("Units by score", ["kind", "from", "to", "stay", "go"], rows)


def spread(report: RunReport) -> Chart | None:
    """Where the scores of every layer lie, and the threshold under which units go."""
    found = [one for one in report.saliency.groups if one.layer is not None] if report.saliency else []
    kinds = list(dict.fromkeys(one.kind for one in found if one.quantiles[-1] > 0))
    if not found or not kinds or report.saliency is None:
        return None
    levels = report.saliency.levels
    panels, traces = Panels([f"{kind}, score" for kind in kinds]), []
    for place, kind in enumerate(kinds):
        groups = [one for one in found if one.kind == kind]
        paint, first = colour_of(kind), not place
        at = {level: [_positive(one.quantiles[number]) for one in groups] for number, level in enumerate(levels)}
        layers = [one.layer for one in groups]
        line = {"type": "scatter", "x": layers, "mode": "lines", **panels.axes(place)}
        for low, high, dim in ((0.05, 0.95, 0.16), (0.25, 0.75, 0.3)):
            off = {"line": {"width": 0, "color": paint}, "hoverinfo": "skip", "showlegend": False}
            traces.append(line | off | {"y": at[low]})
            traces.append(line | off | {"y": at[high], "fill": "tonexty", "fillcolor": f"{paint}/{dim}"})
        text = [_says(one) for one in groups]
        hover = {"hovertext": text, "hoverinfo": "text"}
        middle = {"y": at[0.5], "line": {"color": paint, "width": 2}, "name": "median", "legendgroup": "median"}
        traces.append(line | middle | hover | {"showlegend": first})
        marks = {"mode": "markers", "marker": {"symbol": "line-ew", "size": 9, "line": {"width": 2.5, "color": "var(--removed)"}}}
        limit = {"y": [_positive(one.threshold) for one in groups], "name": "threshold", "legendgroup": "threshold"}
        traces.append(line | marks | limit | hover | {"showlegend": first})
    layout = panels.laid_out(type="log")
    for place, kind in enumerate(kinds):
        layout[f"yaxis{place + 1}" if place else "yaxis"] |= _decades([one for one in found if one.kind == kind])
    layout["xaxis"] |= {"title": {"text": "layer"}, "showgrid": False}
    says = "Where the scores of each layer's units lie (bands: the middle 90 and 50 %; line: the median), and the threshold."
    table = sections.scores(report)
    assert table is not None
    return Chart("spread", says, traces, layout, table, 110 + 170 * len(kinds))


def _decades(groups: Sequence[GroupScores]) -> dict[str, Any]:
    """Ticks at powers of ten, where scores span two or more."""
    values = [value for one in groups for value in one.quantiles if value > 0]
    powers = range(math.ceil(math.log10(min(values))), math.floor(math.log10(max(values))) + 1)
    if len(powers) < 2:
        return {"nticks": 4}
    return {"tickvals": [10.0**power for power in powers], "ticktext": [f"10<sup>{power}</sup>" for power in powers]}


def _says(one: GroupScores) -> str:
    edge = "" if one.threshold is None else f"<br>units below {one.threshold:.3g} go"
    return f"{one.name}<br>median {one.quantiles[len(one.quantiles) // 2]:.3g}{edge}"


def _positive(value: float | None) -> float | None:
    """What a logarithmic axis can show."""
    return value if value is not None and value > 0 else None


def curve(report: RunReport) -> Chart | None:
    """Perplexity over size, where sizes on the way were measured."""
    table, found = sections.curve(report), report.curve
    if table is None or found is None:
        return None
    text = [f"{whole(p.parameters)} parameters: perplexity {brief(p.perplexity)}" for p in found.points]
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [point.parameters for point in found.points],
        "y": [point.perplexity for point in found.points],
        "hovertext": text,
        "hoverinfo": "text",
        "line": {"color": "var(--kept)", "width": 2.5},
        "marker": {"size": [11, *[8] * (len(text) - 1)], "symbol": ["star", *["circle"] * (len(text) - 1)]},
    }
    layout = {"xaxis": {"title": {"text": "parameters"}, "autorange": "reversed"}, "showlegend": False}
    layout["yaxis"] = {"title": {"text": f"perplexity {found.text} @{found.window}"}}
    first, last = found.points[0], found.points[-1]
    says = (
        f"Perplexity goes from {brief(first.perplexity)} at {whole(first.parameters)} parameters (star: dense) to "
        f"{brief(last.perplexity)} at {whole(last.parameters)}."
    )
    return Chart("curve", says, [line], layout, table)


def shots(report: RunReport) -> Chart | None:
    """What every shot cost by its own scores."""
    table = sections.shots(report)
    if table is None:
        return None
    text = [f"shot {shot.number}: {whole(shot.parameters)} parameters left, scores {shot.loss:.4g}" for shot in report.shots]
    bars = {
        "type": "bar",
        "x": [str(shot.number) for shot in report.shots],
        "y": [shot.loss for shot in report.shots],
        "hovertext": text,
        "hoverinfo": "text",
        "marker": {"color": "var(--removed)"},
    }
    layout = {"xaxis": {"title": {"text": "shot"}, "type": "category"}, "yaxis": {"title": {"text": "score of what went"}}}
    says = f"The summed scores of the units that went in each of {len(report.shots)} shots."
    return Chart("shots", says, [bars], {**layout, "showlegend": False}, table, 300)


def prices(report: RunReport) -> Chart | None:
    """What trials found of every layer, in the first shot and in the last."""
    table = sections.prices(report)
    if table is None:
        return None
    tried = [shot for shot in report.shots if shot.prices]
    traces = []
    for shot, dash in zip([tried[0], *tried[1:][-1:]], DASHES, strict=False):
        points: dict[str, list[tuple[float, float]]] = {}
        for group in report.groups:
            if group.name in shot.prices and group.layer is not None:
                points.setdefault(group.kind, []).append((group.layer, shot.prices[group.name]))
        for number, kind in enumerate(points):
            name = f"{kind}, shot {shot.number}" if len(tried) > 1 else kind
            look = {"color": colour_of(kind), "width": 2, "dash": dash}
            traces.append(_line(name, points[kind], number, "lines+markers") | {"line": look})
    layout = {"xaxis": {"title": {"text": "layer"}, "showgrid": False}}
    layout["yaxis"] = {"title": {"text": "measured over expected"}, "rangemode": "tozero"}
    says = "What removing a part of each group alone cost, over what its scores said; the scores are multiplied by it, in bounds."
    return Chart("prices", says, traces, layout, table)


def losses(report: RunReport) -> Chart | None:
    """The training loss of a method that trains while it prunes."""
    if not report.losses:
        return None
    points = list(enumerate(report.losses, start=1))
    says = f"Loss over {len(points):,} steps: {report.losses[0]:.4f} at first, {report.losses[-1]:.4f} at last."
    return _training("losses", says, points, [])


def trainings(facts: Facts) -> list[Chart]:
    """Loss and held-out loss of every training."""
    found = []
    for number, training in enumerate(facts.trainings):
        says = f"{training.name}: loss over {training.steps:,} steps."
        if training.held_out:
            says += f" Held out: {training.held_out[0][1]:.4f} at first, {training.held_out[-1][1]:.4f} at last."
        found.append(_training(f"training-{number}", says, training.losses, training.held_out))
    return found


def _training(name: str, says: str, points: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> Chart:
    thin = thinned(points, LOSSES_SHOWN)
    traces = [_line("training", thin, 0, "lines")]
    if held_out:
        traces.append(_line("held out", held_out, 1, "lines+markers"))
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss, nats per token"}}}
    return Chart(name, says, traces, layout, losses_table(points, held_out))


def losses_table(points: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], *, shown: int = 20) -> Table:
    """Losses over steps, thinned, with the held-out ones beside them."""
    measured = dict(held_out)
    picked = dict(points[:: max(1, len(points) // shown)]) | {step: loss for step, loss in points if step in measured}
    rows = [
        [str(step), f"{picked[step]:.4f}" if step in picked else "", f"{measured[step]:.4f}" if step in measured else ""]
        for step in sorted({*picked, *measured})
    ]
    if not measured:
        return Table("Loss over steps", ["step", "loss"], [row[:2] for row in rows])
    return Table("Loss over steps", ["step", "loss", "held-out loss"], rows)


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most so many points: neighbours are averaged, under the step of the last."""
    size = math.ceil(len(points) / most) if points else 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def rounds(facts: Facts, table: Table) -> Chart | None:
    """How far the model is behind the dense one on every source, round by round."""
    if not facts.rounds:
        return None
    sources = dict.fromkeys(source for one in facts.rounds for source in one.gaps)
    points = {source: [(place, one.gaps.get(source)) for place, one in enumerate(facts.rounds)] for source in sources}
    traces = [
        _line(facts.names[source], points[source], number, "lines+markers") for number, source in enumerate(sources)
    ]
    names = [f"{one.stage} {one.number}" for one in facts.rounds]
    axis = {"tickvals": list(range(len(names))), "ticktext": names}
    layout = {"xaxis": axis, "yaxis": {"title": {"text": "nats per token behind"}, "rangemode": "tozero"}}
    return Chart("rounds", "How far the model is behind the dense one on every source, round by round.", traces, layout, table)


def _line(name: str, points: Sequence[tuple[float, float | None]], number: int, mode: str) -> dict[str, Any]:
    look: Mapping[str, Any] = {"color": colour(number), "width": 2, "dash": DASHES[number // 7 % len(DASHES)]}
    marker = {"symbol": MARKS[number % len(MARKS)], "size": 7}
    steps, values = [step for step, _ in points], [value for _, value in points]
    return {"type": "scatter", "mode": mode, "x": steps, "y": values, "name": name, "line": look, "marker": marker}
