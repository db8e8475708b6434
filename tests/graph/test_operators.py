"""Operators that few networks have: what can be cut through them, held against zeros in float64.

Every entry has a network, an input, and sizes of groups that must be found. A third of the units of every group goes:
the cut network computes what the dense one does with zeros in all slices of what went.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrizations

import resect
from resect.graph import Graph
from resect.plan import Kept, Plan


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    number = 4
    """What the function may divide by; it has to follow a cut."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.number = Net.number
        for name, part in parts.items():
            setattr(self, name, part)
        self.rule = forward

    def forward(self, *inputs: Any) -> Any:
        """What the function gives."""
        return self.rule(self, *inputs)


def without_a_third(graph: Graph) -> Plan:
    """The plan that takes the first third of every group's units."""
    groups = {}
    for group in graph.groups:
        keep = tuple(range(group.units // 3, group.units))
        groups[group.name] = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)
    return Plan(groups=groups)


def check(net: nn.Module, inputs: tuple[Tensor, ...], wanted: list[int]) -> None:
    """Finds groups of the sizes that are wanted, and holds the cut against zeros."""
    net = net.double().eval()
    graph = resect.trace(net, inputs)
    found = sorted(group.units for group in graph.groups)
    assert set(wanted) <= set(found), f"{found}, frozen for {sorted({one.reason for one in graph.frozen})}"
    against_zeros(net, graph, inputs)


def against_zeros(net: nn.Module, graph: Graph, *examples: tuple[Tensor, ...]) -> None:
    """Holds the network without a third of every group against zeros in all that went, which must change something."""
    zeros, small = copy.deepcopy(net), copy.deepcopy(net)
    state = {**dict(zeros.named_parameters()), **dict(zeros.named_buffers())}
    for group in graph.groups:
        for member in group.members:
            gone = member.index[: group.units // 3].flatten()
            if (member.parameter, member.axis) not in graph.spared:
                state[member.parameter].data.index_fill_(member.axis, gone, 0)
    resect.cut(small, without_a_third(graph), graph)
    for inputs in examples:
        expected = zeros(*inputs)
        assert not torch.equal(expected, net(*inputs))
        torch.testing.assert_close(small(*inputs), expected, rtol=1e-9, atol=1e-12)


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, dtype=torch.float64)


def sound(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 16, dtype=torch.float64)


def rows(width: int = 9) -> Tensor:
    return torch.randn(6, width, dtype=torch.float64)


def words() -> Tensor:
    return torch.arange(14).view(2, 7) % 31


def heads(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Net:
    """Four heads of eight, and a kernel of attention."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.e(ids)
        q, k, v = (part.unflatten(-1, (self.number, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.c(x + self.o(kernel(q, k, v).transpose(1, 2).flatten(2)))

    parts = {"e": nn.Embedding(31, 24), "qkv": nn.Linear(24, 96), "o": nn.Linear(32, 24), "c": nn.Linear(24, 5)}
    return Net(forward, **parts)


def chosen_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def through(middle: Callable[[Tensor], Tensor], first: nn.Module, last: nn.Module) -> Net:
    return Net(lambda self, x: self.b(middle(self.a(x).relu())), a=first, b=last)


def messages(how: str) -> Net:
    def forward(self: Any, x: Tensor, edges: Tensor) -> Tensor:
        h = self.a(x)
        to = edges[1][:, None].expand(-1, h.shape[1])
        return self.b(torch.zeros_like(h).scatter_reduce(0, to, h[edges[0]], how, include_self=False))

    return Net(forward, a=nn.Linear(9, 16), b=nn.Linear(16, 5))


def pooled() -> Net:
    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.u(self.e(ids)).relu()
        return self.o((self.w(x).softmax(1).transpose(1, 2) @ x).squeeze(1))

    return Net(forward, e=nn.Embedding(31, 24), u=nn.Linear(24, 40), w=nn.Linear(40, 1), o=nn.Linear(40, 5))


def shuffled() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        return self.b(x.view(b, self.number, c // self.number, h, w).transpose(1, 2).reshape(b, c, h, w))

    return Net(forward, a=nn.Conv2d(3, 24, 1), b=nn.Conv2d(24, 5, 1))


def windows() -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        v = self.v(self.i(x).relu())
        b, n, c = v.shape
        strides = (v.stride(0), v.stride(1), v.stride(1), v.stride(2))
        return self.o(v.as_strided((b, n - 2, 3, c), strides).mean(2))

    return Net(forward, i=nn.Linear(9, 32), v=nn.Linear(32, 24), o=nn.Linear(24, 5))


def conv(rank: int, into: int, out: int, window: int) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return kind(into, out, window)


def hooked(norm: Callable[[nn.Module], nn.Module], layer: nn.Module) -> nn.Module:
    """A layer whose weight one of torch's older norms makes anew before every run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(layer)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], list[int]]] = {
    "a kernel that the network chooses": (lambda: heads(chosen_kernel), lambda: (words(),), [4]),
    "reflection padding of sound": (
        lambda: through(lambda x: F.pad(x, (2, 2), mode="reflect"), conv(1, 3, 12, 3), conv(1, 12, 5, 3)),
        lambda: (sound(),),
        [12],
    ),
    "replication padding of sound": (
        lambda: through(lambda x: F.pad(x, (1, 2), mode="replicate"), conv(1, 3, 12, 3), conv(1, 12, 5, 3)),
        lambda: (sound(),),
        [12],
    ),
    "upsampling in one dimension": (
        lambda: through(nn.Upsample(scale_factor=2, mode="linear"), conv(1, 3, 12, 3), conv(1, 12, 5, 3)),
        lambda: (sound(),),
        [12],
    ),
    "upsampling in three dimensions": (
        lambda: through(nn.Upsample(scale_factor=2, mode="trilinear"), conv(3, 2, 12, 1), conv(3, 12, 5, 1)),
        lambda: (torch.randn(1, 2, 3, 3, 3, dtype=torch.float64),),
        [12],
    ),
    "a grouped transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(16, 24, 3, groups=4), nn.Conv2d(24, 3, 1)),
        lambda: (images(16),),
        [6],
    ),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(9, 32)), nn.ReLU(), nn.Linear(32, 5)),
        lambda: (rows(),),
        [32],
    ),
    "weight_norm of one layer after another": (
        lambda: nn.Sequential(
            *(parametrizations.weight_norm(conv(1, 3, 12, 3)), nn.ReLU(), parametrizations.weight_norm(conv(1, 12, 9, 3))),
            *(nn.ReLU(), conv(1, 9, 5, 1)),
        ),
        lambda: (sound(),),
        [9, 12],
    ),
    "weight_norm by hooks": (
        lambda: nn.Sequential(
            *(hooked(nn.utils.weight_norm, conv(1, 3, 12, 3)), nn.ReLU(), hooked(nn.utils.weight_norm, conv(1, 12, 9, 3))),
            *(nn.ReLU(), conv(1, 9, 5, 1)),
        ),
        lambda: (sound(),),
        [9, 12],
    ),
    "spectral_norm by hooks": (
        lambda: nn.Sequential(hooked(nn.utils.spectral_norm, conv(1, 3, 12, 3)), nn.ReLU(), conv(1, 12, 5, 1)),
        lambda: (sound(),),
        [12],
    ),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(9, 32)), nn.ReLU(), nn.Linear(32, 5)),
        lambda: (rows(),),
        [32],
    ),
    "a bag of embeddings": (
        lambda: nn.Sequential(nn.EmbeddingBag(20, 16), nn.Linear(16, 5)),
        lambda: (torch.randint(20, (3, 4)),),
        [16],
    ),
    "a bilinear layer": (
        lambda: Net(lambda self, x, y: self.b(self.f(self.a(x), self.c(y))), a=nn.Linear(9, 12), c=nn.Linear(7, 10),
                    f=nn.Bilinear(12, 10, 16), b=nn.Linear(16, 5)),
        lambda: (rows(), rows(7)),
        [10, 12, 16],
    ),
    "the largest message": (lambda: messages("amax"), lambda: (rows(), torch.randint(6, (2, 20))), [16]),
    "the mean message": (lambda: messages("mean"), lambda: (rows(), torch.randint(6, (2, 20))), [16]),
    "pooling by attention": (pooled, lambda: (words(),), [24, 40]),
    "a shuffle by hand": (shuffled, lambda: (images(),), [4]),
    "windows by strides": (windows, lambda: (torch.randn(2, 7, 9, dtype=torch.float64),), [24, 32]),
    "rows mapped one by one": (
        lambda: Net(lambda self, x: self.b(torch.vmap(self.a)(x).relu()), a=nn.Linear(9, 32), b=nn.Linear(32, 5)),
        lambda: (rows(),),
        [32],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_passes_is_cut_exactly(name: str) -> None:
    torch.manual_seed(0)
    network, inputs, wanted = CASES[name]
    check(network(), inputs(), wanted)


def test_floats_over_time_have_heads() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.i(x)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.c(x + self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)))

    net = Net(forward, i=nn.Linear(9, 24), qkv=nn.Linear(24, 96), o=nn.Linear(32, 24), c=nn.Linear(24, 5))
    graph = resect.trace(net, (torch.zeros(2, 7, 9),))
    assert [group.units for group in graph.of_kind("heads")] == [4]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_heads_of_flex_attention_are_found() -> None:
    net = heads(lambda q, k, v: flex_attention(q, k, v))
    assert [group.units for group in resect.trace(net, (words(),)).of_kind("heads")] == [4]
