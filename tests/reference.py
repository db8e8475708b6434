"""What removing units means, without the package's surgery: zero slices, normalise over what stays, skip blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resect.graph import DEPTH, Graph, Group
from resect.plan import Plan


def removed_units(group: Group, plan: Plan) -> list[int]:
    """The units of `group` that `plan` takes away, ascending; none where the plan does not mention the group."""
    kept = plan.groups.get(group.name)
    return [] if kept is None else sorted(set(range(group.units)) - set(kept.keep))


def removed_positions(graph: Graph, plan: Plan) -> dict[tuple[str, int], set[int]]:
    """Positions removed by width-wise groups, for every (parameter, axis) that loses any."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group in graph.groups:
        units = removed_units(group, plan)
        if group.kind in DEPTH or not units:
            continue
        for member in group.members:
            gone.setdefault((member.parameter, member.axis), set()).update(member.index[units].flatten().tolist())
    return gone


def removed_blocks(graph: Graph, plan: Plan) -> list[int]:
    """Indices of the blocks that the plan takes out whole; each block is a group of one unit."""
    gone = [group.layer for group in graph.groups if group.kind == "blocks" and removed_units(group, plan)]
    return [layer for layer in gone if layer is not None]


def removed_sublayers(graph: Graph, plan: Plan) -> list[str]:
    """The modules that put out what removed sub-layers add."""
    gone = [group.name for group in graph.groups if group.kind == "sublayers" and removed_units(group, plan)]
    return [graph.sublayers[name].silences[0].path for name in gone]


def reference(model: PreTrainedModel, graph: Graph, plan: Plan) -> PreTrainedModel:
    """A copy with dense shapes that computes what the cut model should.

    Removed slices are zero. A norm that mixes a group's axis takes its statistics over the kept channels only and puts
    zeros back where channels are gone. A removed sub-layer adds nothing. A removed block hands its input on.
    """
    masked = copy.deepcopy(model)
    gone = removed_positions(graph, plan)
    parameters = dict(masked.named_parameters(remove_duplicate=False))
    for (name, axis), positions in gone.items():
        with torch.no_grad():
            parameters[name].index_fill_(axis, torch.tensor(sorted(positions)), 0.0)
    for path in {path for group in graph.groups if removed_units(group, plan) for path in group.mixed}:
        norm = masked.get_submodule(path)
        norm.register_forward_hook(_normalise_over(norm, gone[f"{path}.weight", 0]))
    for path in removed_sublayers(graph, plan):
        masked.get_submodule(path).register_forward_hook(_nothing)
    for block in removed_blocks(graph, plan):
        masked.get_submodule(f"{graph.blocks.path}.{block}").register_forward_hook(_hand_on, with_kwargs=True)
    return masked


def _normalise_over(norm: nn.Module, gone: set[int]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that replaces the output of `norm` by the same norm over the kept channels, scattered back."""
    small = copy.deepcopy(norm)
    size = small.get_parameter("weight").shape[0]
    keep = torch.tensor([position for position in range(size) if position not in gone])
    for name, parameter in list(small.named_parameters()):
        setattr(small, name, nn.Parameter(parameter.detach()[keep]))
    if isinstance(small, nn.LayerNorm):
        small.normalized_shape = (len(keep),)

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output).index_copy(-1, keep, small(inputs[0][..., keep]))

    return replace


def _hand_on(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
    """The block's input in the shape of its output, which is a tensor or a tuple that starts with one."""
    hidden = inputs[0] if inputs else keywords["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _nothing(module: nn.Module, inputs: Any, output: Any) -> Any:
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def count_parameters(graph: Graph, plan: Plan | None = None, *, within: str = "") -> int:
    """Parameters whose name starts with `within`, after `plan`: the product of every parameter's kept axis lengths."""
    gone = removed_positions(graph, plan) if plan else {}
    blocks = [f"{graph.blocks.path}.{i}." for i in removed_blocks(graph, plan)] if plan else []
    for name in [group.name for group in graph.of_kind("sublayers") if plan and removed_units(group, plan)]:
        blocks += [f"{silence.path}." for silence in graph.sublayers[name].silences]
    total = 0
    for name, shape in graph.shapes.items():
        if not name.startswith(within) or name.startswith(tuple(blocks)):
            continue
        size = 1
        for axis, length in enumerate(shape):
            size *= length - len(gone.get((name, axis), ()))
        total += size
    return total
