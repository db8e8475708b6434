"""Saliency from adapters, against the five criteria written out unit by unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import resect
from resect.saliency import adapted_scores
from tests.models import FAMILIES


def written_out(x: Tensor, d: Tensor) -> list[float]:
    """The criteria of one unit, in the order of the paper."""
    product = float(x @ d)
    length, added = math.sqrt(float(x @ x)), math.sqrt(float(d @ d))
    cosine = 1 + product / (length * added) if length * added else 1.0
    return [length, length / len(x), cosine, abs(product), 0.5 * product**2]


def test_against_units_written_out() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    groups = list(graph.of_kind("heads", "channels"))
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    deltas = {
        name: 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
        if "_proj" in name and "up_proj" not in name  # one layer has no adapter
    }
    found = adapted_scores(groups, weights, deltas)
    rows = []
    for group in groups:
        for unit in range(group.units):
            x = torch.cat([weights[m.parameter].detach().index_select(m.axis, m.index[unit]).flatten() for m in group.members])
            d = torch.cat(
                [
                    deltas.get(m.parameter, torch.zeros_like(weights[m.parameter])).index_select(m.axis, m.index[unit]).flatten()
                    for m in group.members
                ]
            )
            rows.append(written_out(x.double(), d.double()))
    table = torch.tensor(rows, dtype=torch.float64)
    expected = (table / table.norm(dim=0) * 0.2).sum(1)
    for kind in ("heads", "channels"):  # each kind adds up to its number of weights
        alike = torch.tensor([group.kind == kind for group in groups for _ in range(group.units)])
        members = [member for group in groups if group.kind == kind for member in group.members]
        count = sum(m.index.numel() * weights[m.parameter].numel() // weights[m.parameter].shape[m.axis] for m in members)
        expected[alike] *= count / expected[alike].sum()
    together = torch.cat([found[group.name] for group in groups])
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=0)
    assert len(set(together.tolist())) == len(together)


def test_without_adapters_it_is_magnitude_alone() -> None:
    model = FAMILIES["llama"]()
    groups = list(resect.trace(model).of_kind("channels"))
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    found = torch.cat(list(adapted_scores(groups, weights, {}).values()))
    parts = [
        sum(weights[m.parameter].index_select(m.axis, m.index[unit]).square().sum() for m in group.members)
        for group in groups
        for unit in range(group.units)
    ]
    size = torch.tensor(parts, dtype=torch.float64).sqrt()
    even = torch.ones_like(size) / math.sqrt(len(size))
    expected = 0.4 * size / size.norm() + 0.2 * even
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=1e-10, atol=0)
