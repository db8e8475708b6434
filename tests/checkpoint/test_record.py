"""Two cuts in a row are one record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from resect.checkpoint.record import EMPTY, compose, record_of

FIRST = {
    "shapes": {"layers.0.w": [4, 8], "layers.3.w": [3, 8]},
    "attributes": {"layers.3": {"heads": 3, "width": 8}},
    "silent": {"layers.0.mlp": {"width": 8, "returns": 0}},
    "gathered": {"layers.3.q": {"rows": 3, "columns": None}},
    "removed": ["layers.1", "layers.2"],
}
SECOND = {
    "shapes": {"layers.1.w": [2, 8], "embed": [7, 5]},
    "attributes": {"layers.1": {"heads": 2}, "layers": {"n": 1}},
    "silent": {"layers.1.mlp": {"width": 8, "returns": 2}},
    "gathered": {"layers.1.o": {"rows": None, "columns": 2}, "head": {"rows": 5, "columns": 0}},
    "removed": ["layers.2"],
}


def test_second_is_read_in_the_numbers_the_first_left() -> None:
    assert compose(FIRST, SECOND) == {
        "shapes": {"layers.0.w": [4, 8], "layers.3.w": [2, 8], "embed": [7, 5]},
        "attributes": {"layers.3": {"heads": 2, "width": 8}, "layers": {"n": 1}},
        "silent": {"layers.0.mlp": {"width": 8, "returns": 0}, "layers.3.mlp": {"width": 8, "returns": 2}},
        "gathered": {
            "layers.3.q": {"rows": 3, "columns": None},
            "layers.3.o": {"rows": None, "columns": 2},
            "head": {"rows": 5, "columns": 0},
        },
        "removed": ["layers.1", "layers.2", "layers.4"],
    }


def test_nothing_is_neutral() -> None:
    assert compose(FIRST, EMPTY) == FIRST
    assert compose(EMPTY, SECOND) == SECOND


def test_records_of_earlier_versions_gather_nothing() -> None:
    first = {key: value for key, value in FIRST.items() if key not in ("silent", "gathered")}
    assert compose(first, EMPTY) == {**first, "silent": {}, "gathered": {}}


def test_records_are_read_from_any_kind_of_value() -> None:
    @dataclass
    class Kept:
        shapes: dict[str, list[int]] = field(default_factory=lambda: {"w": [1]})

    class Dumped:
        def model_dump(self, *, mode: str) -> dict[str, Any]:
            assert mode == "json"
            return {"shapes": {"w": [1]}}

    for value in (Kept(), Dumped(), {"shapes": {"w": [1]}}):
        model = nn.Module()
        model.resect_record = value  # type: ignore[assignment]
        assert record_of(model) == {**EMPTY, "shapes": {"w": [1]}}
    assert record_of(nn.Module()) == EMPTY
