"""Networks as they are written outside transformers: ways to lay out attention, and networks that are no language models."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, HEAD, CHANNELS, WORDS = 48, 6, 8, 56, 37


def causal(length: int) -> Tensor:
    """Minus infinity where a position would look ahead."""
    return torch.full((length, length), -torch.inf).triu(1)


class Block(nn.Module):
    """Attention and an MLP beside the residual stream."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.up, self.down = attention, nn.Linear(WIDTH, CHANNELS), nn.Linear(CHANNELS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The stream and what was computed beside it."""
        x = x + self.attn(self.first(x))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Language(nn.Module):
    """A language model around any attention; `steps_first` runs its blocks on [tokens, batch, width]."""

    def __init__(self, attention: Callable[[], nn.Module], *, steps_first: bool = False) -> None:
        super().__init__()
        self.steps_first = steps_first
        self.embed, self.norm, self.head = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens] to [batch, tokens, words]."""
        x = self.embed(tokens)
        x = x.transpose(0, 1).contiguous() if self.steps_first else x
        for block in self.blocks:
            x = block(x)
        x = x.transpose(0, 1) if self.steps_first else x
        return self.head(self.norm(x))


class Packed(nn.Module):
    """Query, key and value out of one projection, laid end to end; `alibi` adds a slope of its own to every head."""

    def __init__(self, *, unpack: str, alibi: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim, self.unpack, self.alibi = WIDTH, HEADS, HEAD, unpack, alibi
        self.W_pack, self.o_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, length, _ = x.shape
        packed = self.W_pack(x)
        if self.unpack == "unflatten":
            parts = packed.unflatten(-1, (3, self.hidden_size)).unsqueeze(0).transpose(0, -2).squeeze(-2).unbind(0)
        else:
            parts = packed.chunk(3, -1)
        q, k, v = (part.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        if self.alibi:
            slopes = torch.tensor([2 ** -(8 * (head + 1) / self.num_heads) for head in range(self.num_heads)])
            scores = scores + slopes[:, None, None] * torch.arange(length)
        mixed = (scores + causal(length)).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, self.hidden_size))


class PerHead(nn.Module):
    """[tokens, batch, width]; one projection in the order [heads, 3 * head_dim]; rotation in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size_per_head, self.hidden_size = HEADS, HEAD, WIDTH
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("frequencies", 10000 ** -torch.linspace(0, 1, HEAD // 4))

    def rotated(self, x: Tensor, places: Tensor) -> Tensor:
        """Pairs of halves turned by their place."""
        angles = torch.outer(places.float(), self.get_buffer("frequencies"))
        angles = torch.cat((angles, angles), -1)[:, None, None]
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-right, left), -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, batch, width] to the same."""
        length, batch, _ = x.shape
        mixed = self.query_key_value(x).view(length, batch, self.heads, 3 * self.size_per_head)
        q, k, v = mixed.split(mixed.shape[-1] // 3, dim=-1)
        places = torch.arange(length), torch.arange(length).flip(0)
        q, k = (
            torch.cat([self.rotated(half, place) for half, place in zip(x.chunk(2, -1), places, strict=True)], -1) for x in (q, k)
        )
        q, k, v = (x.reshape(length, batch * self.heads, -1).transpose(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(HEAD))
        scores = scores.view(batch, self.heads, length, length).masked_fill(causal(length) < 0, -1e4)
        out = torch.bmm(scores.softmax(-1).view(batch * self.heads, length, length), v).view(batch, self.heads, length, -1)
        return self.dense(out.permute(2, 0, 1, 3).reshape(length, batch, self.hidden_size))


class Columns(nn.Module):
    """A linear layer by hand that keeps its bias back if asked."""

    def __init__(self, width: int, out: int, *, bias_apart: bool = False) -> None:
        super().__init__()
        self.input_size, self.output_size, self.bias_apart = width, out, bias_apart
        self.weight, self.bias = nn.Parameter(torch.randn(out, width)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product, and the bias if it is still to be added."""
        product = torch.matmul(x, self.weight.t())
        return (product, self.bias) if self.bias_apart else (product + self.bias, None)


class Groups(nn.Module):
    """[tokens, batch, width]; one projection in the order [groups, queries + key + value]."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.np, self.ng, self.hn = HEADS, groups, HEAD
        self.qkv = Columns(WIDTH, (HEADS + 2 * groups) * HEAD)
        self.proj = Columns(HEADS * HEAD, WIDTH, bias_apart=True)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, batch, width] to the same."""
        length, batch, _ = x.shape
        queries = self.np // self.ng
        mixed = self.qkv(x)[0].view(length, batch, self.ng, (queries + 2) * self.hn)
        q, k, v = torch.split(mixed, [queries * self.hn, self.hn, self.hn], dim=3)
        q = q.reshape(length, batch, -1, self.hn)
        k, v = (x.repeat_interleave(queries, dim=2) for x in (k, v))
        q, k, v = (x.reshape(length, batch * self.np, self.hn).transpose(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(torch.empty(batch * self.np, length, length), q, k.transpose(1, 2), beta=0.0, alpha=0.3)
        weights = (scores + causal(length)).softmax(-1)
        out = torch.bmm(weights, v).view(batch, self.np, length, self.hn).permute(2, 0, 1, 3)
        product, bias = self.proj(out.reshape(length, batch, self.np * self.hn))
        return product + bias


class Named(nn.Module):
    """Products written as einsum; `talking` mixes the weights of the heads."""

    def __init__(self, *, talking: bool = False) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS)) if talking else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, length, _ = x.shape
        q, k, v = (
            project(x).reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3) for project in (self.to_q, self.to_k, self.to_v)
        )
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * HEAD**-0.5 + causal(length)).softmax(-1)
        if self.talk is not None:
            weights = torch.einsum("bhij,hg->bgij", weights, self.talk)
        out = torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(batch, length, -1))


class HeadAxes(nn.Module):
    """Weights that have an axis for the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(HEADS, WIDTH, HEAD)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(HEADS, HEAD, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        q, k, v = (torch.einsum("btc,hcd->bhtd", x, weight) for weight in (self.q, self.k, self.v))
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * HEAD**-0.5 + causal(x.shape[1])).softmax(-1)
        return torch.einsum("bhij,bhjd,hdc->bic", weights, v, self.o)


class Small(nn.Module):
    """A teaching model's attention: a split by width, a buffer for the mask; `free` leaves the head's size to `view`."""

    def __init__(self, config: SimpleNamespace, *, free: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(config.n_embd, 3 * config.n_embd), nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd, self.free, self.dropout = config.n_head, config.n_embd, free, nn.Dropout(config.dropout)
        self.register_buffer("bias", torch.ones(config.block_size, config.block_size).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, length, width = x.size()
        q, k, v = (
            part.view(batch, length, self.n_head, -1 if self.free else width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(self.n_embd, dim=2)
        )
        scores = q @ k.transpose(-2, -1) * HEAD**-0.5
        scores = scores.masked_fill(self.get_buffer("bias")[:, :, :length, :length] == 0, -torch.inf)
        out = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).contiguous()
        return self.c_proj(out.view(batch, length, -1 if self.free else width))


class Teaching(nn.Module):
    """A configuration object, places looked up in a table, the embedding tied to the head."""

    def __init__(self, *, free: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_embd=WIDTH, n_head=HEADS, block_size=16, dropout=0.1)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(WORDS, WIDTH),
                "wpe": nn.Embedding(self.config.block_size, WIDTH),
                "h": nn.ModuleList(Block(Small(self.config, free=free)) for _ in range(2)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.transformer.get_parameter("wte.weight")

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Logits, and no loss."""
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"].children():
            x = block(x)
        return self.lm_head(parts["ln_f"](x)), None


class Classes(nn.Module):
    """Words read by any network over [batch, tokens, width], their mean told apart."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.embed, self.reader, self.leave = nn.Embedding(WORDS, WIDTH), reader, nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens] to [batch, 5]."""
        return self.leave(self.reader(self.embed(tokens)).mean(1))


class Translation(nn.Module):
    """torch's own encoder-decoder between embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.leave = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.inner = nn.Transformer(WIDTH, HEADS, 2, 2, CHANNELS, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Two texts to logits."""
        return self.leave(self.inner(self.embed(source), self.embed(target)))


class Attending(nn.Module):
    """torch's own attention, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, CHANNELS), nn.Linear(CHANNELS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        return self.down(self.up(x + self.attn(x, x, x, need_weights=False)[0]).relu())


class Recurrent(nn.Module):
    """A classifier over the last state of a recurrent layer."""

    def __init__(self, layer: Callable[..., nn.Module], **options: bool | int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 20)
        self.rnn = layer(20, 24, batch_first=True, **options)
        self.middle, self.leave = nn.Linear(24 * (1 + bool(options.get("bidirectional"))), 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens] to [batch, 4]."""
        return self.leave(self.middle(self.rnn(self.embed(tokens))[0][:, -1]).relu())


class Cell(nn.Module):
    """The same with a cell and a loop."""

    def __init__(self, cell: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.cell, self.leave = nn.Embedding(WORDS, 20), cell(20, 24), nn.Linear(24, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens] to [batch, 4]."""
        state = None
        for step in self.embed(tokens).unbind(1):
            state = self.cell(step, state)
        return self.leave(state[0] if isinstance(state, tuple) else state)


class Beside(nn.Module):
    """A stream and what is computed beside it, tokens and channels exchanged if asked."""

    def __init__(self, *layers: nn.Module, across: bool = False) -> None:
        super().__init__()
        self.norm, self.body, self.across = nn.LayerNorm(20), nn.Sequential(*layers), across

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 20] to the same."""
        y = self.norm(x)
        return x + (self.body(y.transpose(1, 2)).transpose(1, 2) if self.across else self.body(y))


def mixer() -> nn.Sequential:
    """An MLP over tokens and one over channels, by turns."""
    pairs = (
        (
            Beside(nn.Linear(7, 15), nn.GELU(), nn.Linear(15, 7), across=True),
            Beside(nn.Linear(20, 28), nn.GELU(), nn.Linear(28, 20)),
        )
        for _ in range(2)
    )
    return nn.Sequential(nn.Linear(9, 20), *(layer for pair in pairs for layer in pair), nn.LayerNorm(20), nn.Linear(20, 4))


class Branches(nn.Module):
    """Branches by name, side by side."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"left": (12, 10), "right": (14, 8)}
        self.branches = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(6, a), nn.Tanh(), nn.Linear(a, b)) for name, (a, b) in sizes.items()}
        )
        self.leave = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        return self.leave(torch.cat([branch(x) for branch in self.branches.values()], -1))


class Places(nn.Module):
    """Learned places for longer texts than the example, and a projection of which a part is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(WORDS, 20), nn.Parameter(torch.randn(1, 30, 20))
        self.project, self.leave = nn.Linear(20, 33), nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens] to [batch, tokens, 4]."""
        x = self.embed(tokens) + self.places[:, 3 : 3 + tokens.shape[1]]
        return self.leave(self.project(x)[..., 11:23].relu())
