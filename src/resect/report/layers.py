"""What every layer keeps, layers that are alike folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resect.report.results import GroupSizes

FULL, EMPTY = "█", "░"


@dataclass(frozen=True)
class LayerRow:
    """Layers next to each other that keep the same: per kind, units kept and units there were."""

    layers: tuple[int, ...]
    """Empty for what belongs to no layer."""
    sizes: dict[str, tuple[int, int]]


def layer_rows(groups: Iterable[GroupSizes]) -> list[LayerRow]:
    """One row per layer, layers next to each other with the same sizes in one; what belongs to no layer first."""
    layers: dict[int | None, dict[str, tuple[int, int]]] = {}
    for group in groups:
        sizes = layers.setdefault(group.layer, {})
        kept, units = sizes.get(group.kind, (0, 0))
        sizes[group.kind] = (kept + group.kept, units + group.units)
    rows = [LayerRow((), layers.pop(None))] if None in layers else []
    for layer, sizes in sorted(layers.items(), key=lambda item: item[0] or 0):
        assert layer is not None
        if rows and rows[-1].layers and rows[-1].layers[-1] == layer - 1 and rows[-1].sizes == sizes:
            rows[-1] = LayerRow((*rows[-1].layers, layer), sizes)
        else:
            rows.append(LayerRow((layer,), sizes))
    return rows


def kinds_of(rows: Sequence[LayerRow]) -> list[str]:
    """The kinds of units in some rows, in their order."""
    return list(dict.fromkeys(kind for row in rows for kind in row.sizes))


def spans(numbers: Iterable[int]) -> str:
    """Numbers in short: 0-3, 5, 7-9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def bar(kept: int, units: int, *, width: int = 16) -> str:
    """A bar of text: what stays is full. Something kept and something removed both show."""
    full = round(width * kept / units) if units else 0
    if 0 < kept < units:
        full = min(max(full, 1), width - 1)
    return FULL * full + EMPTY * (width - full)
