"""Small networks for every operator rule, in the manner of torch's OpInfo, and what must be found in them.

Most are two layers with an operator between them: `first` makes twelve units, `last` reads the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.test_operators import Net

A = torch.ops.aten

Operation = Callable[[Any], Any]


@dataclass(frozen=True)
class Sample:
    """A network in which operators must be met, and the units of the groups to be offered."""

    operators: tuple[str, ...]
    network: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]  # of a batch size
    units: tuple[int, ...]
    whole: bool = False  # whether something else must stay
    refused: bool = False  # whether they are not let go after all


@dataclass(frozen=True)
class Shell:
    """A layer of twelve units before an operator, and one behind it that reads along the same axis."""

    shape: tuple[int, ...]  # of one example
    first: Callable[[], nn.Module]
    last: Callable[[int], nn.Module]
    axis: int

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Random examples, the same for every size."""
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, *self.shape, dtype=torch.float64, generator=generator),)

    def network(self, make: Callable[[], Operation], *, below: bool) -> nn.Module:
        """The layers with an operation between; `below` autograd, operators are not taken apart."""

        def forward(self: Any, x: Tensor) -> Tensor:
            with torch.inference_mode(below):
                found: Tensor = self.last(self.operation(self.first(x)))
                return found

        return self._around(forward, make())

    def pair(self, operation: Callable[[Any, Any], Any], *, below: bool) -> nn.Module:
        """The same with an operation of what two layers put out."""

        def forward(self: Any, x: Tensor) -> Tensor:
            with torch.inference_mode(below):
                found: Tensor = self.last(self.operation(self.first(x), self.second(x)))
                return found

        return self._around(forward, operation, second=self.first())

    def _around(self, forward: Callable[..., Any], operation: Any, **more: nn.Module) -> nn.Module:
        net = Net(forward, first=self.first(), **more, last=nn.Identity())
        net.operation = operation
        net = net.double()
        with torch.no_grad():
            net.last = self.last(net(*self.inputs(2)).shape[self.axis])
        return net


ROWS = Shell((9,), lambda: nn.Linear(9, 12), lambda width: nn.Linear(width, 5), -1)
TEXT = Shell((7, 9), lambda: nn.Linear(9, 12), lambda width: nn.Linear(width, 5), -1)
SOUND = Shell((3, 16), lambda: nn.Conv1d(3, 12, 1), lambda width: nn.Conv1d(width, 5, 1), 1)
IMAGES = Shell((3, 8, 8), lambda: nn.Conv2d(3, 12, 1), lambda width: nn.Conv2d(width, 5, 1), 1)
VOLUMES = Shell((3, 4, 4, 4), lambda: nn.Conv3d(3, 12, 1), lambda width: nn.Conv3d(width, 5, 1), 1)

SAMPLES: list[Sample] = []


def layer(
    names: str,
    shell: Shell,
    make: Callable[[], Operation],
    *units: int,
    below: bool = False,
    **kept: bool,
) -> None:
    """A layer, made anew for every network, that lets units of these numbers pass."""
    build = functools.partial(shell.network, make, below=below)
    network(names, build, shell.inputs, *units, **kept)


def network(
    names: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[Tensor, ...]],
    *units: int,
    **kept: bool,
) -> None:
    """A network of another form."""
    operators = tuple(f"aten.{name}" for name in names.split())
    SAMPLES.append(Sample(operators, build, inputs, units, **kept))


def passes(names: str, shell: Shell, operation: Operation, *units: int, below: bool = False) -> None:
    """Units that pass an operation: twelve, where nothing else is said."""
    layer(names, shell, lambda: operation, *(units or (12,)), below=below)


def joins(
    names: str,
    shell: Shell,
    operation: Callable[[Any, Any], Any],
    *units: int,
    below: bool = False,
) -> None:
    """An operation of what two layers put out, whose units are one: twelve, if nothing is said."""
    build = functools.partial(shell.pair, operation, below=below)
    network(names, build, shell.inputs, *(units or (12,)))


def stays(names: str, shell: Shell, operation: Operation, *units: int, below: bool = False) -> None:
    """An axis that must stay whole; nothing can be cut, or only units of these numbers."""
    layer(names, shell, lambda: operation, *units, below=below, whole=True)


def refused(names: str, shell: Shell, operation: Operation, *units: int, below: bool = False) -> None:
    """Units that the code does not let go: numbers written out in it say how many there are."""
    layer(names, shell, lambda: operation, *units, below=below, whole=True, refused=True)


# -- element by element ------------------------------------------------------------------------------------------------


UNARY = """abs acos acosh angle asin asinh atan atanh ceil celu cos cosh deg2rad digamma elu erf erfc
    erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh i0 isinf isnan
    isneginf isposinf leaky_relu lgamma log log10 log1p log2 logical_not logit mish nan_to_num neg rad2deg
    reciprocal relu round rsqrt sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt tan
    tanh trunc special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_entr special_erfcx
    special_i0e special_i1 special_log_ndtr special_ndtri special_modified_bessel_k0 special_spherical_bessel_j0"""
BINARY = """add atan2 clamp clamp_max clamp_min copysign div eq fmax fmin fmod ge gt heaviside hypot
    igamma igammac ldexp le logaddexp logaddexp2 logical_and logical_or logical_xor lt max maximum min minimum mul ne
    nextafter pow remainder rsub special_chebyshev_polynomial_t special_xlog1py special_zeta sub xlogy"""
WITH_NUMBER = """add clamp clamp_max clamp_min copysign div eq fmod ge gt le lt mul ne pow remainder rsub
    sub threshold xlogy"""
ON_BITS = """bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift gcd lcm"""
IN_PLACE = """abs_ add_ cos_ div_ exp_ floor_ mul_ neg_ relu_ sigmoid_ sqrt_ sub_ tanh_"""


def unary(name: str, h: Tensor) -> Tensor:
    """An operator of one tensor, at numbers for which it is defined."""
    low, high = (2, 3) if name == "acosh" else (0.2, 0.8)
    found: Tensor = getattr(A, name)(low + (high - low) * h.sigmoid())
    return found.double()


def binary(name: str, h: Tensor) -> Tensor:
    """An operator of two tensors."""
    found: Tensor = getattr(A, name)(1.5 + h.sigmoid(), 1.2 + h.tanh().abs())
    return found.double()


def with_number(name: str, h: Tensor) -> Tensor:
    """An operator of a tensor and a number."""
    more = (0.5, 0.25) if name == "threshold" else (0.5,)
    found: Tensor = getattr(A, name)(h.sigmoid(), *more)
    return found.double()


def on_bits(name: str, h: Tensor) -> Tensor:
    """An operator of two tensors of whole numbers."""
    found: Tensor = getattr(A, name)((8 * h.sigmoid()).long(), (4 * h.sigmoid()).long())
    return found.double()


def in_place(name: str, h: Tensor) -> Tensor:
    """An operator that writes into its first argument."""
    number = (0.5,) if name in ("add_", "div_", "mul_", "sub_") else ()
    found: Tensor = getattr(A, name)(h.sigmoid(), *number)
    return found + h


def added(names: list[str], operation: Callable[[str, Tensor], Tensor], h: Tensor) -> Tensor:
    """The results of operators of one form, added up."""
    return torch.stack([operation(name, h) for name in names]).sum(0)


def family(names: str, shell: Shell, operation: Callable[[str, Tensor], Tensor]) -> None:
    """Operators of one form, ten to a network."""
    every = names.split()
    for some in (every[start : start + 10] for start in range(0, len(every), 10)):
        passes(" ".join(some), shell, functools.partial(added, some, operation), below=True)


family(UNARY, ROWS, unary)
family(BINARY, TEXT, binary)
family(WITH_NUMBER, ROWS, with_number)
family(ON_BITS, ROWS, on_bits)
family(IN_PLACE, ROWS, in_place)

passes("addcmul", ROWS, lambda h: torch.addcmul(h, h, h.sin(), value=0.5))
passes("addcdiv", ROWS, lambda h: torch.addcdiv(h, h, 1 + h.abs()))
passes("lerp", ROWS, lambda h: torch.lerp(h, h.sin(), 0.3) + torch.lerp(h, h.sin(), h.cos()))
passes("where", ROWS, lambda h: torch.where(h > 0, h, 0.1 * h))
passes("polygamma", ROWS, lambda h: torch.polygamma(1, 1 + h.abs()))
passes("mvlgamma", ROWS, lambda h: torch.mvlgamma(2 + h.abs(), 2))
passes("frexp", ROWS, lambda h: torch.frexp(h)[0] + torch.frexp(h)[1])
passes("_to_copy", ROWS, lambda h: h.to(torch.float64, copy=True))
passes("clone", ROWS, torch.clone)
passes("detach", ROWS, lambda h: h + h.detach())
passes("alias", ROWS, lambda h: A.alias(h))
passes("lift_fresh", ROWS, lambda h: h * torch.tensor(2.0))
passes("contiguous", ROWS, lambda h: A.contiguous(h), below=True)
passes("contiguous", TEXT, lambda h: h.transpose(1, 2).contiguous().transpose(1, 2), below=True)
passes("native_dropout", ROWS, lambda h: A.native_dropout(h, 0.5, False)[0])
layer("dropout", ROWS, nn.Dropout, 12, below=True)
passes("zeros_like", ROWS, lambda h: h + torch.zeros_like(h))
passes("ones_like", ROWS, lambda h: h + torch.ones_like(h))
passes("full_like", ROWS, lambda h: h + torch.full_like(h, 3.0))
passes("empty_like copy_", ROWS, lambda h: torch.empty_like(h).copy_(h))
passes("rand_like", ROWS, lambda h: h + 0 * torch.rand_like(h))
passes("bernoulli", ROWS, lambda h: torch.bernoulli((h > 0).double()))
passes("copy", ROWS, lambda h: A.copy(torch.zeros_like(h), h))
passes("fill_", ROWS, lambda h: h + torch.empty_like(h).fill_(2.0))
passes("masked_fill", ROWS, lambda h: h.masked_fill(h > 0.3, 2.0))
passes("masked_fill", TEXT, lambda h: h.masked_fill(h[..., :1].detach() * 0 > 1, 2.0), 11)
passes("masked_fill_", ROWS, lambda h: h.clone().masked_fill_(h > 0.3, 2.0))
passes("zero_", ROWS, lambda h: h + h.clone().zero_())
passes("nan_to_num", ROWS, lambda h: (h / 0.0).nan_to_num(0.5, 2.0, -2.0))
passes("polar view_as_real", ROWS, lambda h: torch.view_as_real(torch.polar(1 + h.abs(), h)).sum(-1))
passes("complex view_as_real", ROWS, lambda h: torch.view_as_real(torch.complex(h, h.sin())).prod(-1))
passes("complex view_as_real", ROWS, lambda h: torch.view_as_real(torch.complex(h, h.sin())).flatten(1))
passes(
    "_conj resolve_conj",
    ROWS,
    lambda h: torch.view_as_real(torch.complex(h, h).conj().resolve_conj())[..., 1],
    below=True,
)
passes("_conj _neg_view", ROWS, lambda h: torch.complex(h, h.sin()).conj().imag + h)
passes("_neg_view", ROWS, lambda h: torch._neg_view(h) + h.sin())
layer("hardswish", IMAGES, nn.Hardswish, 12)
layer("_prelu_kernel", IMAGES, lambda: nn.PReLU(12), 12)
layer("_prelu_kernel", ROWS, nn.PReLU, 12)
passes("log_sigmoid_forward", ROWS, F.logsigmoid)
passes("eq", ROWS, lambda h: (h.floor() == h.round()) * h)

# -- constants ---------------------------------------------------------------------------------------------------------

passes("full", ROWS, lambda h: h + torch.full((h.shape[-1],), 2.0))
passes("zeros", ROWS, lambda h: h + torch.zeros(h.shape))
passes("ones", ROWS, lambda h: h + torch.ones(h.shape[-1]))
passes("empty fill_", ROWS, lambda h: h + torch.empty(h.shape).fill_(0.5))
passes("scalar_tensor", ROWS, lambda h: h * A.scalar_tensor(2.0))
passes("new_zeros", ROWS, lambda h: h + h.new_zeros(h.shape))
passes("new_ones", ROWS, lambda h: h + h.new_ones(h.shape[-1]))
passes("new_full", ROWS, lambda h: h * h.new_full((h.shape[-1],), 3.0))
passes("new_empty", ROWS, lambda h: h + h.new_empty(h.shape).fill_(0.5))
passes("empty_strided", ROWS, lambda h: h + torch.empty_strided(h.shape, h.stride()).fill_(0.5))
passes("new_empty_strided", ROWS, lambda h: h + h.new_empty_strided(h.shape, h.stride()).fill_(0.5))

refused("new_full", ROWS, lambda h: h * h.new_full((12,), 2.0), 12)
refused("ones", ROWS, lambda h: h * torch.ones(12), 12)
stays("arange", ROWS, lambda h: h * torch.arange(h.shape[-1]))
passes("arange", TEXT, lambda h: h * torch.arange(h.shape[1])[:, None])
stays("linspace", ROWS, lambda h: h * torch.linspace(0, 1, h.shape[-1], dtype=h.dtype))
passes("linspace", TEXT, lambda h: h * torch.linspace(0, 1, h.shape[1], dtype=h.dtype)[:, None])
stays("rand", ROWS, lambda h: h * torch.rand(h.shape[-1]))
passes("rand", TEXT, lambda h: h + 0 * torch.rand(h.shape[1], 1))
stays("randn", ROWS, lambda h: h * torch.randn(h.shape[-1]))
passes("randn", TEXT, lambda h: h + 0 * torch.randn(h.shape[1], 1))
stays("randint", ROWS, lambda h: h * torch.randint(3, (h.shape[-1],)))
passes("randint", TEXT, lambda h: h + 0 * torch.randint(3, (h.shape[1], 1)))
stays("eye", ROWS, lambda h: h @ torch.eye(h.shape[-1], dtype=h.dtype))
passes("eye", TEXT, lambda h: torch.eye(h.shape[1], dtype=h.dtype) @ h)
stays("tril_indices", ROWS, lambda h: h[:, torch.tril_indices(3, 3)[0]] + h.sum())

# -- views -------------------------------------------------------------------------------------------------------------

passes("view", TEXT, lambda h: h.view(-1, h.shape[-1]))
passes("view", TEXT, lambda h: h.view(*h.shape[:2], -1, 3).relu().view(h.shape), 4)
stays("view", ROWS, lambda h: h[:5].sum(0, keepdim=True).repeat(5, 1).view(4, 15))
passes("view", ROWS, lambda h: h.view(h.shape[0], 4, -1).softmax(1).flatten(1), 3)
passes("_unsafe_view", TEXT, lambda h: A._unsafe_view(h, (-1, h.shape[-1])))
passes("reshape", TEXT, lambda h: h.reshape(-1, h.shape[-1]), below=True)
passes(
    "_reshape_alias",
    TEXT,
    lambda h: A._reshape_alias(h, (h.shape[0] * h.shape[1], h.shape[2]), (h.shape[2], 1)),
)
passes("flatten", IMAGES, lambda h: h.flatten(2).unflatten(2, h.shape[2:]), below=True)
refused("flatten", ROWS, lambda h: h[:, None].expand(-1, 3, -1).flatten(1), 3, below=True)
passes("unflatten", TEXT, lambda h: h.unflatten(-1, (-1, 3)).relu().flatten(-2), 4, below=True)
passes("squeeze unsqueeze", ROWS, lambda h: h.unsqueeze(1).relu().squeeze(1))
passes("squeeze_ unsqueeze_", ROWS, lambda h: h.clone().unsqueeze_(1).squeeze_(1))
passes("view_copy", TEXT, lambda h: A.view_copy(h, (-1, h.shape[-1])))
passes("permute", IMAGES, lambda h: h.permute(0, 2, 3, 1).sin().permute(0, 3, 1, 2))
passes("transpose", TEXT, lambda h: h.transpose(1, 2).relu().transpose(-1, -2))
passes("transpose_", TEXT, lambda h: h.clone().transpose_(1, 2).relu().transpose_(1, 2))
passes("t", ROWS, lambda h: h.t().sin().t())
passes("t_", ROWS, lambda h: h.clone().t_().sin().t())
passes("swapaxes", TEXT, lambda h: h.swapaxes(1, 2).relu().swapaxes(1, 2), below=True)
passes("expand", ROWS, lambda h: h[:, None].expand(-1, 3, -1))
passes("expand_copy", ROWS, lambda h: A.expand_copy(h[:, None], (-1, 3, -1)))
passes("broadcast_to", ROWS, lambda h: h[:, None].broadcast_to(h.shape[0], 3, h.shape[1]), below=True)
passes("expand_as", ROWS, lambda h: h[:, :1].expand_as(h) + h, 11, below=True)
refused("repeat", ROWS, lambda h: h.repeat(1, 3), 3)
passes("repeat", IMAGES, lambda h: h.repeat(1, 1, 2, 1))
passes("slice", ROWS, lambda h: h[:, : h.shape[1] // 3], 4, 8)
passes("slice", ROWS, lambda h: h[:, ::2], 6)
stays("slice", ROWS, lambda h: h[:, 1::5])
passes("slice", TEXT, lambda h: h[:, 1:-1])
stays("slice", ROWS, lambda h: h[:, 1:] - h[:, :-1])
refused("slice cat", ROWS, lambda h: torch.cat([h[:, 4:], h[:, :4]], 1), 4, 8)
refused("slice cat", ROWS, lambda h: torch.cat([h[:, 6:], h[:, :6]], 1) * h, 6)
passes(
    "narrow",
    ROWS,
    lambda h: h.narrow(1, 0, h.shape[1] // 2) * h.narrow(1, h.shape[1] // 2, h.shape[1] // 2),
    6,
    below=True,
)
passes("slice_copy", TEXT, lambda h: A.slice_copy(h, 1, 1, 5))
passes("select", TEXT, lambda h: h[:, -1])
stays("select", ROWS, lambda h: h.select(1, 3)[:, None] * h)
passes("select_copy", TEXT, lambda h: A.select_copy(h, 1, 2))


def in_threes(h: Tensor) -> Tensor:
    """The same as rows of three, for a while."""
    return h.view(h.shape[0], -1, 3, *h.shape[2:]).sin().flatten(1, 2)


passes("split", ROWS, lambda h: torch.mul(*h.split(h.shape[1] // 2, 1)), 6)
refused("split_with_sizes", ROWS, lambda h: h.split_with_sizes([4, h.shape[1] - 4], 1)[1], 4, 8)
passes("split_with_sizes", ROWS, lambda h: torch.mul(*h.split_with_sizes([h.shape[1] // 2] * 2, 1)), 6)
passes("chunk", ROWS, lambda h: torch.mul(*h.chunk(2, 1)), 6, below=True)
passes("chunk", TEXT, lambda h: h.chunk(3, 1)[1], below=True)
passes("unsafe_split", ROWS, lambda h: torch.mul(*torch.unsafe_split(h, h.shape[1] // 2, 1)), 6)
passes("tensor_split", ROWS, lambda h: torch.mul(*h.tensor_split(2, 1)), 6, below=True)
passes("tensor_split", ROWS, lambda h: torch.add(*h.tensor_split([h.shape[1] // 2], 1)), 6, below=True)
passes("unbind", TEXT, lambda h: h.unbind(1)[0] * h.unbind(1)[3])
stays("unbind", ROWS, lambda h: torch.stack(h.unbind(1)[::-1], 1))
stays("split_with_sizes", ROWS, lambda h: in_threes(h).split_with_sizes([5, 7], 1)[1])
stays("glu", ROWS, lambda h: F.glu(in_threes(h).view(h.shape[0], 2, 6).flatten(1)[:, :10]))
passes("glu", ROWS, lambda h: F.glu(h, -1), 6)
passes("glu", IMAGES, lambda h: F.glu(h, 2))
passes("cat", ROWS, lambda h: torch.cat([h, h.sin()], 1))
passes("cat", TEXT, lambda h: torch.cat([h, h.sin()], 1))
passes("concatenate", ROWS, lambda h: torch.concatenate([h, h.sin()], 1), below=True)
passes("stack", ROWS, lambda h: torch.stack([h, h.sin()], 1), below=True)
passes("stack", ROWS, lambda h: torch.stack([h, h.sin()], 2).flatten(1), below=True)
passes("view_as_complex", ROWS, lambda h: torch.view_as_complex(h.view(h.shape[0], -1, 2)).abs(), 6)
passes(
    "view_as_complex",
    ROWS,
    lambda h: torch.view_as_complex(h.view(h.shape[0], 2, -1).mT.contiguous()).abs(),
    6,
)

# -- contractions ------------------------------------------------------------------------------------------------------

passes("mm", ROWS, lambda h: h @ h.t() @ h)
passes("bmm", TEXT, lambda h: torch.bmm(h, torch.bmm(h.mT, h)))
passes("addmm", ROWS, lambda h: torch.addmm(h, h @ h.t(), h))
layer("addmm", ROWS, lambda: nn.Linear(12, 8), 8, 12)
passes("baddbmm", TEXT, lambda h: torch.baddbmm(h, torch.bmm(h, h.mT), h))
layer("linear", TEXT, lambda: nn.Linear(12, 8), 8, 12, below=True)
passes("linear", ROWS, lambda h: F.linear(h, h)[:, :1] * h, below=True)
passes("mv", ROWS, lambda h: torch.mv(h, h[0])[:, None] * h)
passes("dot", ROWS, lambda h: torch.dot(h[0], h[1]) * h)
stays("dot", ROWS, lambda h: torch.dot(h[0].cos(), h[1].cos()) * h)
passes("vdot", ROWS, lambda h: torch.vdot(h[0], h[1]) * h)
stays("vdot", ROWS, lambda h: torch.vdot(h[0].cos(), h[1].cos()) * h)
stays("mm", ROWS, lambda h: h.cos() @ h.cos().t() @ h)
stays("bmm", TEXT, lambda h: torch.bmm(torch.bmm(h.cos(), h.cos().mT), h))
network(
    "_trilinear",
    lambda: Net(
        lambda self, x: self.b(self.f(self.a(x), self.c(x))),
        a=nn.Linear(9, 12),
        c=nn.Linear(9, 10),
        f=nn.Bilinear(12, 10, 8),
        b=nn.Linear(8, 5),
    ),
    ROWS.inputs,
    8,
    10,
    12,
)
stays("_trilinear", ROWS, lambda h: A._trilinear(h.cos(), h.cos(), h.cos(), [], [], [], [1])[:, None])
passes("_trilinear", ROWS, lambda h: A._trilinear(h, h.cos(), h.cos(), [], [], [], []))
passes("_trilinear", ROWS, lambda h: A._trilinear(h, h.cos(), h.cos(), [], [], [], [1])[:, None] * h)

stays("addmm", ROWS, lambda h: torch.addmm(h[:, :1], h.cos(), h.cos().t()) @ h)
stays("linear", ROWS, lambda h: F.linear(h.cos(), h.cos()) @ h, below=True)

# -- look-ups ----------------------------------------------------------------------------------------------------------


def looked_up(h: Tensor) -> Tensor:
    """Numbers of rows of a batch."""
    return torch.arange(h.shape[0] - 1, -1, -1)


def some_tokens(h: Tensor) -> Tensor:
    """A mask of the first three tokens, with all their channels."""
    return (torch.arange(h.shape[1]) < 3)[:, None].expand(h.shape)


def chosen(h: Tensor) -> Tensor:
    """For every number of `h`, one of the first two rows."""
    return (h > 0).long()


network(
    "embedding",
    lambda: Net(lambda self, ids: self.b(self.e(ids)), e=nn.Embedding(31, 12), b=nn.Linear(12, 5)),
    lambda batch: (torch.arange(7 * batch).view(batch, 7) % 31,),
    12,
)
network(
    "embedding",
    lambda: Net(
        lambda self, x: self.b(self.e((x > 0).long().sum(-1))),
        e=nn.Embedding(10, 12),
        b=nn.Linear(12, 5),
    ),
    ROWS.inputs,
    12,
)


def bags(mode: str) -> nn.Module:
    """Bags of embeddings."""
    table = nn.EmbeddingBag(20, 12, mode=mode)
    return Net(lambda self, ids: self.b(self.e(ids)), e=table, b=nn.Linear(12, 5))


def bag_numbers(batch: int) -> tuple[Tensor, ...]:
    """Four numbers for every bag."""
    return (torch.arange(4 * batch).view(batch, 4) % 20,)


for mode in ("mean", "sum", "max"):
    network("_embedding_bag_forward_only", functools.partial(bags, mode), bag_numbers, 12)
network(
    "_embedding_bag",
    lambda: Net(
        lambda self, ids: self.b(A._embedding_bag(self.e.weight, ids.flatten(), 4 * torch.arange(len(ids)))[0]),
        e=nn.Embedding(20, 12),
        b=nn.Linear(12, 5),
    ),
    bag_numbers,
    12,
)
stays("embedding", ROWS, lambda h: F.embedding(chosen(h)[:, 0], h.t().contiguous())[:, :1] * h)
stays(
    "_embedding_bag_forward_only",
    ROWS,
    lambda h: F.embedding_bag(chosen(h), h.t().contiguous())[:, :1] * h,
)
passes("nonzero index", ROWS, lambda h: h[(torch.arange(len(h)) > 1).nonzero()[:, 0]])
passes("index_select", ROWS, lambda h: h.index_select(0, looked_up(h)))
stays("index_select", ROWS, lambda h: h.index_select(1, torch.arange(12).flip(0)))
stays("index_select", ROWS, lambda h: h.index_select(1, torch.tensor([3, 1, 0])))
passes("gather", ROWS, lambda h: h.gather(0, chosen(h)))
stays("gather", ROWS, lambda h: h.gather(1, chosen(h)))
passes("take_along_dim", ROWS, lambda h: h.take_along_dim(chosen(h), 0), below=True)
stays("gather", ROWS, lambda h: h.gather(0, (torch.arange(h.shape[1]) % 2)[None]))
stays(
    "gather",
    ROWS,
    lambda h: h.new_ones(h.shape[0], 2).cumsum(1).gather(1, chosen(h)).sum(1, keepdim=True),
)
stays("take_along_dim", ROWS, lambda h: h + h.take_along_dim(chosen(h[0]), None), below=True)
stays(
    "take_along_dim",
    ROWS,
    lambda h: h.take_along_dim((torch.arange(h.shape[1]) % 2)[None], 0),
    below=True,
)
passes(
    "take_along_dim",
    TEXT,
    lambda h: h.take_along_dim(torch.tensor([2, 0])[None, :, None], 1),
    below=True,
)
stays("take_along_dim", ROWS, lambda h: h.take_along_dim(chosen(h), 1), below=True)
passes("index", ROWS, lambda h: h[looked_up(h)])
passes("index", TEXT, lambda h: h[looked_up(h), 2])
passes("index", TEXT, lambda h: h[:, torch.tensor([2, 0, 5])])
passes("index", ROWS, lambda h: h[:, [0]] * h, 11)
stays("index", ROWS, lambda h: h[:, [0, 1, 2]])
stays("index", ROWS, lambda h: h[:, torch.tensor([3, 1, 0])])
passes("index", TEXT, lambda h: h[h.detach()[..., :1].flatten(1) * 0 == 0], 11)
stays("index", ROWS, lambda h: h[:, torch.tensor([True, False, True] * 4)])
passes("scatter", ROWS, lambda h: torch.zeros_like(h).scatter(0, chosen(h), h))
passes("scatter", ROWS, lambda h: h.scatter(0, chosen(h), 2.0))
stays("scatter", ROWS, lambda h: h.scatter(1, chosen(h)[:, :2], 2.0))
passes("scatter_", ROWS, lambda h: torch.zeros_like(h).scatter_(0, chosen(h), h.sin()))
stays("scatter_", ROWS, lambda h: torch.zeros_like(h).scatter_(1, chosen(h), h))
passes("scatter_add", ROWS, lambda h: torch.ones_like(h).scatter_add(0, chosen(h), h))
stays("scatter_add", ROWS, lambda h: torch.zeros_like(h).scatter_add(1, chosen(h), h))
passes("scatter_add_", ROWS, lambda h: torch.zeros_like(h).scatter_add_(0, chosen(h), h))
stays("scatter_add_", ROWS, lambda h: torch.zeros_like(h).scatter_add_(1, chosen(h), h))


def counted(name: str, h: Tensor) -> Tensor:
    """Values put into the first or the second of two places."""
    found: Tensor = getattr(A, name)(h.new_zeros(h.shape[0], 2), 1, chosen(h), h.cos())
    return found


for name in ("scatter", "scatter_", "scatter_add", "scatter_add_"):
    stays(name, ROWS, functools.partial(counted, name))
stays("index_add", ROWS, lambda h: h.new_zeros(h.shape[0], 2).index_add(1, chosen(h[0]), h.cos()))
refused(
    "index_put",
    ROWS,
    lambda h: h.new_zeros(2, 5).index_put((chosen(h[0]),), h.new_ones(1, 5), accumulate=True),
    5,
)
passes("scatter_reduce", ROWS, lambda h: torch.ones_like(h).scatter_reduce(0, chosen(h), h, "prod"))
stays("scatter_reduce", ROWS, lambda h: torch.ones_like(h).scatter_reduce(1, chosen(h), h, "mean"))
passes("index_add", ROWS, lambda h: torch.ones_like(h).index_add(0, looked_up(h), h))
stays("index_add", ROWS, lambda h: h.index_add(1, torch.tensor([2, 2]), h[:, :2]))
passes("index_add_", ROWS, lambda h: torch.ones_like(h).index_add_(0, looked_up(h), h))
stays("index_add_", ROWS, lambda h: h.sin().index_add_(1, torch.tensor([2, 2]), h[:, :2]))
passes("index_reduce", ROWS, lambda h: torch.ones_like(h).index_reduce(0, looked_up(h), h, "prod"))
stays("index_reduce", ROWS, lambda h: h.index_reduce(1, torch.tensor([2, 2]), h[:, :2], "amax"))
passes("index_put", ROWS, lambda h: torch.zeros_like(h).index_put((looked_up(h),), h))
passes("index_put", TEXT, lambda h: h.index_put((torch.tensor([0]), torch.tensor([3])), h[:1, 2] * 3))
stays("index_put", TEXT, lambda h: h.index_put((looked_up(h), looked_up(h), looked_up(h)), h[0, 0, 0]))
passes("_unsafe_index_put", ROWS, lambda h: A._unsafe_index_put(torch.zeros_like(h), [looked_up(h)], h))
passes(
    "masked_scatter",
    TEXT,
    lambda h: h.masked_scatter((h.shape[1] > torch.arange(7)[:, None]).expand(h.shape), h.sin()),
)
stays("masked_scatter", ROWS, lambda h: h.masked_scatter(h > 0, h.sin()))
passes(
    "masked_scatter_",
    TEXT,
    lambda h: h.clone().masked_scatter_((torch.arange(7) < 3)[:, None].expand(h.shape), h.sin()),
)
stays("masked_scatter_", ROWS, lambda h: h.clone().masked_scatter_(h > 0, h.sin()))
stays("masked_select", ROWS, lambda h: h.masked_select(h > 0).sum() + h)
stays("nonzero", ROWS, lambda h: h[:1] + h[0].nonzero().sum())
passes(
    "segment_reduce",
    ROWS,
    lambda h: torch.segment_reduce(h, "sum", lengths=torch.tensor([1, h.shape[0] - 1])),
)
stays(
    "segment_reduce",
    ROWS,
    lambda h: torch.segment_reduce(h.t().contiguous(), "max", lengths=torch.tensor([4, 8])).t(),
)

# -- convolutions and images -------------------------------------------------------------------------------------------

layer("convolution", IMAGES, lambda: nn.Conv2d(12, 8, 3, stride=2), 8, 12)
layer("convolution", IMAGES, lambda: nn.Conv2d(12, 12, 3, groups=12), 12)
layer("convolution", IMAGES, lambda: nn.Conv2d(12, 8, 3, groups=4), 4, whole=True)
layer("convolution", SOUND, lambda: nn.ConvTranspose1d(12, 8, 3, stride=2), 8, 12)
layer("convolution", IMAGES, lambda: nn.ConvTranspose2d(12, 8, 3, groups=4), 4)
layer("convolution", VOLUMES, lambda: nn.Conv3d(12, 8, 2, bias=False), 8, 12)
stays("convolution", ROWS, lambda h: F.conv1d(h[:, None], h.new_ones(1, 1, 3)).squeeze(1))


def padded(widths: tuple[int, ...], mode: str, h: Tensor) -> Tensor:
    """Positions before and after others."""
    return F.pad(h, widths, mode)


def twice_as_large(mode: str, h: Tensor) -> Tensor:
    """Twice as many positions along every axis of an image."""
    return F.interpolate(h, scale_factor=2, mode=mode)


POOLS = {
    "avg_pool": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "max_pool": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "adaptive_avg_pool": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "adaptive_max_pool": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INTERPOLATIONS = ("linear", "bilinear", "trilinear")

for rank, shell in ((1, SOUND), (2, IMAGES), (3, VOLUMES)):
    around = (1, 1) * rank
    passes(f"reflection_pad{rank}d", shell, functools.partial(padded, around, "reflect"))
    passes(f"replication_pad{rank}d", shell, functools.partial(padded, around, "replicate"))
    passes("constant_pad_nd", shell, functools.partial(padded, (0, 0) * rank + (1, 2), "constant"))
    passes(f"upsample_nearest{rank}d", shell, functools.partial(twice_as_large, "nearest"))
    passes(f"_upsample_nearest_exact{rank}d", shell, functools.partial(twice_as_large, "nearest-exact"))
    mode = INTERPOLATIONS[rank - 1]
    passes(f"upsample_{mode}{rank}d", shell, functools.partial(twice_as_large, mode))
    for name, kinds in POOLS.items():
        layer(f"{name}{rank}d", shell, functools.partial(kinds[rank - 1], 2), 12, below=True)
    layer("native_batch_norm", shell, functools.partial(NORMS[rank - 1], 12), 12)
stays("reflection_pad1d", TEXT, lambda h: F.pad(h, (1, 1), "reflect"))
stays("avg_pool1d", TEXT, lambda h: F.avg_pool1d(h, 2), below=True)
stays("upsample_nearest1d", TEXT, lambda h: F.interpolate(h, scale_factor=2))
passes("upsample_bicubic2d", IMAGES, lambda h: F.interpolate(h, scale_factor=2, mode="bicubic"))
passes(
    "_upsample_bicubic2d_aa",
    IMAGES,
    lambda h: F.interpolate(h, size=(5, 4), mode="bicubic", antialias=True),
)
passes(
    "_upsample_bilinear2d_aa",
    IMAGES,
    lambda h: F.interpolate(h, size=(5, 4), mode="bilinear", antialias=True),
)
passes("_adaptive_avg_pool2d", IMAGES, nn.AdaptiveAvgPool2d(3))
passes("_adaptive_avg_pool3d", VOLUMES, nn.AdaptiveAvgPool3d(3))
passes("max_pool2d_with_indices", IMAGES, nn.MaxPool2d(2))
passes("max_pool3d_with_indices", VOLUMES, nn.MaxPool3d(2))
passes(
    "fractional_max_pool2d",
    IMAGES,
    lambda h: A.fractional_max_pool2d(h, [2, 2], [4, 4], h.new_full((*h.shape[:2], 2), 0.5))[0],
)
passes(
    "fractional_max_pool3d",
    VOLUMES,
    lambda h: A.fractional_max_pool3d(h, [2, 2, 2], [2, 2, 2], h.new_full((*h.shape[:2], 3), 0.5))[0],
)
stays(
    "fractional_max_pool2d",
    IMAGES,
    lambda h: A.fractional_max_pool2d(h.transpose(1, 3), [2, 2], [4, 4], h.new_full((h.shape[0], 8, 2), 0.5))[0].transpose(1, 3),
)
refused("constant_pad_nd", ROWS, lambda h: F.pad(h, (-4, 0)), 4, 8)
refused("constant_pad_nd", ROWS, lambda h: F.pad(h, (0, 16 - h.shape[1])), 12)
passes("constant_pad_nd", IMAGES, lambda h: F.pad(h, (1, 2, 3, 0)))
passes("constant_pad_nd", TEXT, lambda h: F.pad(h, (2, 3), value=0.5))
passes("pad", IMAGES, lambda h: A.pad(h, (1, 2)), below=True)
passes("pad", TEXT, lambda h: A.pad(h, (0, 0, -1, 2)), below=True)
passes("pad", SOUND, lambda h: A.pad(h, (1, 1), "reflect"), below=True)
stays("pad", TEXT, lambda h: A.pad(h, (1, 1), "reflect"), below=True)
stays("pad", TEXT, lambda h: A.pad(h, (1, 1), "circular"), below=True)
layer("batch_norm", IMAGES, lambda: nn.BatchNorm2d(12), 12, below=True)
layer("batch_norm", ROWS, lambda: nn.BatchNorm1d(12, affine=False), 12, below=True)
passes(
    "_native_batch_norm_legit_no_training",
    IMAGES,
    lambda h: A._native_batch_norm_legit_no_training(
        h, None, None, h.detach().mean((0, 2, 3)), h.detach().var((0, 2, 3)), 0.1, 1e-5
    )[0],
)
layer(
    "_native_batch_norm_legit",
    ROWS,
    lambda: Net(
        lambda self, h: A._native_batch_norm_legit(
            h, self.n.weight, self.n.bias, self.n.running_mean, self.n.running_var, False, 0.1, 1e-5
        )[0],
        n=nn.BatchNorm1d(12),
    ),
    12,
)
layer(
    "_native_batch_norm_legit",
    ROWS,
    lambda: Net(
        lambda self, h: A._native_batch_norm_legit.no_stats(h, self.n.weight, self.n.bias, True, 0.1, 1e-5)[0],
        n=nn.BatchNorm1d(12),
    ),
    12,
)
layer(
    "_native_batch_norm_legit_no_training",
    ROWS,
    lambda: Net(
        lambda self, h: A._native_batch_norm_legit_no_training(
            h, self.n.weight, self.n.bias, self.n.running_mean, self.n.running_var, 0.1, 1e-5
        )[0],
        n=nn.BatchNorm1d(12),
    ),
    12,
)
stays("native_batch_norm", TEXT, lambda h: F.batch_norm(h, None, None, training=True))
stays("native_group_norm", IMAGES, lambda h: F.group_norm(h, 1))
layer("native_group_norm", IMAGES, lambda: nn.GroupNorm(1, 12), 12)
layer("native_group_norm", IMAGES, lambda: nn.GroupNorm(4, 12), 4)
layer("native_group_norm", IMAGES, lambda: nn.GroupNorm(12, 12), 12)
passes("pixel_shuffle", IMAGES, nn.PixelShuffle(2), 3, below=True)
passes("pixel_unshuffle", IMAGES, nn.PixelUnshuffle(2), below=True)
stays(
    "pixel_shuffle",
    IMAGES,
    lambda h: F.pixel_shuffle(h.transpose(1, 3), 2).transpose(1, 3),
    below=True,
)
stays(
    "pixel_unshuffle",
    IMAGES,
    lambda h: F.pixel_unshuffle(h.transpose(1, 3), 2).transpose(1, 3),
    below=True,
)
passes("col2im", SOUND, lambda h: F.fold(h[..., :9], (6, 6), 2, stride=2).flatten(2), 3)
passes("im2col col2im", IMAGES, lambda h: F.fold(F.unfold(h, 2, stride=2), (8, 8), 2, stride=2))
passes("im2col", IMAGES, lambda h: F.unfold(h, 3).unsqueeze(-1))
passes("unfold", IMAGES, lambda h: h.unfold(2, 3, 2).sum(-1))
stays("unfold", ROWS, lambda h: h.unfold(1, 3, 2).mean(-1))
passes("native_channel_shuffle", IMAGES, lambda h: A.native_channel_shuffle(h, h.shape[1] // 3), 4)
stays("native_channel_shuffle", IMAGES, lambda h: A.native_channel_shuffle(in_threes(h), 3))
layer("channel_shuffle", IMAGES, lambda: nn.ChannelShuffle(4), 4, below=True)
passes(
    "linalg_solve_triangular",
    IMAGES,
    lambda h: torch.linalg.solve_triangular(h.triu() + 9 * torch.eye(8), h, upper=True),
)
stays(
    "linalg_solve_triangular",
    ROWS,
    lambda h: torch.linalg.solve_triangular((h.t() @ h).triu() + torch.eye(12), h.t(), upper=True).t(),
)
stays(
    "linalg_solve_triangular",
    ROWS,
    lambda h: torch.linalg.solve_triangular(h.new_ones(12, 12).tril(), h, upper=False, left=False),
)
stays(
    "linalg_solve_triangular",
    ROWS,
    lambda h: torch.linalg.solve_triangular(h.new_ones(h.shape[1], h.shape[1]).tril(), h, upper=False, left=False),
)
stays(
    "linalg_solve_triangular",
    ROWS,
    lambda h: torch.linalg.solve_triangular(h.new_ones(2, h.shape[0], h.shape[0]).tril(), h[None], upper=False),
)
passes("linalg_inv_ex", IMAGES, lambda h: A.linalg_inv_ex(h + 9 * torch.eye(8))[0])
stays("linalg_inv_ex", ROWS, lambda h: h @ A.linalg_inv_ex(h.t() @ h + torch.eye(12))[0])
passes("triangular_solve", IMAGES, lambda h: A.triangular_solve(h, h.triu() + 9 * torch.eye(8))[0])
stays(
    "triangular_solve",
    ROWS,
    lambda h: A.triangular_solve(h.t(), (h.t() @ h).triu() + torch.eye(12))[0].t(),
)


def a_grid(rank: int, h: Tensor) -> Tensor:
    """Where to look in an image or a volume."""
    identity = torch.eye(rank, rank + 1, dtype=h.dtype).expand(h.shape[0], -1, -1)
    return F.affine_grid(identity, list(h.shape), align_corners=False)


def unpooled(rank: int, h: Tensor, other: Tensor | None = None) -> Tensor:
    """An image, or a volume, pooled and spread out again to where the largest were, or those of another."""
    pool, unpool = (F.max_pool2d, F.max_unpool2d) if rank == 2 else (F.max_pool3d, F.max_unpool3d)
    _, places = pool(h if other is None else other, 2, return_indices=True)
    found: Tensor = unpool(pool(h, 2), places, (2,) * rank)
    return found


passes(
    "grid_sampler_2d affine_grid_generator",
    IMAGES,
    lambda h: F.grid_sample(h, a_grid(2, h), align_corners=False),
)
passes(
    "grid_sampler_3d affine_grid_generator",
    VOLUMES,
    lambda h: F.grid_sample(h, a_grid(3, h), align_corners=False),
)
stays(
    "grid_sampler_2d",
    IMAGES,
    lambda h: F.grid_sample(h.transpose(1, 3), a_grid(2, h.transpose(1, 3)), align_corners=False).transpose(1, 3),
)
stays(
    "affine_grid_generator",
    ROWS,
    lambda h: h * F.affine_grid(h[:, :6].view(-1, 2, 3), [h.shape[0], 1, 2, 2], align_corners=False).flatten(1)[:, :1],
    6,
)
stays("max_unpool2d", IMAGES, lambda h: unpooled(2, h.transpose(1, 3)).transpose(1, 3))
passes("max_unpool2d", IMAGES, lambda h: unpooled(2, h))
passes("max_unpool3d", VOLUMES, lambda h: unpooled(3, h))
passes("_fft_r2c _fft_c2r", IMAGES, lambda h: torch.fft.irfft2(torch.fft.rfft2(h) * 2, s=h.shape[2:]))
passes("_fft_c2c", IMAGES, lambda h: torch.fft.fft2(h).abs())
stays("_fft_r2c _fft_c2r", ROWS, lambda h: torch.fft.irfft(torch.fft.rfft(h)))
stays("_fft_c2c", ROWS, lambda h: torch.fft.fft(torch.fft.fft(h)).real)
passes("unfold_backward", SOUND, lambda h: A.unfold_backward(h.unfold(2, 4, 2), h.shape, 2, 4, 2))
stays("unfold_backward", ROWS, lambda h: A.unfold_backward(h.unfold(1, 4, 2), h.shape, 1, 4, 2))
passes(
    "as_strided",
    TEXT,
    lambda h: h.as_strided((h.shape[0], 5, 3, h.shape[2]), (*h.stride()[:2], *h.stride()[1:])).mean(2),
)
stays("as_strided", ROWS, lambda h: h.as_strided((h.shape[0], 4, 3), (h.shape[1], 2, 1)).flatten(1))
passes(
    "as_strided_copy",
    TEXT,
    lambda h: A.as_strided_copy(h, (h.shape[0], 5, 3, h.shape[2]), (*h.stride()[:2], *h.stride()[1:])).mean(2),
)
stays(
    "as_strided_copy",
    ROWS,
    lambda h: A.as_strided_copy(h, (h.shape[0], 4, 3), (h.shape[1], 2, 1)).flatten(1),
)
stays(
    "_weight_norm_interface",
    ROWS,
    lambda h: A._weight_norm_interface(h.cos(), h.new_ones(h.shape[0], 1))[0],
)
network(
    "_weight_norm_interface",
    lambda: nn.Sequential(
        nn.Conv1d(3, 12, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(12, 8, 3)),
        nn.Conv1d(8, 5, 1),
    ),
    SOUND.inputs,
    8,
    12,
)

# -- statistics over an axis -------------------------------------------------------------------------------------------


def reduced(name: str, dim: int, h: Tensor) -> Tensor:
    """A statistic of one axis that is not zero where all of its positions are."""
    found: Any = getattr(h.cos(), name)(dim, keepdim=True)
    return (found if isinstance(found, Tensor) else found[0]).double() * h


REDUCTIONS = "mean var std sum amin amax any all prod logsumexp argmin argmax min max"

for name in REDUCTIONS.split():
    passes(name, TEXT, functools.partial(reduced, name, 1))
    stays(name, TEXT, functools.partial(reduced, name, -1))
passes("sum", TEXT, lambda h: h.sum(-1, keepdim=True) * h)
passes("linalg_vector_norm", TEXT, lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True) * h)
stays(
    "linalg_vector_norm",
    TEXT,
    lambda h: torch.linalg.vector_norm(h.cos(), dim=-1, keepdim=True) * h,
)
stays(
    "linalg_vector_norm",
    TEXT,
    lambda h: torch.linalg.vector_norm(h, ord=-1, dim=-1, keepdim=True) * h,
)
stays(
    "linalg_vector_norm",
    TEXT,
    lambda h: torch.linalg.vector_norm(h, ord=0, dim=-1, keepdim=True) * h,
)
passes("norm", TEXT, lambda h: A.norm(h, 2, [-1], True) * h)
stays("norm", TEXT, lambda h: A.norm(h.cos(), 2, [-1], True) * h)
passes("norm", ROWS, lambda h: A.norm(h) * h)
passes("norm", ROWS, lambda h: A.norm(h, 3) * h)
passes("var_mean", TEXT, lambda h: torch.var_mean(h, 1, keepdim=True)[0] * h)
stays("var_mean", TEXT, lambda h: torch.var_mean(h, -1, keepdim=True)[1] * h)
stays("var", TEXT, lambda h: h.var(False) * h, below=True)
stays("std", TEXT, lambda h: h.std(True) * h, below=True)
stays("var_mean", TEXT, lambda h: torch.var_mean(h, True)[0] * h, below=True)
stays("max", TEXT, lambda h: h.max() * h)
stays("min", TEXT, lambda h: h.min() * h)


def routed(pick: Callable[[Tensor], tuple[Tensor, Tensor]]) -> nn.Module:
    """Six experts, of whom some are picked for every row, by weights that they get."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weights, numbers = pick(self.router(x).softmax(-1))
        table: Tensor = self.experts.weight[numbers]
        found: Tensor = self.last((table * weights[..., None]).sum(-2))
        return found

    return Net(forward, router=nn.Linear(9, 6), experts=nn.Embedding(6, 12), last=nn.Linear(12, 5))


def unlike(number: int, weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that are zero for one of the experts."""
    return weights * ~(numbers == number), numbers


def instead(number: int, weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The first expert in the place of one of the others."""
    return weights, numbers.masked_fill(numbers == number, 0)


network("topk", lambda: routed(lambda scores: scores.topk(2)), ROWS.inputs, 6, 12)
network("topk", lambda: routed(lambda scores: scores.topk(2, largest=False)), ROWS.inputs, 12)
network("max", lambda: routed(lambda scores: scores.max(-1, keepdim=True)), ROWS.inputs, 6, 12)
network("min", lambda: routed(lambda scores: scores.min(-1, keepdim=True)), ROWS.inputs, 12)
network(
    "topk eq",
    lambda: routed(lambda scores: unlike(1, *scores.topk(2))),
    ROWS.inputs,
    4,
    12,
    whole=True,
)
network(
    "topk eq",
    lambda: routed(lambda scores: unlike(9, *scores.topk(2))),
    ROWS.inputs,
    12,
    whole=True,
)
network(
    "topk masked_fill",
    lambda: routed(lambda scores: instead(scores.shape[-1] - 1, *scores.topk(2))),
    ROWS.inputs,
    4,
    12,
    whole=True,
)
network(
    "topk masked_fill",
    lambda: routed(lambda scores: instead(4, *scores.topk(2))),
    ROWS.inputs,
    12,
    whole=True,
)
passes("topk", TEXT, lambda h: h.topk(3, 1)[0])
stays("topk", TEXT, lambda h: h.topk(3, -1)[0])
stays("topk", TEXT, lambda h: h.topk(3, -1, largest=False)[0])
passes("_softmax", TEXT, lambda h: h.softmax(1))
stays("_softmax", TEXT, lambda h: h.softmax(-1))
passes("softmax", TEXT, lambda h: h.softmax(1), below=True)
stays("softmax", TEXT, lambda h: h.softmax(-1), below=True)
passes("_safe_softmax", TEXT, lambda h: A._safe_softmax(h, 1))
stays("_safe_softmax", TEXT, lambda h: A._safe_softmax(h, -1))
for name in ("cumsum", "cumprod", "sort", "roll", "flip", "log_softmax"):
    met = "_log_softmax" if name == "log_softmax" else name

    def run(h: Tensor, dim: int, name: str = name) -> Tensor:
        """An operator in which the positions of one axis see each other."""
        if name == "roll":
            return h.roll(1, dim)
        found = getattr(h, name)([dim] if name == "flip" else dim)
        return found[0] if name == "sort" else found

    passes(met, TEXT, functools.partial(run, dim=1))
    stays(met, TEXT, functools.partial(run, dim=-1))
stays("roll", ROWS, lambda h: h.roll(3))
stays("sort", ROWS, lambda h: h.sort(stable=True)[0])
passes("tril triu", IMAGES, lambda h: h.tril() + h.triu(1).sin())
stays("tril", ROWS, torch.tril)
stays("triu", ROWS, torch.triu)


class FusedNorm(nn.RMSNorm):
    """The norm as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised tensor."""
        found: Tensor = A._fused_rms_norm(x, list(x.shape[-1:]), self.weight, 1e-5)[0]
        return found


layer("native_layer_norm", TEXT, lambda: nn.LayerNorm(12), 12)
layer("native_layer_norm", TEXT, lambda: nn.LayerNorm(12, elementwise_affine=False), 12)
stays("native_layer_norm", TEXT, lambda h: F.layer_norm(h, h.shape[-1:]))
passes("native_layer_norm", IMAGES, lambda h: F.layer_norm(h, h.shape[2:]))
layer("_fused_rms_norm", TEXT, lambda: FusedNorm(12), 12, below=True)
layer("rms_norm", TEXT, lambda: nn.RMSNorm(12), 12, below=True)

# -- what comes from two layers ----------------------------------------------------------------------------------------

joins("add", TEXT, torch.add)
joins("addcmul", ROWS, lambda h, k: torch.addcmul(h, k, k))
joins("where", ROWS, lambda h, k: torch.where(k > 0, h, 0.1 * h))
joins("max", ROWS, torch.max, below=True)
joins("min", ROWS, torch.min, below=True)
joins("polar view_as_real", ROWS, lambda h, k: torch.view_as_real(torch.polar(h.abs(), k)).sum(-1))
joins("complex view_as_real", ROWS, lambda h, k: torch.view_as_real(torch.complex(h, k)).prod(-1))
joins("copy", ROWS, lambda h, k: A.copy(h, k))
joins("copy_", ROWS, lambda h, k: h.clone().copy_(k) * h)
joins("masked_fill", ROWS, lambda h, k: h.masked_fill(k > 0, 2.0))
joins("masked_fill_", ROWS, lambda h, k: h.clone().masked_fill_(k > 0, 2.0))
joins("eq", ROWS, lambda h, k: (h.round() == k.round()).double())
joins("glu", ROWS, lambda h, k: F.glu(torch.cat([h, k], 1)))
joins("cat", TEXT, lambda h, k: torch.cat([h, k], 1))
joins("concatenate", TEXT, lambda h, k: torch.concatenate([h, k], 1), below=True)
joins("stack", ROWS, lambda h, k: torch.stack([h, k], 1))
joins("cat split", ROWS, lambda h, k: torch.mul(*torch.cat([h, k], 1).split(h.shape[1], 1)))
joins("expand_as", ROWS, lambda h, k: h[:, None].expand_as(k[:, None]) * k[:, None], below=True)
passes("split", ROWS, lambda h: torch.cat(h.split(h.shape[1] // 3, 1)[::-1], 1), 4)
passes("chunk", ROWS, lambda h: torch.cat(h.chunk(3, 1)[::-1], 1), 4, below=True)
passes("tensor_split", ROWS, lambda h: torch.cat(h.tensor_split(3, 1)[::-1], 1), 4, below=True)
passes("unsafe_split", ROWS, lambda h: torch.cat(torch.unsafe_split(h, h.shape[1] // 3, 1), 1), 4)
joins("mm", ROWS, lambda h, k: h @ k.t() @ h)
joins("bmm", TEXT, lambda h, k: torch.bmm(h, k.mT))
joins("addmm", ROWS, lambda h, k: torch.addmm(h, h @ h.t(), k))
joins("baddbmm", TEXT, lambda h, k: torch.baddbmm(h, torch.bmm(h, h.mT), k))
joins("linear", ROWS, lambda h, k: F.linear(h, k)[:, :1] * h, below=True)
joins("mv", ROWS, lambda h, k: torch.mv(h, k[0])[:, None] * h)
joins("dot", ROWS, lambda h, k: torch.dot(h[0], k[0]) * h)
joins("vdot", ROWS, lambda h, k: torch.vdot(h[0], k[0]) * h)
joins("_trilinear", ROWS, lambda h, k: A._trilinear(h, k, k, [], [], [], [1])[:, None] * h)
joins("gather", ROWS, lambda h, k: h.gather(0, chosen(k)))
joins("take_along_dim", ROWS, lambda h, k: h.take_along_dim(chosen(k), 0), below=True)
joins("scatter", ROWS, lambda h, k: h.scatter(0, chosen(k), k))
joins("scatter_", ROWS, lambda h, k: h.sin().scatter_(0, chosen(h), k))
joins("scatter_add", ROWS, lambda h, k: h.scatter_add(0, chosen(h), k))
joins("scatter_add_", ROWS, lambda h, k: h.sin().scatter_add_(0, chosen(k), h))
joins("scatter_reduce", ROWS, lambda h, k: h.scatter_reduce(0, chosen(h), k, "mean"))
joins("index_add", ROWS, lambda h, k: h.index_add(0, looked_up(h), k))
joins("index_add_", ROWS, lambda h, k: h.sin().index_add_(0, looked_up(h), k))
joins("index_reduce", ROWS, lambda h, k: h.index_reduce(0, looked_up(h), k, "prod"))
joins("index_put", ROWS, lambda h, k: h.index_put((looked_up(h),), k))
joins("_unsafe_index_put", ROWS, lambda h, k: A._unsafe_index_put(h, [looked_up(h)], k))
joins("masked_scatter", TEXT, lambda h, k: h.masked_scatter(h[..., :1] > 9, k), 11)
joins("masked_scatter_", TEXT, lambda h, k: h.sin().masked_scatter_(some_tokens(h), k))
joins(
    "fractional_max_pool2d",
    IMAGES,
    lambda h, k: A.fractional_max_pool2d(h, [2, 2], [4, 4], k.detach().mean(3)[..., :2].sigmoid())[0],
)
joins(
    "max_unpool2d",
    IMAGES,
    lambda h, k: unpooled(2, h, k),
)
joins(
    "max_unpool3d",
    VOLUMES,
    lambda h, k: unpooled(3, h, k),
)
joins(
    "linalg_solve_triangular",
    IMAGES,
    lambda h, k: torch.linalg.solve_triangular(h.triu() + 9 * torch.eye(8), k, upper=True),
)
joins("triangular_solve", IMAGES, lambda h, k: A.triangular_solve(k, h.triu() + 9 * torch.eye(8))[0])
