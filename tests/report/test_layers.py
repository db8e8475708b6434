"""Layers that are alike are one line."""

from __future__ import annotations

import pytest

from resect.report.layers import bar, kinds_of, layer_rows, spans
from resect.report.results import GroupSizes


def group(layer: int | None, kept: int, *, units: int = 8, kind: str = "channels") -> GroupSizes:
    return GroupSizes(name=f"{layer}.{kind}", kind=kind, layer=layer, units=units, kept=kept)


def test_only_neighbours_are_folded() -> None:
    rows = layer_rows([group(layer, kept) for layer, kept in enumerate([8, 5, 5, 8, 5])])
    assert [row.layers for row in rows] == [(0,), (1, 2), (3,), (4,)]
    assert rows[1].sizes == {"channels": (5, 8)}


def test_groups_of_a_layer_and_kind_add_up_and_whole_model_groups_come_first() -> None:
    groups = [group(1, 3), group(1, 4), group(1, 2, units=3, kind="heads"), group(None, 50, units=60, kind="residual")]
    rows = layer_rows(groups)
    assert [row.layers for row in rows] == [(), (1,)]
    assert rows[1].sizes == {"channels": (7, 16), "heads": (2, 3)}
    assert kinds_of(rows) == ["residual", "channels", "heads"]


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([0, 1, 2], "0-2"), ([9, 3, 1, 2], "1-3, 9"), ([1, 3, 5], "1, 3, 5")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


@pytest.mark.parametrize(
    ("kept", "units", "full"), [(8, 8, 10), (0, 8, 0), (4, 8, 5), (1, 1000, 1), (999, 1000, 9), (0, 1, 0), (1, 1, 10)]
)
def test_bars_show_something_kept_and_something_gone(kept: int, units: int, full: int) -> None:
    assert bar(kept, units, width=10) == "█" * full + "░" * (10 - full)
