"""The knowledge distribution as a picture: what perplexity rises by over the blocks, a panel per kind, a line per ratio.

Rises are drawn by their inverse hyperbolic sine: in proportion where they are small, which they are in most blocks, by their
logarithm where they are large, and falls below zero.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import asinh
from typing import TYPE_CHECKING, Any

from resect.errors import printable
from resect.report.charts import MARKS
from resect.report.figures import brief
from resect.report.knowledge import GroupKnowledge, Knowledge, knowledge_all, percent
from resect.report.parts import Chart, Panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CEILING = 1e9
"""Rises above are drawn here, in percent."""
COLOURS = ("#7fb8da", "#2b7bba", "#0b3c6f")
"""From the lowest ratio to the highest; more ratios lie between."""
DENSE, PROTECTED = "#666666", "#c0392b"
RISE = "perplexity rises by"


@dataclass(frozen=True)
class Panel:
    """Groups of one family, at most one in a block; `spanning` are those of no block."""

    title: str
    groups: list[GroupKnowledge]
    spanning: list[GroupKnowledge]


def panels(found: Knowledge) -> list[Panel]:
    """A panel per kind, of sub-layers per module; where a block has several groups, the dearest is shown."""
    families: dict[str, list[GroupKnowledge]] = {}
    for group in found.groups:
        title = f"{group.kind}: {group.name.rpartition('.')[2]}" if group.kind == "sublayers" else group.kind
        families.setdefault(title, []).append(group)
    return [_panel(title, groups) for title, groups in families.items()]


def _panel(title: str, groups: list[GroupKnowledge]) -> Panel:
    dearest: dict[int, GroupKnowledge] = {}
    for group in sorted(groups, key=lambda group: group.damage):
        if group.layer is not None:
            dearest[group.layer] = group
    several = sum(group.layer is not None for group in groups) > len(dearest)
    return Panel(
        f"{title} (the dearest of each block)" if several else title,
        [dearest[layer] for layer in sorted(dearest)],
        [group for group in groups if group.layer is None],
    )


def knowledge_png(found: Knowledge, *, dpi: int = 150) -> bytes:
    """A still picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn, blocks = panels(found), _blocks(found)
    size = (min(max(8, 0.19 * blocks), 15), 1.4 + 2.3 * len(drawn))
    figure = Figure(figsize=size, layout="constrained", dpi=dpi)
    axes = figure.subplots(len(drawn), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, drawn, strict=True):
        _draw(axis, panel, found)
    ticks = _ticks(found)
    axes[0].set_yticks(list(ticks.values()), list(ticks))
    axes[-1].set_xlabel("block")
    axes[-1].set_xlim(-0.7, blocks - 0.3)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20, steps=[1, 2, 5, 10]))
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), 6), frameon=False, fontsize=8.5
    )
    figure.suptitle(printable(_title(found)), x=0.01, ha="left", fontsize=10.5, parse_math=False)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a font has not all characters of all names
        figure.savefig(out, format="png")
    return out.getvalue()


def _draw(axis: Axes, panel: Panel, found: Knowledge) -> None:
    label: str | None = _protected(found)
    for group in panel.groups:
        if group.name in found.protected and group.layer is not None:
            low, high = group.layer - 0.5, group.layer + 0.5
            axis.axvspan(low, high, color=PROTECTED, alpha=0.16, linewidth=0, label=label, zorder=0)
            label = None
    for place, (ratio, colour) in enumerate(zip(found.ratios, _colours(found), strict=True)):
        values = [_height(found, group, place) for group in panel.groups]
        layers = [group.layer or 0 for group in panel.groups]
        axis.plot(layers, values, color=colour, marker="o", markersize=3.2, linewidth=1.3, label=f"{percent(ratio)} removed")
        for group in panel.spanning:
            axis.axhline(_height(found, group, place), color=colour, linestyle=":", linewidth=1.6)
    axis.axhline(0, color=DENSE, linestyle="--", linewidth=1, label=_dense(found))
    axis.set_ylabel(RISE)
    axis.set_title(printable(_heading(panel)), loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axis.grid(axis="y", color="#e2e2e2", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def knowledge_chart(found: Knowledge) -> Chart:
    """The same to move about in, with the figures of every group."""
    drawn = panels(found)
    stack = Panels([_heading(panel) for panel in drawn])
    traces: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for place, panel in enumerate(drawn):
        axes = stack.axes(place)
        for group in panel.groups:
            if group.name in found.protected and group.layer is not None:
                band = {"type": "rect", "x0": group.layer - 0.5, "x1": group.layer + 0.5, "y0": 0, "y1": 1, "layer": "below"}
                on = {"xref": axes["xaxis"], "yref": f"{axes['yaxis']} domain"}
                shapes.append(band | on | {"fillcolor": "var(--removed)/0.18", "line": {"width": 0}})
        for number, ratio in enumerate(found.ratios):
            name, paint = f"{percent(ratio)} removed", _shade(number, len(found.ratios))
            line = {"type": "scatter", "mode": "lines+markers", "name": name, "legendgroup": name, "showlegend": not place}
            look = {"line": {"color": paint, "width": 2}, "marker": {"size": 6, "symbol": MARKS[number % len(MARKS)]}}
            values = {"x": [group.layer for group in panel.groups], "y": [_height(found, g, number) for g in panel.groups]}
            hover = {"hovertext": [_hover(found, group, number) for group in panel.groups], "hoverinfo": "text"}
            traces.append(line | look | values | hover | axes)
            for group in panel.spanning:
                shapes.append(_across(_height(found, group, number), axes, {"color": paint, "dash": "dot"}))
        shapes.append(_across(0, axes, {"color": "var(--muted)", "dash": "dash", "width": 1}))
    ticks = _ticks(found)
    layout = stack.laid_out(tickvals=list(ticks.values()), ticktext=list(ticks), zeroline=False) | {"shapes": shapes}
    layout["xaxis"] |= {"title": {"text": "block"}, "range": [-0.7, _blocks(found) - 0.3], "showgrid": False}
    says = (
        f"What perplexity rises by, in per cent, when a part of one group is removed. Dashed: {_dense(found)}. "
        f"Shaded: {_protected(found)}."
    )
    return Chart("knowledge", says, traces, layout, knowledge_all(found), 120 + 220 * len(drawn))


def _across(height: float, axes: Mapping[str, str], line: Mapping[str, Any]) -> dict[str, Any]:
    """A line across a panel."""
    ends = {"x0": 0, "x1": 1, "xref": "x domain", "y0": height, "y1": height, "yref": axes["yaxis"]}
    return {"type": "line", "line": dict(line), **ends}


def _shade(number: int, count: int) -> str:
    """One of the five shades of a page, from the lowest ratio to the highest."""
    return f"var(--s{1 + (round(4 * number / (count - 1)) if count > 1 else 4)})"


def _hover(found: Knowledge, group: GroupKnowledge, place: int) -> str:
    removal = group.removals[place]
    value = brief(removal.perplexity)
    value += f" ({_rise(found, group, place):+,.2f} %)"
    protected = "<br>protected" if group.name in found.protected else ""
    return f"{group.name}<br>{removal.removed:,} of {group.units:,} removed: perplexity {value}{protected}"


def _heading(panel: Panel) -> str:
    return f"{panel.title} (dotted: in no block)" if panel.spanning else panel.title


def _title(found: Knowledge) -> str:
    text = f"{found.dense.text}, {found.dense.tokens:,} tokens in windows of {found.dense.window}"
    return f"{found.model} with a part of one group removed ({text})"


def _dense(found: Knowledge) -> str:
    return f"dense: {brief(found.dense.value)}"


def _protected(found: Knowledge) -> str:
    return f"protected: the worst {percent(found.gamma)}"


def _blocks(found: Knowledge) -> int:
    return 1 + max((group.layer or 0 for group in found.groups), default=0)


def _rise(found: Knowledge, group: GroupKnowledge, place: int) -> float:
    """What perplexity rises by, in percent."""
    value = group.removals[place].perplexity
    return min(100 * (value / found.dense.value - 1), CEILING)


def _height(found: Knowledge, group: GroupKnowledge, place: int) -> float:
    """Where a rise is drawn."""
    return asinh(_rise(found, group, place))


def _ticks(found: Knowledge) -> dict[str, float]:
    """Rises with a label, and where they are drawn: few enough to be read."""
    rises = [_rise(found, group, place) for group in found.groups for place in range(len(found.ratios))]
    low, high = min(rises, default=0), max(rises, default=0)
    shown = [value for value in _steps() if low / 2 <= value <= 1.5 * high or value == 0]
    return {f"{value:+,.0f} %" if 0 < abs(value) < 1e5 else f"{value:+.0e} %" if value else "0": asinh(value) for value in shown}


def _steps() -> Iterator[float]:
    """0, 1, 3, 10, ... and the same below zero."""
    yield 0
    for power in range(10):
        yield from (sign * factor * 10**power for factor in (1, 3) for sign in (1, -1) if power < 3 or factor == 1)


def _colours(found: Knowledge) -> list[str]:
    """A colour per ratio."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    shades, last = LinearSegmentedColormap.from_list("ratios", COLOURS), len(found.ratios) - 1
    return [to_hex(shades(place / last if last else 1.0)) for place in range(last + 1)]
