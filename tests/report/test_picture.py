"""The picture of a network: a tree for a terminal, a digraph for Graphviz."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import resect
from resect.graph import Graph
from resect.report import Inspection, inspection, inspection_dot, inspection_tree
from tests.models import FAMILIES
from tests.report.test_reports import text_of
from tests.zoo.shrink import build

QUOTED = r'"((?:[^"\\]|\\.)*)"'


def look(model: nn.Module) -> tuple[Graph, Inspection]:
    graph = resect.trace(model)
    return graph, inspection(graph, model="tiny", architecture=type(model).__name__)


def nodes_and_edges(dot: str) -> tuple[set[str], set[tuple[str, str]]]:
    lines = [line.strip() for line in dot.splitlines()]
    nodes = {found.group(1) for line in lines if (found := re.fullmatch(rf"{QUOTED} \[.*\];", line))}
    edges = {found.groups() for line in lines if (found := re.fullmatch(rf"{QUOTED} -> {QUOTED} \[.*\];", line))}
    return nodes, edges  # type: ignore[return-value]


def test_the_tree_has_a_branch_for_like_blocks() -> None:
    _, found = look(FAMILIES["llama"]())
    text = text_of(inspection_tree(found))
    assert "model.layers 0-2  (3 blocks)" in text
    assert text.count("mlp.down_proj") == 2  # of the residual channels, and of the channels inside, once for all blocks
    for row in found.units:
        assert row.kind in text
        assert f"{row.unit_parameters:,} parameters, {row.of_model:.1%} of the model" in text
    for kept in found.frozen:
        assert kept.reason.split(" ")[0] in text
    assert max(map(len, text.splitlines())) <= 100


def test_unlike_blocks_have_branches_of_their_own() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.zeros(60))
    _, found = look(model)
    text = text_of(inspection_tree(found))
    assert "model.layers 0, 2  (2 blocks)" in text
    assert "model.layers 1\n" in re.sub(" +\n", "\n", text)
    nodes, edges = nodes_and_edges(inspection_dot(found))
    assert {end for edge in edges for end in edge} <= nodes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_every_edge_of_the_digraph_joins_what_was_drawn(name: str) -> None:
    _, found = look(FAMILIES[name]())
    dot = inspection_dot(found)
    nodes, edges = nodes_and_edges(dot)
    assert dot.startswith("digraph ")
    assert re.sub(QUOTED, "", dot).count("{") == re.sub(QUOTED, "", dot).count("}")
    assert {end for edge in edges for end in edge} <= nodes
    sliced = {member.parameter for row in found.units if not row.whole for member in row.members}
    assert len({end for edge in edges for end in edge if ":" in end}) == len(sliced)


def test_the_share_of_all_kinds_together_counts_nothing_twice() -> None:
    graph, found = look(build("mixtral"))
    together = next(row for row in found.shares if "+" in row.kind)
    assert together.kind == "heads + channels + experts"
    alone = {row.kind: row.parameters for row in found.shares}
    assert together.parameters < alone["heads"] + alone["channels"] + alone["experts"]
    inside = [group for group in graph.groups if group.kind in ("heads", "channels", "experts")]
    touched = {member.parameter for group in (*inside, *graph.of_kind("sublayers")) for member in group.members}  # norms go too
    assert together.parameters == sum(graph.parameters[name].value({}) for name in touched)


def test_members_say_which_layers_they_lie_in() -> None:
    _, found = look(FAMILIES["llama"]())
    residual = next(row for row in found.units if row.kind == "residual")
    layers = {member.parameter: member.layers for member in residual.members}
    assert (layers["model.embed_tokens.weight"], layers["model.layers.*.mlp.down_proj.weight"]) == ("", "0-2")
