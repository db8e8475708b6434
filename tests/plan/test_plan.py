"""A plan is a value: it survives JSON, composes by intersection, and refuses what makes no sense."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from resect.errors import UsageError
from resect.plan import Kept, Plan

UNITS = {"model.layers.0.heads": 6, "model.layers.1.heads": 6, "model.layers.0.channels": 56, "residual": 48}


def random_plan_of(seed: int, names: set[str] | None = None) -> Plan:
    """Keeps random units of the named groups."""
    draw = random.Random(seed)
    groups = {}
    for name in sorted(names if names is not None else UNITS):
        units = UNITS[name]
        keep = tuple(sorted(draw.sample(range(units), draw.randint(units * 2 // 3, units))))
        kind = name.split(".")[-1]
        layer = int(name.split(".")[2]) if "." in name else None
        groups[name] = Kept(kind=kind, layer=layer, units=units, keep=keep)
    return Plan(groups=groups)


def kept(plan: Plan, name: str) -> set[int]:
    """Units that stay; all where the plan is silent."""
    return set(plan.groups[name].keep) if name in plan.groups else set(range(UNITS[name]))


@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip(seed: int) -> None:
    plan = random_plan_of(seed)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    read = json.loads(plan.to_json())
    for name, group in plan.groups.items():
        assert read["groups"][name] == {
            "kind": group.kind,
            "layer": group.layer,
            "units": group.units,
            "keep": list(group.keep),
        }


@pytest.mark.parametrize("seed", range(5))
def test_composition_is_intersection(seed: int) -> None:
    """`a & b` keeps what both keep; it commutes, associates, and a plan with itself is itself."""
    names = list(UNITS)
    a, b, c = random_plan_of(seed, set(names[:3])), random_plan_of(seed + 50, set(names[1:])), random_plan_of(seed + 90)
    for name in UNITS:
        assert kept(a & b, name) == kept(a, name) & kept(b, name)
    assert (a & b).groups == (b & a).groups
    assert ((a & b) & c).groups == (a & (b & c)).groups
    assert (a & a).groups == a.groups
    assert (a & Plan()).groups == a.groups
    assert list((a & b).groups) == list((a & b).groups)


def test_composition_does_not_change_its_parts() -> None:
    a, b = random_plan_of(1), random_plan_of(2)
    before = a.to_json(), b.to_json()
    _ = a & b
    assert (a.to_json(), b.to_json()) == before


def test_composition_of_different_models_is_refused() -> None:
    a = Plan(groups={"g": Kept(kind="channels", layer=0, units=8, keep=(0, 1))})
    b = Plan(groups={"g": Kept(kind="channels", layer=0, units=9, keep=(0, 1))})
    with pytest.raises(UsageError, match="g"):
        a & b


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": [0, 8]},
        {"keep": [-1, 2]},
        {"keep": [3, 3]},
        {"keep": "all"},
        {"units": "many"},
        {"keeep": [0]},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    """Units outside the group, twice, or of the wrong type; keys nobody knows."""
    group = {"kind": "channels", "layer": 0, "units": 8, "keep": [0, 1], **wrong}
    with pytest.raises(UsageError):
        Plan.from_json(json.dumps({"groups": {"g": group}}))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"groups": 3}', '{"grops": {}}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Plan.from_json(text)
