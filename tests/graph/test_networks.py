"""Networks that are not language models, and operators beyond attention: what is found is cut, and cut equals mask in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import ModelError, UsageError
from resect.graph import Graph
from tests.models import random_plan


class Experts(nn.Module):
    """A router that picks two of five experts for every position, one tensor holding all experts' weights."""

    def __init__(self, score: Callable[[Tensor], Tensor], used: Callable[[Tensor], Tensor] = lambda chosen: chosen) -> None:
        super().__init__()
        self.score, self.used = score, used
        self.enter = nn.Linear(6, 6)
        self.router = nn.Linear(6, 5)
        self.up, self.down = nn.Parameter(torch.randn(5, 6, 9)), nn.Parameter(torch.randn(5, 9, 6))
        self.register_buffer("correction", torch.randn(5))
        self.leave = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 4]."""
        hidden = self.enter(x)
        scores = self.score(self.router(hidden))
        chosen = torch.add(scores, self.get_buffer("correction")).topk(2, -1).indices
        weights = scores.gather(1, chosen)
        chosen = self.used(chosen)
        inner = torch.einsum("bh,bkhi->bki", hidden, self.up[chosen]).relu()
        outer = torch.einsum("bki,bkih->bkh", inner, self.down[chosen])
        return self.leave(hidden + (outer * weights[..., None]).sum(1))


class Summed(Experts):
    """Runs every expert on everything and sums, with scores of zero where an expert is not chosen."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda outer: outer) -> None:
        super().__init__(torch.sigmoid)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 4]."""
        hidden = self.enter(x)
        logits = torch.add(self.router(hidden), self.get_buffer("correction"))
        best = logits.topk(2, -1)
        scores = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values).sigmoid()
        given = hidden.repeat(scores.shape[1], 1) * scores.t().reshape(-1, 1)
        inner = torch.bmm(given.view(self.up.shape[0], *hidden.shape), self.up).relu()
        outer = self.after(torch.bmm(inner, self.down).view(-1, hidden.shape[1]))
        return self.leave(hidden + outer.view(scores.shape[1], *hidden.shape).sum(0))


class OneAfterAnother(Experts):
    """Chooses the best expert, and the best of the others."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 4]."""
        hidden = self.enter(x)
        scores = self.score(torch.add(self.router(hidden), self.get_buffer("correction")))
        first = scores.max(-1, keepdim=True).indices
        second = scores.scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
        chosen = torch.cat([first, second], -1)
        weights = torch.cat([scores.softmax(-1).gather(1, first), scores.gather(1, second)], -1)
        inner = torch.einsum("bh,bkhi->bki", hidden, self.up[self.used(chosen)]).relu()
        outer = torch.einsum("bki,bkih->bkh", inner, self.down[chosen])
        return self.leave(hidden + (outer * weights[..., None]).sum(1))


class Looped(Experts):
    """Goes through the experts that any row has chosen, one after another; the channels of all lie along one axis."""

    def __init__(self, picked: Callable[[Tensor], Tensor | int] = lambda number: number) -> None:
        super().__init__(torch.sigmoid)
        self.experts, self.inner, self.picked = 5, 9, picked
        self.up, self.down = nn.Parameter(torch.randn(5 * 9, 6)), nn.Parameter(torch.randn(5 * 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 4]."""
        hidden = self.enter(x)
        weights, chosen = torch.add(self.score(self.router(hidden)), self.get_buffer("correction")).topk(2, -1)
        places = nn.functional.one_hot(chosen, num_classes=self.experts + 1).permute(2, 1, 0)
        outer = torch.zeros_like(hidden)
        for found in (places.sum((1, 2)) > 0).nonzero():
            number = self.picked(found[0])
            place, row = torch.where(places[number])
            up, down = (weight.view(-1, self.inner, hidden.shape[1])[number] for weight in (self.up, self.down))
            outer.index_add_(0, row, (hidden[row] @ up.t()).relu() @ down * weights[row, place, None])
        return self.leave(hidden + outer)


class Idle(Experts):
    """Has one more choice, which adds nothing: its number becomes that of the first expert, with a weight of zero."""

    def __init__(self, skipped: Callable[[Tensor, Tensor, int], Tensor] = lambda chosen, skip, last: chosen.masked_fill(skip, 0)):
        super().__init__(torch.sigmoid)
        self.experts, self.skipped = 4, skipped
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 9)), nn.Parameter(torch.randn(4, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 4]."""
        hidden = self.enter(x)
        scores = torch.add(self.router(hidden), self.get_buffer("correction")).softmax(-1)
        chosen = scores.topk(2, -1).indices
        skip = chosen == self.experts
        weights = scores.gather(1, chosen).masked_fill(skip, 0)
        chosen = self.skipped(chosen, skip, self.experts)
        inner = torch.einsum("bh,bkhi->bki", hidden, self.up[chosen]).relu()
        outer = torch.einsum("bki,bkih->bkh", inner, self.down[chosen])
        return self.leave(hidden + (outer * weights[..., None]).sum(1))


class Residual(nn.Module):
    """A block of a residual network: two convolutions beside the stream."""

    def __init__(self, channels: int, inner: int, groups: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=groups),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The stream and what was computed beside it."""
        return x + self.body(x)


class Picks(nn.Module):
    """Looks at values: which rows are positive decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 5]."""
        scale = 2.0 if float(x.sum()) > 0 else 3.0
        return self.leave(self.enter(x).relu()) * scale


def head(channels: int) -> nn.Sequential:
    """Pools an image to 7 classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7))


IMAGE = (2, 3, 8, 8)
class Puts(nn.Module):
    """Puts other numbers into every second row."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.other, self.leave = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, 5] to [rows, 4]."""
        hidden = self.enter(x)
        second = torch.arange(0, len(x), 2)
        hidden[second] = self.other(x)[second]
        return self.leave(hidden)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[int]]] = {  # network, input, sizes of its groups
    "residual": (lambda: nn.Sequential(nn.Conv2d(3, 10, 3), Residual(10, 12), nn.MaxPool2d(2), head(10)), IMAGE, {10, 12}),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 10, 3), Residual(10, 12, groups=12), head(10)), IMAGE, {10, 12}),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(3, 10, 3), Residual(10, 12, groups=3), head(10)), IMAGE, {10, 3}),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.SiLU(), head(12)), IMAGE, {4}),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(3, 10, 2, 2), nn.ConvTranspose2d(10, 11, 2, 2), head(11)), IMAGE, {10, 11}),
    "padded": (lambda: nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.Conv2d(3, 9, 3), nn.AvgPool2d(2), head(9)), IMAGE, {9}),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 36, 11), nn.Linear(11, 4)),
        IMAGE,
        {9, 11},
    ),
    "experts, softmax": (lambda: Experts(lambda logits: logits.softmax(-1)), (13, 6), {5, 9}),
    "experts, sigmoid": (lambda: Experts(torch.sigmoid), (13, 6), {5, 9}),
    "experts, summed": (Summed, (13, 6), {5, 9}),
    "experts, one after another": (lambda: OneAfterAnother(torch.sigmoid), (13, 6), {5, 9}),
    "experts, in a loop": (Looped, (13, 6), {5, 9, 6}),
    "experts, and none of them": (Idle, (13, 6), {3, 9}),  # the first expert stays
    "looks at values": (Picks, (3, 5), {12}),
    "puts rows": (Puts, (7, 5), {12}),
}


def lively(build: Callable[[], nn.Module]) -> nn.Module:
    """The network in float64 with random statistics of its batch norms."""
    torch.manual_seed(0)
    model = build().double().eval()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
    return model


def assert_cut_equals_mask(model: nn.Module, graph: Graph, x: Tensor, *, seed: int) -> None:
    """For a random plan over every kind."""
    plan = random_plan(graph, seed, uniform=True, kinds={group.kind for group in graph.groups})
    assert any(kept.removed for kept in plan.groups.values())
    with torch.no_grad():
        with resect.masked(model, plan, graph):
            expected = model(x)
        small = resect.cut(copy.deepcopy(model), plan, graph)
        torch.testing.assert_close(small(x), expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) == graph.parameter_count(plan.removed())


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_equals_mask(name: str) -> None:
    build, shape, sizes = NETWORKS[name]
    model = lively(build)
    x = torch.randn(shape, dtype=torch.float64)
    graph = resect.trace(model, (x,))
    assert {group.units for group in graph.groups} >= sizes, graph.frozen
    for seed in (1, 2, 3):
        assert_cut_equals_mask(model, graph, x, seed=seed)


def test_a_removed_expert_is_never_chosen() -> None:
    """Against the definition: the router's other logits alone decide."""
    model = lively(lambda: Experts(torch.sigmoid))
    x = torch.randn(13, 6, dtype=torch.float64)
    graph = resect.trace(model, (x,))
    (group,) = graph.of_kind("experts")
    kept = {"kind": "experts", "layer": group.layer, "units": 5, "keep": [0, 2, 3]}
    plan = resect.Plan.model_validate({"groups": {group.name: kept}})
    reference = copy.deepcopy(model)
    reference.get_buffer("correction")[[1, 4]] = -torch.inf
    with torch.no_grad():
        with resect.masked(model, plan, graph):
            torch.testing.assert_close(model(x), reference(x))
        torch.testing.assert_close(resect.cut(model, plan, graph)(x), reference(x))
    assert model.get_parameter("up").shape == (3, 6, 9)
    assert model.get_buffer("correction").shape == (3,)


@pytest.mark.parametrize("used", [lambda chosen: chosen.clamp(max=3), lambda chosen: (chosen + 1) % 5, lambda chosen: 4 - chosen])
def test_experts_stay_whose_numbers_are_computed_with(used: Callable[[Tensor], Tensor]) -> None:
    graph = resect.trace(lively(lambda: Experts(torch.sigmoid, used)), (torch.zeros(13, 6, dtype=torch.float64),))
    assert not graph.of_kind("experts")
    assert any("numbers of positions are used" in frozen.reason for frozen in graph.frozen)


def test_experts_stay_that_add_something_where_they_are_masked() -> None:
    """What nothing else decides is summed at zero as well: a sigmoid of it is one half."""
    graph = resect.trace(lively(lambda: Summed(torch.sigmoid)), (torch.zeros(13, 6, dtype=torch.float64),))
    assert not graph.of_kind("experts")
    assert any("reduced over at aten.sum" in frozen.reason for frozen in graph.frozen)


def test_experts_stay_whose_numbers_meet_other_numbers() -> None:
    model = lively(lambda: OneAfterAnother(torch.sigmoid, lambda chosen: torch.cat([chosen[:, :1], chosen[:, :1] * 0], -1)))
    graph = resect.trace(model, (torch.zeros(13, 6, dtype=torch.float64),))
    assert not graph.of_kind("experts")


@pytest.mark.parametrize(
    "skipped",
    [
        lambda chosen, skip, last: chosen.masked_fill(skip, 1),
        lambda chosen, skip, last: chosen.masked_fill(chosen == 1, 0).masked_fill(skip, 0),
        lambda chosen, skip, last: chosen.clamp(max=last - 1),
        lambda chosen, skip, last: torch.where(skip, 2, chosen),
    ],
)
def test_experts_stay_where_others_stand_in_for_them(skipped: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    graph = resect.trace(lively(lambda: Idle(skipped)), (torch.zeros(13, 6, dtype=torch.float64),))
    assert not graph.of_kind("experts")


@pytest.mark.parametrize("picked", [int, Tensor.item, Tensor.tolist, lambda one: one + 0, lambda one: (int(one) + 1) % 5])
def test_experts_stay_whose_numbers_leave_the_tensors(picked: Callable[[Tensor], Tensor | int]) -> None:
    """What the network's code does with a plain number nobody sees."""
    graph = resect.trace(lively(lambda: Looped(picked)), (torch.randn(13, 6, dtype=torch.float64),))
    assert not graph.of_kind("experts")
    reasons = {frozen.reason for frozen in graph.frozen}
    assert any(reason.startswith(("numbers of positions", "values leave the tensors")) for reason in reasons), reasons


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_no_row_of_the_example_chose_are_cut_all_the_same(seed: int) -> None:
    """A cut network chooses otherwise: it goes through another number of experts than the dense one did."""
    model = lively(Looped)
    graph = resect.trace(model, (torch.randn(3, 6, dtype=torch.float64),))
    assert_cut_equals_mask(model, graph, torch.randn(40, 6, dtype=torch.float64), seed=seed)


def test_as_many_experts_stay_as_are_chosen_one_after_another() -> None:
    graph = resect.trace(lively(lambda: OneAfterAnother(torch.sigmoid)), (torch.zeros(13, 6, dtype=torch.float64),))
    assert [group.least for group in graph.of_kind("experts")] == [2]


class Skipping(Experts):
    """Has a sixth choice, in which nothing is added."""

    def __init__(self) -> None:
        super().__init__(torch.sigmoid)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 9)), nn.Parameter(torch.randn(4, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 4]; the fifth row of the router stands for no expert."""
        hidden = self.enter(x)
        scores = self.router(hidden).sigmoid()
        weights, chosen = scores[:, :4].topk(2, -1)
        rest = scores.topk(1, -1).indices
        inner = torch.einsum("bh,bkhi->bki", hidden, self.up[chosen]).relu()
        outer = torch.einsum("bki,bkih->bkh", inner, self.down[chosen])
        return self.leave(hidden + (outer * weights[..., None]).sum(1) + self.up[rest.clamp(max=3)].sum((1, 3)))


def test_experts_stay_that_the_router_counts_otherwise() -> None:
    model = lively(Skipping)
    x = torch.randn(13, 6, dtype=torch.float64)
    graph = resect.trace(model, (x,))
    for seed in (1, 2, 3):
        assert_cut_equals_mask(model, graph, x, seed=seed)
    assert not graph.of_kind("experts")


def test_as_many_experts_stay_as_are_chosen_at_a_time() -> None:
    model = lively(lambda: Experts(torch.sigmoid))
    graph = resect.trace(model, (torch.zeros(13, 6, dtype=torch.float64),))
    (group,) = graph.of_kind("experts")
    assert group.least == 2
    kept = {"kind": "experts", "layer": group.layer, "units": 5, "keep": [1]}
    with pytest.raises(UsageError, match="chooses 2 of them at a time"):
        resect.cut(model, resect.Plan.model_validate({"groups": {group.name: kept}}), graph)


def test_what_the_run_does_not_use_is_kept_whole() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 6), "spare": nn.Linear(6, 6), "out": nn.Linear(6, 3)})
    model.forward = lambda x: model["out"](model["used"](x))
    graph = resect.trace(model, (torch.zeros(2, 4),))
    assert {member.parameter for group in graph.groups for member in group.members} == {"used.weight", "used.bias", "out.weight"}
    assert {item.parameter for item in graph.frozen if "not used" in item.reason} == {"spare.weight", "spare.bias"}


def test_numbers_picked_in_steps_are_no_units() -> None:
    """x[..., 0::2] gives each of two interleaved positions a part of its own; only the pairs are units."""
    enter, leave = nn.Linear(5, 12), nn.Linear(6, 5)
    model = nn.ModuleDict({"enter": enter, "leave": leave})
    model.forward = lambda x: leave(enter(x)[..., 0::2] * enter(x)[..., 1::2].sigmoid())
    graph = resect.trace(model, (torch.zeros(2, 5),))
    assert [group.units for group in graph.groups] == [6]


class Notes(nn.Module):
    """Notes on itself that it has run, and exchanges a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = False
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 5]."""
        hidden: Tensor = self.enter(x) if self.ran else self.enter(x).relu()
        self.ran, self.leave = True, nn.Linear(12, 5) if self.ran else self.leave
        return self.leave(hidden)


def test_a_network_that_changes_itself_is_left_as_it_was() -> None:
    model = Notes()
    leave = model.leave
    resect.trace(model, (torch.zeros(2, 5),))
    assert not model.ran
    assert model.leave is leave
    assert model.training


class Pieces(nn.Module):
    """A mixer that keeps the sizes of its pieces: a list, one number and the sum of two, and the shape of a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 21), nn.Linear(21, 6)
        self.pieces, self.first, self.both, self.shape = [5, 9, 7], 5, 14, (9, 1)
        self.shift, self.scale = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 6]."""
        a, b, c = self.enter(x).split(self.pieces, -1)
        joined = torch.cat([a.relu(), b.sigmoid()], -1)
        a, b = joined.split([self.first, self.both - self.first], -1)
        b = (b[..., None] * self.scale.view(self.shape))[..., 0]
        return self.leave(torch.cat([a + self.shift, b, c.tanh()], -1))


@pytest.mark.parametrize("seed", range(3))
def test_lists_and_sums_of_sizes_that_a_module_keeps_follow_a_cut(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 6, dtype=torch.float64)
    model = nn.Sequential(Pieces(), Pieces()).double().eval()
    graph = resect.trace(model, (x,))
    assert sorted(group.units for group in graph.groups) == [5, 5, 6, 7, 7, 9, 9]
    plan = random_plan(graph, seed, uniform=False, kinds=["channels"])
    small = resect.cut(copy.deepcopy(model), plan, graph)
    front = small.get_submodule("0")
    assert isinstance(front, Pieces)
    assert sum(front.pieces) == front.enter.out_features < 21
    assert isinstance(front.shape, tuple)
    with resect.masked(model, plan, graph):
        torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


class Literal(nn.Module):
    """A layer of four channels that its code knows by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 5]."""
        inner: Tensor = self.up(x).view(-1, 4)
        return x + self.down(inner.relu())


class Stack(nn.Module):
    """As many layers as each has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 4
        self.enter, self.layers = nn.Linear(3, 5), nn.ModuleList(Literal() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3] to [batch, 5]."""
        hidden: Tensor = self.enter(x)
        for layer in self.layers[: self.depth]:
            hidden = layer(hidden)
        return hidden


def test_a_cut_network_may_not_stop_before_what_it_cannot_run() -> None:
    model = Stack().double().eval()
    graph = resect.trace(model, (torch.zeros(2, 3, dtype=torch.float64),))
    kept = {"kind": "channels", "layer": 3, "units": 4, "keep": [0, 1, 2]}
    plan = resect.Plan.model_validate({"groups": {"layers.3.channels": kept}})
    with pytest.raises(ModelError, match=r"layers\.3 does not take the new sizes"):
        resect.cut(model, plan, graph)


class Projects(nn.Module):
    """Has a width, and a method that is no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.weight = nn.Parameter(torch.randn(12, 5))

    def project(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 12]."""
        return torch.zeros(len(x), self.width, dtype=x.dtype).add(x @ self.weight.t())


class Calls(nn.Module):
    """Calls a method of a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.leave = Projects(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 5]."""
        return self.leave(self.part.project(x).relu())


def test_numbers_of_a_part_whose_method_runs_follow_a_cut() -> None:
    model = Calls().double().eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    assert_cut_equals_mask(model, resect.trace(model, (x,)), x, seed=1)
