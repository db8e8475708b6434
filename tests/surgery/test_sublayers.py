"""Sub-layers: what adds nothing to the stream is gone, with all that only served it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import ModelError, UsageError
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


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.enter(x).relu())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem: nn.Module = nn.Conv2d(3, 6, 3)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.head: nn.Module = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def test_a_stand_in_for_a_convolution_follows_the_resolution() -> None:
    model = Convolutions().eval()
    graph = resect.trace(model, (torch.randn(2, 3, 16, 16),))
    name = next(iter(graph.sublayers))
    plan = without(graph, name)
    small = resect.cut(copy.deepcopy(model), plan, graph)
    stand_in: Any = small.get_submodule(graph.sublayers[name].silences[0].path)
    assert (stand_in.width, stand_in.axis) == (6, -3)
    for side in (16, 23):
        x = torch.randn(3, 3, side, side + 4)
        with resect.masked(model, plan, graph):
            expected = model(x)
        torch.testing.assert_close(small(x), expected)


class Routed(nn.Module):
    """Experts beside an attention-like sub-layer; the last expert is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.gate = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))
        self.gate.bias.data = torch.tensor([0.0, 0.0, -100.0])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        choice, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = choice == number
            out[chosen] += expert(x[chosen])
        return x + out


def test_an_expert_without_tokens_is_not_idle() -> None:
    model = Convolutions()
    model.stem, model.blocks, model.head = nn.Embedding(31, 8), nn.ModuleList([Routed(), Routed()]), nn.Linear(8, 5)
    graph = resect.trace(model.eval(), (torch.arange(14).view(2, 7),))
    silent = {silence.path for one in graph.sublayers.values() for silence in one.silences}
    assert "blocks.0.mix" in silent
    assert not any(path.endswith("experts.2") for path in silent)


def test_units_that_the_code_counts_are_named() -> None:
    """Code that unpacks a list cannot do without any of its blocks: the error names them, so that they can be left out."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Residual(), Residual()])

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.layers
            return second(first(x))

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Pair(), nn.Conv2d(6, 2, 1)).eval()
    graph = resect.trace(model, (torch.randn(2, 3, 9, 9),))
    assert [group.name for group in graph.of_kind("blocks")] == ["1.layers.0", "1.layers.1"]
    with pytest.raises(ModelError, match="cannot do without 1.layers.1") as caught:
        resect.cut(model, without(graph, "1.layers.1"), graph)
    assert caught.value.groups == ("1.layers.1",)
