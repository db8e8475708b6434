"""Cut equals mask is checked on every run, and a coupling that was missed does not pass."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import resect
from resect.errors import ModelError, NumericsError, UsageError
from resect.graph import Graph
from resect.plan import Kept, Plan
from resect.surgery import cut_and_check
from tests.models import FAMILIES, assert_same_function, random_plan, random_tokens, tiny


def without_member(graph: Graph, ending: str) -> Graph:
    """The graph with one member forgotten in every group's masking, as a missing rule would leave it."""
    groups = tuple(
        dataclasses.replace(g, members=tuple(m for m in g.members if not m.parameter.endswith(ending))) for g in graph.groups
    )
    return dataclasses.replace(graph, groups=groups, _by_name={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_difference_is_reported(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"]()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(dtype)
    graph = resect.trace(model)
    found = cut_and_check(model, random_plan(graph, 3, uniform=False, kinds=("heads", "channels")), graph)
    assert found is not None
    assert 0 <= found["difference"] <= found["allowed"] < 1e-2
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_missed_bias_is_caught() -> None:
    """The first bias of GPT-2's MLP forgotten: its units still speak in the masked model, so the cut differs or cannot run."""
    model = FAMILIES["gpt2"]()
    whole = resect.trace(model)
    plan = random_plan(whole, 1, uniform=True, kinds=("channels",))
    broken = without_member(whole, "mlp.c_proj.weight")
    with pytest.raises((NumericsError, RuntimeError, resect.errors.ModelError)):
        cut_and_check(model, plan, broken)


def test_wrong_positions_are_caught() -> None:
    """A group whose output side is off by one unit has the right shapes and the wrong function."""
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    plan = random_plan(graph, 5, uniform=False, kinds=("channels",))
    right = resect.cut(FAMILIES["llama"](), plan, graph)
    groups = tuple(
        dataclasses.replace(
            g,
            members=tuple(
                dataclasses.replace(m, index=m.index.roll(1, 0)) if m.parameter.endswith("down_proj.weight") else m
                for m in g.members
            ),
        )
        for g in graph.groups
    )
    wrong = resect.cut(model, plan, dataclasses.replace(graph, groups=groups, _by_name={}))
    with pytest.raises(AssertionError):
        assert_same_function(right, wrong, random_tokens(2, 9))


def test_a_model_is_cut_once() -> None:
    model = FAMILIES["llama"]()
    plan = random_plan(resect.trace(model), 3, uniform=True, kinds=("channels",))
    resect.cut(model, plan)
    with pytest.raises(UsageError, match="cut already"):
        resect.cut(model, plan)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = random_plan(resect.trace(FAMILIES["llama"]()), 3, uniform=True, kinds=("heads",))
    with pytest.raises(UsageError, match="another network|no coupled group"):
        resect.cut(FAMILIES["llama_mha"](), plan)


class Remembering(nn.Module):
    """Looks a bias up once for evaluation and keeps it, outside of its buffers, until it is trained again."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.scale = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and "scale" not in self.kept:
            self.kept["scale"] = self.scale * 2
        return self.leave(self.enter(x) * (self.scale * 2 if self.training else self.kept["scale"]))


def test_what_a_network_keeps_for_evaluation_is_forgotten() -> None:
    model, x = Remembering().eval(), torch.randn(4, 5)
    graph = resect.trace(model, (x,))
    with torch.no_grad():
        before = model(x)
        (group,) = graph.of_kind("channels")
        plan = Plan(groups={group.name: Kept(kind=group.kind, layer=None, units=8, keep=(0, 3, 4))})
        with resect.masked(model, plan, graph):
            masked = model(x)
        assert torch.equal(model(x), before)
        assert not torch.equal(masked, before)
        resect.cut(model, plan, graph)
        assert torch.allclose(model(x), masked)
    assert not model.training


def hybrid() -> PreTrainedModel:
    """Three state-space blocks and one of attention, whose slot of the cache knows how long the text is."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "shared_intermediate_size": 32, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 0, "num_experts_per_tok": 0}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
    kinds = ["mamba", "mamba", "attention", "mamba"]
    return tiny("GraniteMoeHybrid", vocab_size=64, **sizes, **heads, **mamba, layer_types=kinds)


@pytest.mark.parametrize(("block", "writes"), [(1, True), (2, False)])
def test_a_model_that_would_write_no_text_is_refused(block: int, writes: bool) -> None:
    model: Any = hybrid()
    settings = {"drop_blocks": [block]}
    if writes:
        resect.prune(model, method="by-hand", settings=settings, layout="per-layer")
        found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert found.shape == (1, 6)
    else:
        with pytest.raises(ModelError, match="cannot go on from its cache"):
            resect.prune(model, method="by-hand", settings=settings, layout="per-layer")


class Elsewhere(nn.Module):
    """Goes another way than in the example: `way` is what it does then, with a number that no cut changes."""

    def __init__(self, when: str, *, stops: bool = False) -> None:
        super().__init__()
        self.enter, self.leave, self.when, self.stops = nn.Linear(5, 8), nn.Linear(8, 3), when, stops

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        here = {"batch": len(x) != 4, "length": x.shape[1] != 6, "training": self.training}
        if here[self.when]:
            x = x.view(*x.shape[:-1], 2, 4).flatten(-2) if self.stops else x / x.shape[-1]
        return self.leave(x)


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize(
    ("when", "told"),
    [("batch", "at another batch size"), ("length", "at another length or resolution"), ("training", "in training")],
)
def test_what_the_example_does_not_show_is_checked(when: str, told: str, stops: bool) -> None:
    model = Elsewhere(when, stops=stops).eval()
    state = copy.deepcopy(model.state_dict())
    graph = resect.trace(model, (torch.randn(4, 6, 5),))
    plan = random_plan(graph, 1, uniform=True, kinds=("channels",))
    error = ModelError if stops else NumericsError
    with pytest.raises(error, match=f"stops {told}, where the dense one runs" if stops else f"computes {told}: outputs"):
        cut_and_check(copy.deepcopy(model), plan, graph)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_padding_is_checked() -> None:
    """A language model that divides by the width of a layer wherever a mask has a zero."""
    model = FAMILIES["llama"]()
    inner = model.model.layers[0].mlp
    dense, forward = inner.gate_proj.out_features, inner.forward
    padded = {"now": False}

    def noted(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        padded["now"] = mask is not None and bool((mask == 0).any())

    model.register_forward_pre_hook(noted, with_kwargs=True)
    inner.forward = lambda x: forward(x) * (inner.gate_proj.out_features / dense if padded["now"] else 1)
    graph = resect.trace(model)
    plan = random_plan(graph, 3, uniform=True, kinds=("channels",))
    with pytest.raises(NumericsError, match="computes with padding: outputs"):
        cut_and_check(model, plan, graph)


def test_training_leaves_the_statistics_of_norms() -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(*layers).eval()
    graph = resect.trace(model, (torch.randn(2, 3, 9, 9),))
    found = cut_and_check(model, random_plan(graph, 1, uniform=True, kinds=("channels",)), graph)
    assert found["difference"] <= found["allowed"]
    norm: Any = model[1]
    assert not norm.training
    assert int(norm.num_batches_tracked) == 0
    assert not norm.running_mean.any()


def test_a_loss_alone_is_compared() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).pow(2).mean()

    model = Loss().eval()
    graph = resect.trace(model, (torch.randn(4, 5),))
    found = cut_and_check(model, random_plan(graph, 1, uniform=True, kinds=("channels",)), graph)
    assert 0 <= found["difference"] <= found["allowed"]
