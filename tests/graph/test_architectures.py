"""Networks drawn at random from what decoders are made of: a cut one computes what the masked one computes, or is refused."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import resect
from resect.errors import ModelError
from resect.graph import Graph
from resect.plan import Plan
from tests.models import random_plan

STREAM, WORDS, LONGEST = 24, 31, 16


@dataclass(frozen=True)
class Architecture:
    """What a decoder is made of."""

    depth: int = 2
    heads: int = 4
    groups: int = 2
    """Heads of keys and values."""
    width: int = 6
    """Of one head."""
    qkv: Literal["separate", "chunk", "split", "interleaved"] = "separate"
    sizes: Literal["attribute", "inferred", "mapping"] = "attribute"
    """Where the code has the number of heads from."""
    attention: Literal["kernel", "products", "einsum"] = "kernel"
    positions: Literal["none", "learned", "rotary"] = "none"
    norm: Literal["layer", "rms", "written", "none"] = "rms"
    place: Literal["before", "after", "beside", "around"] = "before"
    mlp: Literal["plain", "gated", "fused", "alternating", "experts", "stacked"] = "plain"
    query_norm: bool = False
    scaled: bool = False
    """Whether what a sub-layer adds is scaled, channel by channel."""
    skips: bool = False
    """Whether the last block reads what the first took in, too."""
    shared: bool = False
    """Whether all blocks are one."""
    bias: bool = False
    tied: bool = False


class Written(nn.Module):
    """A root-mean-square norm as code of one's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def norm_of(kind: str, width: int = STREAM) -> nn.Module:
    made: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written": Written}
    return made[kind](width) if kind in made else nn.Identity()


class Attention(nn.Module):
    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.made, inner, keys = made, made.heads * made.width, made.groups * made.width
        if made.sizes == "mapping":
            self.numbers = {"heads": made.heads, "groups": made.groups}
        else:
            self.heads, self.groups = made.heads, made.groups
        self.width = made.width
        if made.qkv == "separate":
            self.q, self.k, self.v = (nn.Linear(STREAM, size, bias=made.bias) for size in (inner, keys, keys))
        else:
            self.qkv = nn.Linear(STREAM, inner + 2 * keys, bias=made.bias)
        if made.query_norm:
            self.query_norm, self.key_norm = nn.RMSNorm(made.width), nn.RMSNorm(made.width)
        self.out = nn.Linear(inner, STREAM, bias=made.bias)

    def number(self, name: str) -> int:
        found: int = self.numbers[name] if self.made.sizes == "mapping" else getattr(self, name)
        return found

    def split(self, x: Tensor, name: str) -> Tensor:
        """[batch, heads, tokens, width]."""
        shape = (-1, self.width) if self.made.sizes == "inferred" else (self.number(name), -1)
        return x.unflatten(-1, shape).transpose(1, 2)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.made.qkv == "separate":
            return self.split(self.q(x), "heads"), self.split(self.k(x), "groups"), self.split(self.v(x), "groups")
        mixed = self.qkv(x)
        if self.made.qkv == "interleaved":
            heads = -1 if self.made.sizes == "inferred" else self.number("heads")
            return mixed.view(*x.shape[:2], heads, 3, self.width).permute(3, 0, 2, 1, 4).unbind(0)
        if self.made.qkv == "chunk":
            parts = mixed.chunk(3, -1)
        else:
            heads, groups = self.number("heads"), self.number("groups")
            parts = mixed.split([heads * self.width, groups * self.width, groups * self.width], -1)
        return tuple(self.split(part, name) for part, name in zip(parts, ("heads", "groups", "groups"), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        if self.made.query_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.made.positions == "rotary":
            q, k = rotated(q), rotated(k)
        if self.made.attention == "kernel":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            if self.made.attention == "einsum":
                scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.width**-0.5
                mixed = torch.einsum("bhij,bhjd->bhid", scores.masked_fill(hidden, -1e9).softmax(-1), v)
            else:
                scores = q @ k.mT * self.width**-0.5
                mixed = scores.masked_fill(hidden, -1e9).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def rotated(x: Tensor) -> Tensor:
    """[batch, heads, tokens, width] turned by its positions, half against half."""
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[2])[:, None] * 0.3 ** torch.arange(half)
    first, second = x.chunk(2, -1)
    return torch.cat([first * turns.cos() - second * turns.sin(), second * turns.cos() + first * turns.sin()], -1)


class MLP(nn.Module):
    def __init__(self, made: Architecture, inner: int = 20) -> None:
        super().__init__()
        self.kind = made.mlp
        wide = 2 * inner if made.mlp in ("fused", "alternating") else inner
        self.up, self.down = nn.Linear(STREAM, wide, bias=made.bias), nn.Linear(inner, STREAM, bias=made.bias)
        if made.mlp == "gated":
            self.gate = nn.Linear(STREAM, inner, bias=made.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.kind == "gated":
            inner = F.silu(self.gate(x)) * inner
        elif self.kind == "fused":
            gate, inner = inner.chunk(2, -1)
            inner = F.silu(gate) * inner
        elif self.kind == "alternating":
            inner = F.silu(inner[..., ::2]) * inner[..., 1::2]
        else:
            inner = F.gelu(inner)
        out: Tensor = self.down(inner)
        return out


class Experts(nn.Module):
    """All of them, weighted by a gate; a list of modules, or two tensors."""

    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.gate, self.stacked = nn.Linear(STREAM, 3, bias=False), made.mlp == "stacked"
        if self.stacked:
            self.up, self.down = nn.Parameter(torch.randn(3, STREAM, 14) / 5), nn.Parameter(torch.randn(3, 14, STREAM) / 5)
        else:
            self.experts = nn.ModuleList(MLP(replace(made, mlp="plain"), 14) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        if self.stacked:
            inner = F.gelu(torch.einsum("btc,ecd->betd", x, self.up))
            return torch.einsum("betd,edc,bte->btc", inner, self.down, weights)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + weights[..., number : number + 1] * expert(x)
        return out


class Block(nn.Module):
    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.place = made.place
        self.attention = Attention(made)
        self.mlp = Experts(made) if made.mlp in ("experts", "stacked") else MLP(made)
        self.norms = nn.ModuleList(norm_of(made.norm) for _ in range(4 if made.place == "around" else 2))
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(STREAM) + 0.5) for _ in range(2 * made.scaled))

    def scale(self, x: Tensor, number: int) -> Tensor:
        return x * self.scales[number] if len(self.scales) else x

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "beside":
            inner = self.norms[0](x)
            return x + self.scale(self.attention(inner), 0) + self.scale(self.mlp(inner), 1)
        for number, part in enumerate((self.attention, self.mlp)):
            if self.place == "after":
                x = self.norms[number](x + self.scale(part(x), number))
            elif self.place == "around":
                x = x + self.scale(self.norms[2 + number](part(self.norms[number](x))), number)
            else:
                x = x + self.scale(part(self.norms[number](x)), number)
        return x


class Decoder(nn.Module):
    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.made = made
        self.embedding = nn.Embedding(WORDS, STREAM)
        self.positions = nn.Embedding(LONGEST, STREAM) if made.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(made) for _ in range(1 if made.shared else made.depth))
        self.join = nn.Linear(2 * STREAM, STREAM) if made.skips else None
        self.norm, self.head = norm_of(made.norm), nn.Linear(STREAM, WORDS, bias=False)
        if made.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = start = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1]))
        for block in [self.blocks[0]] * self.made.depth if self.made.shared else self.blocks:
            x = block(x)
        if self.join is not None:
            x = self.join(torch.cat([x, start], -1))
        out: Tensor = self.head(self.norm(x))
        return out


def built(made: Architecture, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(made).double().eval()
    for parameter in model.parameters():  # norms and biases that are not one and zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def possible(made: Architecture) -> Architecture:
    """The same, without what excludes something else."""
    if made.heads % made.groups:
        made = replace(made, groups=1)
    if made.qkv in ("chunk", "interleaved"):
        made = replace(made, groups=made.heads)
    return replace(made, sizes="attribute") if made.qkv == "split" and made.sizes == "inferred" else made


def words(batch: int = 2, length: int = 7) -> Tensor:
    return torch.arange(batch * length).view(batch, length) * 5 % WORDS


def computed(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids)
    return found


def agrees(model: Decoder, graph: Graph, plan: Plan) -> str:
    """Whether a plan was cut, and cut rightly: `cut`, or why it was refused."""
    try:
        small = resect.cut(copy.deepcopy(model), plan, graph)
    except ModelError as problem:
        return str(problem)
    removed = {name: kept.units - len(kept.keep) for name, kept in plan.groups.items()}
    assert sum(parameter.numel() for parameter in small.parameters()) == graph.parameter_count(removed)
    for training in (False, True):
        for ids in (words(), words(3, 11)):
            with resect.masked(model.train(training), plan, graph):
                expected = computed(model, ids)
            torch.testing.assert_close(computed(small.train(training), ids), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(computed(copy.deepcopy(small), words()), computed(small, words()))
    return "cut"


def outcomes(made: Architecture, seed: int) -> Counter[str]:
    """What became of random plans of each kind, and of all at once."""
    model = built(made, seed)
    before = copy.deepcopy(model.state_dict())
    graph = resect.trace(model, (words(),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kinds = sorted({group.kind for group in graph.groups} - {"vocabulary"})
    found = Counter[str]()
    for chosen in ([kind] for kind in kinds):
        plan = random_plan(graph, seed, uniform=False, kinds=chosen)
        found[f"{chosen[0]}: {agrees(model, graph, plan)}"] += any(kept.removed for kept in plan.groups.values())
    found[f"all: {agrees(model, graph, random_plan(graph, seed + 1, uniform=False, kinds=kinds))}"] += 1
    return +found


SIZES = {
    "depth": st.integers(1, 3),
    "heads": st.integers(1, 4),
    "groups": st.integers(1, 4),
    "width": st.sampled_from((4, 6, 8)),
}
# A field with a default is drawn only where it is named.
CHOICES: dict[str, Any] = {field.name: ... for field in fields(Architecture) if field.name not in SIZES}
DRAWN = st.builds(Architecture, **SIZES, **CHOICES)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(made=DRAWN, seed=st.integers(0, 99))
def test_whatever_is_cut_is_cut_rightly(made: Architecture, seed: int) -> None:
    for outcome in outcomes(possible(made), seed):
        event(outcome if outcome.endswith("cut") else outcome.partition(":")[0] + ": refused")


ORDINARY = {
    "llama": Architecture(positions="rotary", mlp="gated", groups=2),
    "gpt2": Architecture(qkv="chunk", groups=4, norm="layer", positions="learned", bias=True, tied=True),
    "falcon": Architecture(qkv="split", groups=1, norm="layer", place="beside", positions="rotary"),
    "gemma": Architecture(place="around", mlp="gated", tied=True, query_norm=True, positions="rotary"),
    "bloom": Architecture(qkv="interleaved", groups=4, norm="layer", bias=True, attention="products"),
    "phi3": Architecture(qkv="split", groups=2, mlp="fused", positions="rotary"),
    "bert": Architecture(place="after", norm="layer", bias=True, positions="learned", groups=4, attention="products"),
    "cait": Architecture(scaled=True, norm="layer", qkv="chunk", groups=4, attention="einsum", sizes="mapping"),
    "mixture": Architecture(mlp="experts", sizes="mapping"),
    "mixture in tensors": Architecture(mlp="stacked", groups=4),
    "skips": Architecture(skips=True, depth=3),
    "one block three times": Architecture(shared=True, depth=3),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_the_ordinary_is_cut(name: str) -> None:
    made = possible(ORDINARY[name])
    found = outcomes(made, 1)
    kinds = {outcome.partition(":")[0] for outcome in found}
    assert {"channels", "heads", "all"} <= kinds
    assert [outcome for outcome in found if not outcome.endswith(": cut")] == []
