"""Every operator rule has small networks in which it is met: what it lets go is gone exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import ModelError
from resect.graph import Graph, rules
from resect.graph.rules import Axes, Call
from tests.graph.rule_samples import SAMPLES, Sample
from tests.graph.test_operators import against_zeros, without_a_third

ELSEWHERE = {
    "aten.cudnn_batch_norm": "aten.native_batch_norm",
    "aten.cudnn_grid_sampler": "aten.grid_sampler_2d",
}
"""Operators that run on CUDA only, and those of the CPU that take in and put out the same."""


PASSING = frozenset(
    (
        "pointwise",
        "uniform_constant",
        "permute",
        "transpose",
        "expand",
        "stack",
        "view_as_complex",
        "view_as_real",
    )
)
"""Rules that only pass axes on and couple them."""


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the operators that any rule was asked about."""
    found: set[str] = set()
    plain = rules.apply

    def apply(call: Call, overload: Any) -> list[Axes]:
        found.add(call.name)
        return plain(call, overload)

    monkeypatch.setattr(rules, "apply", apply)
    return found


def name_of(sample: Sample) -> str:
    return " ".join(name.removeprefix("aten.") for name in sample.operators)


def against_mask(net: nn.Module, graph: Graph, *examples: tuple[Tensor, ...]) -> None:
    """The same with more than zeros: norms are over what stays, masked experts never win."""
    plan, small = without_a_third(graph), copy.deepcopy(net)
    resect.cut(small, plan, graph)
    for inputs in examples:
        with resect.masked(net, plan, graph):
            expected = net(*inputs)
        assert not torch.equal(expected, net(*inputs))
        torch.testing.assert_close(small(*inputs), expected, rtol=1e-9, atol=1e-12)


def hold(sample: Sample) -> None:
    """Finds the groups of a sample, and holds what goes against zeros, at two sizes of a batch."""
    torch.manual_seed(0)
    net = sample.network().double().eval()
    graph = resect.trace(net, sample.inputs(3))
    found = sorted(group.units for group in graph.groups)
    reasons = sorted({one.reason for one in graph.frozen})
    assert found == sorted(sample.units), reasons
    if sample.refused:
        with pytest.raises(ModelError, match="cannot be cut this way"):
            resect.cut(net, without_a_third(graph), graph)
        return
    if any(group.mixed or group.rivals for group in graph.groups):
        against_mask(net, graph, sample.inputs(3), sample.inputs(5))
    elif graph.groups:
        against_zeros(net, graph, sample.inputs(3), sample.inputs(5))


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta", "ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_what_an_operator_lets_go_is_gone_exactly(sample: Sample, met: set[str]) -> None:
    hold(sample)
    assert met.issuperset(sample.operators)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_operators_of_other_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, twin = rules._RULES[name], ELSEWHERE[name]
    asked = []

    def instead(call: Call) -> list[Axes]:
        asked.append(call.name)
        call.name = name
        return rule(call)

    monkeypatch.setitem(rules._RULES, twin, instead)
    for sample in SAMPLES:
        if twin in sample.operators:
            hold(sample)
    assert twin in asked


def test_every_rule_has_samples() -> None:
    """And every sample is of a rule, or of an operator that torch says works element by element."""
    sampled = {name for sample in SAMPLES for name in sample.operators}
    registered = {name for name in rules._RULES if name.startswith("aten.")}
    assert not registered - sampled - set(ELSEWHERE)
    assert not {name for name in sampled - registered if not is_pointwise(name)}


def test_every_rule_that_keeps_something_whole_has_a_sample_of_that() -> None:
    own = {name: rule for name, rule in rules._RULES.items() if name.startswith("aten.")}
    functions = {name: rule.__name__ for name, rule in own.items()}
    whole = {name for sample in SAMPLES if sample.whole for name in sample.operators}
    keeping = {functions.get(name) for name in whole}
    assert set(functions.values()) - keeping <= PASSING


def is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name.removeprefix("aten."))
    return any(rules._is_pointwise(getattr(packet, overload)) for overload in packet.overloads())
