"""Figures of models side by side, as text: the rows that terminal tables and Markdown both show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resect.report.results import Measured


@dataclass(frozen=True)
class Figure:
    """One quantity of several models."""

    name: str
    values: tuple[float | None, ...]
    show: Callable[[float], str]
    kind: str = "size"
    """`size`, `quality` or `speed`."""
    heading: str = ""
    """The name over a narrow column."""

    def texts(self) -> list[str]:
        """The values as text, a dash where one is unknown."""
        return ["-" if value is None else self.show(value) for value in self.values]

    def change(self) -> str:
        """From the first to the last: a percentage for sizes and quality, a factor for speed."""
        first, last = self.values[0], self.values[-1]
        if not first or last is None or not math.isfinite(last / first):
            return ""
        if self.kind == "speed":
            faster = last / first if "tokens/s" in self.name else first / last
            return f"{faster:.2f}x as fast"
        return f"{100 * (last / first - 1):+.1f} %"


def figures(models: Sequence[Measured]) -> list[Figure]:
    """What was measured of the models: sizes, perplexities, speeds; quantities that none has are left out."""
    rows = [
        Figure("parameters", tuple(m.parameters for m in models), whole),
        Figure("block parameters", tuple(m.block_parameters for m in models), whole, heading="block\nparameters"),
        Figure(f"MACs, 1 x {_tokens(models)} tokens", tuple(m.macs for m in models), metric),
        Figure("weight files", tuple(m.file_bytes for m in models), lambda value: f"{metric(value)}B", heading="weight\nfiles"),
        *_perplexities(models),
        *_timings(models),
    ]
    return [row for row in rows if any(value is not None for value in row.values)]


def _perplexities(models: Sequence[Measured]) -> list[Figure]:
    found = [{(p.text, p.window): p for p in model.perplexities} for model in models]
    keys = list(dict.fromkeys(key for row in found for key in row))
    rows = []
    for text, window in keys:
        here = [row.get((text, window)) for row in found]
        counts = {p.tokens for p in here if p}
        counted = f"{counts.pop():,} tokens" if len(counts) == 1 else "tokenised differently"
        name = f"perplexity {text} @{window} ({counted})"
        heading = f"{text}\n@{window}\n{counted}"
        rows.append(Figure(name, tuple(p.value if p else None for p in here), brief, "quality", heading))
    return rows


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
