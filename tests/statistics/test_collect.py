"""Statistics add, look at a model without touching it, and name what is not a number."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import resect
from resect.errors import NumericsError, ResectError
from resect.graph import Graph
from resect.saliency import score
from resect.statistics import collect
from tests.models import FAMILIES, assert_untouched, copy_of, random_tokens, snapshot
from tests.saliency.oracle import CRITERIA, all_scores, assert_same_scores, curvature

EVERY = (*CRITERIA, "random")


@functools.cache
def dense(family: str) -> tuple[PreTrainedModel, Graph]:
    """The family's tiny model and its graph, for reading only."""
    model = FAMILIES[family]()
    return model, resect.trace(model)


def scores(model: PreTrainedModel, tokens: Tensor, criterion: str) -> dict[str, Tensor]:
    """Summed scores from one estimation."""
    _, graph = dense("llama")
    return score(graph, collect(model, tokens, graph, criterion), criterion=criterion)


def assert_halves_make_a_whole(family: str, criterion: str, first: int) -> None:
    """Statistics of the first sequences plus those of the rest score like all sequences at once, either way round."""
    model, graph = dense(family)
    tokens = random_tokens(7, 9, seed=21)
    one = collect(model, tokens[:first], graph, criterion, elements=True)
    two = collect(model, tokens[first:], graph, criterion, elements=True)
    weights = dict(model.named_parameters())
    whole = score(graph, collect(model, tokens, graph, criterion), criterion=criterion)
    for halves in (one + two, two + one):
        found = score(graph, halves, criterion=criterion, weights=weights)
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            assert_same_scores(found[name], value.double(), what=f"{name}, {criterion}")


@pytest.mark.parametrize("criterion", EVERY)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_halves_make_a_whole(family: str, criterion: str) -> None:
    assert_halves_make_a_whole(family, criterion, first=3)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_shares_of_one_sequence_add(criterion: str) -> None:
    """The smallest and the largest share."""
    assert_halves_make_a_whole("llama", criterion, first=1)


@pytest.mark.parametrize("criterion", EVERY)
def test_adding_leaves_the_parts_alone(criterion: str) -> None:
    model, graph = dense("llama")
    one, two = (collect(model, random_tokens(2, 9, seed=seed), graph, criterion, elements=True) for seed in (1, 2))
    weights = dict(model.named_parameters())
    before = score(graph, one, criterion=criterion, weights=weights)
    _ = one + two
    for name, value in score(graph, one, criterion=criterion, weights=weights).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_order_of_sequences_does_not_matter(criterion: str) -> None:
    model, _ = dense("llama")
    tokens = random_tokens(5, 9, seed=4)
    forwards, backwards = scores(model, tokens, criterion), scores(model, tokens.flip(0), criterion)
    for name, value in forwards.items():
        assert_same_scores(backwards[name], value.double(), what=f"{name}, {criterion}")


@pytest.mark.parametrize("criterion", EVERY)
def test_model_is_bit_identical_after_estimation(criterion: str) -> None:
    """Old gradients, frozen parameters, modes and foreign hooks are as before."""
    model, graph = copy_of(dense("llama")[0]), dense("llama")[1]
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.get_parameter("model.norm.weight").grad = torch.full((60,), 3.0)
    model.get_parameter("model.layers.2.mlp.up_proj.weight").requires_grad_(False)
    before = snapshot(model)
    collect(model, random_tokens(3, 9), graph, criterion)
    assert_untouched(model, before)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_old_gradients_and_frozen_parameters_do_not_change_scores(criterion: str) -> None:
    model, graph = copy_of(dense("llama")[0]), dense("llama")[1]
    tokens = random_tokens(3, 9, seed=8)
    expected = all_scores(graph, curvature(model, tokens), criterion)
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        found = scores(model, tokens, criterion)
    assert "vocabulary" not in found
    for name, value in expected.items():
        if name != "vocabulary":
            assert_same_scores(found[name], value, what=f"{name}, {criterion}")


@pytest.mark.parametrize("criterion", ["vector", "element1"])
def test_first_order_frees_gradients_on_the_way(criterion: str) -> None:
    """While going backward, at most one block's gradients and the largest parameter outside hang on the model."""
    model, graph = copy_of(dense("llama")[0]), dense("llama")[1]
    parameters = dict(model.named_parameters())
    held = [0]

    def look(_: Tensor) -> None:
        held.append(sum(p.grad.numel() for p in parameters.values() if p.grad is not None))

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(look)
    collect(model, random_tokens(3, 9), graph, criterion)
    block = sum(p.numel() for name, p in parameters.items() if name.startswith(f"{graph.blocks.path}.0."))
    outside = max(p.numel() for name, p in parameters.items() if not name.startswith(graph.blocks.path))
    assert max(held) <= block + outside


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weight_is_named(criterion: str, value: float) -> None:
    model, graph = copy_of(dense("llama")[0]), dense("llama")[1]
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = value
    before = snapshot(model)
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        collect(model, random_tokens(2, 9), graph, criterion)
    assert_untouched(model, before)


@pytest.mark.parametrize("criterion", ["vector", "element1", "element2", "mix"])
def test_bad_loss_is_named(criterion: str) -> None:
    """Weights that are finite but overflow on the way give a loss that is no number."""
    model, graph = copy_of(dense("llama")[0]), dense("llama")[1]
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(3e38)
    before = snapshot(model)
    with pytest.raises(NumericsError, match="loss"):
        collect(model, random_tokens(2, 9), graph, criterion)
    assert_untouched(model, before)


@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (3, 1)])
def test_nothing_to_predict_is_refused(shape: tuple[int, int]) -> None:
    model, graph = dense("llama")
    with pytest.raises(ResectError):
        collect(model, torch.full(shape, 5), graph, "element2")
