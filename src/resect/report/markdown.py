"""The report of a run as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from resect.report.figures import before_and_after
from resect.report.layers import bar, kinds_of, layer_rows, spans
from resect.report.recovery import facts_markdown
from resect.report.results import RunReport
from resect.report.words import LOADS, asked, kept_shares, protected_lines, protocol, provenance, vocabulary_lines

STATUS = {
    "planned": "A dry run: the plan was made, nothing was cut.",
    "saved": "The pruned model is saved and verified; its measurements are not complete.",
    "complete": "",
}


def run_markdown(report: RunReport) -> str:
    """What was asked, before and after, what every layer keeps, and everything needed to judge and repeat it."""
    parts = [
        f"# {asked(report)}",
        STATUS[report.status],
        f"Kept: {kept_shares(report)}.",
        _headline(report),
        f"Seed {report.recipe['seed']}. {_perplexity_note(report)}",
        *_loading(report),
        "## What every layer keeps",
        _layers(report),
        *_withheld(report),
        _bullets([*protected_lines(report), *vocabulary_lines(report)]),
        *(["## Recovery", *facts_markdown(report.recovery, level="###")] if report.recovery else []),
        *_generations(report),
        "## Calibration",
        _calibration(report),
        "## Kept whole, and why",
        _bullets(report.frozen) or "Nothing.",
        "## Seconds",
        _table(["stage", "seconds"], [[stage, f"{seconds:.1f}"] for stage, seconds in report.seconds.items()]),
        "## Made with",
        _table(["what", "which"], _made_with(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(report: RunReport) -> str:
    after = "planned" if report.status == "planned" else "pruned"
    rows = [[figure.name, *figure.texts(), figure.change()] for figure in before_and_after(report)]
    return _table(["", "dense", after, "change"], rows)


def _perplexity_note(report: RunReport) -> str:
    found = [p for model in report.models for p in model.perplexities]
    if not found:
        return "Nothing was evaluated."
    digests = ", ".join(dict.fromkeys(f"{p.text} `{p.digest[:12]}`" for p in found))
    return f"Perplexity: {protocol(report.models)} Text tokens: {digests}."


def _loading(report: RunReport) -> list[str]:
    if report.saved is None:
        return []
    saved = report.saved
    kind = f"Saved as `{saved['model_type']}`, {saved['layout']}"
    kind += f", relabelled from `{saved['relabelled_from']}`" if saved["relabelled_from"] else ""
    lines = [f"{kind}. Loads with {LOADS[saved['layout']]}."]
    check = report.cut_equals_mask
    if check is not None:
        lines.append(f"Cut against mask: logits differ by {check['difference']:.1e}, {check['allowed']:.1e} is allowed.")
    if report.reload_difference is not None:
        lines.append(f"Reloaded in a fresh process: by {report.reload_difference:.1e} of their spread.")
    return [" ".join(lines)]


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
    lines = _bullets(f"{kind}: {why}" for kind, why in report.withheld.items())
    return ["### Left whole, because no stock configuration says otherwise", lines + "\n\n`layout: per-layer` cuts them too."]


def _generations(report: RunReport) -> list[str]:
    if not report.prompts or not any(model.generations for model in report.models):
        return []
    parts = ["## Greedy continuations"]
    for place, prompt in enumerate(report.prompts):
        parts.append(f"**{_inline(prompt)}**")
        parts += [f"*{model.name}*\n{_quoted(model.generations[place])}" for model in report.models if model.generations]
    return parts


def _calibration(report: RunReport) -> str:
    if report.calibration is None:
        return provenance(report)
    facts = json.dumps(report.calibration, indent=1, ensure_ascii=False)
    return f"{provenance(report)}\n\n```json\n{facts}\n```"


def _made_with(report: RunReport) -> list[list[str]]:
    machine = report.machine
    memory = machine.get("memory_bytes")
    rows = [[name, version] for name, version in report.versions.items()]
    rows.append(["processor", f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('threads')} threads"])
    rows += [["memory", f"{memory / 2**30:.1f} GiB"]] if memory else []
    rows += [["peak memory of the run", f"{report.peak_memory_bytes / 2**30:.2f} GiB"]] if report.peak_memory_bytes else []
    rows += [["accelerator", name] for name in machine.get("accelerators", [])]
    return [*rows, ["device, dtype", f"{report.recipe['device']}, {report.recipe['dtype']}"]]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in row) + " |" for row in [header, ruler, *rows])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {_inline(line)}" for line in lines)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.strip().splitlines() or [""])


def _inline(text: str) -> str:
    """Text on one line that does not end a table cell."""
    return " ".join(text.split()).replace("|", "\\|")
