"""Rows of the vocabulary are offered where a number means nothing but its row, and kept whole everywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.graph import Graph
from tests.models import FAMILIES, random_plan
from tests.zoo.examine import TOLERANCE, differences, lively
from tests.zoo.shrink import build

ROWS, WIDTH = 23, 10

MEMBERS = {
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "llama_tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight"},  # looks at the text to warn of padding
    "phi": {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"},
    "gemma2": {"model.embed_tokens.weight"},  # logits go through a soft cap
    "gemma4_text": {"model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"},  # more rows for the same numbers
    "bert": {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
}


@pytest.mark.parametrize("family", MEMBERS)
def test_one_group_of_rows(family: str) -> None:
    model = FAMILIES[family]() if family in FAMILIES else build(family)
    (group,) = resect.trace(model).of_kind("vocabulary")
    assert {member.parameter for member in group.members} == MEMBERS[family]
    assert (group.name, group.layer, group.units) == ("vocabulary", None, 101)
    for member in group.members:
        assert member.index.tolist() == [[row] for row in range(101)]


@pytest.mark.parametrize("family", ["gemma4_text", "bert"])
def test_tables_and_biases_are_cut_together(family: str) -> None:
    model = lively(build(family, device="cpu"), 0)
    graph = resect.trace(model)
    plan = random_plan(graph, 1, uniform=False, kinds=["vocabulary"])
    assert plan.removed()
    assert differences(model, graph, plan, 0)[0] <= TOLERANCE


def test_tokens_that_the_configuration_names() -> None:
    (group,) = resect.trace(FAMILIES["llama"]()).of_kind("vocabulary")
    assert dict(group.named) == {0: "config.pad_token_id", 1: "config.bos_token_id", 2: "config.eos_token_id"}


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("roberta", "aten.ne"),  # positions are counted from the padding
        ("gemma3n_text", "aten.ge"),  # numbers beyond a second table
        ("musicgen", "101 positions for 102 rows"),
        ("xlm", "looks at the values"),
    ],
)
def test_families_that_look_at_their_numbers(model_type: str, why: str) -> None:
    graph = resect.trace(build(model_type))
    assert not graph.of_kind("vocabulary")
    assert any(why in reason for reason in reasons(graph))


class Net(nn.Module):
    """A table, a layer and a head; a variant changes what happens to text, hidden state or logits."""

    def __init__(self, *, text: Callable[..., Tensor] | None = None, logits: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ROWS)
        self.second, self.other, self.norm = nn.Embedding(ROWS, WIDTH), nn.Embedding(ROWS + 1, WIDTH), nn.LayerNorm(ROWS)
        self.register_buffer("shift", torch.randn(ROWS), persistent=False)
        self.register_buffer("kept_shift", torch.randn(ROWS))
        self.text, self.logits = text, logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[batch, tokens] to [batch, tokens, ROWS]."""
        hidden = self.table(input_ids) if self.text is None else self.text(self, input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        logits: Tensor = self.head(self.layer(hidden).tanh())
        return logits if self.logits is None else self.logits(self, logits)


OFFERED: dict[str, tuple[Net, set[str]]] = {
    "plain": (Net(), {"table.weight", "head.weight", "head.bias"}),
    "views": (Net(text=lambda net, ids: net.table(ids.view(-1)).view(*ids.shape, WIDTH)), {"table.weight", "head.weight"}),
    "a second table": (
        Net(text=lambda net, ids: net.table(ids) + net.second(ids)),
        {"table.weight", "second.weight", "head.weight", "head.bias"},
    ),
    "a mask of its shape": (Net(text=lambda net, ids: net.table(ids) * torch.ones_like(ids)[..., None]), {"table.weight"}),
    "a capped head": (Net(logits=lambda net, x: 3 * torch.tanh(x / 3)), {"table.weight", "head.weight", "head.bias"}),
    "a buffer of the checkpoint": (Net(logits=lambda net, x: x + net.kept_shift), {"table.weight", "head.weight", "kept_shift"}),
}

FROZEN: dict[str, tuple[Net, str]] = {
    "softmax": (Net(logits=lambda net, x: x.softmax(-1)), "see each other at aten._softmax"),
    "log-softmax": (Net(logits=lambda net, x: x.log_softmax(-1)), "see each other"),
    "a norm of logits": (Net(logits=lambda net, x: net.norm(x)), "takes a statistic"),
    "soft embeddings": (Net(logits=lambda net, x: net.head(x @ net.table.weight)), "a product sums"),
    "fewer logits": (Net(logits=lambda net, x: x[..., :-1]), "22 positions for 23 rows"),
    "a constant per row": (Net(logits=lambda net, x: x + net.shift), "constant"),
    "a comparison": (Net(text=lambda net, ids: net.table(ids) * (ids != 5)[..., None]), "aten.ne"),
    "a hash": (Net(text=lambda net, ids: net.table(ids) + net.second(ids * 7 % ROWS)), "aten.mul"),
    "a clamp": (Net(text=lambda net, ids: net.table(ids.clamp(max=4))), "looked up by number"),
    "indexing": (Net(text=lambda net, ids: net.table.weight[ids]), "aten.index"),
    "tables of different sizes": (Net(text=lambda net, ids: net.table(ids) + net.other(ids)), "tables of 23 and 24 rows"),
    "values": (Net(text=lambda net, ids: net.table(ids) * (2 if int(ids.max()) > 3 else 1)), "looks at the values"),
    "one row": (Net(text=lambda net, ids: net.table(ids) + net.table.weight[3]), "picked"),
    "the text as output": (Net(logits=lambda net, x: x), ""),
}


def reasons(graph: Graph) -> set[str]:
    return {item.reason for item in graph.frozen if item.parameter in (*graph.tables, "table.weight") and item.axis == 0}


@pytest.mark.parametrize("name", OFFERED)
def test_offered_and_cut_like_the_dense_network(name: str) -> None:
    net, members = OFFERED[name]
    model, text = copy.deepcopy(net).double().eval(), {"input_ids": torch.randint(ROWS, (2, 7))}
    graph = resect.trace(model, text)
    (group,) = graph.of_kind("vocabulary")
    assert {member.parameter for member in group.members} >= members
    plan = random_plan(graph, 3, uniform=True, kinds=["vocabulary"])
    keep = torch.tensor(plan.groups["vocabulary"].keep)
    assert len(keep) < ROWS
    new = torch.randint(len(keep), (3, 9))
    expected = model(keep[new])[..., keep]
    torch.testing.assert_close(resect.cut(model, plan, graph)(new), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FROZEN)
def test_kept_whole_and_said_why(name: str) -> None:
    net, why = FROZEN[name]
    if name == "the text as output":
        net, why = Echo(), "puts the text's numbers out"
    graph = resect.trace(net.eval(), {"input_ids": torch.zeros(2, 7, dtype=torch.long)})
    assert not graph.of_kind("vocabulary")
    assert any(why in reason for reason in reasons(graph)), reasons(graph)


class Echo(Net):
    """Puts its text out beside the logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Logits and the text."""
        return {"logits": super().forward(input_ids), "ids": input_ids.view(-1)}


def test_which_input_is_the_text() -> None:
    """By its name; two of its kind without that name are not told apart."""
    text, mask = torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    net = Net().eval()
    assert resect.trace(net, {"input_ids": text, "attention_mask": mask}).of_kind("vocabulary")
    assert resect.trace(net, (text,)).of_kind("vocabulary")
    assert not resect.trace(net, (text, mask)).of_kind("vocabulary")


def test_a_network_without_logits() -> None:
    net = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH))
    graph = resect.trace(net, (torch.zeros(2, 7, dtype=torch.long),))
    assert not graph.of_kind("vocabulary")
    assert any("10 positions for 23 rows" in reason for reason in reasons(graph))
