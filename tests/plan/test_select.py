"""Budgets land within one unit of the target, and what goes is what scores lowest."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import resect
from resect.errors import NumericsError, UsageError
from resect.graph import Graph, Group
from resect.plan import Kept, Plan, keep_all, select
from tests.models import FAMILIES, tiny
from tests.reference import count_parameters, removed_units

LAYERS = 4
OF = ("blocks", "model", "macs")


@functools.cache
def graph() -> Graph:
    """Four layers of 4 KV heads (3840 parameters each) and 56 channels (180 parameters each)."""
    return resect.trace(llama())


def llama(**fields: Any) -> torch.nn.Module:
    """A tiny llama with enough heads to choose from."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}
    sizes = {"hidden_size": 60, "intermediate_size": 56, "num_hidden_layers": LAYERS, "vocab_size": 101}
    return tiny("Llama", **{**heads, **sizes, **fields})


@functools.cache
def random_scores(seed: int = 0) -> Mapping[str, Tensor]:
    """Distinct positive scores, of another scale in every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.rand(group.units, generator=generator) * (1 + (group.layer or 0)) + 0.01
        for group in graph().groups
    }


def cost(plan: Plan | None, of: str) -> int:
    """What the budget counts, after the plan: parameters by a count of our own, MACs as the graph prices them."""
    if of == "macs":
        return graph().macs(plan.removed() if plan else None)
    return count_parameters(graph(), plan, within=graph().blocks.path if of == "blocks" else "")


def price(group: Group, of: str) -> int:
    """What removing one unit of a group saves."""
    keep = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=tuple(range(1, group.units)))
    return cost(None, of) - cost(Plan(groups={group.name: keep}), of)


def groups(*kinds: str) -> list[Group]:
    """The graph's groups of some kinds."""
    return [group for group in graph().groups if group.kind in kinds]


def assert_within_one_step(plan: Plan, *, keep: float, of: str, step: int) -> None:
    """The cost is at most the target, and less than one step below it."""
    slack = keep * cost(None, of) - cost(plan, of)
    assert slack >= 0, f"{-slack:.0f} {of} over the target"
    assert slack < step, f"{slack:.0f} {of} below the target, one step is {step}"


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("keep", [0.95, 0.8, 0.5, 0.371])
def test_budget_is_exact(keep: float, layout: str, selection: str, of: str) -> None:
    """Per-layer: within one channel. Uniform: within one channel of every layer, since all layers change together."""
    plan = select(graph(), random_scores(), keep=keep, of=of, layout=layout, selection=selection)
    channel = price(groups("channels")[0], of)
    assert_within_one_step(plan, keep=keep, of=of, step=channel * (LAYERS if layout == "uniform" else 1))
    if layout == "uniform":
        for kind in ("heads", "channels"):
            assert len({len(removed_units(group, plan)) for group in groups(kind)}) == 1
        assert plan.is_uniform()


@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("kind", ["heads", "channels", "residual", "blocks"])
def test_budget_of_one_kind(kind: str, of: str, selection: str) -> None:
    """Every kind alone meets its budget within one of its units, and nothing else is touched."""
    keep = 0.8
    plan = select(graph(), random_scores(), keep=keep, of=of, layout="per-layer", selection=selection, kinds=(kind,))
    assert_within_one_step(plan, keep=keep, of=of, step=price(groups(kind)[0], of))
    assert {group.kind for group in graph().groups if removed_units(group, plan)} == {kind}


@pytest.mark.parametrize("of", OF)
def test_keeping_all_removes_nothing(of: str) -> None:
    plan = select(graph(), random_scores(), keep=1.0, of=of, layout="per-layer", selection="global")
    assert not any(removed_units(group, plan) for group in graph().groups)


@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_lowest_scores_go_first_within_a_group(layout: str, selection: str) -> None:
    plan = select(graph(), random_scores(), keep=0.6, of="blocks", layout=layout, selection=selection)
    for group in groups("heads", "channels"):
        score, gone = random_scores()[group.name], removed_units(group, plan)
        assert sorted(score.argsort()[: len(gone)].tolist()) == gone


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_local_selection_takes_the_same_share_everywhere(keep: float, layout: str) -> None:
    """Groups of one kind lose as many units, give or take one; heads and channels the same share within one head."""
    plan = select(graph(), random_scores(), keep=keep, of="blocks", layout=layout, selection="local")
    gone = {kind: [len(removed_units(group, plan)) for group in groups(kind)] for kind in ("heads", "channels")}
    for counts in gone.values():
        assert max(counts) - min(counts) <= (0 if layout == "uniform" else 1)
    shares = {kind: sum(counts) / sum(group.units for group in groups(kind)) for kind, counts in gone.items()}
    assert abs(shares["heads"] - shares["channels"]) <= 1 / groups("heads")[0].units


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_global_selection_is_by_loss_per_parameter(keep: float, seed: int) -> None:
    """The total loss is that of taking the lowest loss per parameter first, give or take what one head weighs."""
    scores = random_scores(seed)
    plan = select(graph(), scores, keep=keep, of="blocks", layout="per-layer", selection="global")
    units = []  # loss per parameter and size of every unit that may go: all but the best of each group
    found, dearest = 0.0, 0.0
    for group in groups("heads", "channels"):
        size, gone = price(group, "blocks"), removed_units(group, plan)
        units += [(float(score) / size, size) for score in scores[group.name].sort().values[:-1]]
        found += float(scores[group.name][gone].sum())
        dearest = max([dearest, *(float(score) / size for score in scores[group.name][gone])])
    needed = (1 - keep) * cost(None, "blocks")
    head = price(groups("heads")[0], "blocks")
    assert found <= lowest_loss(sorted(units), needed) + dearest * head


def lowest_loss(units: list[tuple[float, int]], needed: float) -> float:
    """What it costs at least to free `needed` parameters, if the last unit could go in part."""
    loss = 0.0
    for ratio, size in units:
        taken = min(size, needed)
        loss, needed = loss + ratio * taken, needed - taken
    return loss


def test_global_selection_lets_heads_and_channels_compete() -> None:
    """Scores that make heads cheap per parameter remove heads before channels, and the other way round."""
    for cheap, dear in (("heads", "channels"), ("channels", "heads")):
        scores = {
            group.name: (torch.rand(group.units) + 1) * price(group, "blocks") * (0.01 if group.kind == cheap else 1.0)
            for group in groups("heads", "channels")
        }
        plan = select(graph(), scores, keep=0.9, of="blocks", layout="per-layer", selection="global")
        gone = {kind: sum(len(removed_units(group, plan)) for group in groups(kind)) for kind in (cheap, dear)}
        assert gone[cheap] > 0
        assert gone[dear] * price(groups(dear)[0], "blocks") < price(groups("heads")[0], "blocks")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.75, 0.5])
def test_global_selection_is_optimal_by_brute_force(seed: int, keep: float) -> None:
    """With units of one size, no other choice of as few units within the budget has a smaller total score."""
    model = llama(num_hidden_layers=3, intermediate_size=5, num_attention_heads=2, num_key_value_heads=1)
    small = resect.trace(model)
    channels = [group for group in small.groups if group.kind == "channels"]
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in small.groups}
    prunable = sum(3 * 60 * group.units for group in channels)
    share = 1 - (1 - keep) * prunable / count_parameters(small, within=small.blocks.path)
    plan = select(small, scores, keep=share, of="blocks", layout="per-layer", selection="global", kinds=("channels",))
    units = [(group.name, unit) for group in channels for unit in range(group.units)]
    found = {(group.name, unit) for group in channels for unit in removed_units(group, plan)}
    needed = -(-round((1 - keep) * 1000) * len(units) // 1000)
    assert len(found) == needed
    least = min(total(scores, choice) for choice in allowed(units, needed))
    assert total(scores, found) == pytest.approx(least, rel=1e-6)


def total(scores: Mapping[str, Tensor], units: Sequence[tuple[str, int]] | set[tuple[str, int]]) -> float:
    """Sum of the scores of some units."""
    return sum(float(scores[name][unit]) for name, unit in units)


def allowed(units: list[tuple[str, int]], needed: int) -> list[tuple[tuple[str, int], ...]]:
    """Every choice of so many units that leaves one per group."""
    whole = max(unit for _, unit in units) + 1
    choices = itertools.combinations(units, needed)
    return [choice for choice in choices if all(sum(n == name for n, _ in choice) < whole for name, _ in choice)]


@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_aligned_channels(layout: str, selection: str) -> None:
    """Channels that stay come in multiples; the budget is met within one multiple (of every layer, if uniform)."""
    plan = select(graph(), random_scores(), keep=0.6, of="blocks", layout=layout, selection=selection, align=8)
    for group in groups("channels"):
        assert (group.units - len(removed_units(group, plan))) % 8 == 0
    step = 8 * price(groups("channels")[0], "blocks") * (LAYERS if layout == "uniform" else 1)
    assert_within_one_step(plan, keep=0.6, of="blocks", step=step)


@pytest.mark.parametrize("selection", ["local", "global"])
def test_ranges_bound_the_blocks_of_each_kind(selection: str) -> None:
    plan = select(
        graph(),
        random_scores(),
        keep=0.8,
        of="blocks",
        layout="per-layer",
        selection=selection,
        ranges={"heads": (1, 3), "channels": (0, 2)},
    )
    touched = {(group.kind, group.layer) for group in graph().groups if removed_units(group, plan)}
    assert touched <= {("heads", 1), ("heads", 2), ("channels", 0), ("channels", 1)}
    assert_within_one_step(plan, keep=0.8, of="blocks", step=price(groups("channels")[0], "blocks"))


@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_floor_stays_in_every_group(layout: str, selection: str) -> None:
    plan = select(graph(), random_scores(), keep=0.62, of="blocks", layout=layout, selection=selection, floor=2)
    assert all(group.units - len(removed_units(group, plan)) >= 2 for group in groups("heads", "channels"))
    assert_within_one_step(plan, keep=0.62, of="blocks", step=price(groups("channels")[0], "blocks") * LAYERS)


def test_floor_by_kind() -> None:
    options: dict[str, Any] = {"keep": 0.62, "layout": "per-layer", "selection": "local"}
    plan = select(graph(), random_scores(), floor={"heads": 3}, **options)
    assert {len(removed_units(group, plan)) for group in groups("heads")} == {1}
    free = select(graph(), random_scores(), **options)
    assert max(len(removed_units(group, free)) for group in groups("heads")) > 1
    assert_within_one_step(plan, keep=0.62, of="blocks", step=price(groups("channels")[0], "blocks"))


def test_spread_lies_between_local_and_global() -> None:
    """No group loses more than the multiple of the even share, or what the even share itself takes from it."""
    options: dict[str, Any] = {"keep": 0.7, "of": "blocks", "layout": "per-layer"}
    even = select(graph(), random_scores(), selection="local", **options)
    free = select(graph(), random_scores(), **options)
    share = {
        kind: sum(len(removed_units(group, even)) for group in groups(kind)) / sum(group.units for group in groups(kind))
        for kind in ("heads", "channels")
    }
    lost = {group.name: len(removed_units(group, free)) / group.units for group in groups("heads", "channels")}
    assert max(lost.values()) > 1.5 * max(share.values()), "the global plan must be one that the cap changes"
    for spread in (1.0, 1.2, 1.5):
        plan = select(graph(), random_scores(), spread=spread, **options)
        assert_within_one_step(plan, keep=0.7, of="blocks", step=price(groups("channels")[0], "blocks"))
        for group in groups("heads", "channels"):
            most = max(int(spread * share[group.kind] * group.units), len(removed_units(group, even)))
            assert len(removed_units(group, plan)) <= most, (spread, group.name)
    assert select(graph(), random_scores(), spread=99.0, **options) == free
    assert select(graph(), random_scores(), spread=1.5, selection="local", **options) == even


def test_spread_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"spread=0\.5 .* 1 or more"):
        select(graph(), random_scores(), keep=0.7, spread=0.5)


def test_same_input_same_plan() -> None:
    """The order of the scores' dictionary says nothing, nor does a second call, nor which units tie."""
    options: dict[str, Any] = {"keep": 0.7, "of": "blocks", "layout": "per-layer", "selection": "global"}
    backwards = dict(reversed(list(random_scores().items())))
    assert select(graph(), backwards, **options) == select(graph(), random_scores(), **options)
    tied = {group.name: torch.ones(group.units) for group in graph().groups}
    assert select(graph(), tied, **options) == select(graph(), tied, **options)


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("selection", ["local", "global"])
def test_out_of_reach_says_what_is_reachable(selection: str, of: str) -> None:
    """The message names the share that is left with one unit in every group, as a fraction or a percentage."""
    bare = Plan(
        groups={
            group.name: Kept(kind=group.kind, layer=group.layer, units=group.units, keep=(0,))
            for group in groups("heads", "channels")
        }
    )
    smallest = cost(bare, of) / cost(None, of)
    with pytest.raises(UsageError) as caught:
        select(graph(), random_scores(), keep=smallest * 0.9, of=of, layout="per-layer", selection=selection)
    numbers = [float(number) for number in re.findall(r"\d+\.\d+|\d+", str(caught.value))]
    assert any(smallest - 1e-9 <= n * unit <= smallest + 0.01 for n in numbers for unit in (1, 0.01)), str(caught.value)
    plan = select(graph(), random_scores(), keep=smallest + 1e-9, of=of, layout="per-layer", selection=selection)
    assert cost(plan, of) == round(smallest * cost(None, of))


@pytest.mark.parametrize("keep", [0.0, -0.2, 1.01, 80.0, float("nan"), float("inf")])
def test_impossible_shares_are_refused(keep: float) -> None:
    with pytest.raises(UsageError, match="keep"):
        select(graph(), random_scores(), keep=keep)


@pytest.mark.parametrize(
    ("option", "asked", "meant"),
    [
        ("kinds", ("head",), "heads"),
        ("of", "block", "blocks"),
        ("layout", "unifrom", "uniform"),
        ("selection", "globl", "global"),
        ("ranges", {"chanels": (0, 2)}, "channels"),
    ],
)
def test_unknown_words_are_answered_with_the_nearest(option: str, asked: object, meant: str) -> None:
    options: dict[str, Any] = {"keep": 0.8, option: asked}
    with pytest.raises(UsageError, match=f"'{meant}'"):
        select(graph(), random_scores(), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_scores_are_named(value: float) -> None:
    group = groups("channels")[2]
    bad = torch.ones(group.units)
    bad[5] = value
    with pytest.raises(NumericsError, match=re.escape(group.name)):
        select(graph(), {**random_scores(), group.name: bad}, keep=0.8)


@pytest.mark.parametrize("cut", [False, True])
def test_macs_are_what_runs(cut: bool) -> None:
    """The graph's multiply-accumulates are half the floating-point operations PyTorch counts on 1×64 tokens."""
    model = llama(attn_implementation="eager")
    here = resect.trace(model)
    plan = select(here, random_scores(), keep=0.6, kinds=("heads", "channels")) if cut else Plan()
    if cut:
        resect.cut(model, plan)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(4, 101, (1, 64)), use_cache=False)
    assert here.macs(plan.removed()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("spread", [None, 1.2])
def test_what_an_earlier_plan_removed_is_gone(layout: str, selection: str, spread: float | None) -> None:
    graph = resect.trace(FAMILIES["llama"]())
    generator = torch.Generator().manual_seed(0)
    plan, cost = keep_all(graph.of_kind("heads", "channels")), graph.parameter_count(blocks_only=True)
    for keep in (0.9, 0.75, 0.6):
        scores = {group.name: torch.rand(group.units, generator=generator) for group in graph.of_kind("heads", "channels")}
        found = select(graph, scores, keep=keep, layout=layout, selection=selection, spread=spread, within=plan)
        assert keep - 0.09 < graph.parameter_count(found.removed(), blocks_only=True) / cost <= keep
        assert all(set(kept.keep) <= set(plan.groups[name].keep) for name, kept in found.groups.items())
        plan = found
