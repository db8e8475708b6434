"""LoRAShear: budgets, what is zero when it ends, what is untouched, and runs that are cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.checkpoint import Progress
from resect.errors import NumericsError, UsageError
from resect.methods import LoRAShear
from resect.plan import Plan
from resect.recovery import Steps
from resect.statistics import Classes, Data
from resect.surgery import masked
from tests.models import FAMILIES, assert_untouched, random_tokens, snapshot

TOKENS = random_tokens(24, 16, seed=3)
SETTINGS: dict[str, Any] = {"warmup_steps": 3, "periods": 3, "period_steps": 4, "settle_steps": 2, "checkpoint_steps": 1}
SETTINGS["analysis"] = None


def sheared(model: nn.Module, **options: Any) -> resect.Result:
    """A small run on fixed tokens."""
    options = {"data": TOKENS, "layout": "per-layer", "keep": 0.7, "settings": SETTINGS, **options}
    return resect.prune(model, method="lorashear", **options)


def planned(model: nn.Module, directory: Path, *, resume: bool = False, **settings: Any) -> Plan:
    """The method alone, without the cut; every step is noted."""
    method = LoRAShear(**{**SETTINGS, **settings})
    progress = Progress(directory, "a test", resume=resume)
    plan, _ = method.plan(model, resect.trace(model), Data(TOKENS.split(4)), keep=0.7, progress=progress)
    return plan


@pytest.mark.parametrize("family", ["llama_biases", "gpt2", "qwen3", "gemma2", "opt", "falcon_gqa"])
def test_families_are_cut_and_checked(family: str) -> None:
    model = FAMILIES[family]()
    result = sheared(model)
    share = result.report["block_parameters"]["pruned"] / result.report["block_parameters"]["dense"]
    assert 0.66 < share <= 0.7
    sizes = [shot["parameters"] for shot in result.report["shots"]]
    assert len(sizes) == SETTINGS["periods"]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == result.report["parameters"]["pruned"]
    assert result.report["cut_equals_mask"]["difference"] <= result.report["cut_equals_mask"]["allowed"]
    assert not any(".lora_" in name or "base_layer" in name for name, _ in model.named_modules())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("selection", ["global", "local"])
def test_the_budget_is_met_in_every_layout(layout: str, selection: str) -> None:
    result = sheared(FAMILIES["llama"](), layout=layout, settings={**SETTINGS, "selection": selection})
    share = result.report["block_parameters"]["pruned"] / result.report["block_parameters"]["dense"]
    assert 0.6 < share <= 0.7


def test_scores_of_llm_pruner_remove_what_it_removes() -> None:
    asked: dict[str, Any] = {"layout": "per-layer", "keep": 0.7, "data": TOKENS}
    ours = sheared(FAMILIES["llama"](), settings={**SETTINGS, "criterion": "element2"})
    theirs = resect.prune(FAMILIES["llama"](), method="llm-pruner", **asked)
    assert {name: kept.keep for name, kept in ours.plan.groups.items()} == {
        name: kept.keep for name, kept in theirs.plan.groups.items()
    }
    adapted = sheared(FAMILIES["llama"]())
    assert adapted.plan.groups != ours.plan.groups


def test_an_analysis_of_held_out_windows_spares_the_dearest_groups() -> None:
    asked = {"gamma": 0.3, "ratios": [0.5], "windows": 6}
    model = FAMILIES["llama"]()
    before = resect.analyze(model, text=TOKENS[:6], gamma=0.3, ratios=[0.5], window=16, limit=None)
    named = next(group.name for group in resect.trace(model).of_kind("heads") if group.name not in before.protected)
    result = sheared(model, settings={**SETTINGS, "analysis": asked}, protect=named)
    found = result.report["knowledge"]
    assert found.protected == before.protected
    assert len(before.protected) > 1
    for name in [*before.protected, named]:
        assert result.plan.groups[name].removed == 0, name
    share = result.report["block_parameters"]["pruned"] / result.report["block_parameters"]["dense"]
    assert 0.6 < share <= 0.7


def test_an_analysis_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(FAMILIES["llama"](), tmp_path / "whole", analysis={"ratios": [0.5]})

    def no(*_: Any, **__: Any) -> Any:
        raise AssertionError("analysed again")

    def torn(self: Steps, number: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "step", torn)
        with pytest.raises(KeyboardInterrupt):
            planned(FAMILIES["llama"](), tmp_path / "cut short", analysis={"ratios": [0.5]})
    monkeypatch.setattr("resect.methods.lorashear.analyze", no)
    again = planned(FAMILIES["llama"](), tmp_path / "cut short", resume=True, analysis={"ratios": [0.5]})
    assert again.groups == whole.groups


def test_what_goes_is_zero_and_cutting_it_changes_nothing(tmp_path: Path) -> None:
    model = FAMILIES["llama_biases"]()
    first = {name: value.clone() for name, value in model.named_parameters()}
    graph = resect.trace(model)
    plan = planned(model, tmp_path / "progress")
    removed = sum(kept.removed for kept in plan.groups.values())
    assert removed
    zero = 0
    for group in graph.of_kind("heads", "channels"):
        stays = set(plan.groups[group.name].keep)
        gone = [unit for unit in range(group.units) if unit not in stays]
        zero += len(gone)
        for member in group.members:
            if member.axis == 0:
                weight = model.get_parameter(member.parameter)
                assert not weight[member.index[gone].flatten()].any()
                assert weight[member.index[sorted(stays)].flatten()].flatten(1).any(1).all() if weight.ndim > 1 else True
    assert zero == removed
    with torch.no_grad():
        faded = model(TOKENS).logits
        with masked(model, plan, graph):
            assert torch.equal(model(TOKENS).logits, faded)
        resect.cut(model, plan, graph)
        torch.testing.assert_close(model(TOKENS).logits, faded, rtol=1e-4, atol=1e-4)
    untouched = [name for name in first if "_proj" not in name]
    assert untouched
    for name in untouched:
        assert torch.equal(model.get_parameter(name), first[name])


def test_plans_grow_from_period_to_period(tmp_path: Path) -> None:
    planned(FAMILIES["llama"](), tmp_path)
    noted = Progress(tmp_path, "a test", resume=True).facts("state")
    assert noted is not None
    plans = [Plan.from_json(text) for text in noted["plans"]]
    sizes = [sum(kept.removed for kept in plan.groups.values()) for plan in plans]
    assert len(plans) == 4
    assert sizes[0] == 0
    assert sorted(set(sizes)) == sizes
    for before, after in zip(plans, plans[1:], strict=False):
        assert all(set(after.groups[name].keep) <= set(kept.keep) for name, kept in before.groups.items())
    assert len(noted["losses"]) == 3 + 3 * 4 + 2


class Cut(Exception):
    """The power went."""


def test_cut_short_at_any_step_it_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FAMILIES["llama"]()
    expected = planned(whole, tmp_path / "whole")
    step = Steps.step
    for when in (2, 5, 9, 16):

        def failing(self: Steps, number: int, when: int = when) -> None:
            if number == when:
                raise Cut
            step(self, number)

        monkeypatch.setattr(Steps, "step", failing)
        with pytest.raises(Cut):  # the process is gone, and with it the network
            planned(FAMILIES["llama"](), tmp_path / "cut", resume=when > 2, checkpoint_steps=2)
    monkeypatch.setattr(Steps, "step", step)
    again = FAMILIES["llama"]()
    assert planned(again, tmp_path / "cut", resume=True, checkpoint_steps=2) == expected
    for name, value in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name


@pytest.mark.parametrize("settle", [0, 2])
def test_what_was_cut_off_after_the_last_step_trains_no_more(
    settle: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"checkpoint_steps": 50, "settle_steps": settle}
    whole = FAMILIES["llama"]()
    expected = planned(whole, tmp_path, **settings)
    monkeypatch.delattr(Steps, "step")
    again = FAMILIES["llama"]()
    assert planned(again, tmp_path, resume=True, **settings) == expected
    for name, value in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name


def test_a_dry_run_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["llama"]()
    before = snapshot(model)
    assert sheared(model, plan_only=True).plan.removed()
    assert_untouched(model, before)


def test_survivors_learn() -> None:
    model = FAMILIES["llama"]()
    first = {name: value.clone() for name, value in model.named_parameters()}
    result = sheared(model, keep=0.9, settings={**SETTINGS, "learning_rate": 1e-2, "settle_steps": 30})
    assert result.report["losses"][-1] < result.report["losses"][0]
    changed = [name for name, value in model.named_parameters() if value.shape == first[name].shape and "_proj" in name]
    assert any(not torch.equal(model.get_parameter(name), first[name]) for name in changed)


def test_in_half_precision_adapters_are_wider_than_the_weights(tmp_path: Path) -> None:
    model = FAMILIES["llama"]().bfloat16()
    planned(model, tmp_path)
    noted = Progress(tmp_path, "a test", resume=True)
    facts = noted.facts("state")
    assert facts is not None
    state = noted.get(f"state-{facts['step']}/steps")
    assert state is not None
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_network_of_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    data = Data([(images[:16], labels[:16]), (images[16:], labels[16:])], Classes())
    result = resect.prune(
        model, method="lorashear", keep=0.6, of="model", layout="per-layer", data=data, inputs=(images[:1],), settings=SETTINGS
    )
    assert result.report["parameters"]["pruned"] <= 0.6 * result.report["parameters"]["dense"]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_adapters(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="Lower the learning rate"):
        planned(model, tmp_path)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_budget_out_of_reach_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Steps, number: int) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(Steps, "step", never)
    with pytest.raises(UsageError, match="cannot be met"):
        sheared(FAMILIES["llama"](), keep=0.01)
