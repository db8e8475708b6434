"""Networks with low-rank adapters: slices of both matrices go with the units of their layer, ranks are never offered."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import resect
from tests.models import FAMILIES, random_plan, random_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # PEFT asks for it
]
TOKENS = random_tokens(2, 12, seed=1)


def with_adapters(family: str) -> torch.nn.Module:
    config = LoraConfig(r=5, lora_alpha=10, target_modules="all-linear", lora_dropout=0.1)
    adapted = get_peft_model(FAMILIES[family]().double(), config).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return adapted


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_the_composed_operator_is_cut_as_one(family: str) -> None:
    model = with_adapters(family)
    graph = resect.trace(model)
    plain = resect.trace(FAMILIES[family]())
    assert {(g.kind, g.layer, g.units) for g in graph.groups} == {(g.kind, g.layer, g.units) for g in plain.groups}
    ranks = [item for item in graph.frozen if item.reason == "the rank of an adapter"]
    assert {item.size for item in ranks} == {5}
    assert len(ranks) == sum(".lora_" in name for name, _ in model.named_parameters())
    plan = random_plan(graph, 0, uniform=False, kinds=["heads", "channels"])
    before = {name: (parameter.requires_grad, parameter.ndim) for name, parameter in model.named_parameters()}
    small = resect.cut(copy.deepcopy(model), plan, graph)
    assert {name: (parameter.requires_grad, parameter.ndim) for name, parameter in small.named_parameters()} == before
    with resect.masked(model, plan, graph), torch.no_grad():
        expected = model(TOKENS).logits
        merged = small(TOKENS).logits, copy.deepcopy(small).merge_and_unload()(TOKENS).logits  # type: ignore[operator]
    for found in merged:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_channel_has_rows_and_columns_of_its_adapters() -> None:
    graph = resect.trace(with_adapters("llama"))
    group = next(group for group in graph.of_kind("channels") if group.layer == 1)
    found = {(member.parameter.split(".mlp.")[1], member.axis) for member in group.members}
    rows = {(f"{name}_proj.{part}.weight", 0) for name in ("gate", "up") for part in ("base_layer", "lora_B.default")}
    columns = {(f"down_proj.{part}.weight", 1) for part in ("base_layer", "lora_A.default")}
    assert found == rows | columns
