"""A run in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resect.explain import sizes_asked
from resect.report.results import Measured, RunReport

OF = {"blocks": "block parameters", "model": "parameters", "macs": "multiply-accumulates"}
STATUS = {
    "planned": "A dry run: the plan was made, nothing was cut.",
    "saved": "The pruned model is saved and verified; its measurements are not complete.",
    "complete": "",
}
"""What of a run is there."""
WITHOUT_BOS = "Windows do not overlap, no token is added, the first of each is not predicted."
WITH_BOS = "Windows do not overlap, begin-of-text stands before each, all of its tokens are predicted."
LOADS = {
    "uniform": "stock transformers: `AutoModelForCausalLM.from_pretrained(directory)`",
    "per-layer": "`resect.load(directory)`, or transformers with `trust_remote_code=True` (the code lies beside the weights)",
}

GIVEN = "no scores"
"""What decides in a plan by hand."""


def asked(report: RunReport) -> str:
    """What the recipe asked for."""
    recipe = report.recipe
    settings = recipe["settings"]
    if said := sizes_asked(settings):
        target = said
    elif recipe.get("budget"):
        target = f"budget {recipe['budget']}"
    else:
        target = f"{100 * recipe['keep']:g} % of {OF[recipe['of']]} kept"
    if report.vocabulary is not None:
        rows = f"{report.vocabulary.kept:,} of {report.vocabulary.rows:,} rows of the vocabulary kept"
        if not touches_more(report):
            return f"{recipe['model']}: {rows}, all else whole"
        target = f"{target}, {rows}"
    return f"{recipe['model']}: {target} ({recipe['method']}, {_decides(settings)}, {recipe['layout']} layout)"


def _decides(settings: Mapping[str, Any]) -> str:
    """What of a method's settings says most about it."""
    if "periods" in settings:
        return f"{settings['periods']} x {settings['period_steps']} steps of fading"
    if "drop_blocks" in settings:
        return GIVEN
    if "criterion" in settings:
        return str(settings["criterion"])
    return f"{settings['mode']}, {settings['shots']} shot{'s' if settings['shots'] > 1 else ''}"


def touches_more(report: RunReport) -> bool:
    """Whether anything but the vocabulary was to be cut."""
    recipe = report.recipe
    asked = recipe["keep"] < 1 or recipe.get("budget") or sizes_asked(recipe["settings"])
    return report.vocabulary is None or bool(asked)


def vocabulary_lines(report: RunReport) -> list[str]:
    """How many rows of the vocabulary went, and what that does to the texts that were measured."""
    found = report.vocabulary
    if found is None:
        return []
    source = ", ".join(found.source)
    lines = [
        f"Vocabulary: {found.kept:,} of {found.rows:,} rows stay, {found.rows - found.kept:,} went; {source} ({found.tokens:,} "
        f"tokens) needs {found.needed:,}, of which {found.base:,} are needed by any text. "
        f"{found.missing:,} of its tokens are gone and spelled with others."
    ]
    for text in found.texts:
        gone = f"{text.text}: {text.missing:,} of {text.tokens:,} tokens are gone and spelled with others"
        more = f", {text.pruned_tokens:,} in all now: its perplexities before and after are of different tokens"
        lines.append(f"{gone}{more if text.missing else ''}.")
    return lines


def budget_lines(report: RunReport) -> list[str]:
    """Whether a budget was met: predicted, and measured."""
    found = report.budget
    if found is None:
        return []
    if found.measured is None or found.low is None or found.high is None:
        return [f"Budget {found.asked}: {found.cost:,.0f} of {found.dense:,.0f} stay, {100 * found.predicted:.2f} %."]
    off = found.measured / found.keep - 1
    plans = f", {len(found.tried)} plans tried" if len(found.tried) > 1 else ""
    return [
        f"Budget {found.asked}: the table says {100 * found.predicted:.1f} % of the dense network's time, measured in turns "
        f"{100 * found.measured:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}], {100 * off:+.1f} % off what was "
        f"asked{plans}."
    ]


def protected_lines(report: RunReport) -> list[str]:
    """The groups that were to stay whole."""
    names = ", ".join(report.protected)
    return [f"Protected: {names}."] if names else []


def provenance(report: RunReport) -> str:
    """Which text decided, with which seed, and how perplexity was taken."""
    seed = f"seed {report.recipe['seed']}"
    if not touches_more(report):
        text = f"No calibration text: only the vocabulary was cut; {seed}."
    elif report.calibration is None:
        decides = _decides(report.recipe["settings"])
        looks = "the plan was given" if decides == GIVEN else f"{decides} looks at weights only"
        text = f"No calibration text: {looks}; {seed}."
    else:
        text = f"Calibration: {calibration_text(report.calibration)}; {seed}."
    if any(model.perplexities for model in report.models):
        said = protocol(report.models)
        text = f"{text} Perplexity: {said[0].lower()}{said[1:]}"
    return f"{text} {measuring(report.models)}" if any(model.tasks for model in report.models) else text


def protocol(models: Sequence[Measured]) -> str:
    """How windows are made."""
    return WITH_BOS if any(p.bos for model in models for p in model.perplexities) else WITHOUT_BOS


def measuring(models: Sequence[Measured]) -> str:
    """How tasks were answered."""
    shots = next(one.shots for model in models for one in model.tasks)
    return f"Accuracy in per cent ± standard error, {shots or 'no'} solved example{'' if shots == 1 else 's'} before each item."


def calibration_text(calibration: dict[str, Any]) -> str:
    """Source, samples and length of the calibration text."""
    source = calibration["source"]
    names = source if isinstance(source, str) else ", ".join(source)
    return f"{names}, {calibration['samples']} x {calibration['length']} tokens"


def kept_shares(report: RunReport) -> str:
    """What stays of blocks, model and work."""
    dense, pruned = report.dense, report.pruned
    pairs = [
        ("blocks", dense.block_parameters, pruned.block_parameters),
        ("model", dense.parameters, pruned.parameters),
        ("macs", dense.macs, pruned.macs),
    ]
    return ", ".join(f"{100 * after / before:.2f} % of {OF[of]}" for of, before, after in pairs if before and after is not None)
