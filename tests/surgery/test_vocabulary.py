"""A cut vocabulary: tokens that stay have the logits that they had, and their new numbers wherever the model names them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

import resect
from resect.errors import ModelError, NumericsError, UsageError
from resect.plan import Kept, Plan
from resect.surgery import cut_and_check
from tests.models import FAMILIES, assert_same_logits, logits_with_cache, logits_without_cache, random_plan, tiny

KEEP = (0, 1, 2, 7, *range(20, 70), 100)


def rows(keep: tuple[int, ...] = KEEP, units: int = 101) -> Plan:
    return Plan(groups={"vocabulary": Kept(kind="vocabulary", layer=None, units=units, keep=keep)})


def named(**fields: Any) -> LlamaForCausalLM:
    """A llama whose special tokens lie anywhere."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 101}
    model: Any = tiny("Llama", **sizes, **{"pad_token_id": 40, "bos_token_id": 50, "eos_token_id": [60, 100], **fields})
    return model


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "phi", "opt", "gemma2", "bloom", "cohere"])
def test_kept_tokens_keep_their_logits(family: str) -> None:
    model = FAMILIES[family]()
    keep, new = torch.tensor(KEEP), torch.randint(len(KEEP), (2, 12))
    expected = logits_without_cache(model, keep[new])[..., keep]
    small: Any = resect.cut(copy.deepcopy(model), rows())
    assert_same_logits(logits_without_cache(small, new), expected)
    assert_same_logits(logits_with_cache(small, new), expected)
    assert small.config.vocab_size == len(KEEP)
    assert model.config.vocab_size == 101


@pytest.mark.parametrize("kinds", [("vocabulary",), ("heads", "channels", "residual", "vocabulary")])
def test_the_check_compares_kept_tokens(kinds: tuple[str, ...]) -> None:
    model = FAMILIES["qwen3"]()
    graph = resect.trace(model)
    plan = random_plan(graph, 5, uniform=False, kinds=kinds)
    assert plan.removed()["vocabulary"]
    found = cut_and_check(model, plan, graph)
    assert found is not None
    assert found["difference"] <= found["allowed"]


def test_the_check_finds_rows_that_were_exchanged() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    (group,) = graph.of_kind("vocabulary")
    members = [dataclasses.replace(m, index=m.index.roll(1, 0)) if "lm_head" in m.parameter else m for m in group.members]
    groups = tuple(dataclasses.replace(g, members=tuple(members)) if g is group else g for g in graph.groups)
    with pytest.raises(NumericsError, match="does not compute"):
        cut_and_check(model, rows(), dataclasses.replace(graph, groups=groups, _by_name={}))


def test_a_head_that_was_forgotten_cannot_be_cut() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    groups = tuple(dataclasses.replace(g, members=g.members[:1]) if g.kind == "vocabulary" else g for g in graph.groups)
    with pytest.raises(ModelError):
        resect.cut(model, rows(), dataclasses.replace(graph, groups=groups, _by_name={}))


def test_named_tokens_are_renumbered_everywhere() -> None:
    model = named()
    model.model.image_token_id = 41  # some modules keep what the configuration says
    model.generation_config = GenerationConfig(
        pad_token_id=40,
        eos_token_id=[60, 100],
        suppress_tokens=[3, 45],
        forced_decoder_ids=[[1, 50]],
        bad_words_ids=[[44, 3], [44]],
    )
    shared = model.config
    keep = tuple(range(40, 101))
    resect.cut(model, rows(keep))
    config: Any = model.config
    generation: Any = model.generation_config
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (61, 0, 10, [20, 60])
    assert (shared.vocab_size, shared.pad_token_id, shared.eos_token_id) == (101, 40, [60, 100])
    assert model.model.config is config
    assert (generation.pad_token_id, generation.eos_token_id) == (0, [20, 60])
    assert (generation.suppress_tokens, generation.forced_decoder_ids, generation.bad_words_ids) == ([5], [[1, 10]], [[4]])
    assert (model.vocab_size, model.model.vocab_size, model.model.padding_idx) == (61, 61, 0)
    assert (model.model.embed_tokens.padding_idx, model.model.embed_tokens.num_embeddings) == (0, 61)
    assert model.lm_head.out_features == 61
    assert model.model.image_token_id == 1


def test_configurations_inside_configurations() -> None:
    model = FAMILIES["llama"]()
    model.config.text_config = copy.deepcopy(model.config)
    model.config.text_config.eos_token_id = 100
    resect.cut(model, rows())
    assert (model.config.text_config.vocab_size, model.config.text_config.eos_token_id) == (len(KEEP), len(KEEP) - 1)


def test_a_padding_row_that_nobody_names_may_go() -> None:
    model: Any = FAMILIES["gpt2"]()
    model.transformer.wte.padding_idx = 5
    resect.cut(model, rows())
    assert model.transformer.wte.padding_idx is None


@pytest.mark.parametrize(("gone", "name"), [(40, "pad_token_id"), (50, "bos_token_id"), (100, "eos_token_id")])
def test_named_tokens_must_stay(gone: int, name: str) -> None:
    model = named()
    with pytest.raises(UsageError, match=f"drops token {gone}, which is the model's config.{name}"):
        resect.cut(model, rows(tuple(token for token in range(101) if token != gone)))
    assert model.config.vocab_size == 101


def test_tokens_that_a_module_names_must_stay() -> None:
    model = FAMILIES["llama"]()
    model.model.image_token_id = 5
    with pytest.raises(UsageError, match="drops token 5, which is the model's model.image_token_id"):
        resect.cut(model, rows())


def test_the_loss_of_a_cut_model() -> None:
    """Models hand the size of their vocabulary to the loss."""
    model = FAMILIES["llama"]()
    new = torch.randint(len(KEEP), (2, 12))
    logits = resect.cut(model, rows())(new, labels=new)
    expected = torch.nn.functional.cross_entropy(logits.logits[:, :-1].flatten(0, 1), new[:, 1:].flatten())
    torch.testing.assert_close(logits.loss, expected)


@pytest.mark.parametrize(
    ("biases", "expected"),
    [
        ([[[44, 45], -1.5], [[44, 3], 2.0]], [[[4, 5], -1.5]]),
        ({(44,): 1.0, (3,): 2.0}, {(4,): 1.0}),
        ([[[3], 2.0]], None),
    ],
)
def test_biases_of_sequences_follow(biases: Any, expected: Any) -> None:
    model = named()
    model.generation_config = GenerationConfig(pad_token_id=40, eos_token_id=100)
    model.generation_config.sequence_bias = biases
    resect.cut(model, rows(tuple(range(40, 101))))
    generation: Any = model.generation_config
    assert generation.sequence_bias == expected
