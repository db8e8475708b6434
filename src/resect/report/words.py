"""A run in sentences."""

from __future__ import annotations

from typing import Any

from resect.report.results import RunReport

OF = {"blocks": "block parameters", "model": "parameters", "macs": "multiply-accumulates"}
PROTOCOL = "Windows do not overlap, no token is added, the first of each is not predicted."
LOADS = {
    "uniform": "stock transformers: `AutoModelForCausalLM.from_pretrained(directory)`",
    "per-layer": "`resect.load(directory)`, or transformers with `trust_remote_code=True` (the code lies beside the weights)",
}


def asked(report: RunReport) -> str:
    """What the recipe asked for."""
    recipe = report.recipe
    settings = recipe["settings"]
    if settings.get("share") is not None:
        target = f"share {settings['share']:g} of every chosen group removed"
    else:
        target = f"{100 * recipe['keep']:g} % of {OF[recipe['of']]} kept"
    return f"{recipe['model']}: {target} ({recipe['method']}, {settings['criterion']}, {recipe['layout']} layout)"


def provenance(report: RunReport) -> str:
    """Which text decided, with which seed, and how perplexity was taken."""
    seed = f"seed {report.recipe['seed']}"
    if report.calibration is None:
        text = f"No calibration text: {report.recipe['settings']['criterion']} looks at weights only; {seed}."
    else:
        text = f"Calibration: {calibration_text(report.calibration)}; {seed}."
    measured = any(model.perplexities for model in report.models)
    return f"{text} Perplexity: {PROTOCOL[0].lower()}{PROTOCOL[1:]}" if measured else text


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
