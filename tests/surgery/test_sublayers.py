"""Sub-layers: what adds nothing to the stream is gone, with all that only served it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import UsageError
from resect.graph import Graph
from resect.plan import Kept, Plan, select
from tests.models import FAMILIES, assert_same_function, assert_same_logits, logits_without_cache, random_tokens


class Passed(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def without(graph: Graph, *names: str) -> Plan:
    groups = (graph.group(name) for name in names)
    return Plan(groups={group.name: Kept(kind=group.kind, layer=group.layer, units=group.units, keep=()) for group in groups})


def test_an_attention_goes_with_its_norm() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    sublayer = graph.sublayers["model.layers.1.self_attn"]
    assert [silence.path for silence in sublayer.silences] == ["model.layers.1.self_attn", "model.layers.1.input_layernorm"]
    expected = copy.deepcopy(model)
    expected.get_submodule("model.layers.1").self_attn = Passed()
    small = resect.cut(copy.deepcopy(model), without(graph, sublayer.name), graph)
    tokens = random_tokens()
    assert_same_logits(logits_without_cache(small, tokens), logits_without_cache(expected, tokens))
    left = sum(parameter.numel() for parameter in small.parameters())
    assert left == graph.parameter_count({sublayer.name: 1})
    assert not list(small.get_submodule("model.layers.1.self_attn").parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon_gqa", "opt", "qwen2_sliding"])
def test_the_first_attention_keeps_the_place_in_the_cache(family: str) -> None:
    model = FAMILIES[family]()
    graph = resect.trace(model)
    first = min((one for one in graph.sublayers.values() if "att" in one.name), key=lambda one: one.layer)
    masked = copy.deepcopy(model)
    small = resect.cut(copy.deepcopy(model), without(graph, first.name), graph)
    resect.mask(masked, without(graph, first.name), graph)
    assert_same_function(small, masked, random_tokens())
    tokens = random_tokens()
    generated, expected = (network.generate(tokens, max_new_tokens=4) for network in (small, masked))  # type: ignore[operator]
    assert torch.equal(generated, expected)


@pytest.mark.parametrize(("kind", "sublayer"), [("heads", "self_attn"), ("channels", "mlp")])
def test_a_plan_that_keeps_no_unit_removes_the_sublayer(kind: str, sublayer: str) -> None:
    model = FAMILIES["llama_biases"]()
    graph = resect.trace(model)
    group = next(group for group in graph.of_kind(kind) if group.layer == 2)
    small = resect.cut(copy.deepcopy(model), without(graph, group.name), graph)
    direct = resect.cut(copy.deepcopy(model), without(graph, f"model.layers.2.{sublayer}"), graph)
    assert small.resect_record == direct.resect_record
    assert graph.parameter_count({group.name: group.units}) == sum(parameter.numel() for parameter in small.parameters())
    assert_same_function(small, direct, random_tokens())


def test_a_group_that_is_not_alone_cannot_be_emptied() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    with pytest.raises(UsageError, match="keeps 0 of the 60 residual in residual. At least one must stay"):
        resect.cut(model, without(graph, "residual"), graph)


def test_a_floor_of_zero_lets_sublayers_go() -> None:
    graph = resect.trace(FAMILIES["llama"]())
    scores = {group.name: torch.rand(group.units) + (group.layer or 0) for group in graph.of_kind("heads", "channels")}
    plan = select(graph, scores, keep=0.2, floor=0)
    assert graph.emptied(plan.removed())
    assert graph.parameter_count(plan.removed(), blocks_only=True) <= 0.2 * graph.parameter_count(blocks_only=True)
    assert not graph.emptied(select(graph, scores, keep=0.3).removed())
