"""How fast models are beside the first of them, and how much of the speed-up that their size allows is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from resect.explain import inline
from resect.report.figures import metric
from resect.report.results import Measurements, Record

SCHEMA: Final = 1
REACHED = 0.9
"""The share of the ideal speed-up below which a row is marked."""
COLUMNS = ("ms", "low-high", "tokens/s", "speed-up", "95 %", "ideal", "reached", "memory")
NOTE = (
    "ms: median of the rounds, for all prompts or for one token of each; speed-up over the first model, median of the rounds, "
    "and 95 % of a bootstrap of them. ideal: prefill by multiply-accumulates, decode by the bytes of weights that a token reads. "
    f"memory: weights, cache and what a run needs. * less than {REACHED:.0%} of the ideal speed-up."
)


class Benched(Record):
    """A model: what it is, without a clock."""

    name: str
    parameters: int
    weight_bytes: int
    read_bytes: int
    """Of the weights, what every token reads: all but tables that are only looked up."""
    file_bytes: int | None = None
    """Size of the weight files, where they are local."""
    macs_per_token: int
    """Of a prompt of `macs_tokens` tokens, by the traced graph."""
    macs_tokens: int


class BenchRow(Record):
    """A model at some work."""

    model: str
    phase: Literal["prefill", "decode"]
    batch: int
    length: int
    """Tokens of every prompt, after which decoding begins."""
    seconds: Measurements
    """For all prompts, or for one more token of every sequence."""
    tokens_per_second: float
    macs: int
    """Multiply-accumulates of that."""
    memory_bytes: int | None = None
    """Weights, and what a run needs at most beside them."""
    speedup: float
    """Over the first model: the median of the rounds."""
    low: float | None = None
    high: float | None = None
    ideal: float
    """By multiply-accumulates in prefill, by the bytes of weights read in decoding."""

    @property
    def reached(self) -> float:
        """The share of the ideal speed-up that is there."""
        return self.speedup / self.ideal

    @property
    def work(self) -> str:
        """`prefill 1x512`."""
        return f"{self.phase} {self.batch}x{self.length}"


class BenchReport(Record):
    """Several models timed in the same way."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["bench"] = "bench"
    models: list[Benched]
    rows: list[BenchRow]
    decode: int
    """Tokens written after every prompt."""
    repeats: int
    compiled: bool
    device: str
    dtype: str
    tables: list[str] = []
    """Files of latency tables that were written."""
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}


def bench_table(report: BenchReport) -> Group:
    """What the models are, and a row for each at every work."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        if _first(report, row):
            table.add_row(Text(row.work, style="bold"))
        table.add_row(row.model, *_cells(row, first=_first(report, row)))
    about = Text("\n".join(_about(report)))
    tables = [Text(f"Latency tables: {', '.join(report.tables)}.", style="dim")] if report.tables else []
    return Group(about, table, Text(NOTE, style="dim"), Text(_measured(report), style="dim"), *tables)


def bench_markdown(report: BenchReport) -> str:
    """The same as Markdown."""
    lines = ["# bench", "", *(f"- {inline(line)}" for line in _about(report)), ""]
    lines += [_line(["", "model", *COLUMNS]), "|" + "---|" * (len(COLUMNS) + 2)]
    for row in report.rows:
        first = _first(report, row)
        lines.append(_line([row.work if first else "", row.model, *_cells(row, first=first)]))
    return "\n".join([*lines, "", NOTE, "", inline(_measured(report))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(inline, cells)) + " |"


def _about(report: BenchReport) -> list[str]:
    return [
        f"{one.name}: {one.parameters:,} parameters, {metric(one.macs_per_token)}MACs a token (1x{one.macs_tokens}), weights "
        f"{metric(one.weight_bytes)}B" + (f", files {metric(one.file_bytes)}B" if one.file_bytes is not None else "")
        for one in report.models
    ]


def _first(report: BenchReport, row: BenchRow) -> bool:
    return row.model == report.models[0].name


def _cells(row: BenchRow, *, first: bool) -> list[str]:
    low, middle, high = (f"{1e3 * seconds:,.4g}" for seconds in (row.seconds.low, row.seconds.median, row.seconds.high))
    memory = "-" if row.memory_bytes is None else f"{metric(row.memory_bytes)}B"
    speed = [""] * 4
    if not first:
        between = f"{row.low:.2f}-{row.high:.2f}" if row.low is not None and row.high is not None else ""
        mark = "*" if row.reached < REACHED else ""
        speed = [f"{row.speedup:.2f}x", between, f"{row.ideal:.2f}x", f"{100 * row.reached:.0f} %{mark}"]
    return [middle, f"{low}-{high}", f"{row.tokens_per_second:,.4g}", *speed, memory]


def _measured(report: BenchReport) -> str:
    count = report.machine.get("threads") if report.device == "cpu" else None
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
    where = f"{report.device}, {report.dtype}{threads}{', compiled' if report.compiled else ''}"
    return f"Measured in turns on {where}: {report.repeats} rounds, {report.decode} tokens written in each."
