"""One call from dense to small: sizes, layouts, iterations, settings, errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import resect
from resect.errors import EmulatedPrecision, NumericsError, UsageError
from resect.methods import METHODS, LLMPruner
from resect.statistics import Classes, Data, precision
from resect.statistics.precision import multiplies_bfloat16
from tests.models import FAMILIES, assert_same_function, assert_untouched, copy_of, random_tokens, snapshot, tiny_tokenizer

TOKENS = random_tokens(6, 12, seed=3)


def prune(model: PreTrainedModel, **options: Any) -> resect.Result:
    """A small run on fixed tokens."""
    return resect.prune(model, data=TOKENS, **options)


def block_share(result: resect.Result, model: PreTrainedModel, dense: PreTrainedModel) -> float:
    """Parameters in blocks, after over before, counted on the modules."""
    assert result.graph is not None
    path = result.graph.blocks.path
    left, before = (sum(p.numel() for p in m.get_submodule(path).parameters()) for m in (model, dense))
    return left / before


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("criterion", ["vector", "element1", "element2", "mix", "l1", "l2", "random"])
def test_every_criterion_in_every_layout(criterion: str, layout: str) -> None:
    dense = FAMILIES["llama"]()
    model = copy_of(dense)
    result = prune(model, keep=0.7, layout=layout, settings={"criterion": criterion})
    assert result.model is model
    assert 0.6 < block_share(result, model, dense) <= 0.7
    assert result.report["cut_equals_mask"]["difference"] <= 1e-4
    assert result.plan.is_uniform() or layout == "per-layer"


def test_cutting_again_from_the_plan_alone_gives_the_same_model() -> None:
    model = FAMILIES["qwen3"]()
    again = copy_of(model)
    result = prune(model, keep=0.6, layout="per-layer")
    resect.cut(again, resect.Plan.from_json(result.plan.to_json()))
    assert_same_function(model, again, random_tokens(2, 9))


def test_the_same_seed_gives_the_same_plan() -> None:
    plans = [prune(FAMILIES["gpt2"](), keep=0.7, layout="per-layer", seed=5).plan for _ in range(2)]
    assert plans[0] == plans[1]


def test_plan_only_leaves_the_model_alone() -> None:
    model = FAMILIES["llama"]()
    before = snapshot(model)
    result = prune(model, keep=0.7, plan_only=True)
    assert_untouched(model, before)
    assert result.plan.removed()


@pytest.mark.parametrize(("granularity", "kinds"), [("channel-wise", {"residual"}), ("layer-wise", {"blocks"})])
def test_other_granularities(granularity: str, kinds: set[str]) -> None:
    dense = FAMILIES["llama"]()
    model = copy_of(dense)
    result = prune(model, keep=0.66, layout="per-layer", settings={"granularity": granularity})
    assert {kept.kind for kept in result.plan.groups.values() if kept.removed} == kinds
    assert 0 < block_share(result, model, dense) <= 0.66


def test_iterations_score_what_is_left() -> None:
    """Steps compose: what goes in two steps is a budget met as exactly as in one, and usually another choice."""
    plans = {
        steps: prune(FAMILIES["llama"](), keep=0.5, layout="per-layer", settings={"iterations": steps}).plan for steps in (1, 4)
    }
    graph = resect.trace(FAMILIES["llama"]())
    dense = graph.parameter_count(blocks_only=True)
    for plan in plans.values():
        assert 0.45 < graph.parameter_count(plan.removed(), blocks_only=True) / dense <= 0.5
    assert plans[1].groups != plans[4].groups


def test_what_an_earlier_step_removed_stays_removed() -> None:
    model, method = FAMILIES["llama"](), LLMPruner(criterion="l2", iterations=2)
    graph = resect.trace(model)
    half, _ = LLMPruner(criterion="l2").plan(model, graph, Data((TOKENS,)), keep=0.75)
    whole, _ = method.plan(model, graph, Data((TOKENS,)), keep=0.5)
    assert (half & whole).groups == whole.groups


def test_steps_keep_to_the_blocks_that_were_asked_for() -> None:
    settings = {"blocks": {"heads": (1, 2), "channels": (1, 2)}, "iterations": 3}
    result = prune(FAMILIES["llama"](), keep=0.85, layout="per-layer", settings=settings)
    assert {kept.layer for kept in result.plan.groups.values() if kept.removed} == {1}


def test_paper_shares() -> None:
    """A quarter of the inner blocks: one of six MHA heads (1.5 rounded down) and 14 of 56 channels each."""
    settings = {"share": 0.25, "blocks": {"heads": (1, 2), "channels": (1, 3)}, "selection": "local"}
    result = prune(FAMILIES["llama_mha"](), layout="per-layer", settings=settings)
    assert result.plan.removed() == {
        "model.layers.1.self_attn.heads": 1,
        "model.layers.1.mlp.channels": 14,
        "model.layers.2.mlp.channels": 14,
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "olmo2", "cohere"])
def test_uniform_results_load_in_stock_transformers(family: str, tmp_path: Any) -> None:
    model = FAMILIES[family]()
    result = prune(model, keep=0.6)
    resect.save(model, tmp_path / "out", plan=result.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not type(loaded).__name__.startswith("Resect")
    assert_same_function(model, loaded, random_tokens(2, 9))


def test_uniform_layout_withholds_what_no_stock_configuration_says() -> None:
    """GPT-2's configuration ties the heads to the hidden size: channels go alone."""
    result = prune(FAMILIES["gpt2"](), keep=0.8)
    assert set(result.report["withheld"]) == {"heads"}
    assert {kept.kind for kept in result.plan.groups.values() if kept.removed} == {"channels"}


def test_self_calibration_needs_no_text() -> None:
    result = resect.prune(FAMILIES["llama"](), tiny_tokenizer(), keep=0.8, samples=2, length=10)
    assert result.report["calibration"]["source"] in ("self", ["self"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "llm-prunner"}, "'llm-pruner'"),
        ({"layout": "unifrom"}, "'uniform'"),
        ({"of": "block"}, "'blocks'"),
        ({"settings": {"criterium": "l2"}}, "'criterion'"),
        ({"settings": {"criterion": "elment2"}}, "'element2'"),
        ({"settings": {"iterations": 0}}, "iterations"),
        ({"settings": {"kinds": 3}}, "kinds = 3: it must be a list"),
        ({"method": "llm-surgeon", "settings": {"trials": {"bounds": [1]}}}, r"trials.bounds = \[1\]: it has too few entries"),
        ({"method": "llm-surgeon", "settings": {"trials": {"bounds": [1, 2, 3]}}}, "it must have at most 2 entries"),
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.2}, "keep"),
        ({"keep": 0.01}, "smallest reachable"),
    ],
)
def test_impossible_requests_are_answered_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = FAMILIES["llama"]()
    before = snapshot(model)
    with pytest.raises(UsageError, match=message):
        prune(model, **{"keep": 0.8, **options})
    assert_untouched(model, before)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        resect.prune(FAMILIES["llama"](), data="some.txt")


def test_bad_weights_are_named() -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj"):
        prune(model)


def test_methods_are_known_by_name() -> None:
    assert METHODS["llm-pruner"] is LLMPruner


def classifier() -> tuple[nn.Module, dict[str, Any]]:
    """A network that takes no tokens, and what it is pruned with."""
    data = Data([(torch.randn(32, 8), torch.randint(5, (32,)))], Classes())
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    return model, {"data": data, "inputs": (torch.randn(2, 8),), "of": "model", "layout": "per-layer"}


def test_other_networks_are_pruned_by_weights_and_compensated() -> None:
    model, options = classifier()
    result = resect.prune(model, settings={"criterion": "l1", "kinds": ["channels"], "compensation": {}}, **options)
    assert result.plan.removed()


def test_gradients_of_other_networks_are_refused() -> None:
    model, options = classifier()
    with pytest.raises(UsageError, match="take batches of tokens"):
        resect.prune(model, settings={"kinds": ["channels"]}, **options)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("llm-pruner", {}), ("llm-surgeon", {"shots": 2}), ("lorashear", {"analysis": None, "warmup_steps": 2, "periods": 1})],
)
def test_estimates_in_half_precision_are_near(
    method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the network computes is rounded; sums, scores and weights keep their types, and precision is as it was afterwards."""
    found, limit = {}, 0.05 if multiplies_bfloat16() else 0.1
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    for bf16 in (False, True):
        model = FAMILIES["llama"]()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            result = resect.prune(
                model, method=method, data=TOKENS, layout="per-layer", plan_only=True, settings={**settings, "bf16": bf16}
            )
        assert [one.category for one in heard] == [EmulatedPrecision] * bf16
        found[bf16] = torch.cat([scores.double() for _, scores in sorted(result.scores.items())])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not torch.is_autocast_enabled("cpu")
    finite = found[False].isfinite() & found[True].isfinite()
    exact, rounded = found[False][finite], found[True][finite]
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).norm() / exact.norm()) < limit
