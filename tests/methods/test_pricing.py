"""Ladders of one shot: how far they reach, and what is said of units below their end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resect
from resect.checkpoint import Progress
from resect.methods import LLMSurgeon
from resect.methods.pricing import Pricing
from resect.plan import Cost, Plan, cost_of, select
from resect.statistics import Data, Moments, collect_curvature, readers
from tests.models import FAMILIES, random_tokens

TOKENS = random_tokens(24, 16, seed=3)


def pricing(family: str, keep: float, *, least: float = 0.0, gone: int = 0) -> Pricing:
    """Of a tiny network, of whose groups of channels the first few went before."""
    model = FAMILIES[family]().double()
    graph = resect.trace(model)
    groups = graph.of_kind("heads", "channels")
    moments = dict[str, Moments]()
    paths = dict.fromkeys(layer.path for group in groups for layer, _ in readers(model, graph, group))
    collect_curvature(model, TOKENS.split(8), graph, list(paths), moments.__setitem__)

    def chosen(scores: Mapping[str, Tensor]) -> Plan:
        return select(graph, scores, keep=keep, layout="per-layer", kinds=["heads", "channels"])

    went = {group.name: list(range(gone)) if group.kind == "channels" else [] for group in groups}
    return Pricing(model, graph, groups, went, moments.__getitem__, (0.01, 0.01), chosen, least)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_alone_is_the_sum_of_single_weights(family: str) -> None:
    """Every weight of a unit's columns by itself: half its square, times both diagonals."""
    found = pricing(family, 0.7, gone=2)
    for group in found.groups:
        for unit in range(group.units):
            total = 0.0
            for layer, columns in readers(found.model, found.graph, group):
                A, G = found.moments(layer.path).means()
                assert G is not None
                for column in columns[unit].tolist():
                    total += sum(
                        0.5 * float(weight) ** 2 * float(G[row, row] * A[column, column])
                        for row, weight in enumerate(layer.matrix()[:, column])
                    )
            expected = 0.0 if unit in found.gone[group.name] else total
            assert float(found.alone[group.name][unit]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("gone", [0, 3])
def test_what_goes_is_on_the_ladders_and_as_by_whole_ones(keep: float, gone: int) -> None:
    short, whole = pricing("llama", keep, gone=gone), pricing("llama", keep, gone=gone, least=1.0)
    scores, complete = short.scores(), whole.scores()
    assert short.went(scores) == whole.went(complete)
    plan = short.chosen(scores)
    assert plan == whole.chosen(complete)
    steps = [sum(len(one.ladders[group.name].order) for group in one.groups) for one in (short, whole)]
    assert steps[0] < steps[1] == sum(group.units - len(whole.gone[group.name]) for group in whole.groups)
    for group in short.groups:
        order = short.ladders[group.name].order
        removed = set(range(group.units)) - set(plan.groups[group.name].keep)
        assert removed <= {*order.tolist(), *short.gone[group.name]}
        assert torch.equal(scores[group.name][order], complete[group.name][order])
        below = sorted(set(range(group.units)) - {*order.tolist(), *short.gone[group.name]})
        assert (scores[group.name][below] >= scores[group.name][order[-1]]).all()


@pytest.mark.parametrize("keep", [0.9, 0.6])
def test_prices_multiply_what_is_on_the_ladders(keep: float) -> None:
    plain, priced = pricing("llama", keep), pricing("llama", keep, least=1.0)
    prices = {group.name: 0.5 + number for number, group in enumerate(plain.groups)}
    plain.scores()
    found, complete = plain.scores(prices), priced.scores(prices)
    assert plain.chosen(found) == priced.chosen(complete)
    for name, price in prices.items():
        order = plain.ladders[name].order
        expected = price * plain.ladders[name].scores(len(found[name]))[order]
        torch.testing.assert_close(found[name][order], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("of", ["blocks", "cost"])
def test_whole_ladders_where_another_plan_may_be_asked_for(of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that is timed asks again by the last scores."""
    made = list[Pricing]()

    def noted(*args: Any, **options: Any) -> Pricing:
        made.append(Pricing(*args, **options))
        return made[-1]

    monkeypatch.setattr("resect.methods.llm_surgeon.Pricing", noted)
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    asked = Cost("timed", cost_of(graph, "blocks").value) if of == "cost" else of
    LLMSurgeon(shots=2).plan(model, graph, Data(TOKENS.split(8)), keep=0.8, of=asked, progress=Progress(tmp_path, []))
    left = [sum(g.units - len(one.gone[g.name]) - len(one.ladders[g.name].order) for g in one.groups) for one in made]
    assert left[0] > 0
    assert (left[1] == 0) == (of == "cost")
