"""Reports as one HTML file each, which needs nothing else: text and tables first, charts beside them.

Without scripts everything is still there as text. Charts are described as plain values; the page gives them its own colours, in
light and in dark.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from resect.recovery import Facts
from resect.report import charts, sections
from resect.report.compare import Comparison, comparison_sections
from resect.report.knowledge import Knowledge, knowledge_all, knowledge_note, knowledge_title
from resect.report.knowledge_picture import knowledge_chart
from resect.report.parts import Pair, Section, Table, Tile
from resect.report.recovery import RecoveryReport, facts_lines, facts_losses, facts_rounds, recovery_asked, recovery_lines
from resect.report.results import RunReport
from resect.report.words import STATUS, asked, budget_lines, kept_shares, protected_lines, provenance, vocabulary_lines

if TYPE_CHECKING:
    from jinja2 import Environment


TAGS = re.compile(r"<(?!/?(b|br|sup)>)")
"""The beginning of any tag but those that titles and labels of charts hold."""
GENERATOR = '<meta name="generator" content="resect">'
"""What every page says of itself."""


def is_page(file: Path) -> bool:
    """Whether a file is a page that resect wrote."""
    with file.open("rb") as opened:
        return GENERATOR.encode() in opened.read(2048)


def run_html(report: RunReport) -> str:
    """The page of a run."""
    return page(
        title=f"{report.recipe['model']}, pruned" if report.status != "planned" else f"{report.recipe['model']}, planned",
        lead=[asked(report), f"Kept: {kept_shares(report)}.", STATUS[report.status]],
        tiles=sections.tiles(report),
        figures="report.json",
        parts=[
            Section("figures", "Before and after", sections.perplexity_note(report), tables=[sections.headline(report)]),
            _kept(report),
            Section("curve", "Quality over size", charts=present(charts.curve(report), charts.shots(report))),
            Section(
                "scores",
                "What decided: the scores",
                "A score is what losing a unit is estimated to cost; the lowest go first. Scores of one kind compare.",
                charts=present(charts.histogram(report), charts.spread(report), charts.prices(report)),
            ),
            *([_knowledge(Knowledge.model_validate(report.knowledge))] if report.knowledge else []),
            Section("training", "Training", charts=present(charts.losses(report))),
            *(_learnt(report.recovery, "Recovery") if report.recovery else []),
            Section("generations", "What the models write", "Greedy continuations of the same prompts.", pairs=_pairs(report)),
            Section("frozen", "Kept whole, and why", lines=_whole(report)),
            _recipe(report.recipe),
            Section(
                "provenance",
                "Provenance",
                provenance(report),
                lines=sections.checks(report),
                tables=[*_calibration(report), sections.seconds(report.seconds), sections.made_with(report)],
            ),
        ],
    )


def recovery_html(report: RecoveryReport) -> str:
    """The page of a recovery."""
    facts = report.facts
    losses = facts_losses(facts)
    tiles = [
        Tile("Quality", f"held-out perplexity, {row[0]}", _change(row[1], row[2]), row[1], row[2]) for row in losses.rows
    ]
    return page(
        title=f"{report.recipe['model']}, recovered",
        lead=[recovery_asked(report)],
        tiles=tiles,
        figures="report.json",
        parts=[
            *_learnt(facts, "Before and after", recovery_lines(report)),
            _recipe(report.recipe),
            Section(
                "provenance",
                "Provenance",
                tables=[sections.seconds(report.seconds), sections.made_with(report)],
                lines=_reloaded(report),
            ),
        ],
    )


def _learnt(facts: Facts, title: str, lines: Sequence[str] = ()) -> list[Section]:
    """What a recovery did."""
    return [
        Section("recovery", title, tables=[facts_losses(facts)], lines=[*facts_lines(facts), *lines]),
        Section("losses", "Loss over steps", charts=charts.trainings(facts)),
        Section("rounds", "Behind the dense model", charts=present(charts.rounds(facts, facts_rounds(facts)))),
    ]


def knowledge_html(found: Knowledge) -> str:
    """The page of an analysis."""
    worst = found.worst()
    dearest = [group.name for group in worst if group.name in found.protected]
    made = Table("Made with", ["what", "which"], [[name, version] for name, version in found.versions.items()])
    return page(
        title=f"{found.model}, analysed",
        lead=[knowledge_title(found), f"To be protected, the dearest first: {', '.join(dearest) or 'none'}."],
        tiles=[],
        figures="analysis.json",
        parts=[
            _knowledge(found),
            Section("groups", "Every group, the dearest first", tables=[knowledge_all(found)]),
            Section("provenance", "Provenance", f"{found.seconds:.1f} seconds, seed {found.seed}.", tables=[made]),
        ],
    )


def comparison_html(found: Comparison) -> str:
    """The page of runs side by side."""
    pruned = sum(not one.dense for one in found.candidates)
    count = pruned if pruned > 1 else len(found.candidates)
    return page(title=f"{count} models side by side", lead=[], tiles=[], parts=comparison_sections(found))


def page(*, title: str, lead: Sequence[str], tiles: Sequence[Tile], parts: Sequence[Section], figures: str = "") -> str:
    """One file of HTML; sections with nothing in them are left out. `figures` names the file beside it for programs."""
    from plotly.offline import get_plotlyjs

    shown = [part for part in parts if part]
    drawn = [chart for part in shown for chart in part.charts]
    specs = [{"name": chart.name, "traces": chart.traces, "layout": chart.layout} for chart in drawn]
    plotly: str = get_plotlyjs() if drawn else ""
    script = _templates().get_template("script.js").render()
    text: str = _templates().get_template("page.html.j2").render(
        title=title,
        lead=[line for line in lead if line],
        tiles=tiles,
        sections=shown,
        figures=figures,
        charts=_embedded(specs) if drawn else "",
        plotly=plotly,
        script=script,
        hashes=" ".join(_hash(one) for one in (script, plotly) if one),
    )
    return text


def _hash(script: str) -> str:
    """A script as a policy of content names it: no other runs in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def present(*charts: Any) -> list[Any]:
    """Those that are there."""
    return [chart for chart in charts if chart is not None]


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    always = select_autoescape(default=True, default_for_string=True, enabled_extensions=("html", "j2"))
    loader = PackageLoader("resect.report", "templates")
    found = Environment(loader=loader, autoescape=always, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["joined"] = joined
    return found


def joined(text: str) -> str:
    """A number stays on one line with its unit."""
    return re.sub(r"(?<=\d) (?=[%kMGT])", "\u00a0", text)


def _embedded(values: Any) -> str:
    """JSON that no text in it can end the script element of; of HTML, charts get the marks that they are made of."""
    text = json.dumps(_drawable(values), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _drawable(value: Any) -> Any:
    """The same with null for numbers that are not finite, and in texts no formulas, nor tags but plotly's plain ones."""
    if isinstance(value, Mapping):
        return {key: _drawable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_drawable(inner) for inner in value]
    if isinstance(value, str):
        return TAGS.sub("&lt;", value).replace("$", "&#36;")  # between two of these plotly reads formulas
    return None if isinstance(value, float) and value - value != 0 else value


def _kept(report: RunReport) -> Section:
    lines = [*budget_lines(report), *protected_lines(report), *vocabulary_lines(report)]
    chart = charts.kept(report)
    table = [] if chart or not report.groups else [sections.kept(report)]
    return Section("kept", "What every layer keeps", charts=present(chart), tables=table, lines=lines)


def _knowledge(found: Knowledge) -> Section:
    return Section("knowledge", "Where the network keeps its knowledge", knowledge_note(found), charts=[knowledge_chart(found)])


def _pairs(report: RunReport) -> list[Pair]:
    written = [model for model in report.models if model.generations]
    if not written:
        return []
    return [
        Pair(prompt, [(model.name, model.generations[place].strip()) for model in written])
        for place, prompt in enumerate(report.prompts)
    ]


def _whole(report: RunReport) -> list[str]:
    withheld = [f"{kind}, because no stock configuration says otherwise: {why}" for kind, why in report.withheld.items()]
    return [*withheld, *report.frozen]


def _recipe(recipe: Mapping[str, Any]) -> Section:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    return Section("recipe", "Recipe", "Everything that was asked for, defaults written out.", code=text)


def _calibration(report: RunReport) -> list[Table]:
    if report.calibration is None:
        return []
    rows = [[name, text] for name, text in _flat("", report.calibration)]
    return [Table("Calibration text", ["what", "which"], rows, words=2)]


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Nested values as rows; what a list holds several of is numbered."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}, {key}" if name else str(key), inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value, start=1):
            yield from _flat(f"{name} {number}" if len(value) > 1 else name, inner)
    else:
        yield name, str(value)


def _reloaded(report: RecoveryReport) -> list[str]:
    found = report.reload_difference
    return [] if found is None else [f"Reloaded in a fresh process: logits differ by {found:.1e} of their spread."]


def _change(before: str, after: str) -> str:
    first, last = (float(text.replace(",", "")) for text in (before, after))
    return f"{100 * (last / first - 1):+.1f} %" if first else ""
