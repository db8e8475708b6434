"""Plans, patterns, analyses and latency tables as strangers give them: read whole, or refused with the place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from resect.errors import UsageError
from resect.evaluation.staircase import LatencyTable
from resect.plan import Kept, Pattern, Plan
from resect.plan.pattern import Matrix
from resect.report import Knowledge
from tests.report.made import knowledge

GROUP: dict[str, Any] = {"kind": "heads", "layer": 0, "units": 4, "keep": [0, 2]}
MATRIX: dict[str, Any] = {"shape": [4, 3], "rows": [0, 3], "columns": [1], "zeros": 2}
STEPS: dict[str, Any] = {"kind": "heads", "units": 2, "homes": {"0.heads": "layers.0"}, "seconds": {"2": 0.5, "1": 0.25}}
TABLE: dict[str, Any] = {
    "where": "prefill:1x8", "device": "cpu", "dtype": "float32", "threads": 1, "seconds": 1.0, "families": [STEPS],
}  # fmt: skip


def plan(**changes: Any) -> str:
    return json.dumps({"version": 1, "groups": {"0.heads": GROUP | changes}})


def pattern(**changes: Any) -> str:
    return json.dumps({"version": 1, "kind": "", "layers": {"up": MATRIX | changes}})


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (Plan, plan(keep=[2, 0]), "unique and ascending"),
        (Plan, plan(keep=[0, 0]), "unique and ascending"),
        (Plan, plan(keep=[-1, 0]), "keep.0 = -1: it must be at least 0"),
        (Plan, plan(keep=[0, 4]), "numbered 0 to 3"),
        (Plan, plan(keep=[True]), "groups.0.heads.keep.0 = True"),
        (Plan, plan(keep=["0"]), "keep.0 = '0'"),
        (Plan, plan(units=-4, keep=[]), "units = -4"),
        (Plan, plan(units=10**30), "units = 1000000"),
        (Plan, plan(layer=-1), "layer = -1"),
        (Plan, plan(more=1), "no key 'groups.0.heads.more'"),
        (Plan, json.dumps({"groups": {"a": {}}}), "groups.a.kind is missing"),
        (Plan, json.dumps({"groups": {f"{n}": {} for n in range(9999)}}), "more faults"),
        (Plan, '{"notes": {"a": NaN}}', "NaN"),
        (Plan, '{"notes": {"a": ' + "9" * 9999 + "}}", "This is not a plan"),
        (Plan, "[" * 99999, "nested too deep"),
        (Plan, '{"notes": {"a": "\\ud83d"}}', "This is not a plan"),
        (Plan, '"' + "x" * 99999, "This is not a plan"),
        (Plan, "", "This is not a plan"),
        (Pattern, pattern(rows=[3, 0]), "rows must be"),
        (Pattern, pattern(rows=[0, 4]), "rows must be"),
        (Pattern, pattern(columns=[-1]), "columns.0 = -1"),
        (Pattern, pattern(zeros=13), "13 zeros"),
        (Pattern, pattern(zeros=-1), "zeros = -1"),
        (Pattern, pattern(shape=[4]), "shape"),
        (LatencyTable, json.dumps(TABLE | {"seconds": -1.0}), "seconds = -1.0"),
        (LatencyTable, json.dumps(TABLE | {"seconds": float("inf")}), "Infinity"),
        (LatencyTable, json.dumps(TABLE | {"families": [STEPS | {"seconds": {"1": 1.0}}]}), "numbers of units"),
        (LatencyTable, json.dumps(TABLE | {"families": [STEPS | {"seconds": {"2": 1, "9": 2}}]}), "numbers of units"),
        (Knowledge, knowledge().to_json().replace('"gamma": 0.1', '"gamma": NaN'), "NaN"),
        (Knowledge, "null", "This is not an analysis"),
    ],
)
def test_what_is_wrong_is_refused(kind: Any, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        kind.from_json(text)
    assert len(str(refused.value)) < 3000


def test_names_come_back_as_they_are() -> None:
    name = 'a"b\\c\n"groups": {'
    kept = Plan(groups={name: Kept(kind="heads", layer=None, units=2, keep=(1,))})
    assert Plan.from_json(kept.to_json()) == kept
    found = Pattern(kind=name, layers={name: Matrix(shape=(2, 2), rows=(1,))})
    assert Pattern.from_json(found.to_json()) == found
    for value, text in ((Plan.from_json(plan()), plan()), (LatencyTable.from_json(json.dumps(TABLE)), None)):
        assert type(value).from_json(value.to_json()) == value, text
