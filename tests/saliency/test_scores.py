"""Scores equal an independent float64 computation, for every criterion and reduction."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from transformers import PreTrainedModel

import resect
from resect.errors import UsageError
from resect.graph import Graph
from resect.saliency import score
from resect.statistics import Statistics, collect
from tests.models import FAMILIES, random_tokens
from tests.saliency.oracle import (
    CRITERIA,
    REDUCTIONS,
    Curvature,
    assert_same_scores,
    curvature,
    scores_by_definition,
)

# The member that consumes the group, by family: heads, channels.
CONSUMERS = {
    "llama": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "llama_mqa": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "llama_biases": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "qwen2": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "phi3": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "gemma2": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "gpt2": ("attn.c_proj.weight", "mlp.c_proj.weight"),
    "gpt_neox": ("attention.dense.weight", "mlp.dense_4h_to_h.weight"),
    "falcon_gqa": ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"),
}
TIED = ("qwen2", "gemma2", "gpt2")


@functools.cache
def exact(family: str) -> tuple[PreTrainedModel, Graph, Mapping[str, Curvature]]:
    """A model, its graph and the float64 gradients on the calibration tokens; the model too is in float64."""
    model = FAMILIES[family]().double()
    return model, resect.trace(model), curvature(model, tokens())


@functools.cache
def tokens() -> torch.Tensor:
    """Four calibration sequences [4, 10]."""
    return random_tokens(4, 10, seed=7)


@functools.cache
def collected(family: str, criterion: str) -> Statistics:
    """One estimation, to be scored in several ways."""
    model, graph, _ = exact(family)
    return collect(model, tokens(), graph, criterion)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", CONSUMERS)
def test_scores_equal_the_definition(family: str, criterion: str, reduction: str) -> None:
    _, graph, curvatures = exact(family)
    found = score(graph, collected(family, criterion), criterion=criterion, reduction=reduction)
    kinds = ("heads", "channels") if reduction in ("prod", "last") else ("heads", "channels", "residual")
    for group in graph.groups:
        if group.kind not in kinds:
            continue
        last = dict(zip(("heads", "channels"), CONSUMERS[family], strict=True)).get(group.kind, "")
        expected = scores_by_definition(group, curvatures, criterion=criterion, reduction=reduction, last=last)
        tolerance = 2e-4 * (len(group.members) if reduction == "prod" else 1)  # relative errors of factors add
        assert_same_scores(
            found[group.name], expected, what=f"{group.name}, {criterion}, {reduction}", tolerance=tolerance
        )


@pytest.mark.parametrize("family", TIED)
def test_tied_embeddings_count_once(family: str) -> None:
    """A tied matrix is one member of the residual group; the test above shows that both uses give it gradient."""
    model, graph, _ = exact(family)
    (residual,) = [group for group in graph.groups if group.kind == "residual"]
    embedding = model.get_input_embeddings().weight
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding]
    assert len(names) == 2, "not tied"
    assert [member.axis for member in residual.members if member.parameter in names] == [1]


@pytest.mark.parametrize("criterion", ["element1", "element2", "l1", "l2"])
def test_a_block_scores_all_it_holds(criterion: str) -> None:
    """Layer-wise: a block's score is the sum over every parameter inside it."""
    model, graph, curvatures = exact("llama_biases")
    found = score(graph, collect(model, tokens(), graph, criterion), criterion=criterion)
    blocks = [group for group in graph.groups if group.kind == "blocks"]
    element = {
        "element1": lambda c: (c.w * c.g).abs(),
        "element2": lambda c: c.w**2 * c.F,
        "l1": lambda c: c.w.abs(),
        "l2": lambda c: c.w**2,
    }[criterion]
    expected = torch.zeros(len(blocks), dtype=torch.float64)
    for name, value in curvatures.items():
        if name.startswith(graph.blocks.path):
            expected[int(name.removeprefix(graph.blocks.path).split(".")[1])] += element(value).sum()
    values = torch.cat([found[block.name] for block in blocks])
    assert_same_scores(values, expected, what=f"blocks, {criterion}")


def test_random_scores_repeat_and_vary() -> None:
    model, graph, _ = exact("llama")
    first = score(graph, collect(model, tokens(), graph, "random"), criterion="random")
    second = score(graph, collect(model, tokens(), graph, "random"), criterion="random")
    values = torch.cat([value.double() for value in first.values()])
    assert values.isfinite().all()
    assert values.unique().numel() > 0.99 * values.numel()
    assert "vocabulary" not in first  # its rows go by use, and only when asked for
    for group in graph.of_kind("heads", "channels", "residual", "blocks"):
        assert first[group.name].shape == (group.units,)
        assert torch.equal(first[group.name], second[group.name])


def test_weight_criteria_need_no_data() -> None:
    """`l1` and `l2` do not depend on the tokens."""
    model, graph, _ = exact("llama")
    for criterion in ("l1", "l2"):
        one = score(graph, collect(model, tokens(), graph, criterion), criterion=criterion)
        two = score(graph, collect(model, random_tokens(1, 5, seed=99), graph, criterion), criterion=criterion)
        for name, value in one.items():
            assert torch.equal(value, two[name])


def test_unknown_names_are_answered_with_the_nearest() -> None:
    model, graph, _ = exact("llama")
    with pytest.raises(UsageError, match="element2"):
        collect(model, tokens(), graph, "elemnt2")
    statistics = collect(model, tokens(), graph, "l1")
    with pytest.raises(UsageError, match="mean"):
        score(graph, statistics, criterion="l1", reduction="meen")
    with pytest.raises(UsageError, match="l1"):
        score(graph, statistics, criterion="element2")
