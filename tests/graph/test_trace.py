"""Discovery on networks of our own: unknown operators freeze, user rules extend, shapes are all that is read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import ModelError
from resect.graph import Call, op_rule, rules
from resect.graph.rules import pointwise
from tests.models import FAMILIES, assert_untouched, snapshot


class Gated(nn.Module):
    """Two linears around an operator of choice."""

    def __init__(self, middle: object) -> None:
        super().__init__()
        self.middle = middle
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 5]."""
        hidden: Tensor = self.middle(self.enter(x))  # type: ignore[operator]
        return x + self.leave(hidden)


@torch.library.custom_op("resect_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An operator that discovery cannot know."""
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def _own_rule() -> Iterator[None]:
    op_rule("resect_tests.doubled")(lambda call: pointwise(call))
    yield
    del rules._RULES["resect_tests.doubled"]


def example() -> tuple[Tensor]:
    """Inputs [3, 5]."""
    return (torch.zeros(3, 5),)


def test_channels_between_two_linears_are_found() -> None:
    graph = resect.trace(Gated(torch.relu), example())
    assert [(group.units, len(group.members)) for group in graph.groups] == [(12, 3)]


def test_an_operator_without_a_rule_freezes_and_is_named() -> None:
    graph = resect.trace(Gated(doubled), example())
    assert not graph.groups
    assert any("resect_tests.doubled" in item.reason for item in graph.frozen)


@pytest.mark.usefixtures("_own_rule")
def test_a_rule_from_user_code_frees_it() -> None:
    model = Gated(doubled)
    graph = resect.trace(model, example())
    (group,) = graph.groups
    kept = {"kind": group.kind, "layer": group.layer, "units": 12, "keep": [0, 3, 7]}
    plan = resect.Plan.model_validate({"groups": {group.name: kept}})
    x = torch.randn(4, 5)
    with torch.no_grad():
        with resect.masked(model, plan, graph):
            expected = model(x)
        assert model.enter.out_features == 12
        found = resect.cut(model, plan, graph)(x)
    assert model.enter.out_features == 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "middle", [lambda h: h.softmax(-1), lambda h: h.flip(-1), lambda h: h.cumsum(-1), lambda h: h - h.amax(-1, True)]
)
def test_positions_that_see_each_other_stay(middle: object) -> None:
    assert not resect.trace(Gated(middle), example()).groups


def test_a_wrong_rule_is_caught_by_the_check_of_shapes() -> None:
    @op_rule("resect_tests.doubled")
    def wrong(call: Call) -> list[rules.Axes]:
        return [[()]]

    try:
        with pytest.raises(ModelError, match="doubled"):
            resect.trace(Gated(doubled), example())
    finally:
        del rules._RULES["resect_tests.doubled"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_gqa"])
def test_tracing_leaves_the_model_alone(family: str) -> None:
    model = FAMILIES[family]().train()
    before = snapshot(model)
    resect.trace(model)
    assert_untouched(model, before)


def test_a_network_that_cannot_run_says_where() -> None:
    with pytest.raises(ModelError, match="enter"):
        resect.trace(Gated(torch.relu), (torch.zeros(3, 4),))


def test_like_blocks_share_their_index_tensors() -> None:
    graph = resect.trace(FAMILIES["llama"]())
    first, second, third = (group.members[0].index for group in graph.of_kind("channels"))
    assert first is second
    assert second is third
