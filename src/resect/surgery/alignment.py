"""Heads that tell where words are in the sound: pairs of block and head in the settings of generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from resect.graph import Graph
from resect.plan import Plan


def renumber_alignment(model: nn.Module, plan: Plan, graph: Graph) -> None:
    """Gives `alignment_heads` the numbers that blocks and heads have after a cut, in place; those that are gone go.

    The pairs count the decoder's blocks and the heads of their attention to the encoder. Without any left the entry goes.
    """
    settings: Any = getattr(model, "generation_config", None)
    pairs = getattr(settings, "alignment_heads", None)
    stack = next((path for path in graph.blocks.lists if "decoder" in path.split(".")), None)
    if not pairs or stack is None:
        return
    stays = [number for number in range(_count(graph, stack)) if not _gone(plan, f"{stack}.{number}")]
    found = [_renumbered(plan, graph, stack, stays, pair) for pair in pairs]
    settings.alignment_heads = [pair for pair in found if pair] or None


def _renumbered(plan: Plan, graph: Graph, stack: str, stays: Sequence[int], pair: Sequence[int]) -> list[int] | None:
    block, head = pair
    if block not in stays or any(_gone(plan, f"{stack}.{block}.{part}") for part in ("encoder_attn", "encoder_attn_layer_norm")):
        return None
    group = next((group for group in graph.of_kind("heads") if _is_of(group, f"{stack}.{block}.encoder_attn.")), None)
    kept = plan.groups.get(group.name) if group is not None else None
    if kept is None:
        return [stays.index(block), head]
    return [stays.index(block), kept.keep.index(head)] if head in kept.keep else None


def _is_of(group: Any, start: str) -> bool:
    """Whether the heads of a group are those of a module."""
    return any(member.parameter.startswith(start) for member in group.members)


def _count(graph: Graph, stack: str) -> int:
    return sum(path.rpartition(".")[0] == stack for paths in graph.blocks.modules for path in paths)


def _gone(plan: Plan, name: str) -> bool:
    """Whether a block or a sub-layer is taken out."""
    kept = plan.groups.get(name)
    return kept is not None and not kept.keep
