"""Networks drawn at random from what decoders are made of: a cut one computes what the masked one computes, or is refused."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterable
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
from tests.models import assert_untouched, random_plan, snapshot

STREAM, WORDS, LONGEST = 24, 31, 16
EXPERTS, WINNERS = 4, 2


@dataclass(frozen=True)
class Architecture:
    """What a network is made of. The fields' first choices are the plainest."""

    depth: int = 2
    heads: int = 4
    groups: int = 2
    """Heads of keys and values."""
    width: Literal[6, 4, 8] = 6
    """Of one head."""
    qkv: Literal["separate", "chunk", "split", "interleaved", "grouped"] = "separate"
    sizes: Literal["attribute", "inferred", "divided", "mapping", "record", "partial"] = "attribute"
    """Where the code has the number of heads from."""
    explicit: bool = False
    """Whether both numbers are written where axes are taken apart or put together, and none is -1."""
    attention: Literal["kernel", "products", "einsum", "linear"] = "kernel"
    repeats: Literal["interleave", "expand"] = "interleave"
    """How keys and values come to be as many as queries, where the kernel does not see to it."""
    causal: bool = True
    positions: Literal["none", "learned", "table", "rotary", "slopes"] = "none"
    query_norm: Literal["none", "head", "whole"] = "none"
    output_gate: Literal["none", "channels", "heads"] = "none"
    """What the sum over values is multiplied by: a sigmoid of the input."""
    norm: Literal["rms", "layer", "written", "none"] = "rms"
    place: Literal["before", "after", "beside", "apart", "around"] = "before"
    mlp: Literal["plain", "gated", "fused", "alternating", "pointwise", "experts", "stacked", "routed"] = "plain"
    router: Literal["softmax", "sigmoid", "normalised"] = "softmax"
    activation: Literal["gelu", "relu", "silu", "square"] = "gelu"
    mixing: bool = False
    """Whether a depthwise convolution over tokens comes first in a block."""
    scaled: bool = False
    """Whether what a sub-layer adds is scaled, channel by channel."""
    embedding: Literal["plain", "constant", "root"] = "plain"
    """Whether embeddings are multiplied by a number, or by the root of their width."""
    skips: Literal["none", "joined", "added", "ladder"] = "none"
    """The last block reads the first input, too, or later blocks read earlier ones in reverse order, as a U-Net."""
    container: Literal["list", "sequential", "attributes"] = "list"
    shared: bool = False
    """Whether all blocks are one."""
    bias: bool = False
    tied: bool = False
    output: Literal["tokens", "capped", "pooled"] = "tokens"


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


@dataclass
class Numbers:
    """As a configuration that is no module's own: all blocks have the same one."""

    heads: int
    groups: int


def taken_apart(x: Tensor, number: int) -> Tensor:
    """Heads out of [batch, tokens, heads * width]: [batch, tokens, heads, width]."""
    return x.unflatten(-1, (number, -1))


class Attention(nn.Module):
    slopes: Tensor

    def __init__(self, made: Architecture, numbers: Numbers) -> None:
        super().__init__()
        self.made, inner, keys = made, made.heads * made.width, made.groups * made.width
        if made.sizes == "mapping":
            self.numbers: Any = {"heads": made.heads, "groups": made.groups}
        elif made.sizes == "record":
            self.numbers = numbers
        elif made.sizes == "partial":
            self.apart_heads = functools.partial(taken_apart, number=made.heads)
            self.apart_groups = functools.partial(taken_apart, number=made.groups)
        else:
            self.heads, self.groups = made.heads, made.groups
        self.width = made.width
        if made.qkv == "separate":
            self.q, self.k, self.v = (nn.Linear(STREAM, size, bias=made.bias) for size in (inner, keys, keys))
        else:
            self.qkv = nn.Linear(STREAM, inner + 2 * keys, bias=made.bias)
        if made.query_norm == "head":
            self.query_norm, self.key_norm = nn.RMSNorm(made.width), nn.RMSNorm(made.width)
        elif made.query_norm == "whole":
            self.query_norm, self.key_norm = nn.RMSNorm(inner), nn.RMSNorm(keys)
        if made.output_gate != "none":
            self.gate = nn.Linear(STREAM, inner if made.output_gate == "channels" else made.heads, bias=made.bias)
        if made.positions == "slopes":
            self.register_buffer("slopes", 0.5 ** torch.arange(1, made.heads + 1))
        self.out = nn.Linear(inner, STREAM, bias=made.bias)

    def number(self, name: str, x: Tensor | None = None) -> int:
        if self.made.sizes == "divided" and x is not None:
            return x.shape[-1] // self.width
        if self.made.sizes == "inferred":
            return -1
        if self.made.sizes == "mapping":
            return int(self.numbers[name])
        return int(getattr(self.numbers if self.made.sizes == "record" else self, name))

    def apart(self, x: Tensor, name: str) -> Tensor:
        """[batch, tokens, heads, width]."""
        if self.made.sizes == "partial":
            made: Tensor = getattr(self, f"apart_{name}")(x)
            return made
        number = self.number(name, x)
        if self.made.explicit:
            return x.view(*x.shape[:-1], number, self.width)
        return x.unflatten(-1, (number, self.width) if number == -1 else (number, -1))

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [batch, tokens, heads, width]."""
        names = ("heads", "groups", "groups")
        if self.made.qkv == "separate":
            parts: Any = (self.q(x), self.k(x), self.v(x))
        elif self.made.qkv == "chunk":
            parts = self.qkv(x).chunk(3, -1)
        elif self.made.qkv == "split":
            heads, groups = self.number("heads"), self.number("groups")
            parts = self.qkv(x).split([heads * self.width, groups * self.width, groups * self.width], -1)
        elif self.made.qkv == "interleaved":
            return self.qkv(x).view(*x.shape[:2], self.number("heads"), 3, self.width).unbind(3)
        else:
            each = self.made.heads // self.made.groups
            mixed = self.qkv(x).view(*x.shape[:2], self.number("groups"), each + 2, self.width)
            return mixed[..., :each, :].flatten(2, 3), mixed[..., each, :], mixed[..., each + 1, :]
        if self.made.query_norm == "whole":
            parts = (self.query_norm(parts[0]), self.key_norm(parts[1]), parts[2])
        return tuple(self.apart(part, name) for part, name in zip(parts, names, strict=True))

    def repeated(self, x: Tensor, number: int) -> Tensor:
        """[batch, groups, tokens, width], every one as often as it has queries."""
        each = number // x.shape[1]
        if self.made.repeats == "interleave":
            return x.repeat_interleave(each, 1)
        batch, groups, tokens, width = x.shape
        return x[:, :, None].expand(batch, groups, each, tokens, width).reshape(batch, groups * each, tokens, width)

    def hidden(self, tokens: int) -> Tensor:
        """What is added to the scores, [tokens, tokens] or [heads, tokens, tokens]."""
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        added = torch.zeros(tokens, tokens).double().masked_fill(later, -1e9 * self.made.causal)
        if self.made.positions == "slopes":
            away = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
            added = added - self.slopes[:, None, None] * away
        return added

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values summed over tokens, [batch, heads, tokens, width]."""
        tokens = q.shape[2]
        if self.made.attention == "kernel" and self.made.positions == "slopes":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.hidden(tokens), enable_gqa=True)
        if self.made.attention == "kernel":
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.made.causal, enable_gqa=True)
        k, v = self.repeated(k, q.shape[1]), self.repeated(v, q.shape[1])
        if self.made.attention == "linear":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return q @ (k.mT @ v) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        if self.made.attention == "einsum":
            scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.width**-0.5
            return torch.einsum("bhij,bhjd->bhid", (scores + self.hidden(tokens)).softmax(-1), v)
        return (q @ k.mT * self.width**-0.5 + self.hidden(tokens)).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.projected(x))
        if self.made.query_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        if self.made.positions == "rotary":
            q, k = rotated(q), rotated(k)
        mixed = self.mixed(q, k, v).transpose(1, 2)
        if self.made.output_gate == "heads":
            mixed = mixed * self.gate(x).sigmoid()[..., None]
        if self.made.explicit and self.made.sizes not in ("inferred", "partial"):
            inner = mixed.reshape(*x.shape[:2], self.number("heads") * self.width)
        else:
            inner = mixed.flatten(2)
        if self.made.output_gate == "channels":
            inner = inner * self.gate(x).sigmoid()
        out: Tensor = self.out(inner)
        return out


def rotated(x: Tensor) -> Tensor:
    """[batch, heads, tokens, width] turned by its positions, half against half."""
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[2])[:, None] * 0.3 ** torch.arange(half)
    first, second = x.chunk(2, -1)
    return torch.cat([first * turns.cos() - second * turns.sin(), second * turns.cos() + first * turns.sin()], -1)


ACTIVATIONS: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "square": lambda x: F.relu(x) ** 2}


class MLP(nn.Module):
    def __init__(self, made: Architecture, inner: int = 20) -> None:
        super().__init__()
        self.kind, self.act = made.mlp, made.activation
        wide = 2 * inner if made.mlp in ("fused", "alternating") else inner
        self.up: nn.Module = nn.Linear(STREAM, wide, bias=made.bias)
        self.down: nn.Module = nn.Linear(inner, STREAM, bias=made.bias)
        if made.mlp == "pointwise":
            self.up = nn.Conv1d(STREAM, wide, 1, bias=made.bias)
            self.down = nn.Conv1d(inner, STREAM, 1, bias=made.bias)
        if made.mlp == "gated":
            self.gate = nn.Linear(STREAM, inner, bias=made.bias)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.act]
        if self.kind == "pointwise":
            return self.down(act(self.up(x.mT))).mT
        inner = self.up(x)
        if self.kind == "gated":
            inner = act(self.gate(x)) * inner
        elif self.kind == "fused":
            gate, inner = inner.chunk(2, -1)
            inner = act(gate) * inner
        elif self.kind == "alternating":
            inner = act(inner[..., ::2]) * inner[..., 1::2]
        else:
            inner = act(inner)
        out: Tensor = self.down(inner)
        return out


class Experts(nn.Module):
    """All of them, weighted by a gate; a list of modules, or two tensors. Routed: only some have a weight."""

    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.kind, self.router, self.act = made.mlp, made.router, made.activation
        self.gate = nn.Linear(STREAM, EXPERTS, bias=False)
        if made.mlp == "stacked":
            self.up = nn.Parameter(torch.randn(EXPERTS, STREAM, 14) / 5)
            self.down = nn.Parameter(torch.randn(EXPERTS, 14, STREAM) / 5)
        else:
            self.experts = nn.ModuleList(MLP(replace(made, mlp="plain"), 14) for _ in range(EXPERTS))

    def weights(self, x: Tensor) -> Tensor:
        """Of every expert, for every token."""
        scores = self.gate(x)
        found: Tensor = scores.softmax(-1) if self.router == "softmax" else scores.sigmoid()
        if self.kind == "routed":
            best, which = found.topk(WINNERS, -1)
            found = torch.zeros_like(found).scatter(-1, which, best)
        return found / found.sum(-1, keepdim=True) if self.router == "normalised" else found

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        if self.kind == "stacked":
            inner = ACTIVATIONS[self.act](torch.einsum("btc,ecd->betd", x, self.up))
            return torch.einsum("betd,edc,bte->btc", inner, self.down, weights)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + weights[..., number : number + 1] * expert(x)
        return out


class Mixing(nn.Module):
    """A convolution over tokens that looks back, every channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(STREAM, STREAM, 3, groups=STREAM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x.mT, (2, 0))).mT
        return out


class Block(nn.Module):
    def __init__(self, made: Architecture, numbers: Numbers) -> None:
        super().__init__()
        self.place = made.place
        self.mixing = Mixing() if made.mixing else None
        self.attention = Attention(made, numbers)
        self.mlp = Experts(made) if made.mlp in ("experts", "stacked", "routed") else MLP(made)
        self.norms = nn.ModuleList(norm_of(made.norm) for _ in range(4 if made.place == "around" else 2))
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(STREAM) + 0.5) for _ in range(2 * made.scaled))

    def scale(self, x: Tensor, number: int) -> Tensor:
        return x * self.scales[number] if len(self.scales) else x

    def forward(self, x: Tensor) -> Tensor:
        if self.mixing is not None:
            x = x + self.mixing(x)
        if self.place in ("beside", "apart"):
            left = self.norms[0](x)
            right = left if self.place == "beside" else self.norms[1](x)
            return x + self.scale(self.attention(left), 0) + self.scale(self.mlp(right), 1)
        for number, part in enumerate((self.attention, self.mlp)):
            if self.place == "after":
                x = self.norms[number](x + self.scale(part(x), number))
            elif self.place == "around":
                x = x + self.scale(self.norms[2 + number](part(self.norms[number](x))), number)
            else:
                x = x + self.scale(part(self.norms[number](x)), number)
        return x


class Network(nn.Module):
    table: Tensor

    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.made = made
        self.embedding = nn.Embedding(WORDS, STREAM)
        self.positions = nn.Embedding(LONGEST, STREAM) if made.positions == "learned" else None
        if made.positions == "table":
            self.register_buffer("table", torch.outer(torch.arange(LONGEST), 0.5 ** torch.arange(STREAM)).sin())
        numbers = Numbers(made.heads, made.groups)
        blocks = [Block(made, numbers) for _ in range(1 if made.shared else made.depth)]
        if made.container == "attributes":
            for number, block in enumerate(blocks):
                setattr(self, f"block{number}", block)
        else:
            self.blocks = nn.ModuleList(blocks) if made.container == "list" else nn.Sequential(*blocks)
        joins = {"joined": 1, "ladder": made.depth // 2}.get(made.skips, 0)
        self.joins = nn.ModuleList(nn.Linear(2 * STREAM, STREAM) for _ in range(joins))
        self.norm, self.head = norm_of(made.norm), nn.Linear(STREAM, WORDS, bias=False)
        if made.tied:
            self.head.weight = self.embedding.weight

    def embedded(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.made.embedding != "plain":
            x = x * (2.5 if self.made.embedding == "constant" else x.shape[-1] ** 0.5)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1]))
        if self.made.positions == "table":
            x = x + self.table[: ids.shape[1]]
        out: Tensor = x
        return out

    def in_order(self) -> Iterable[nn.Module]:
        made = self.made
        if made.container == "attributes":
            blocks = [self.get_submodule(f"block{number}") for number in range(1 if made.shared else made.depth)]
            return blocks * made.depth if made.shared else blocks
        return [self.blocks[0]] * made.depth if made.shared else self.blocks

    def through_blocks(self, x: Tensor) -> Tensor:
        made = self.made
        if made.container == "sequential" and made.skips != "ladder" and not made.shared:
            out: Tensor = self.blocks(x)
            return out
        seen: list[Tensor] = []
        for number, block in enumerate(self.in_order()):
            later = number - (made.depth + 1) // 2
            if made.skips == "ladder" and later >= 0:
                x = self.joins[later](torch.cat([x, seen.pop()], -1))
            x = block(x)
            seen.append(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        start = self.embedded(ids)
        x = self.through_blocks(start)
        if self.made.skips == "joined":
            x = self.joins[0](torch.cat([x, start], -1))
        elif self.made.skips == "added":
            x = x + start
        x = self.norm(x)
        if self.made.output == "pooled":
            x = x.mean(1)
        out: Tensor = self.head(x)
        return out.tanh() * 3 if self.made.output == "capped" else out


def built(made: Architecture, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = Network(made).double().eval()
    for parameter in model.parameters():  # norms and biases that are not one and zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def possible(made: Architecture) -> Architecture:
    """The same, without what excludes something else."""
    if made.heads % made.groups:
        made = replace(made, groups=1)
    if made.qkv in ("chunk", "interleaved"):
        made = replace(made, groups=made.heads)
    needed = made.qkv in ("split", "grouped", "interleaved")
    if (made.qkv == "split" and made.sizes in ("inferred", "partial")) or (needed and made.sizes in ("divided", "partial")):
        made = replace(made, sizes="attribute")
    if made.qkv in ("interleaved", "grouped") and made.query_norm == "whole":
        made = replace(made, query_norm="head")
    return replace(made, positions="none") if made.attention == "linear" and made.positions == "slopes" else made


def words(batch: int = 2, length: int = 7) -> Tensor:
    return torch.arange(batch * length).view(batch, length) * 5 % WORDS


def computed(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids)
    return found


SITUATIONS = [(words(), False), (words(3, 11), False), (words(1, 1), False), (words(), True)]
"""Tokens, and whether the network is in training."""


def agrees(model: Network, graph: Graph, plan: Plan) -> str:
    """Whether a plan was cut, and cut rightly: `cut`, or why it was refused."""
    try:
        small = resect.cut(copy.deepcopy(model), plan, graph)
    except ModelError as problem:
        return str(problem)
    assert sum(parameter.numel() for parameter in small.parameters()) == graph.parameter_count(plan.removed())
    with resect.masked(model, plan, graph):
        expected = [computed(model.train(training), ids) for ids, training in SITUATIONS]
    model.eval()
    for network in (small, copy.deepcopy(small)):
        for (ids, training), wanted in zip(SITUATIONS, expected, strict=True):
            torch.testing.assert_close(computed(network.train(training), ids), wanted, rtol=1e-9, atol=1e-9)
    return "cut"


def outcomes(made: Architecture, seed: int) -> Counter[str]:
    """What became of random plans of each kind, and of all at once."""
    model = built(made, seed)
    before = snapshot(model)
    graph = resect.trace(model, (words(),))
    assert_untouched(model, before)
    assert graph.parameter_count() == sum(parameter.numel() for parameter in model.parameters())
    kinds = sorted({group.kind for group in graph.groups} - {"vocabulary"})
    plans = {kind: random_plan(graph, seed, uniform=False, kinds=[kind]) for kind in kinds}
    plans["all"] = random_plan(graph, seed + 1, uniform=False, kinds=kinds)
    return Counter(f"{name}: {agrees(model, graph, plan)}" for name, plan in plans.items() if plan.removed())


SIZES = {"depth": st.integers(1, 3), "heads": st.integers(1, 4), "groups": st.integers(1, 4)}
CHOICES: dict[str, Any] = {field.name: ... for field in fields(Architecture)}  # hypothesis leaves defaults alone otherwise
DRAWN = st.builds(Architecture, **{**CHOICES, **SIZES})


@settings(max_examples=24, deadline=None, derandomize=True, database=None)
@given(made=DRAWN, seed=st.integers(0, 99))
def test_whatever_is_cut_is_cut_rightly(made: Architecture, seed: int) -> None:
    for outcome in outcomes(possible(made), seed):
        event(outcome if outcome.endswith("cut") else outcome.partition(":")[0] + ": refused")


ORDINARY = {
    "llama": Architecture(positions="rotary", mlp="gated", activation="silu", repeats="expand", attention="products"),
    "gpt2": Architecture(qkv="chunk", groups=4, norm="layer", positions="learned", bias=True, tied=True, explicit=True),
    "falcon": Architecture(qkv="split", groups=1, norm="layer", place="beside", positions="rotary"),
    "neox": Architecture(qkv="interleaved", groups=4, norm="layer", place="apart", positions="rotary", bias=True),
    "gemma": Architecture(place="around", mlp="gated", tied=True, query_norm="head", embedding="constant", output="capped"),
    "olmo": Architecture(query_norm="whole", mlp="gated", positions="rotary", explicit=True, sizes="record"),
    "internlm": Architecture(qkv="grouped", mlp="gated", norm="written", positions="rotary"),
    "phi3": Architecture(qkv="split", groups=2, mlp="fused", positions="rotary"),
    "bert": Architecture(place="after", norm="layer", bias=True, positions="learned", groups=4, causal=False, output="pooled"),
    "cait": Architecture(scaled=True, norm="layer", qkv="chunk", groups=4, attention="einsum", sizes="mapping", causal=False),
    "vit": Architecture(container="sequential", qkv="interleaved", groups=4, norm="layer", causal=False, output="pooled"),
    "conformer": Architecture(mixing=True, mlp="pointwise", activation="silu", sizes="divided", positions="table"),
    "mixture": Architecture(mlp="experts", sizes="mapping"),
    "mixture in tensors": Architecture(mlp="stacked", groups=4),
    "ladder": Architecture(skips="ladder", depth=3, container="attributes"),
    "one block three times": Architecture(shared=True, depth=3, sizes="partial"),
}
"""By the network that is made like this, where one is."""


@pytest.mark.parametrize("name", ORDINARY)
def test_the_ordinary_is_cut(name: str) -> None:
    made = possible(ORDINARY[name])
    found = outcomes(made, 1)
    kinds = {outcome.partition(":")[0] for outcome in found}
    assert {"channels", "heads", "all"} <= kinds
    assert [outcome for outcome in found if not outcome.endswith(": cut")] == []
