"""REAP against a float64 twin that runs every expert by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import resect
from resect.errors import UsageError
from resect.graph import trace
from resect.statistics import expert_activations
from tests.models import _NARROW, FAMILIES, assert_untouched, random_tokens, snapshot, tiny

EXPERTS, CHOSEN = 5, 2
SIZES = {**_NARROW, "num_hidden_layers": 2, "vocab_size": 101, "max_position_embeddings": 80}


def mixture(name: str) -> PreTrainedModel:
    count = "num_local_experts" if name == "Mixtral" else "num_experts"
    return tiny(name, **SIZES, **{count: EXPERTS}, num_experts_per_tok=CHOSEN, moe_intermediate_size=16)


def twin(model: PreTrainedModel, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For every layer: sums of router weight times norm of an expert's output, and counts, of tokens routed to it."""
    model = model.double()
    model.set_experts_implementation("eager")  # the only one that computes in float64
    found: list[tuple[Tensor, Tensor]] = []

    def watch(module: Any, args: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
        hidden, numbers, weights = args
        norms, counts = torch.zeros(EXPERTS).double(), torch.zeros(EXPERTS)
        for token in range(len(hidden)):
            for slot in range(CHOSEN):
                expert = int(numbers[token, slot])
                gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
                out = module.down_proj[expert] @ (nn.functional.silu(gate) * up)
                norms[expert] += weights[token, slot] * out.norm()
                counts[expert] += 1
        found.append((norms, counts))

    handles = [m.register_forward_hook(watch) for path, m in model.named_modules() if path.endswith("experts")]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_means_over_the_tokens_of_each_expert(name: str) -> None:
    model, tokens = mixture(name), random_tokens(3, 12)
    graph, before = trace(model), snapshot(model)
    found = expert_activations(model, tokens, graph, batch_tokens=1024)
    assert_untouched(model, before)
    parts = [expert_activations(model, part, graph, batch_tokens=12) for part in tokens.split([2, 1])]
    for group, (norms, counts) in zip(graph.of_kind("experts"), twin(mixture(name), tokens), strict=True):
        one = found[group.name]
        assert torch.equal(one.tokens, counts)
        assert float(counts.sum()) == CHOSEN * tokens.numel()
        torch.testing.assert_close(one.norms, norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.means, norms / counts.clamp_min(1), rtol=1e-5, atol=0)
        both = parts[0][group.name] + parts[1][group.name]
        torch.testing.assert_close(both.norms, one.norms, rtol=1e-5, atol=0)


def test_the_experts_that_add_least_go() -> None:
    model, tokens = mixture("Qwen3Moe"), random_tokens(4, 12)
    graph = trace(model)
    scores = {name: one.means for name, one in expert_activations(model, tokens, graph, batch_tokens=1024).items()}
    settings = {"criterion": "reap", "widths": {"experts": 3}}
    found = resect.prune(model, data=tokens, settings=settings)
    for name, kept in found.plan.groups.items():
        assert kept.keep == tuple(sorted(scores[name].argsort()[-3:].tolist()))
    assert found.report["cut_equals_mask"]["difference"] <= 1e-4


def test_a_second_iteration_scores_what_is_left() -> None:
    found = resect.prune(
        mixture("Qwen3Moe"), data=random_tokens(4, 12), settings={"criterion": "reap", "iterations": 2, "widths": {"experts": 2}}
    )
    for name, kept in found.plan.groups.items():
        assert len(kept.keep) == 2
        assert int((found.scores[name] == 0).sum()) >= 1  # what went at first is asked by no token any more


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (lambda: FAMILIES["llama"](), {}, "experts were asked for"),
        (lambda: mixture("Qwen3Moe"), {"kinds": ["heads", "experts"]}, "reap scores experts, and heads"),
        (lambda: mixture("Qwen3Moe"), {"widths": {"channels": 8}}, "reap scores experts, and channels"),
    ],
)
def test_what_it_cannot_score(model: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resect.prune(model(), data=random_tokens(4, 12), settings={"criterion": "reap", **settings})


def test_experts_that_do_not_take_the_router_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("Qwen3Moe")
    graph = trace(model)
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    monkeypatch.setattr(experts, "forward", lambda hidden, routing: hidden)
    with pytest.raises(UsageError, match="needs the router's choice"):
        expert_activations(model, random_tokens(2, 8), graph, batch_tokens=64)
