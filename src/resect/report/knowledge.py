"""Where a network keeps what it knows: what perplexity becomes when a part of one coupled group is removed, group by group.

Source: LoRAShear (arXiv 2310.18356), its analysis of the knowledge distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import fmean
from typing import Any, Final, Literal

from rich import box
from rich.console import Group as Parts
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from resect.explain import from_json, inline
from resect.report.figures import brief
from resect.report.parts import Table as Rows
from resect.report.parts import markdown
from resect.report.results import SCHEMA, Record, TextPerplexity

SHOWN = 24
"""Groups shown in a terminal; Markdown and JSON have all."""
MARK: Final = "*"


class Removal(Record):
    """A part of a group removed alone, and what the model was then worth."""

    ratio: float
    """As asked for."""
    removed: int
    """Units: the ratio in whole ones, at least one, at most what the network can do without."""
    nats: float
    """Mean cross-entropy per predicted token."""
    perplexity: float


class GroupKnowledge(Record):
    """What was measured of one coupled group."""

    name: str
    kind: str
    layer: int | None
    units: int
    damage: float
    """Nats per token that removing it costs, the mean over the ratios."""
    removals: list[Removal]


class Knowledge(Record):
    """The knowledge distribution of a model. `protected` are the groups that cost most: the worst share `gamma` of them."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["analysis"] = "analysis"
    model: str
    units: str
    """How the units of a group that go were chosen."""
    ratios: list[float]
    gamma: float
    seed: int
    dense: TextPerplexity
    groups: list[GroupKnowledge]
    """In the order of the network."""
    protected: list[str]
    """Worst first."""
    passing: bool
    """Whether blocks before a group were passed over, or all of the model ran every time."""
    seconds: float
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}

    @classmethod
    def from_json(cls, text: str) -> Knowledge:
        """Reads `to_json`; anything else is a `UsageError` that says where."""
        return from_json(cls, text, "an analysis")

    @property
    def kinds(self) -> list[str]:
        """The kinds of the groups, in the order of the network."""
        return list(dict.fromkeys(group.kind for group in self.groups))

    def worst(self) -> list[GroupKnowledge]:
        """All groups, the dearest first."""
        return sorted(self.groups, key=lambda group: -group.damage)


def damage(dense: float, removals: Sequence[Removal]) -> float:
    """What removing a group costs: nats per token over those of the dense model, the mean over the ratios."""
    return fmean(removal.nats - dense for removal in removals)


def unprunable(groups: Sequence[GroupKnowledge], gamma: float) -> list[str]:
    """The names of the worst share `gamma` of the groups, rounded up to whole ones, worst first."""
    worst = sorted(groups, key=lambda group: -group.damage)
    return [group.name for group in worst[: ceil(gamma * len(groups) - 1e-9)]]


def knowledge_table(found: Knowledge) -> Parts:
    """The groups that cost most, for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _header(found):
        table.add_column(heading, justify="left" if heading in ("group", "kind") else "right", overflow="fold")
    for group in found.worst()[:SHOWN]:
        table.add_row(*_row(found, group), style="bold" if group.name in found.protected else None)
    more = len(found.groups) - SHOWN
    parts: list[RenderableType] = [Text(knowledge_title(found), style="bold"), table]
    if more > 0:
        parts.append(Text(f"and {more} more groups in analysis.md", style="dim"))
    return Parts(*parts, Text(knowledge_note(found), style="dim"))


def knowledge_markdown(found: Knowledge) -> str:
    """All groups, the dearest first, and how they were measured."""
    parts = [f"# {inline(knowledge_title(found))}", "![perplexity by block](analysis.png)", inline(knowledge_note(found))]
    parts.append(markdown(knowledge_all(found)))
    made = inline(", ".join(f"{name} {version}" for name, version in found.versions.items()))
    return "\n\n".join([*parts, f"{found.seconds:.1f} seconds. {made}."]) + "\n"


def knowledge_all(found: Knowledge) -> Rows:
    """All groups, the dearest first."""
    caption = f"Perplexity with a part of one group removed; dense {brief(found.dense.value)}"
    return Rows(caption, _header(found), [_row(found, group) for group in found.worst()], words=2)


def percent(ratio: float) -> str:
    """A ratio as people read it."""
    return f"{100 * ratio:g} %"


def knowledge_title(found: Knowledge) -> str:
    """Which model, and what was done to it."""
    text = f"{found.dense.text} @{found.dense.window}, {found.dense.tokens:,} tokens predicted"
    return f"Where {found.model} keeps its knowledge: perplexity with parts of one group removed ({text})"


def knowledge_note(found: Knowledge) -> str:
    """How it was measured."""
    chosen = "the smallest by weight magnitude" if found.units == "magnitude" else f"drawn at random with seed {found.seed}"
    return (
        f"Dense {brief(found.dense.value)}. The units of a group that go are {chosen}. Damage: nats per token over the dense "
        f"model's, the mean over the ratios. {MARK}: among the worst {percent(found.gamma)} of {len(found.groups)} groups, to be "
        "protected."
    )


def _header(found: Knowledge) -> list[str]:
    return ["group", "kind", "units", *(f"{percent(ratio)} gone" for ratio in found.ratios), "damage", ""]


def _row(found: Knowledge, group: GroupKnowledge) -> list[str]:
    values = [brief(removal.perplexity) for removal in group.removals]
    mark = MARK if group.name in found.protected else ""
    return [group.name, group.kind, f"{group.units:,}", *values, f"{group.damage:.3f}", mark]
