"""Units that fade: the shares of frozen and trained slices, zero for good, and the bits of a run that goes on later."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import resect
from resect.methods.lorashear import LoRAShear
from resect.surgery import Fading
from tests.models import FAMILIES


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 333])
def test_ratios_telescope_to_the_share_that_is_left_and_to_zero(steps: int) -> None:
    asked = LoRAShear(warmup_steps=3, period_steps=steps, periods=2)
    product = 1.0
    for step in range(3, 3 + steps):
        product *= asked._ratio(step)
        left = Fraction(steps - (step - 3) - 1, steps)
        assert asked._left(step) == float(left)
        assert product == pytest.approx(float(left), rel=1e-12)
    assert product == 0.0
    assert asked._left(3 + steps) == pytest.approx(1 - 1 / steps)  # the next period begins anew


def test_frozen_slices_fade_from_what_they_were_and_trained_ones_from_what_they_are() -> None:
    model = FAMILIES["llama_biases"]()
    graph = resect.trace(model)
    group = next(iter(graph.of_kind("channels")))
    gate = model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    bias = model.get_parameter("model.layers.0.mlp.up_proj.bias").requires_grad_(False)
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    first = {id(one): one.detach().clone() for one in (gate, up, bias, down)}
    fading = Fading.of(model, graph, [group])
    fading.begin({group.name: torch.tensor([4, 9])})
    fading.scale(left=0.75, step=0.75)
    with torch.no_grad():
        gate[4] += 1  # a gradient step
    fading.scale(left=0.5, step=2 / 3)
    torch.testing.assert_close(gate[4], (first[id(gate)][4] * 0.75 + 1) * (2 / 3))
    torch.testing.assert_close(gate[9], first[id(gate)][9] * 0.75 * (2 / 3))
    assert torch.equal(up[[4, 9]], first[id(up)][[4, 9]] * 0.5)
    assert torch.equal(bias[[4, 9]], first[id(bias)][[4, 9]] * 0.5)
    assert torch.equal(down, first[id(down)])
    fading.zero({group.name: torch.tensor([9])})
    assert fading.fading[group.name].tolist() == [4]
    with torch.no_grad():
        gate[9] = 3.0
    fading.hold()
    assert not gate[9].any()
    fading.end()
    assert not gate[[4, 9]].any()
    assert not up[[4, 9]].any()
    assert not fading.fading
    others = [unit for unit in range(group.units) if unit not in (4, 9)]
    for one in (gate, up, bias):
        assert torch.equal(one[others], first[id(one)][others])
