"""Image classification: real networks of torchvision and timm, and a tiny module for every rule that they need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("timm")

import resect
from tests.graph.test_networks import IMAGE, assert_cut_equals_mask, head, lively
from tests.vision.examine import examine

NETWORKS = (
    *("torchvision/resnet18", "torchvision/squeezenet1_1", "torchvision/shufflenet_v2_x0_5", "torchvision/mobilenet_v3_small"),
    *("timm/test_convnext", "timm/test_vit", "timm/test_efficientnet", "timm/test_byobnet"),
)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_cut(name: str) -> None:
    row = examine(name)
    assert row.verified, row
    assert {"channels", "heads", "residual"} & row.groups.keys()


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """What the function says."""
        return self.function(x)


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean zero and variance one for each channel it puts out."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] to [batch, out, ...]."""
        weight = functional.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


class Attention(nn.Module):
    """Attention that takes the size of a head from the width of what comes in, as many networks do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, height, width] to the same."""
        shape, x = x.shape, x.flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        found = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.leave(found.transpose(1, 2).reshape(batch, tokens, width)).transpose(1, 2).reshape(shape)


def between(middle: nn.Module, enter: int = 12, leave: int = 12) -> Callable[[], nn.Module]:
    """A network with a module between two convolutions."""
    return lambda: nn.Sequential(nn.Conv2d(3, enter, 3), middle, nn.Conv2d(leave, 9, 1), head(9))


RULES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # network, units of the group that the rule decides about
    "hardswish": (between(nn.Hardswish(inplace=True)), 12),
    "one group": (between(nn.GroupNorm(1, 12)), 12),
    "pixel shuffle": (between(nn.PixelShuffle(2), 12, 3), 3),
    "pixel unshuffle": (between(nn.PixelUnshuffle(2), 12, 48), 12),
    "windows": (between(Apply(lambda x: functional.unfold(x, 3)[..., None]), 12, 108), 12),
    "channel shuffle": (between(nn.Sequential(nn.ChannelShuffle(3), nn.Tanh(), nn.ChannelShuffle(4))), 3),
    "equal parts": (between(Apply(lambda x: torch.cat([x.chunk(2, 1)[0].relu(), x.chunk(2, 1)[1]], 1))), 6),
    "half the size": (between(Apply(lambda x: torch.cat([p.tanh() for p in x.split(x.shape[1] // 2, 1)], 1))), 6),
    "standardised weights": (between(Standardised(12, 12, 1)), 12),
    "size of a head": (between(Attention(12, 4)), 4),
    "rolled": (between(Apply(lambda x: x.roll((1, 1), (2, 3)))), 12),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule(name: str) -> None:
    build, units = RULES[name]
    model = lively(build)
    x = torch.randn(IMAGE, dtype=torch.float64)
    graph = resect.trace(model, (x,))
    assert units in {group.units for group in graph.groups if any(m.parameter == "0.weight" for m in group.members)}, graph.groups
    for seed in (1, 2, 3):
        assert_cut_equals_mask(model, graph, x, seed=seed)


def test_heads_are_told_from_channels() -> None:
    graph = resect.trace(between(Attention(12, 4))(), (torch.zeros(IMAGE),))
    assert [group.units for group in graph.of_kind("heads")] == [4]


def test_a_size_that_is_computed_with_stays() -> None:
    model = between(Apply(lambda x: x * x.shape[1] ** -0.5))()
    graph = resect.trace(model, (torch.zeros(IMAGE),))
    assert [group.units for group in graph.groups] == [9]
    assert any("computes with" in item.reason for item in graph.frozen if item.parameter == "0.weight")


def test_branches_in_a_list_are_no_blocks() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([branch(x) for branch in self.branches]).sum(0)

    assert not resect.trace(Branches(), (torch.zeros(IMAGE),)).of_kind("blocks")
