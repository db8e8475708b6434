"""Depth: stacks, blocks and sub-layers are read off the flow of data; what the loop around them does keeps them whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import ModelError
from resect.plan import Kept, Plan
from tests.zoo.examine import lively

WIDTH, INNER = 12, 20


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Two(nn.Module):
    """A block of two sub-layers, with a norm before the first and behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(WIDTH), Mlp()
        self.second, self.after = Mlp(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(self.norm(x))
        return x + self.after(self.second(x))


class Stack(nn.Module):
    """Blocks in a loop that may do something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x, blocks: int = 3) -> None:
        super().__init__()
        self.between = between
        self.enter, self.leave = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Two() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = self.between(block(x))
        return self.leave(x)


class Tapped(Stack):
    """Reads what the second block hands on a second time, outside."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.leave(states[-1] + states[-2])


class Turns(nn.Module):
    """Lists of norms and of layers side by side, one from each in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.leave(x)


class Both(nn.Module):
    """Two stacks, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = Stack(blocks=2), Stack(blocks=3)
        self.bridge = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.writer(self.bridge(self.reader(x)))


class Scaled(nn.Module):
    """Divides by a number that it keeps beside its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.units = 6
        self.into, self.out = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x).view(-1, self.units).relu()
        return self.out(hidden * self.units**-0.5)


class Warming(nn.Module):
    """Runs another way once it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 6), nn.Linear(6, 4)
        self.warm = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x).relu() if self.warm else self.into(x)
        self.warm = True
        return self.out(hidden)


def x() -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def without(graph: resect.Graph, name: str) -> Plan:
    group = graph.group(name)
    return Plan(groups={name: Kept(kind=group.kind, layer=group.layer, units=1, keep=())})


@torch.no_grad()
def difference(model: nn.Module, graph: resect.Graph, plan: Plan) -> float:
    with resect.masked(model, plan, graph):
        expected = model(x())
    assert not torch.allclose(expected, model(x()), atol=1e-3)
    return float((resect.cut(copy.deepcopy(model), plan, graph)(x()) - expected).abs().max() / expected.std())


def test_sublayers_go_with_what_served_them() -> None:
    model = lively(Stack(), seed=0)
    graph = resect.trace(model, (x(),))
    silences = {name: [silence.path for silence in sublayer.silences] for name, sublayer in graph.sublayers.items()}
    assert silences["blocks.1.first"] == ["blocks.1.first", "blocks.1.norm"]
    assert silences["blocks.1.second"] == ["blocks.1.after", "blocks.1.second"]
    assert len(graph.of_kind("sublayers")) == 6
    for name in ("blocks.0.first", "blocks.1.second", "blocks.2"):
        assert difference(model, graph, without(graph, name)) <= 1e-5


def test_something_between_blocks_keeps_them_and_not_their_sublayers() -> None:
    graph = resect.trace(lively(Stack(torch.tanh), seed=0), (x(),))
    assert (graph.blocks.count, len(graph.of_kind("blocks")), len(graph.of_kind("sublayers"))) == (3, 0, 6)


def test_blocks_stay_where_a_state_in_between_is_read() -> None:
    graph = resect.trace(lively(Tapped(), seed=0), (x(),))
    assert not graph.of_kind("blocks")
    assert len(graph.of_kind("sublayers")) == 6


class Branches(nn.Module):
    """Adds what the modules of a list make of the same thing."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.branches = nn.ModuleList(Two() for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = 2 * x
        for branch in self.branches:
            y = y + branch(x)
        return self.leave(y)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_branches_are_no_blocks(branches: int) -> None:
    """Without one, the rest is summed; without a block, its input is handed on. Of a single one, nothing tells which it is."""
    graph = resect.trace(Branches(branches), (torch.zeros(2, 5),))
    assert not graph.of_kind("blocks")


class TwoStreams(nn.Module):
    """Blocks that hand on two streams, each changed by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Crossing() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = second = self.enter(x)
        for block in self.blocks:
            first, second = block(first, second)
        return self.leave(first)


class Crossing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first + self.first(second), second + self.second(first)


def test_blocks_that_hand_on_two_streams_stay() -> None:
    graph = resect.trace(TwoStreams(), (torch.zeros(2, 5),))
    assert graph.blocks.count == 3
    assert not graph.of_kind("blocks")


def test_lists_that_take_turns_are_one_stack() -> None:
    graph = resect.trace(lively(Turns(), seed=0), (x(),))
    assert graph.blocks.modules == tuple((f"layers.{number}", f"norms.{number}") for number in range(3))
    assert [group.layer for group in graph.of_kind("channels")] == [0, 1, 2]
    assert graph.blocks.within("norms.2.weight") == "weight"


def test_stacks_are_numbered_through() -> None:
    model = lively(Both(), seed=0)
    graph = resect.trace(model, (x(),))
    assert graph.blocks.lists == ("reader.blocks", "writer.blocks")
    assert graph.blocks.layer_of("writer.blocks.0.first.up.weight") == 2
    assert graph.blocks.layer_of("bridge.weight") is None
    assert difference(model, graph, without(graph, "writer.blocks.1")) <= 1e-5


def test_a_constant_that_follows_a_size_is_refused() -> None:
    model = lively(Scaled(), seed=0)
    graph = resect.trace(model, (x(),))
    (group,) = graph.groups
    plan = Plan(groups={group.name: Kept(kind=group.kind, layer=None, units=6, keep=(0, 2, 3))})
    with pytest.raises(ModelError, match="a constant that follows a size"):
        resect.cut(model, plan, graph)


def test_a_network_that_changed_itself_is_traced_anew() -> None:
    model = lively(Warming(), seed=0)
    graph = resect.trace(model, (x(),))
    assert not model.warm
    (group,) = graph.groups
    plan = Plan(groups={group.name: Kept(kind=group.kind, layer=None, units=6, keep=(0, 2, 3))})
    model(x())
    assert difference(model, graph, plan) <= 1e-5
