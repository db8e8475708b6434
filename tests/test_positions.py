"""Which positions belong to a unit, written out by hand for the layouts that are easy to get wrong.

Six query heads of width 8 throughout; two KV heads where they are grouped; 56 MLP channels.
"""

from __future__ import annotations

import pytest

import resect
from resect.graph import Group
from tests.models import FAMILIES

WIDTH = 8


def runs(*starts: int, length: int) -> set[int]:
    """Positions of runs of one length."""
    return {start + offset for start in starts for offset in range(length)}


def grouped(u: int) -> dict[tuple[str, int], set[int]]:
    """KV head u of separate projections: its three query heads, itself, and the columns that read it."""
    queries, own = runs(u * 24, length=24), runs(u * 8, length=8)
    return {
        ("q_proj.weight", 0): queries,
        ("k_proj.weight", 0): own,
        ("v_proj.weight", 0): own,
        ("o_proj.weight", 1): queries,
    }


def grouped_biases(u: int) -> dict[tuple[str, int], set[int]]:
    """The same with biases on q, k and v; the bias of o belongs to the residual stream."""
    weights = grouped(u)
    return weights | {(name.replace("weight", "bias"), 0): rows for (name, axis), rows in weights.items() if axis == 0}


HEADS = {
    "llama": grouped,
    "qwen2": grouped_biases,
    "llama_biases": grouped_biases,
    "qwen3": grouped,  # q and k norms work inside a head: all heads share them
    "llama_mqa": lambda u: {("q_proj.weight", 0): runs(u * 8, length=8), ("o_proj.weight", 1): runs(u * 8, length=8)},
    # the norms over all of q and all of k have a weight per position
    "olmo2": lambda u: (
        grouped(u) | {("q_norm.weight", 0): runs(u * 24, length=24), ("k_norm.weight", 0): runs(u * 8, length=8)}
    ),
    "cohere_qk": lambda u: grouped(u) | {("q_norm.weight", 0): runs(u * 3, length=3), ("k_norm.weight", 0): {u}},
    # [q | k | v] of one Conv1D, inputs first
    "gpt2": lambda u: {
        ("c_attn.weight", 1): runs(u * 8, 48 + u * 8, 96 + u * 8, length=8),
        ("c_attn.bias", 0): runs(u * 8, 48 + u * 8, 96 + u * 8, length=8),
        ("c_proj.weight", 0): runs(u * 8, length=8),
    },
    # q, k, v of a head side by side
    "gpt_neox": lambda u: {
        ("query_key_value.weight", 0): runs(u * 24, length=24),
        ("query_key_value.bias", 0): runs(u * 24, length=24),
        ("dense.weight", 1): runs(u * 8, length=8),
    },
    # [q | k | v] with grouped queries
    "phi3": lambda u: {
        ("qkv_proj.weight", 0): runs(u * 24, length=24) | runs(48 + u * 8, 64 + u * 8, length=8),
        ("o_proj.weight", 1): runs(u * 24, length=24),
    },
    # three query heads, then k and v, per KV head
    "falcon_gqa": lambda u: {
        ("query_key_value.weight", 0): runs(u * 40, length=40),
        ("dense.weight", 1): runs(u * 24, length=24),
    },
    # [q | k | v] with one KV head that stays
    "falcon_mqa": lambda u: {
        ("query_key_value.weight", 0): runs(u * 8, length=8),
        ("dense.weight", 1): runs(u * 8, length=8),
    },
}
CHANNELS = {
    "llama": lambda u: {("gate_proj.weight", 0): {u}, ("up_proj.weight", 0): {u}, ("down_proj.weight", 1): {u}},
    "llama_biases": lambda u: {
        ("gate_proj.weight", 0): {u},
        ("gate_proj.bias", 0): {u},
        ("up_proj.weight", 0): {u},
        ("up_proj.bias", 0): {u},
        ("down_proj.weight", 1): {u},
    },
    "phi3": lambda u: {("gate_up_proj.weight", 0): {u, 56 + u}, ("down_proj.weight", 1): {u}},
    "glm": lambda u: {("gate_up_proj.weight", 0): {u, 56 + u}, ("down_proj.weight", 1): {u}},
    "gpt2": lambda u: {("c_fc.weight", 1): {u}, ("c_fc.bias", 0): {u}, ("c_proj.weight", 0): {u}},
    "opt": lambda u: {("fc1.weight", 0): {u}, ("fc1.bias", 0): {u}, ("fc2.weight", 1): {u}},
}


def owned(group: Group, unit: int) -> dict[tuple[str, int], set[int]]:
    """What a unit owns: (module and parameter name, axis) to positions."""
    return {
        (".".join(member.parameter.split(".")[-2:]), member.axis): set(member.index[unit].tolist())
        for member in group.members
    }


@pytest.mark.parametrize("family", HEADS)
def test_heads(family: str) -> None:
    graph = resect.trace(FAMILIES[family]())
    for group in graph.groups:
        if group.kind == "heads":
            for unit in range(group.units):
                assert owned(group, unit) == HEADS[family](unit)


@pytest.mark.parametrize("family", CHANNELS)
def test_channels(family: str) -> None:
    graph = resect.trace(FAMILIES[family]())
    for group in graph.groups:
        if group.kind == "channels":
            for unit in range(group.units):
                assert owned(group, unit) == CHANNELS[family](unit)


def test_residual() -> None:
    """A residual channel of an untied llama: embedding, norms, what reads it, what writes it, the output head."""
    graph = resect.trace(FAMILIES["llama_biases"]())
    (residual,) = [group for group in graph.groups if group.kind == "residual"]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    reads = [f"{path}.weight" for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    reads += ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    writes = ["self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias"]
    inside = [(name, 0) for name in norms + writes] + [(name, 1) for name in reads]
    expected = {(f"model.layers.{layer}.{name}", axis) for layer in range(3) for name, axis in inside}
    expected |= {("model.embed_tokens.weight", 1), ("model.norm.weight", 0), ("lm_head.weight", 1)}
    assert {(member.parameter, member.axis) for member in residual.members} == expected
    assert all(member.index.flatten().tolist() == list(range(60)) for member in residual.members)
    paths = {f"model.layers.{layer}.{name.removesuffix('.weight')}" for layer in range(3) for name in norms}
    assert set(residual.mixed) == paths | {"model.norm"}
