"""Protected groups stay whole, bit by bit, and the others meet the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resect
from resect.errors import UsageError
from resect.graph import Graph
from resect.methods.protection import protected
from resect.methods.sparsity import matrices
from tests.models import FAMILIES, copy_of, random_tokens

TOKENS = random_tokens(6, 12, seed=3)
HEADS, CHANNELS = "model.layers.0.self_attn.heads", "model.layers.2.mlp.channels"
SHARE: dict[str, Any] = {"criterion": "l2", "share": 0.5}
COUPLED = {
    "llm-pruner": ("llm-pruner", {}),
    "llm-pruner, in steps": ("llm-pruner", {"criterion": "mix", "iterations": 2, "selection": "local"}),
    "llm-surgeon": ("llm-surgeon", {"shots": 2}),
}


def weights(model: nn.Module, graph: Graph, *groups: str) -> dict[str, torch.Tensor]:
    names = {member.parameter for group in groups for member in graph.group(group).members}
    return {name: model.get_parameter(name).detach().clone() for name in names}


def block_share(model: nn.Module, dense: nn.Module) -> float:
    left, before = (sum(p.numel() for p in m.get_submodule("model.layers").parameters()) for m in (model, dense))
    return left / before


@pytest.mark.parametrize("name", COUPLED)
def test_protected_groups_are_untouched_and_the_others_meet_the_budget(name: str) -> None:
    method, settings = COUPLED[name]
    dense = FAMILIES["llama"]()
    graph, model = resect.trace(dense), copy_of(dense)
    asked: dict[str, Any] = {"method": method, "settings": settings, "data": TOKENS, "keep": 0.7, "layout": "per-layer"}
    free = resect.prune(copy_of(dense), **asked)
    assert {HEADS, CHANNELS} & set(free.plan.removed())  # else nothing is shown below
    result = resect.prune(model, **asked, protect=[HEADS, CHANNELS])
    found = weights(model, graph, HEADS, CHANNELS)
    for parameter, before in weights(dense, graph, HEADS, CHANNELS).items():
        assert torch.equal(found[parameter], before), parameter
    assert 0.6 < block_share(model, dense) <= 0.7
    assert not {HEADS, CHANNELS} & set(result.plan.removed())
    assert {HEADS, CHANNELS} < set(result.plan.groups) == set(free.plan.groups)
    assert {HEADS, CHANNELS} == set(result.report["protected"])


@pytest.mark.parametrize("mode", ["rows-columns", "unstructured", "2:4"])
def test_matrices_of_protected_groups_stay_dense(mode: str) -> None:
    dense = FAMILIES["llama"]()
    graph, model = resect.trace(dense), copy_of(dense)
    settings = {"mode": mode, "shots": 2, "gather": False}
    result = resect.prune(model, method="llm-surgeon", settings=settings, data=TOKENS, keep=0.7, protect=[HEADS, CHANNELS])
    found = weights(model, graph, HEADS, CHANNELS)
    for parameter, before in weights(dense, graph, HEADS, CHANNELS).items():
        assert torch.equal(found[parameter], before), parameter
    assert result.pattern is not None
    assert {f"{path}.weight" for path in result.pattern.layers}.isdisjoint(found)
    open_ = sum(layer.weight.numel() for layer in matrices(model, graph, [HEADS, CHANNELS]))
    whole = graph.parameter_count(blocks_only=True)
    wanted = open_ / 2 if mode == "2:4" else 0.3 * whole
    assert 0.9 * wanted < result.report["zeros"] <= wanted


def test_a_share_of_every_group_passes_over_the_protected() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match=r"layout=uniform .*sizes differ from layer to layer"):
        resect.prune(model, settings=SHARE, protect=[HEADS, CHANNELS])
    result = resect.prune(model, settings=SHARE, layout="per-layer", protect=[HEADS, CHANNELS])
    assert {name: len(kept.keep) for name, kept in result.plan.groups.items() if kept.layer == 0} == {
        "model.layers.0.mlp.channels": 28,
        HEADS: 2,
    }
    assert {len(kept.keep) for name, kept in result.plan.groups.items() if kept.layer == 1} == {28, 1}
    assert len(result.plan.groups[CHANNELS].keep) == 56


def test_a_uniform_layout_protects_whole_kinds_only() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    with pytest.raises(UsageError, match=r"1 of 3 groups of them are protected.*Use layout=per-layer"):
        resect.prune(model, settings={"criterion": "l2"}, protect=CHANNELS)
    heads = [group.name for group in graph.of_kind("heads")]
    result = resect.prune(model, settings={"criterion": "l2"}, keep=0.8, protect=heads)
    assert {graph.group(name).kind for name in result.plan.removed()} == {"channels"}
    assert result.plan.is_uniform()


def test_blocks_and_sublayers_around_a_protected_group_stay() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    assert protected(graph, HEADS) == (HEADS,)
    settings = {"criterion": "l2", "granularity": "layer-wise"}
    for layer in range(3):
        kept = f"model.layers.{layer}.mlp.channels"
        plan = resect.prune(model, settings=settings, keep=0.4, protect=kept, layout="per-layer", plan_only=True).plan
        assert set(plan.removed()) == {f"model.layers.{other}" for other in range(3) if other != layer}


def test_a_protected_block_keeps_what_is_in_it() -> None:
    graph = resect.trace(FAMILIES["llama"]())
    found = protected(graph, ["model.layers.1"])
    assert set(found) == {group.name for group in graph.groups if group.layer == 1}
    assert len(found) == 5


def test_too_much_protection_is_refused() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    channels = [group.name for group in graph.of_kind("channels")]
    asked: dict[str, Any] = {"settings": {"criterion": "l2"}, "layout": "per-layer"}
    with pytest.raises(UsageError, match=r"smallest reachable share is 0\.\d+\. Let more stay, or protect fewer groups"):
        resect.prune(model, **asked, keep=0.3, protect=channels)
    with pytest.raises(UsageError, match=r"Nothing to cut.* 6 groups are protected"):
        resect.prune(model, **asked, keep=0.8, protect=[*channels, *(group.name for group in graph.of_kind("heads"))])
    with pytest.raises(UsageError, match="outside of the .* groups that are protected"):
        resect.prune(
            model, method="llm-surgeon", settings={"mode": "unstructured"}, data=TOKENS, protect=["residual"], layout="per-layer"
        )


def test_unknown_names_and_files_are_refused(tmp_path: Path) -> None:
    graph = resect.trace(FAMILIES["llama"]())
    with pytest.raises(UsageError, match=r"Did you mean 'model\.layers\.0\.self_attn\.heads'"):
        protected(graph, ["model.layers.0.self_attn.head"])
    with pytest.raises(UsageError, match=r"cannot be read.*resect analyze"):
        protected(graph, str(tmp_path / "nothing.json"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="not an analysis"):
        protected(graph, tmp_path / "other.json")


def test_an_analysis_protects_what_it_found(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    found = resect.analyze(model, text=random_tokens(4, 16).flatten(), window=16, gamma=0.4)
    (tmp_path / "analysis.json").write_text(found.to_json())
    graph = resect.trace(model)
    assert len(found.protected) == 3
    for asked in (found, tmp_path / "analysis.json", [str(tmp_path / "analysis.json")]):
        assert set(protected(graph, asked)) == set(found.protected)
    with pytest.raises(UsageError, match="analysis is of another network"):
        protected(resect.trace(FAMILIES["llama_mha"]()), found)
