"""Which cut models a stock configuration describes, and which not."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from resect.checkpoint.stock import Stock, expressible_kinds, find_stock, shapes_of
from resect.graph import Group, Member
from tests.checkpoint.hand import Slices, channels, cut_by_hand, heads, merged, residual
from tests.models import FAMILIES, VOCABULARY, tiny

LAYERS = range(3)


def found(model: PreTrainedModel, slices: Slices) -> tuple[Stock | None, str]:
    return find_stock(shapes_of(cut_by_hand(model, slices)), model.config, type(model))


def changes(model: PreTrainedModel, slices: Slices) -> dict[str, int]:
    stock, reason = found(model, slices)
    assert stock is not None, reason
    return stock.changes


def test_a_dense_model_describes_itself() -> None:
    assert changes(FAMILIES["llama"](), {}) == {}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "olmo2", "smollm3"])
def test_channels_and_heads(family: str) -> None:
    model = FAMILIES[family]()
    slices = merged(channels(LAYERS, range(0, 56, 2)), heads(model, dict.fromkeys(LAYERS, [1])))
    expected = {"intermediate_size": 28, "num_attention_heads": 3, "num_key_value_heads": 1}
    head = {} if hasattr(model.config, "head_dim") else {"head_dim": 8}  # else it would follow from the number of heads
    if family == "olmo2":  # its norms run over all heads at once
        slices = merged(slices, {f"model.layers.{i}.self_attn.q_norm.weight": {0: range(24, 48)} for i in LAYERS})
        slices = merged(slices, {f"model.layers.{i}.self_attn.k_norm.weight": {0: range(8, 16)} for i in LAYERS})
    assert changes(model, slices) == expected | head


def test_all_widths_together() -> None:
    model = FAMILIES["llama"]()
    slices = merged(channels(LAYERS, range(30)), heads(model, dict.fromkeys(LAYERS, [0])), residual(model, range(48), 60))
    assert changes(model, slices) == {
        "hidden_size": 48,
        "intermediate_size": 30,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }


def test_a_relative_says_what_llama_refuses() -> None:
    model = FAMILIES["llama"]()
    stock, _ = found(model, residual(model, range(31), 60))  # 31 does not divide by 6 heads
    assert stock is not None
    assert (stock.config.model_type, stock.relabelled_from, stock.config.hidden_size) == ("mistral", "llama", 31)
    assert stock.config.sliding_window is None
    biased = FAMILIES["llama_biases"]()
    stock, _ = found(biased, residual(biased, range(31), 60))
    assert stock is not None
    assert (stock.config.model_type, stock.config.attention_bias, stock.config.mlp_bias) == ("granite", True, True)
    assert stock.config.attention_multiplier == 8**-0.5


def test_equal_numbers_are_told_apart() -> None:
    """4 layers, 4 heads, 4 KV heads, head size 4, hidden and MLP sizes 16: every change still finds its own field."""
    model = tiny(
        "Llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        vocab_size=VOCABULARY,
    )
    assert changes(model, channels(range(4), range(4))) == {"intermediate_size": 4}
    two = heads(model, dict.fromkeys(range(4), [0, 2]))
    assert changes(model, two) == {"num_attention_heads": 2, "num_key_value_heads": 2}
    assert changes(model, merged(two, channels(range(4), range(4)))) == {
        "intermediate_size": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }


def test_uneven_layers_are_named() -> None:
    model = FAMILIES["llama"]()
    stock, reason = found(model, channels([0, 1], range(28)))
    assert stock is None
    assert reason == "sizes differ from layer to layer: model.layers.*.mlp.gate_proj.weight axis 0 of 56 is 28, 56"


def test_the_caller_has_the_last_word() -> None:
    """GPT-2 narrower in proportion to its heads: the shapes alone don't say how many heads; only `accept` can."""
    model = FAMILIES["gpt2"]()
    target = {name: tuple({48: 32, 144: 96}.get(size, size) for size in shape) for name, shape in shapes_of(model).items()}
    tried = []

    def accept(stock: Stock) -> str:
        tried.append(stock.changes)
        return "" if stock.config.n_head == 4 else "wrong number of heads"

    stock, reason = find_stock(target, model.config, type(model), accept=accept)
    assert stock is not None, reason
    assert stock.changes == {"n_embd": 32, "n_head": 4}
    assert find_stock(target, model.config, type(model), accept=lambda stock: "no")[0] is None


def test_sizes_that_follow_another_are_pinned() -> None:
    """GPT-2's MLP is four times the residual width unless `n_inner` says otherwise."""
    model = tiny("GPT2", n_embd=48, n_head=6, n_layer=2, n_positions=80, vocab_size=VOCABULARY)
    assert model.config.n_inner is None
    shapes = {name: tuple({192: 100}.get(size, size) for size in shape) for name, shape in shapes_of(model).items()}
    stock, reason = find_stock(shapes, model.config, type(model))
    assert stock is not None, reason
    assert stock.changes == {"n_inner": 100}


def groups(model: PreTrainedModel) -> list[Group]:
    """Groups of a Llama-like model, written out."""
    made = [Group("residual", "residual", None, 60, tuple(residual_members(model)))]
    for layer in LAYERS:
        mlp, attention = f"model.layers.{layer}.mlp", f"model.layers.{layer}.self_attn"
        one = torch.arange(56)[:, None]
        sides = [(f"{mlp}.gate_proj.weight", 0), (f"{mlp}.up_proj.weight", 0), (f"{mlp}.down_proj.weight", 1)]
        made.append(Group(mlp, "channels", layer, 56, tuple(Member(name, axis, one) for name, axis in sides)))
        many, few = torch.arange(48).view(2, 24), torch.arange(16).view(2, 8)
        sides_heads = [("q_proj", 0, many), ("k_proj", 0, few), ("v_proj", 0, few), ("o_proj", 1, many)]
        members = tuple(Member(f"{attention}.{name}.weight", axis, index) for name, axis, index in sides_heads)
        made.append(Group(attention, "heads", layer, 2, members))
        made.append(Group(f"model.layers.{layer}", "blocks", layer, 1, ()))
    return made


def residual_members(model: PreTrainedModel) -> list[Member]:
    one = torch.arange(60)[:, None]
    return [
        Member(name, axis, one)
        for name, parameter in model.named_parameters()
        for axis, size in enumerate(parameter.shape)
        if size == 60
    ]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "gemma"])
def test_expressible_kinds(family: str) -> None:
    model = FAMILIES[family]()
    with torch.device("meta"):
        empty = type(model)(model.config)
    expected: dict[str, bool | str] = dict.fromkeys(["residual", "channels", "heads", "blocks"], True)
    if family == "gemma":  # it scales embeddings by the square root of their width
        expected["residual"] = "gemma: scalar_embed_scale of model.embed_tokens would be 7.681, not 7.746"
    assert expressible_kinds(empty, groups(model)) == expected


def test_inexpressible_kinds_say_why() -> None:
    model = FAMILIES["gpt2"]()
    index = torch.arange(144).view(3, 6, 8).transpose(0, 1).reshape(6, 24)
    members = [
        Group(
            f"transformer.h.{layer}.attn",
            "heads",
            layer,
            6,
            (
                Member(f"transformer.h.{layer}.attn.c_attn.weight", 1, index),
                Member(f"transformer.h.{layer}.attn.c_attn.bias", 0, index),
                Member(f"transformer.h.{layer}.attn.c_proj.weight", 0, torch.arange(48).view(6, 8)),
            ),
        )
        for layer in LAYERS
    ]
    answer = expressible_kinds(model, members)
    assert isinstance(answer["heads"], str)
    assert "divisible by num_heads" in answer["heads"]
