"""Published sizes of pruned models, exactly, from their configs alone: no weights exist in this file."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import resect
from resect.graph import Graph, Group
from resect.plan import Kept, Plan, select_share
from tests.reference import count_parameters

SIZES: dict[str, dict[str, Any]] = {
    "LLaMA-7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "Llama-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "TinyLlama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "Llama-3.1-70B": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class Setting:
    """A run of LLM-Pruner (arXiv 2305.11627): the share removed in a range of blocks, and the size that is left."""

    model: str
    share: Fraction
    first: int
    last: int
    heads: int
    channels: int
    dense: int
    pruned: int


SETTINGS = [
    Setting("LLaMA-7B", Fraction(1, 4), 4, 29, 8, 2752, 6_738_415_616, 5_422_977_024),
    Setting("LLaMA-7B", Fraction(3, 5), 3, 30, 19, 6605, 6_738_415_616, 3_350_188_032),
    Setting("Llama-3-8B", Fraction(1, 4), 4, 29, 2, 3584, 8_030_261_248, 6_612_586_496),
    Setting("TinyLlama", Fraction(1, 4), 4, 17, 1, 1408, 1_100_048_384, 945_907_712),
]
HEAD_DIMENSION = {"LLaMA-7B": 128, "Llama-3-8B": 128, "TinyLlama": 64}
NAMES = [f"{setting.model}-{setting.share}" for setting in SETTINGS]


@functools.cache
def skeleton(name: str) -> LlamaForCausalLM:
    """The model without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES[name]))


@functools.cache
def graph_of(name: str) -> Graph:
    """The skeleton's graph."""
    return resect.trace(skeleton(name))


def removed_units(share: Fraction, units: int, width: int) -> int:
    """Whole units removed per group: positions kept are floored, then positions removed are floored to units."""
    positions = units * width
    return (positions - int(positions * (1 - share))) // width


def plan_of(setting: Setting) -> Plan:
    """The plan that drops the last so many units of heads and channels in the setting's blocks."""

    def drop(group: Group) -> Kept:
        width = HEAD_DIMENSION[setting.model] if group.kind == "heads" else 1
        keep = tuple(range(group.units - removed_units(setting.share, group.units, width)))
        return Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)

    blocks = range(setting.first, setting.last + 1)
    chosen = [g for g in graph_of(setting.model).groups if g.kind in ("heads", "channels") and g.layer in blocks]
    return Plan(groups={group.name: drop(group) for group in chosen})


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_published_size(setting: Setting) -> None:
    graph, plan = graph_of(setting.model), plan_of(setting)
    removed = {(kept.kind, kept.units - len(kept.keep)) for kept in plan.groups.values()}
    assert removed == {("heads", setting.heads), ("channels", setting.channels)}
    assert len(plan.groups) == 2 * (setting.last - setting.first + 1)
    assert graph.parameter_count() == count_parameters(graph) == setting.dense
    assert graph.parameter_count(plan.removed()) == count_parameters(graph, plan) == setting.pruned


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_select_share_gives_the_published_size(setting: Setting) -> None:
    """The package's own rounding of a share is the paper's."""
    graph, blocks = graph_of(setting.model), (setting.first, setting.last + 1)
    scores = {group.name: torch.arange(group.units, 0, -1.0) for group in graph.groups}
    plan = select_share(graph, scores, share=float(setting.share), ranges={"heads": blocks, "channels": blocks})
    assert plan.removed() == plan_of(setting).removed()
    assert graph.parameter_count(plan.removed()) == setting.pruned


@pytest.mark.parametrize("setting", SETTINGS[2:], ids=NAMES[2:])
def test_published_size_of_the_cut_skeleton(setting: Setting) -> None:
    """Surgery on the meta device arrives at the same number."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[setting.model]))
    resect.cut(model, plan_of(setting))
    assert sum(parameter.numel() for parameter in model.parameters()) == setting.pruned


def test_seventy_billion_parameters_without_weights() -> None:
    """80 layers of 8 KV heads and 28672 channels, found on a skeleton that stays on the meta device."""
    graph = graph_of("Llama-3.1-70B")
    found = [(group.layer, group.kind, group.units) for group in graph.groups if group.kind in ("heads", "channels")]
    expected = [(layer, kind, units) for layer in range(80) for kind, units in (("heads", 8), ("channels", 28672))]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert graph.parameter_count() == 70_553_706_496
    assert all(parameter.is_meta for parameter in skeleton("Llama-3.1-70B").parameters())
