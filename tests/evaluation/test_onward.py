"""Runs from a block on: the same bits as whole runs, or none where blocks talk past each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import resect
from resect.evaluation import Onward
from tests.models import FAMILIES, assert_untouched, random_tokens, snapshot

BATCHES = [random_tokens(2, 12, seed=1), random_tokens(1, 12, seed=2)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "bloom"])
@torch.no_grad()
def test_runs_from_every_block_on_give_the_same_bits(family: str) -> None:
    model = FAMILIES[family]()
    whole = [model(batch).logits for batch in BATCHES]
    before = snapshot(model)
    onward = Onward.of(model, resect.trace(model), BATCHES)
    assert onward is not None
    ran: list[int] = []
    blocks: Any = model.get_submodule(resect.trace(model).blocks.path)
    handles = [block.register_forward_pre_hook(lambda block, given: ran.append(1)) for block in (m[0] for m in _inner(blocks))]
    for layer in range(3):
        onward.advance_to(layer)
        ran.clear()
        for number, batch in enumerate(BATCHES):
            with onward.passing(number):
                assert torch.equal(model(batch).logits, whole[number])
        assert len(ran) == len(BATCHES) * (3 - layer)  # the blocks before did not run
    for handle in handles:
        handle.remove()
    assert_untouched(model, before)


def _inner(blocks: nn.ModuleList) -> list[list[nn.Module]]:
    """The modules inside every block."""
    return [list(block.children()) for block in blocks]


@pytest.mark.parametrize("reader", [1, 2])
def test_a_network_whose_blocks_talk_past_each_other_is_refused(reader: int) -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    heard: list[torch.Tensor] = []
    blocks: Any = model.get_submodule(graph.blocks.path)
    # the attention of the first block leaves something behind that a later block's adds
    blocks[0].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: heard.append(output))
    blocks[reader].mlp.register_forward_hook(lambda module, inputs, output: output + heard.pop())
    with torch.no_grad():
        model(BATCHES[0])
    assert not heard
    assert Onward.of(model, graph, BATCHES) is None


def test_a_network_without_blocks_is_refused() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 4))
    assert Onward.of(model, graph, BATCHES) is None
