"""What pages are made of: tables, and charts with the table that says the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from resect.explain import inline

GAP = 0.13
"""Between panels, as a share of a chart's height for two of them."""


@dataclass(frozen=True)
class Table:
    """A caption, a header, and rows of text; numbers stand to the right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """So many columns, the first, are words and stand to the left."""


@dataclass(frozen=True)
class Chart:
    """A picture in the terms of plotly, what it says in a sentence, and its values as a table.

    Colours are the names of those in `style.css`, `var(--kept)`, so that a chart follows the page's theme.
    """

    name: str
    says: str
    traces: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    table: Table
    height: int = 340


@dataclass(frozen=True)
class Tile:
    """A figure of the headline: what became of it, large, and both ends of it, small."""

    about: str
    name: str
    change: str
    before: str
    after: str
    between: str = ""
    """What the change lies between, where that is known."""


@dataclass(frozen=True)
class Section:
    """A part of a page; one without anything in it is left out."""

    name: str
    title: str
    lead: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    lines: Sequence[str] = ()
    code: str = ""
    pairs: Sequence[Pair] = ()

    def __bool__(self) -> bool:
        return bool(self.charts or self.tables or self.lines or self.code or self.pairs)


@dataclass(frozen=True)
class Pair:
    """What models wrote after a prompt, side by side: (name, text)."""

    prompt: str
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Panels:
    """Panels one above the other that share their horizontal axis."""

    titles: Sequence[str]
    layout: dict[str, Any] = field(default_factory=dict)

    def axes(self, place: int) -> dict[str, str]:
        """Which axes a trace of a panel has."""
        return {"xaxis": "x", "yaxis": f"y{place + 1}" if place else "y"}

    def laid_out(self, **axis: Any) -> dict[str, Any]:
        """The layout, with every vertical axis as given."""
        count = len(self.titles)
        gap = GAP * 2 / max(count, 2)
        height = (1 - gap * (count - 1)) / count
        layout: dict[str, Any] = {"xaxis": {"anchor": f"y{count}" if count > 1 else "y"}, "annotations": []}
        for place, title in enumerate(self.titles):
            top = 1 - place * (height + gap)
            layout["yaxis" if not place else f"yaxis{place + 1}"] = {"domain": [max(top - height, 0), top], **axis}
            layout["annotations"].append(heading(title, top))
        return layout | self.layout


def heading(text: str, top: float) -> dict[str, Any]:
    """A title over a panel."""
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": top, "xanchor": "left", "yanchor": "bottom"}
    return {"text": f"<b>{text}</b>", "showarrow": False, "font": {"size": 13}, **place}


def markdown(table: Table) -> str:
    """A table as Markdown, without its caption."""
    ruler = ["---"] * table.words + ["---:"] * (len(table.header) - table.words)
    return "\n".join("| " + " | ".join(inline(cell) for cell in row) + " |" for row in [table.header, ruler, *table.rows])


def bullets(lines: Iterable[str]) -> str:
    """Lines as a list in Markdown."""
    return "\n".join(f"* {inline(line)}" for line in lines)
