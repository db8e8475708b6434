"""Grouped-query attention written out by hand: the score of a KV head is its own slices and those of its query heads.

The reference code of LLM-Pruner credits query heads to the wrong KV head (it folds [kv, repeats] the wrong way round).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import resect
from resect.graph import Graph
from resect.saliency import score
from resect.statistics import collect
from tests.saliency.oracle import DATA_CRITERIA, Curvature, assert_same_scores, curvature

HIDDEN, KV_HEADS, REPEATS, WIDTH, WORDS = 10, 3, 2, 4, 23
HEADS = KV_HEADS * REPEATS


class Attention(nn.Module):
    """Causal grouped-query attention, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HEADS * WIDTH)
        self.k = nn.Linear(HIDDEN, KV_HEADS * WIDTH)
        self.v = nn.Linear(HIDDEN, KV_HEADS * WIDTH)
        self.o = nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, hidden] to the same shape."""
        n, t, _ = x.shape
        q = self.q(x).view(n, t, -1, WIDTH).transpose(1, 2)  # [N, heads, T, width]
        k = self.k(x).view(n, t, -1, WIDTH).transpose(1, 2).repeat_interleave(REPEATS, dim=1)
        v = self.v(x).view(n, t, -1, WIDTH).transpose(1, 2).repeat_interleave(REPEATS, dim=1)
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5  # [N, heads, T, T]
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        out: Tensor = self.o(mixed.transpose(1, 2).reshape(n, t, -1))
        return x + out


class Toy(nn.Module):
    """Embedding, two attention blocks, output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        """Logits for input_ids [N, T]."""
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))


@pytest.fixture(scope="module")
def toy() -> tuple[Toy, Graph, Tensor, dict[str, Curvature]]:
    """The toy, its graph, tokens [3, 7] and exact gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Toy().eval()
        tokens = torch.randint(0, WORDS, (3, 7))
    return model, resect.trace(model, tokens), tokens, curvature(model, tokens)


def by_hand(curvatures: dict[str, Curvature], block: int, kv: int, criterion: str) -> float:
    """The score of one KV head, term by term."""
    total = 0.0
    query_rows = [((kv * REPEATS) + repeat) * WIDTH + d for repeat in range(REPEATS) for d in range(WIDTH)]
    kv_rows = [kv * WIDTH + d for d in range(WIDTH)]
    for name, rows in (("q", query_rows), ("k", kv_rows), ("v", kv_rows), ("o", query_rows)):
        weight = curvatures[f"blocks.{block}.{name}.weight"]
        for row in rows:
            slices = [t.T[row] if name == "o" else t[row] for t in weight]
            total += of(criterion, *slices)
        if name != "o":
            bias = curvatures[f"blocks.{block}.{name}.bias"]
            total += sum(of(criterion, *(t[row] for t in bias)) for row in rows)
    return total


def of(criterion: str, w: Tensor, g: Tensor, F: Tensor) -> float:
    """Value of one row or column."""
    if criterion == "vector":
        return float((w * g).sum().abs())
    element = {"element1": w * g, "element2": w * w * F, "mix": w * g - w * w * F / 2}[criterion]
    return float(element.abs().sum())


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_kv_head_scores_equal_brute_force(toy: tuple[Toy, Graph, Tensor, dict[str, Curvature]], criterion: str) -> None:
    model, graph, tokens, curvatures = toy
    heads = [group for group in graph.groups if group.kind == "heads"]
    assert [group.units for group in heads] == [KV_HEADS, KV_HEADS]
    found = score(graph, collect(model, tokens, graph, criterion), criterion=criterion)
    for block, group in enumerate(heads):
        exact = [by_hand(curvatures, block, kv, criterion) for kv in range(KV_HEADS)]
        expected = torch.tensor(exact, dtype=torch.float64)
        assert_same_scores(found[group.name], expected, what=f"{group.name}, {criterion}")


def test_the_toy_tells_right_from_wrong(toy: tuple[Toy, Graph, Tensor, dict[str, Curvature]]) -> None:
    """Folding the query heads the wrong way round gives another ranking-relevant number, so the test above can fail."""
    _, _, _, curvatures = toy
    weight = curvatures["blocks.0.q.weight"]
    per_head = (weight.w**2 * weight.F).sum(1).view(HEADS, WIDTH).sum(1)
    right, wrong = per_head.view(KV_HEADS, REPEATS).sum(1), per_head.view(REPEATS, KV_HEADS).sum(0)
    assert ((right - wrong).abs() / right).min() > 0.01
