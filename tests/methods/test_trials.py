"""Prices by trial, against removals done by hand."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import resect
from resect.errors import UsageError
from resect.evaluation import Onward
from resect.graph import Graph, Group
from resect.methods import Compensation, Trials
from resect.methods.compensation import compensate
from resect.methods.trials import spread, tried
from resect.plan import Plan, keep_all
from resect.saliency import Ladder, Reader, ladder
from resect.statistics import Data, Moments, collect_curvature, readers
from resect.surgery import masked
from tests.models import FAMILIES, assert_untouched, copy_of, random_tokens, snapshot

BATCHES = [random_tokens(2, 12, seed=seed) for seed in range(6)]
UNBOUNDED = (-1e12, 1e12)  # factors as measured; nobody may ask for negative ones, so nothing validates these


def mean_nats(model: nn.Module, batches: list[Any]) -> float:
    """Cross-entropy of every token but the first of a window; of a padded one, of those that follow a token."""
    total, predictions = 0.0, 0
    for batch in batches:
        given = batch if isinstance(batch, dict) else {"input_ids": batch}
        mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        with torch.no_grad():
            logits = model(**given).logits.double()
        for row, (tokens, real) in enumerate(zip(given["input_ids"], mask, strict=True)):
            for place in range(1, len(tokens)):
                if real[place] and real[place - 1]:
                    total += float(cross_entropy(logits[row, place - 1], tokens[place]))
                    predictions += 1
    return total / predictions


class Setting:
    """A tiny network in float64 that has lost some channels of every block before, and its ladders from there on."""

    def __init__(self, family: str, gone: int = 0) -> None:
        self.model = FAMILIES[family]().double()
        self.graph: Graph = resect.trace(self.model)
        self.groups: list[Group] = self.graph.of_kind("heads", "channels")
        self.plan = self.without({group.name: range(gone) for group in self.groups if group.kind == "channels"})
        self.moments: dict[str, Moments] = {}
        pairs = {group.name: readers(self.model, self.graph, group) for group in self.groups}
        paths = list(dict.fromkeys(layer.path for some in pairs.values() for layer, _ in some))
        collect_curvature(self.model, BATCHES, self.graph, paths, self.moments.__setitem__)
        self.update(self.model, self.plan)
        self.ladders: dict[str, Ladder] = {}
        for group in self.groups:
            found = [(layer, self.moments[layer.path].curvature(layer.path), at) for layer, at in pairs[group.name]]
            layers = [Reader(layer.matrix(), curvature, at) for layer, curvature, at in found]
            without = sorted(set(range(group.units)) - set(self.plan.groups[group.name].keep))
            self.ladders[group.name] = ladder(layers, gone=without)

    def without(self, gone: dict[str, range]) -> Plan:
        whole = keep_all(self.groups).groups
        kept = {name: tuple(unit for unit in one.keep if unit not in gone.get(name, ())) for name, one in whole.items()}
        return Plan(groups={name: one.model_copy(update={"keep": kept[name]}) for name, one in whole.items()})

    def update(self, model: nn.Module, plan: Plan) -> None:
        compensate(model, self.graph, plan, Data(BATCHES), Compensation(), known=self.moments.get)

    def tried(self, asked: Trials, data: list[Any], **options: Any) -> dict[str, float]:
        given: dict[str, Any] = {"plan": self.plan, "counts": {group.name: 0 for group in self.groups}, **options}
        given.setdefault("update", lambda plan: self.update(self.model, plan))
        return tried(self.model, self.graph, self.groups, self.ladders, Data(data), asked, **given)

    def by_hand(self, group: Group, count: int, data: list[Any]) -> float:
        """What a removal costs, over what its ladder says."""
        steps, network = self.ladders[group.name], copy_of(self.model)
        kept = self.plan.groups[group.name]
        keep = tuple(unit for unit in kept.keep if unit not in steps.order[:count].tolist())
        alone = {group.name: kept.model_copy(update={"keep": keep})}
        with masked(network, self.plan, self.graph):
            before = mean_nats(network, data)
        self.update(network, Plan(groups=alone))
        with masked(network, Plan(groups={**self.plan.groups, **alone}), self.graph):
            return (mean_nats(network, data) - before) / float(steps.losses[:count].sum())


@pytest.mark.parametrize("passing", [True, False])
@pytest.mark.parametrize(("family", "gone"), [("llama_biases", 0), ("gpt2", 3)])
def test_factors_are_measured_over_expected(family: str, gone: int, passing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(family, gone)
    if not passing:
        monkeypatch.setattr(Onward, "of", classmethod(lambda cls, *_: None))
    before = snapshot(setting.model)
    found = setting.tried(Trials.model_construct(share=0.25, bounds=UNBOUNDED), BATCHES)
    assert_untouched(setting.model, before)
    assert len(found) == len(setting.groups) > 2
    for group in setting.groups:
        assert found[group.name] == pytest.approx(setting.by_hand(group, ceil(group.units / 4), BATCHES), rel=1e-7)


def test_a_trial_removes_as_many_as_the_ladders_would() -> None:
    setting = Setting("llama")
    group = next(group for group in setting.groups if group.kind == "channels")
    counts = {one.name: 0 for one in setting.groups} | {group.name: group.units // 2}
    found = setting.tried(Trials.model_construct(bounds=UNBOUNDED), BATCHES, counts=counts)
    assert found[group.name] == pytest.approx(setting.by_hand(group, group.units // 2, BATCHES), rel=1e-7)


def test_padding_counts_for_nothing() -> None:
    setting = Setting("llama")
    mask = torch.ones_like(BATCHES[0])
    mask[0, 7:] = 0
    data = [{"input_ids": batch, "attention_mask": mask} for batch in BATCHES[:2]]
    found = setting.tried(Trials.model_construct(bounds=UNBOUNDED), data)
    group = setting.groups[0]
    assert found[group.name] == pytest.approx(setting.by_hand(group, max(1, ceil(group.units / 10)), data), rel=1e-7)


def test_factors_stay_within_their_bounds() -> None:
    setting = Setting("llama")
    free = setting.tried(Trials.model_construct(bounds=UNBOUNDED), BATCHES)
    least, most = sorted(free.values())[1], sorted(free.values())[-2]
    found = setting.tried(Trials.model_construct(bounds=(least, most)), BATCHES)
    assert found == {name: min(max(value, least), most) for name, value in free.items()}
    assert len(set(found.values())) < len(set(free.values()))


def test_what_cannot_be_measured_is_as_dear_as_can_be() -> None:
    setting = Setting("llama")

    def spoil(plan: Plan) -> None:
        for name in plan.groups:
            for layer, _ in readers(setting.model, setting.graph, setting.graph.group(name)):
                layer.write(layer.matrix() * torch.nan)

    before = snapshot(setting.model)
    assert set(setting.tried(Trials(), BATCHES, update=spoil).values()) == {3.0}
    assert_untouched(setting.model, before)


def test_groups_that_can_lose_nothing_keep_their_prices() -> None:
    setting = Setting("llama")
    group = next(group for group in setting.groups if group.kind == "channels")
    plan = setting.without({group.name: range(setting.graph.least(group), group.units)})
    assert setting.tried(Trials(bounds=(2.0, 3.0)), BATCHES, plan=plan)[group.name] == 1


@pytest.mark.parametrize(("tokens", "chosen"), [(1, [0]), (48, [0, 3]), (49, [0, 2, 4]), (999, [0, 1, 2, 3, 4, 5])])
def test_batches_are_spread_over_the_text(tokens: int, chosen: list[int]) -> None:
    found = spread(BATCHES, tokens)
    assert [next(place for place, batch in enumerate(BATCHES) if batch is one) for one in found] == chosen


@pytest.mark.parametrize("batch", [{"input_ids": torch.zeros(2, 3)}, (torch.zeros(6, 2), torch.zeros(6))])
def test_what_other_batches_hold_is_counted_too(batch: Any) -> None:
    assert len(spread([batch] * 5, 12)) == 2


def pruned(model: nn.Module, tokens: Tensor, trials: Any, **options: Any) -> resect.Result:
    settings = {"shots": 1, "trials": trials}
    return resect.prune(model, method="llm-surgeon", data=tokens, layout="per-layer", keep=0.7, settings=settings, **options)


def test_a_run_prices_by_them() -> None:
    """What goes with and without them is on the ladders of both, and costs the price times as much."""
    tokens, dense = torch.cat(BATCHES), FAMILIES["llama"]()
    plain, result = (pruned(copy_of(dense), tokens, asked) for asked in (None, {"bounds": (1e-6, 1e6)}))
    (shot,) = result.report["shots"]
    assert list(shot["prices"]) == list(plain.scores)
    assert len({f"{price:.4g}" for price in shot["prices"].values()}) > 1
    compared = 0
    for name, price in shot["prices"].items():
        stay = {unit for one in (plain, result) for unit in one.plan.groups[name].keep}
        both = sorted(set(range(len(plain.scores[name]))) - stay)
        torch.testing.assert_close(result.scores[name][both], price * plain.scores[name][both], rtol=1e-9, atol=0)
        compared += len(both)
    assert compared > 10


@pytest.mark.parametrize(
    "settings", [{"mode": "rows-columns"}, {"mode": "2:4"}, {"fisher": "activations"}, {"fisher": "identity"}]
)
def test_they_need_whole_units_and_nats(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"trials compare .* Use trials = null"):
        resect.prune(FAMILIES["llama"](), method="llm-surgeon", data=BATCHES[0], settings={**settings, "trials": {}})


@pytest.mark.parametrize(
    ("bounds", "says"), [((3.0, 0.7), "the least factor comes first"), ((float("nan"), 1.0), "a finite number")]
)
def test_bounds_are_in_order(bounds: tuple[float, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Trials(bounds=bounds)
