"""What widths cost, with clocks that are made up: edges are found, plans meet their budget in the made-up machine."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from math import ceil

import pytest
import torch

import resect
from resect.errors import UsageError
from resect.evaluation import LatencyTable, Steps, latency_table, measure_families
from resect.graph import Graph
from resect.plan import Plan, Workload, select
from tests.models import FAMILIES, assert_untouched, snapshot, tiny

LAYERS, UNITS, HEADS = 6, 60, 4
REST = 0.5
"""Seconds of everything that is not cut."""


@functools.cache
def graph() -> Graph:
    """Six layers of 4 KV heads and 60 channels."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": HEADS, "head_dim": 8, "intermediate_size": UNITS}
    return resect.trace(tiny("Llama", hidden_size=48, num_hidden_layers=LAYERS, vocab_size=101, **sizes))


class Machine:
    """A clock that looks at widths: MLPs take a second for every 8 channels begun, attention a tenth for every head."""

    def __init__(self, tread: int = 8, *, head: float = 0.1, wobble: float = 0.0) -> None:
        self.tread, self.head, self.wobble, self.passes = tread, head, wobble, list[Mapping[str, int]]()

    def home(self, name: str, kept: int) -> float:
        if name.endswith("heads"):
            return 0.2 + self.head * kept
        odd = self.wobble if kept % 2 else 0.0
        return 0.1 + ceil(kept / self.tread) + odd

    def __call__(self, kept: Mapping[str, int]) -> dict[str, float]:
        self.passes.append(kept)
        cut = {g.name: kept.get(g.name, g.units) for g in graph().of_kind("heads", "channels")}
        homes = {name.rpartition(".")[0]: self.home(name, units) for name, units in cut.items()}
        blocks = {f"model.layers.{layer}": 0.05 for layer in range(LAYERS)}
        for home, seconds in homes.items():
            blocks[home.rpartition(".")[0]] += seconds
        return {**homes, **blocks, "": REST + sum(blocks.values())}

    def of(self, plan: Plan) -> float:
        """Seconds of the whole network cut by a plan."""
        return self({name: len(kept.keep) for name, kept in plan.groups.items()})[""]


def table(machine: Machine, kinds: tuple[str, ...] = ("heads", "channels"), points: int = 15) -> LatencyTable:
    families, seconds = measure_families(graph(), machine, kinds=kinds, points=points)
    work = str(Workload("prefill", 1, 8))
    return LatencyTable(
        where=work, device="cpu", dtype="float32", threads=1, seconds=seconds, families=tuple(families)
    )


def family(found: LatencyTable, kind: str) -> Steps:
    return next(steps for steps in found.families if steps.kind == kind)


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=generator) + 0.01 for g in graph().of_kind("heads", "channels")}


@pytest.mark.parametrize("points", [5, 15])
def test_edges_of_the_stairs_are_found(points: int) -> None:
    """Treads of 8: those that widths at equal distances stand on end at a multiple; with 15 widths these are all."""
    machine = Machine()
    found = table(machine, points=points)
    heads, channels = (family(found, kind) for kind in ("heads", "channels"))
    assert heads.edges == [4, 3, 2, 1]
    assert channels.edges[0] == UNITS
    assert {48, 40, 24, 16, 8} <= set(channels.edges)
    if points == 15:
        assert channels.edges == [60, 56, 48, 40, 32, 24, 16, 8]
    for width, seconds in channels.seconds.items():
        assert seconds == machine.home("channels", width)


def test_like_blocks_share_the_work() -> None:
    """All six blocks of a pass are cut, each to another width, and no width is measured twice."""
    machine = Machine()
    found = table(machine)
    channels = [[kept for name, kept in one.items() if name.endswith("channels")] for one in machine.passes]
    measured = [kept for one in channels for kept in one]
    assert channels[0] == []
    assert len(channels[1]) == LAYERS
    assert len(measured) == len(set(measured)) == len(family(found, "channels").seconds) - 1


def test_widths_slower_than_wider_ones_are_passed_over() -> None:
    """Odd widths take three seconds more, so none of them is an edge."""
    edges = family(table(Machine(wobble=3.0)), "channels").edges
    assert not any(edge % 2 for edge in edges)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_plans_meet_the_budget_in_the_machine(keep: float, selection: str, layout: str) -> None:
    """The table's seconds are the machine's, to the last bit of a sum; at most the budget, less than one step below it."""
    machine, dense = Machine(), Machine()({})[""]
    cost = table(machine).cost(graph())
    plan = select(graph(), scores(), keep=keep, of=cost, layout=layout, selection=selection)
    removed = plan.removed()
    assert cost(removed) == pytest.approx(machine.of(plan), rel=1e-12)
    assert machine.of(plan) <= keep * dense
    assert machine.of(plan) > keep * dense - (LAYERS if layout == "uniform" else 1)
    assert all(len(kept.keep) % 8 in (0, 60 % 8) for kept in plan.groups.values() if kept.kind == "channels")
    assert plan.is_uniform() or layout == "per-layer"


def test_costs_never_rise_when_units_go() -> None:
    cost = table(Machine(wobble=3.0)).cost(graph())
    seconds = [cost({"model.layers.2.mlp.channels": gone}) for gone in range(UNITS)]
    assert seconds == sorted(seconds, reverse=True)


def test_a_machine_that_does_not_care_says_how_far_it_goes() -> None:
    """Channels cost nothing here: 4 heads to 1 in six layers save 1.8 of the seconds, and that is all."""
    machine = Machine(tread=1000)
    dense = machine({})[""]
    reachable = ceil((dense - 1.8) / dense * 1e4) / 1e4
    with pytest.raises(UsageError, match=re.escape(f"smallest reachable share is {reachable:.4f}")):
        select(graph(), scores(), keep=0.3, of=table(machine).cost(graph()))


def test_what_goes_with_a_block_is_saved_once() -> None:
    machine = Machine()
    cost = table(machine, ("heads", "channels", "blocks")).cost(graph())
    block = 0.05 + machine.home("heads", HEADS) + machine.home("channels", UNITS)
    whole = {"model.layers.3": 1}
    assert cost({}) - cost(whole) == pytest.approx(block)
    inside = {**whole, "model.layers.3.mlp.channels": 28, "model.layers.3.self_attn.heads": 2}
    assert cost(inside) == pytest.approx(cost(whole))
    assert cost({**whole, "model.layers.2.mlp.channels": 20}) == pytest.approx(cost(whole) - 3)


def test_tables_come_back_from_json() -> None:
    found = table(Machine())
    again = LatencyTable.from_json(found.to_json())
    assert again == found
    assert again.cost(graph())({"model.layers.0.mlp.channels": 20}) == found.cost(graph())({"model.layers.0.mlp.channels": 20})
    with pytest.raises(UsageError, match="not a latency table"):
        LatencyTable.from_json("{}")


def test_tables_of_other_networks_are_refused() -> None:
    other = resect.trace(FAMILIES["llama"]())
    with pytest.raises(UsageError, match=r"counts 60 units .* this network has 56"):
        table(Machine()).cost(other)


@pytest.mark.parametrize(("family", "work"), [("llama", "prefill:2x8"), ("opt", "decode:1x8")])
def test_a_real_network_is_timed_and_left_alone(family: str, work: str) -> None:
    """OPT's MLP lies in the block itself: its channels and its heads are never cut in the same block at once."""
    model = FAMILIES[family]()
    before, here = snapshot(model), resect.trace(model)
    found = latency_table(model, here, Workload.parse(work), points=2, rounds=1)
    assert_untouched(model, before)
    assert (found.where, found.device, found.dtype) == (work, "cpu", "float32")
    homes = {steps.kind: steps.homes for steps in found.families}
    block = here.blocks.path + ".0"
    assert homes["heads"][f"{block}.self_attn.heads"] == f"{block}.self_attn"
    assert set(homes["channels"].values()) >= {block if family == "opt" else f"{block}.mlp"}
    assert all(seconds > 0 for steps in found.families for seconds in steps.seconds.values())
    assert found.seconds > max(seconds for steps in found.families for seconds in steps.seconds.values())


def test_too_few_positions_are_refused() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match="it has 80 positions"):
        latency_table(model, resect.trace(model), Workload("prefill", 1, 80))
