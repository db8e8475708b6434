"""Budgets of every kind reach every method; those of seconds are measured with the whole network and corrected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import resect
import resect.methods.budget
from resect.checkpoint import Progress
from resect.errors import OtherMachine, UsageError
from resect.evaluation import LatencyTable, Spread
from resect.methods.budget import MOST_REPEATS, PLAIN, TOLERANCE, Spending, settle, spending, timed_share
from resect.plan import Budget, Plan, Workload, select
from resect.report import machine
from tests.evaluation.test_staircase import LAYERS, Machine, graph, scores, table
from tests.models import FAMILIES, random_tokens, tiny

METHODS: dict[str, dict[str, Any]] = {
    "llm-pruner": {"criterion": "element1", "iterations": 2},
    "llm-surgeon": {"shots": 2},
    "lorashear": {"warmup_steps": 1, "periods": 2, "period_steps": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_bytes(method: str) -> None:
    model = FAMILIES["llama"]()
    dense = 4 * sum(parameter.numel() for parameter in model.parameters())
    options: dict[str, Any] = {"method": method, "settings": METHODS[method], "layout": "per-layer"}
    result = resect.prune(model, data=random_tokens(8, 12), budget=f"bytes:{dense * 3 // 4}B", **options)
    left = 4 * sum(parameter.numel() for parameter in model.parameters())
    channel = 4 * 3 * 60
    assert dense * 3 // 4 - channel < left <= dense * 3 // 4
    assert result.report["budget"]["cost"] == left
    assert result.report["budget"]["dense"] == dense
    assert result.plan.notes["budget"] == f"bytes:{dense * 3 // 4}B"


def test_plain_budgets_are_keep_and_of_in_other_words() -> None:
    options: dict[str, Any] = {"settings": {"criterion": "l2"}, "plan_only": True}
    asked: list[dict[str, Any]] = [{"budget": "model:0.9"}, {"keep": 0.9, "of": "model"}]
    plans = [resect.prune(FAMILIES["llama"](), **one, **options).plan for one in asked]
    assert plans[0].groups == plans[1].groups
    assert [PLAIN[kind] for kind in ("params", "model", "macs")] == ["blocks", "model", "macs"]


def planned(found: LatencyTable, layout: str = "per-layer") -> Callable[[float], Plan]:
    cost = found.cost(graph())
    return lambda keep: select(graph(), scores(), keep=keep, of=cost, layout=layout)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("extra", [0.0, 25.0, 40.0])
def test_plans_are_corrected_until_the_machine_agrees(extra: float, layout: str) -> None:
    """The whole network takes seconds more than the table knows of, cut or not; shares are corrected for that."""
    clock = Machine(tread=1)
    found = table(clock, points=60)
    again, dense = planned(found, layout), clock({})[""] + extra
    first = again(0.7)
    plan, tried = settle(
        first, again, found.cost(graph()), lambda one: {"measured": (clock.of(one) + extra) / dense}, keep=0.7
    )
    share = (clock.of(plan) + extra) / dense
    assert abs(share / 0.7 - 1) <= TOLERANCE
    assert tried[-1]["measured"] == share
    assert (len(tried) > 1) == (plan != first) == (extra > 0)


def test_the_nearest_plan_stays_where_none_is_near() -> None:
    """Uniform treads of 8 in every layer are coarse: whatever is tried, the nearest is taken."""
    clock = Machine(tread=30)
    found = table(clock)
    again = planned(found, "uniform")
    measured = lambda one: {"measured": (clock.of(one) + 3) / (clock({})[""] + 3)}  # noqa: E731
    plan, tried = settle(again(0.7), again, found.cost(graph()), measured, keep=0.7)
    assert abs(measured(plan)["measured"] - 0.7) == min(abs(one["measured"] - 0.7) for one in tried)
    assert len(tried) <= 3


@pytest.mark.parametrize(("noise", "rounds"), [(0.01, 7), (0.03, 14), (0.5, 28)])
def test_a_share_is_measured_until_it_is_known(noise: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rounds where they agree, more where they do not, and an end to it."""
    draws, asked = torch.Generator().manual_seed(0), list[int]()

    def latencies(models: Any, *, repeats: int, **_: Any) -> dict[str, Any]:
        asked.append(repeats)
        seconds = {"dense": [2.0] * repeats, "pruned": (1.4 + noise * torch.randn(repeats, generator=draws)).tolist()}
        return {name: SimpleNamespace(prefill_seconds=Spread(tuple(values))) for name, values in seconds.items()}

    monkeypatch.setattr(resect.methods.budget, "latencies", latencies)
    model = FAMILIES["llama"]()
    found = timed_share(model, resect.trace(model), Plan(groups={}), Workload("prefill", 1, 8))
    assert found["measured"] == pytest.approx(0.7, abs=noise)
    assert (found["high"] - found["low"] <= 2 * TOLERANCE * found["measured"]) == (rounds < MOST_REPEATS)
    assert sum(asked) == rounds


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole network takes what the made-up machine says."""
    clock = Machine()

    def share(model: object, here: object, plan: Plan, workload: object) -> dict[str, float]:
        ratio = clock.of(plan) / clock({})[""]
        return {"measured": ratio, "low": ratio, "high": ratio, "seconds": clock.of(plan), "dense_seconds": clock({})[""]}

    monkeypatch.setattr(resect.methods.budget, "timed_share", share)


def small() -> Any:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 60}
    return tiny("Llama", hidden_size=48, num_hidden_layers=LAYERS, vocab_size=101, **sizes)


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize(("method", "settings"), [("llm-pruner", {"criterion": "l2"}), ("llm-surgeon", {"shots": 2})])
def test_seconds_reach_methods(method: str, settings: dict[str, Any]) -> None:
    model, found = small(), table(Machine())
    options: dict[str, Any] = {"method": method, "settings": settings, "latency_table": found, "data": random_tokens(8, 12)}
    result = resect.prune(model, budget="latency:0.7@prefill:1x8", **options)
    facts = result.report["budget"]
    assert facts["measured"] == pytest.approx(facts["predicted"])
    assert facts["cost"] == pytest.approx(Machine().of(result.plan))
    assert facts["measured"] <= 0.7
    assert result.latency_table is found
    assert result.plan.is_uniform()
    width = model.get_submodule("model.layers.0.mlp.gate_proj").out_features
    assert width % 8 == 0


def test_tables_are_for_the_work_and_the_numbers_they_were_measured_with(tmp_path: Path) -> None:
    found, model = table(Machine()), small()

    def spent(budget: str, model: Any = model, used: LatencyTable | str = found) -> Spending:
        options: dict[str, Any] = {"keep": 0.8, "of": "blocks", "kinds": ("channels",), "progress": Progress(tmp_path / "p", "")}
        return spending(model, graph(), Budget.parse(budget), table=used, **options)

    (tmp_path / "table.json").write_text(found.to_json())
    assert spent("latency:0.7@prefill:1x8", used=str(tmp_path / "table.json")).table == found
    with pytest.raises(UsageError, match="work prefill:1x8; the run is for decode:1x8"):
        spent("latency:0.7@decode:1x8")
    with pytest.raises(UsageError, match="dtype float32; the run is for bfloat16"):
        spent("latency:0.7@prefill:1x8", copy.deepcopy(model).to(torch.bfloat16))
    with pytest.warns(OtherMachine, match="other threads"):
        spent("latency:0.7@prefill:1x8", used=found.model_copy(update={"machine": {**machine(), "threads": 99}}))
    with pytest.raises(UsageError, match="cannot be read"):
        spent("latency:0.7@prefill:1x8", used="nowhere.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "bytes:0.7", "keep": 0.5}, "keep=0.5 of blocks as well"),
        ({"budget": "bytes:0.7", "settings": {"share": 0.2}}, "share decides"),
        ({"budget": "bytes:0.7", "method": "llm-surgeon", "settings": {"mode": "unstructured"}}, "counted in params or model"),
        ({"budget": "latncy:0.7"}, "'latency'"),
        ({"budget": "bytes:100B"}, r"smallest reachable share is 0\.\d+ \([\d,]+ bytes\)"),
    ],
)
def test_budgets_that_cannot_be_meant(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resect.prune(FAMILIES["llama"](), data=random_tokens(4, 12), **options)


def test_seconds_are_for_language_models() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    options: dict[str, Any] = {"settings": {"criterion": "l1", "kinds": ["channels"]}, "inputs": (torch.randn(2, 8),)}
    with pytest.raises(UsageError, match="takes no tokens"):
        resect.prune(model, budget="latency:0.7", layout="per-layer", **options)
