"""The report of a run as Markdown."""

from __future__ import annotations

import json

from resect.explain import inline, plain_text
from resect.report.layers import bar, kinds_of, layer_rows, spans
from resect.report.parts import Table, bullets, markdown
from resect.report.recovery import facts_markdown
from resect.report.results import RunReport
from resect.report.sections import checks, curve, headline, made_with, perplexity_note, prices, scores, seconds, shots
from resect.report.words import STATUS, asked, budget_lines, kept_shares, protected_lines, provenance, vocabulary_lines


def run_markdown(report: RunReport) -> str:
    """What was asked, before and after, what every layer keeps, and everything needed to judge and repeat it."""
    parts = [
        f"# {inline(asked(report))}",
        STATUS[report.status],
        f"Kept: {inline(kept_shares(report))}.",
        markdown(headline(report)),
        f"Seed {report.recipe['seed']}. {inline(perplexity_note(report))}",
        inline(" ".join(checks(report))),
        "## What every layer keeps",
        _layers(report),
        *_withheld(report),
        bullets([*budget_lines(report), *protected_lines(report), *vocabulary_lines(report)]),
        *(["## Recovery", *facts_markdown(report.recovery, level="###")] if report.recovery else []),
        *_titled("Quality over size", curve(report)),
        *_titled("Shots", shots(report)),
        *_generations(report),
        "## Calibration",
        _calibration(report),
        "## Kept whole, and why",
        bullets(report.frozen) or "Nothing.",
        *_titled("Scores", scores(report)),
        *_titled("Prices by trial", prices(report)),
        "## Seconds",
        markdown(seconds(report.seconds)),
        "## Made with",
        markdown(made_with(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _titled(title: str, table: Table | None) -> list[str]:
    """A table under a heading, with its caption; nothing where there is none."""
    return [f"## {title}", f"{inline(table.caption)}.", markdown(table)] if table else []


def _layers(report: RunReport) -> str:
    rows = layer_rows(report.groups)
    kinds = kinds_of(rows)
    lines = [f"{'layers':<10}" + "".join(f"{kind:<34}" for kind in kinds)]
    for row in rows:
        cells = []
        for kind in kinds:
            kept, units = row.sizes.get(kind, (0, 0))
            cells.append(f"{bar(kept, units)} {kept:,} of {units:,}" if units else "")
        lines.append(f"{spans(row.layers) or 'all':<10}" + "".join(f"{cell:<34}" for cell in cells))
    return "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def _withheld(report: RunReport) -> list[str]:
    if not report.withheld:
        return []
    lines = bullets(f"{kind}: {why}" for kind, why in report.withheld.items())
    return ["### Left whole, because no stock configuration says otherwise", lines + "\n\n`layout: per-layer` cuts them too."]


def _generations(report: RunReport) -> list[str]:
    if not report.prompts or not any(model.generations for model in report.models):
        return []
    parts = ["## Greedy continuations"]
    for place, prompt in enumerate(report.prompts):
        parts.append(f"**{inline(prompt)}**")
        parts += [f"*{inline(model.name)}*\n{_quoted(model.generations[place])}" for model in report.models if model.generations]
    return parts


def _calibration(report: RunReport) -> str:
    if report.calibration is None:
        return inline(provenance(report))
    facts = json.dumps(report.calibration, indent=1, ensure_ascii=False)
    return f"{inline(provenance(report))}\n\n```json\n{facts}\n```"


def _quoted(text: str) -> str:
    return "\n".join(f"> {plain_text(line)}" for line in text.strip().splitlines() or [""])
