"""Budgets as people write them, and as exactly as whole units allow."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import resect
from resect.errors import UsageError
from resect.plan import Budget, Cost, Plan, Workload, bytes_cost, macs_cost, macs_of, select
from resect.plan.select import _pooled
from tests.plan.test_select import graph, groups, llama, random_scores
from tests.reference import count_parameters


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("params:0.7", Budget("params", 0.7)),
        ("model:0.7", Budget("model", 0.7)),
        ("macs:1", Budget("macs", 1.0)),
        ("macs:0.5@decode:4x128", Budget("macs", 0.5, workload=Workload("decode", 4, 128))),
        ("bytes:0.5", Budget("bytes", 0.5)),
        ("bytes:200MB", Budget("bytes", amount=200_000_000)),
        ("bytes:1.5KiB", Budget("bytes", amount=1536)),
        ("params:250k", Budget("params", amount=250_000)),
        ("model:1.5B", Budget("model", amount=1_500_000_000)),
        ("model:250000", Budget("model", amount=250_000)),
        ("macs:2G@prefill", Budget("macs", amount=2 * 10**9, workload=Workload("prefill", 1, 512))),
        ("latency:0.7", Budget("latency", 0.7, workload=Workload("prefill", 1, 512))),
        ("latency:0.7@decode", Budget("latency", 0.7, workload=Workload("decode", 1, 512))),
        ("latency:0.7@prefill:2x64", Budget("latency", 0.7, workload=Workload("prefill", 2, 64))),
    ],
)
def test_budgets_are_read_and_written(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latencey:0.7", "'latency'"),
        ("flops:0.7", "Known: bytes, latency, macs, model, params"),
        ("0.7", "no budget of '0.7'"),
        ("macs", "does not say how much"),
        ("macs:", "does not say how much"),
        ("macs:much", "'much' is no number"),
        ("macs:0", "lies in (0, 1]"),
        ("latency:1.2", "lies in (0, 1]"),
        ("latency:nan", "lies in (0, 1]"),
        ("latency:0.7@prefil", "'prefill'"),
        ("latency:0.7@prefill:512", "prefill:1x512"),
        ("latency:0.7@prefill:0x512", "prefill:1x512"),
        ("params:0.7@decode", "Leave @decode out"),
        ("params:250q", "Known: , B, G, M, T, k"),
        ("model:1.5", "lies in (0, 1]"),
        ("latency:2s", "'2s' is no number"),
        ("bytes:200Mb", "Known: B, GB, GiB, KiB, MB, MiB, kB"),
    ],
)
def test_bad_budgets_say_what_is_meant(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Budget.parse(text)


SIZES = dict.fromkeys(graph().parameters, 2) | {"model.embed_tokens.weight": 4}
COSTS = {
    "bytes": bytes_cost(graph(), SIZES),
    "macs@prefill:2x32": macs_cost(graph(), Workload("prefill", 2, 32)),
    "macs@decode:1x32": macs_cost(graph(), Workload("decode", 1, 32)),
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_one_more_unit_would_exceed_the_budget(layout: str, selection: str, name: str) -> None:
    cost, target = COSTS[name], 0.8 * COSTS[name]({})
    plan = select(graph(), random_scores(), keep=0.8, of=cost, layout=layout, selection=selection)
    removed = plan.removed()
    assert cost(removed) <= target
    channels = groups("channels") if layout == "uniform" else [next(one for one in groups("channels") if removed.get(one.name))]
    more = {**removed, **{group.name: removed[group.name] - 1 for group in channels}}
    assert cost(more) > target


def test_bytes_are_those_of_the_parameters_that_stay() -> None:
    plan = select(graph(), random_scores(), keep=0.7, of=COSTS["bytes"])
    expected = 2 * count_parameters(graph(), plan) + 2 * count_parameters(graph(), plan, within="model.embed_tokens")
    assert COSTS["bytes"](plan.removed()) == expected


@pytest.mark.parametrize("amount", [160_001, 173_456, 10**9])
def test_amounts_of_bytes_are_met(amount: int) -> None:
    cost = bytes_cost(graph(), dict.fromkeys(graph().parameters, 2))
    keep = Budget("bytes", amount=amount).keep(cost({}))
    spent = cost(select(graph(), random_scores(), keep=keep, of=cost).removed())
    channel = 2 * 3 * 60
    assert min(amount, cost({})) - channel < spent <= amount


def test_out_of_reach_says_what_is_reachable_in_bytes() -> None:
    with pytest.raises(UsageError, match=r"of bytes cannot be met .* smallest reachable share is 0\.\d+ \([\d,]+ bytes\)"):
        select(graph(), random_scores(), keep=0.01, of=COSTS["bytes"])


@pytest.mark.parametrize("cut", [False, True])
def test_work_of_a_token_is_what_runs(cut: bool) -> None:
    """Half the floating-point operations that PyTorch counts for the 33rd token of two sequences, and for the 32 before."""
    model = llama(attn_implementation="eager")
    here = resect.trace(model)
    plan = select(here, random_scores(), keep=0.6) if cut else Plan()
    if cut:
        resect.cut(model, plan)
    tokens = torch.randint(4, 101, (2, 33))
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            read = model(tokens[:, :32], use_cache=True)
        assert macs_of(here, Workload("prefill", 2, 32), plan.removed()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, 32:], past_key_values=read.past_key_values, use_cache=True)
    assert macs_of(here, Workload("decode", 2, 32), plan.removed()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_steps_that_lead_to_a_bargain_go_with_it() -> None:
    """Losses 1, 4, 1, 9 for 1, 1, 4, 1: the dear second step is the way to the cheap third, and both cost 5 for 5."""
    losses, prices = torch.tensor([0.5, 4, 1, 9]).double(), torch.tensor([1, 1, 4, 1]).double()
    assert _pooled(losses, prices).tolist() == [0.5, 1, 1, 9]


def test_stops_are_the_only_widths() -> None:
    """A cost that falls at widths 40, 24 and 8 only: channels stop there, heads, which have no stops, stay whole."""
    stops = (56, 40, 24, 8)
    names = {group.name for group in groups("channels")}

    def value(removed: dict[str, int]) -> float:
        return float(sum(min(stop for stop in stops if stop >= 56 - removed.get(name, 0)) for name in names))

    cost = Cost("stairs", value, lambda name: stops if name in names else ())  # type: ignore[arg-type]
    for layout in ("uniform", "per-layer"):
        removed = select(graph(), random_scores(), keep=0.6, of=cost, layout=layout).removed()
        assert removed.keys() <= names
        assert {56 - count for count in removed.values()} <= set(stops)
        assert value(removed) <= 0.6 * 56 * 4
        ladders = [list(names)] if layout == "uniform" else [[name] for name in removed]
        less = [{**removed, **{name: removed[name] - 1 for name in ladder}} for ladder in ladders]
        assert any(value(one) > 0.6 * 56 * 4 for one in less)
