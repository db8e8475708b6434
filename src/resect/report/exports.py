"""What came of an export, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from resect.export import Exported, Verification

HIDDEN = ("context_length", "shortest", "inputs", "from_cache", "auto_model_difference", "logit_difference")
"""Facts that only the JSON form has."""


def export_table(found: Exported) -> Table:
    """Where it is, what it is, and what its reader said."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=f"{found.model} as {found.format}", title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, Text(value))
    return table


def _rows(found: Exported) -> Iterator[tuple[str, str]]:
    yield "written to", f"{found.output}, {found.bytes / 1e6:,.1f} MB"
    if found.quantize != "none":
        yield "weights", found.quantize
    for name, value in found.facts.items():
        if name not in HIDDEN and value not in (None, []):
            yield name.replace("_", " "), _text(value)
    yield from _verified(found.verification)
    if found.pushed:
        yield "pushed to", found.pushed


def _verified(found: Verification | None) -> Iterator[tuple[str, str]]:
    if found is None:
        yield "verified", "no: nobody has read it back"
        return
    yield "read by", f"{found.consumer}, in a fresh process, {found.positions} predictions"
    allowed = "" if found.limits.difference is None else f" ({found.limits.difference:.0e} allowed)"
    yield "log-probabilities off", f"{found.difference:.1e} nats at most{allowed}"
    yield (
        "divergence",
        f"{found.divergence:.1e} nats ({found.limits.divergence:.0e} allowed); from the weights as they were {found.cost:.1e}",
    )
    yield "greedy continuations", f"{found.agreement:.0%} of the tokens that torch would choose"
    if found.tokenizer:
        yield "its tokenizer", "splits texts in the same way"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
