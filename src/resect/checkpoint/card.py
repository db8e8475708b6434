"""The README of a checkpoint: what it is, how it was made and measured, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from resect.explain import code, inline, sizes_asked

STOCK = """model = AutoModelForCausalLM.from_pretrained(directory)"""
SHIPPED = """# Its layers have sizes of their own; modeling_resect.py, beside it, builds them. Read it, then trust it.
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)"""
TOKENIZER = """tokenizer = AutoTokenizer.from_pretrained(directory)"""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class About:
    """How a model was made and what was measured, as far as its run directory says."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    after: Sequence[str] = ()
    """Lines of Markdown on what was done to it afterwards; what the report measured is of the model before that."""

    @classmethod
    def of(cls, directory: str | Path) -> About:
        """What report.json of a run directory says; nothing where there is none."""
        try:
            report = json.loads((Path(directory) / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return cls()
        recipe = report.get("recipe") if isinstance(report, dict) else None
        return cls(recipe, report) if isinstance(recipe, dict) else cls()

    @property
    def base_model(self) -> str | None:
        """The dense model's id on the hub; None for one that is not from there."""
        name = str(self.recipe.get("model", ""))
        return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else None

    def lines(self) -> list[str]:
        """Markdown: model, method, budget, calibration, evaluation."""
        try:
            return [*self._making(), *(self.after or self._measured())]
        except (LookupError, TypeError, ValueError, AttributeError):  # the report of another version, or none of ours
            return list(self.after)

    def _making(self) -> Iterator[str]:
        recipe, text = self.recipe, self.report.get("calibration")
        if not recipe:
            return
        yield f"* Base model: {code(recipe.get('model'))}"
        if "method" in recipe:
            criterion = (recipe.get("settings") or {}).get("criterion")
            named = f", criterion {code(criterion)}" if criterion else ""
            yield f"* Method: {code(recipe['method'])}{named}, {inline(str(recipe.get('layout')))} layout"
        if recipe.get("budget"):
            yield f"* Budget: {code(recipe['budget'])}"
        elif said := sizes_asked(recipe.get("settings") or {}):
            yield f"* Budget: {inline(said)}"
        elif "keep" in recipe:
            yield f"* Budget: {recipe['keep']:.0%} of {inline(str(recipe.get('of')))} kept"
        if text:
            source = ", ".join(text.get("source") or []) or "text that the model wrote itself"
            size = f"{text.get('samples')} x {text.get('length')} tokens, seed {text.get('seed')}"
            yield f"* Calibration: {inline(f'{source}, {size}')}"

    def _measured(self) -> Iterator[str]:
        models = {model["name"]: model for model in self.report.get("models") or []}
        dense, pruned = models.get("dense", {}), models.get("pruned", {})
        rows = dict(_figures(pruned))
        if not rows:
            return
        before = dict(_figures(dense))
        yield from ("", "| evaluation | dense | pruned |", "|---|---|---|")
        for figure, value in rows.items():
            yield f"| {inline(figure)} | {before.get(figure, '-')} | {value} |"


def _figures(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured of a model, by name."""
    for one in model.get("perplexities") or []:
        yield f"perplexity, {one['text']}, windows of {one['window']}", f"{one['value']:.2f}"
    for one in model.get("tasks") or []:
        yield f"{one['metric']}, {one['task']}, {one['items']} items", f"{one['accuracy']:.3f}"


def card(saved: Any, *, has_tokenizer: bool, about: About | None = None) -> str:
    """Markdown for a `Saved` model: parameters, layout, how it was made, and the lines that load it."""
    about = about or About()
    uniform = saved.layout == "uniform"
    names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    lines = [
        front_matter(about),
        "# A model with parts removed",
        "",
        f"{saved.parameters:,} parameters; model type {code(saved.model_type)}{_relabelled(saved)}.",
        _sizes(saved),
        "",
        *about.lines(),
        "",
        "```python",
        f"from transformers import {names}",
        "",
        'directory = "."',
        STOCK if uniform else SHIPPED,
        *([TOKENIZER] if has_tokenizer else []),
        "```",
    ]
    if not uniform:
        lines += [
            "",
            "Without remote code, with resect installed:",
            "",
            "```python",
            "import resect",
            "",
            'model = resect.load(".")',
            "```",
        ]
    return tidy([*lines, "", "`resect.json` says what was removed.", ""])


def front_matter(about: About, library: str | None = "transformers", **fields: Any) -> str:
    """The YAML that the hub reads."""
    said = {
        "base_model": about.base_model,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "resect"],
        **fields,
    }
    return "---\n" + yaml.safe_dump({k: v for k, v in said.items() if v}, sort_keys=False, allow_unicode=True) + "---"


def tidy(lines: list[str]) -> str:
    """Lines as a text, never two empty ones in a row."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _relabelled(saved: Any) -> str:
    return f" (the same mathematics as the dense model's {code(saved.relabelled_from)})" if saved.relabelled_from else ""


def _sizes(saved: Any) -> str:
    if saved.layout != "uniform":
        return f"No stock configuration describes it: {inline(str(saved.reason))}."
    changes = ", ".join(f"{code(name)} {inline(str(value))}" for name, value in saved.changes.items())
    return f"A stock configuration describes it{': ' + changes if changes else ''}."
