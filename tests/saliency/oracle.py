"""Scores by the definition: whole gradients in float64, one sequence at a time, nothing reduced early.

Notation: w a parameter, L the mean token cross-entropy of all sequences, g = dL/dw, g_n the same for sequence n alone,
F = (1/N) sum_n g_n² [shape of w]. Source: LLM-Pruner, arXiv 2305.11627, section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from resect.graph import Graph, Group

DATA_CRITERIA = ("vector", "element1", "element2", "mix")
WEIGHT_CRITERIA = ("l1", "l2")
CRITERIA = DATA_CRITERIA + WEIGHT_CRITERIA


class Curvature(NamedTuple):
    """w, g and F of one parameter, all of its shape and float64."""

    w: Tensor
    g: Tensor
    F: Tensor


def curvature(model: nn.Module, tokens: Tensor) -> dict[str, Curvature]:
    """w, g and F of every parameter (tied ones once) for tokens [N, T], by autograd on a float64 copy."""
    exact = copy.deepcopy(model).double().eval()
    parameters = dict(exact.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    per_sequence = [_gradients(exact, parameters, sequence[None]) for sequence in tokens]
    whole = _gradients(exact, parameters, tokens)
    return {
        name: Curvature(parameter.detach(), whole[name], sum_of_squares(name, per_sequence) / len(tokens))
        for name, parameter in parameters.items()
    }


def sum_of_squares(name: str, gradients: list[dict[str, Tensor]]) -> Tensor:
    """sum_n g_n² of one parameter."""
    return torch.stack([gradient[name] ** 2 for gradient in gradients]).sum(0)


def _gradients(model: nn.Module, parameters: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    logits = model(input_ids=tokens).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(parameter) if g is None else g for (name, parameter), g in pairs}


ELEMENT: dict[str, Callable[[Curvature], Tensor]] = {
    "vector": lambda c: c.w * c.g,
    "element1": lambda c: c.w * c.g,
    "element2": lambda c: c.w**2 * c.F,
    "mix": lambda c: c.w * c.g - 0.5 * c.w**2 * c.F,
    "l1": lambda c: c.w.abs(),
    "l2": lambda c: c.w**2,
}


OVER_MEMBERS: dict[str, Callable[[Tensor], Tensor]] = {  # [members, units] to [units]
    "sum": lambda values: values.sum(0),
    "mean": lambda values: values.mean(0),
    "max": lambda values: values.amax(0),
    "prod": lambda values: values.prod(0),
    "last": lambda values: values[-1],
}


REDUCTIONS = tuple(OVER_MEMBERS)


def per_position(curvature: Curvature, axis: int, criterion: str) -> Tensor:
    """Value of every position along `axis` [size]: |sum| over the rest for `vector`, sum of |.| for the others."""
    element = ELEMENT[criterion](curvature)
    if element.ndim == 1:
        return element.abs()
    rows = element.movedim(axis, 0).flatten(1)
    return rows.sum(1).abs() if criterion == "vector" else rows.abs().sum(1)


def scores_by_definition(
    group: Group, curvatures: Mapping[str, Curvature], *, criterion: str, reduction: str, last: str = ""
) -> Tensor:
    """Score of every unit [units]: sum over a unit's positions of a member, then the reduction over members.

    `last` is the name (its end) of the member that consumes the group.
    """
    members = []
    for member in group.members:
        if reduction == "last" and not member.parameter.endswith(last):
            continue
        positions = per_position(curvatures[member.parameter], member.axis, criterion)
        units = [sum(float(positions[p]) for p in unit) for unit in member.index.tolist()]
        members.append(torch.tensor(units, dtype=torch.float64))
    if reduction == "last":
        assert len(members) == 1, f"{last} is not one member of {group.name}"
    return OVER_MEMBERS[reduction](torch.stack(members))


def all_scores(graph: Graph, curvatures: Mapping[str, Curvature], criterion: str) -> dict[str, Tensor]:
    """Summed scores of every width-wise group."""
    return {
        group.name: scores_by_definition(group, curvatures, criterion=criterion, reduction="sum")
        for group in graph.groups
        if group.kind != "blocks"
    }


def assert_same_scores(found: Tensor, expected: Tensor, *, what: str, tolerance: float = 2e-4) -> None:
    """Every unit within `tolerance` of its own score, or of a hundredth of the typical one where terms cancel."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert found.isfinite().all(), f"{what}: not finite"
    typical = expected.abs().median()
    assert typical > 0, f"{what}: scores of zero show nothing"
    error = ((found.double().cpu() - expected).abs() / (expected.abs() + 0.01 * typical)).max().item()
    assert error <= tolerance, f"{what}: off by {error:.2e} of a score, at most {tolerance:.0e} allowed"
