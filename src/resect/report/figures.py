"""Figures of models side by side, as text: the rows that terminal tables and Markdown both show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from resect.report.results import Difference, Measured, RunReport


@dataclass(frozen=True)
class Figure:
    """One quantity of several models."""

    name: str
    values: tuple[float | None, ...]
    show: Callable[[float], str]
    kind: str = "size"
    """`size`, `quality`, `bits`, `accuracy` or `speed`."""
    heading: str = ""
    """The name over a narrow column."""
    errors: tuple[float | None, ...] = ()
    """Standard errors of the values."""
    difference: Difference | None = None
    """From the first model to the last, with its interval."""

    def texts(self) -> list[str]:
        """The values as text, a dash where one is unknown."""
        shown = ["-" if value is None else self.show(value) for value in self.values]
        errors = self.errors or (None,) * len(shown)
        return [f"{text} ± {self.show(error)}" if error else text for text, error in zip(shown, errors, strict=True)]

    def change(self) -> str:
        """From the first to the last: a percentage for sizes and quality, a factor for speed."""
        if self.difference:
            return interval(self.difference)
        first, last = self.values[0], self.values[-1]
        if not first or last is None or not math.isfinite(last / first):
            return ""
        if self.kind == "speed":
            faster = last / first if "tokens/s" in self.name else first / last
            return f"{faster:.2f}x as fast"
        return f"{100 * (last / first - 1):+.1f} %"


def figures(models: Sequence[Measured], differences: Sequence[Difference] = ()) -> list[Figure]:
    """What was measured of the models: sizes, perplexities, accuracies, speeds; quantities that none has are left out.

    `differences` from the first model to the last replace plain changes.
    """
    known = {difference.figure: difference for difference in differences}
    rows = [
        Figure("parameters", tuple(m.parameters for m in models), whole),
        Figure("block parameters", tuple(m.block_parameters for m in models), whole, heading="block\nparameters"),
        Figure(f"MACs, 1 x {_tokens(models)} tokens", tuple(m.macs for m in models), metric),
        Figure("weight files", tuple(m.file_bytes for m in models), lambda value: f"{metric(value)}B", heading="weight\nfiles"),
        *_perplexities(models, known),
        *_accuracies(models, known),
        *_timings(models),
    ]
    return [row for row in rows if any(value is not None for value in row.values)]


def before_and_after(report: RunReport) -> list[Figure]:
    """The figures of a run's two models."""
    rows = figures(report.models, report.differences) + agreement_figures(report.models)
    return [row for row in rows if row.kind != "bits"]


def agreement_figures(models: Sequence[Measured]) -> list[Figure]:
    """How close models stay to another: distributions beside the reference's, answers beside the first model's."""
    rows = []
    closeness = [{f"{one.text} @{one.window}": one for one in model.agreements} for model in models]
    for key in dict.fromkeys(key for row in closeness for key in row):
        here = [row.get(key) for row in closeness]
        rows.append(Figure(f"KL divergence {key}, nats", tuple(one.kl if one else None for one in here), brief))
        rows.append(Figure(f"same likeliest token {key}", tuple(one.same_top if one else None for one in here), percent))
    flipped = [{one.task: one for one in model.flips} for model in models]
    for task in dict.fromkeys(task for row in flipped for task in row):
        changed = tuple(row[task].changed if task in row else None for row in flipped)
        rows.append(Figure(f"answers changed, {task}", changed, percent))
    return rows


def _perplexities(models: Sequence[Measured], known: Mapping[str, Difference]) -> list[Figure]:
    found = [{(p.text, p.window): p for p in model.perplexities} for model in models]
    keys = list(dict.fromkeys(key for row in found for key in row))
    rows = []
    for text, window in keys:
        here = [row.get((text, window)) for row in found]
        counts = {p.tokens for p in here if p}
        counted = f"{counts.pop():,} tokens" if len(counts) == 1 else "tokenised differently"
        name = f"perplexity {text} @{window} ({counted})"
        heading = f"{text}\n@{window}\n{counted}"
        values = tuple(p.value if p else None for p in here)
        difference = known.get(f"perplexity {text} @{window}")
        rows.append(Figure(name, values, brief, "quality", heading, difference=difference))
        bits = tuple(p.bits_per_byte if p else None for p in here)
        rows.append(Figure(f"bits per byte {text} @{window}", bits, brief, "bits"))
    return rows


def _accuracies(models: Sequence[Measured], known: Mapping[str, Difference]) -> list[Figure]:
    found = [{one.task: one for one in model.tasks} for model in models]
    rows = []
    for task in dict.fromkeys(task for row in found for task in row):
        here = [row.get(task) for row in found]
        first = next(one for one in here if one)
        errors = tuple(one.stderr if one and math.isfinite(one.stderr) else None for one in here)
        rows.append(
            Figure(
                f"{task}, {first.metric} ({first.items:,} items)",
                tuple(one.accuracy if one else None for one in here),
                percent,
                "accuracy",
                errors=errors,
                difference=known.get(task),
            )
        )
    if len(rows) > 1:
        name, means = mean_of(len(rows)), tuple(model.task_mean for model in models)
        errors = tuple(e if e is not None and math.isfinite(e) else None for e in (m.task_mean_stderr for m in models))
        rows.append(Figure(name, means, percent, "accuracy", errors=errors, difference=known.get(name)))
    return rows


def mean_of(count: int) -> str:
    """What the mean accuracy of several tasks is called."""
    return f"mean of {count} tasks"


def interval(difference: Difference) -> str:
    """A difference and what it lies between: perplexities in per cent, accuracies in points."""
    unit = " %" if difference.kind == "ratio" else ""
    between = ""
    if difference.low is not None and difference.high is not None:
        between = f" [{100 * difference.low:+,.1f}, {100 * difference.high:+,.1f}]"
    return f"{100 * difference.value:+,.1f}{unit}{between}"


def percent(value: float) -> str:
    """A share in per cent, without the sign."""
    return f"{100 * value:.1f}"


def _timings(models: Sequence[Measured]) -> list[Figure]:
    found = [model.timings for model in models]
    first = next((timings for timings in found if timings), None)
    if first is None:
        return []
    read = tuple(t.prefill_seconds.median if t else None for t in found)
    written = tuple(t.decode_tokens_per_second.median if t else None for t in found)
    return [
        Figure(f"prefill 1 x {first.prompt}, seconds", read, brief, "speed", f"prefill\n1 x {first.prompt}\nseconds"),
        Figure(f"decode {first.decode}, tokens/s", written, brief, "speed", f"decode\n{first.decode}\ntokens/s"),
    ]


def _tokens(models: Sequence[Measured]) -> int:
    return next((model.macs_tokens for model in models if model.macs_tokens), 64)


def whole(value: float) -> str:
    """An integer with separators."""
    return f"{value:,.0f}"


def brief(value: float) -> str:
    """Four significant digits, as people write them."""
    if not math.isfinite(value):
        return "inf"
    digits = 0 if value >= 1000 else max(0, 3 - math.floor(math.log10(value))) if value > 0 else 2
    return f"{value:,.{digits}f}"


def metric(value: float) -> str:
    """Four digits and a prefix: 13.45 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{brief(value / factor)} {prefix}"
    return f"{value:.0f} "
