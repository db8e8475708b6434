"""What a unit is worth while adapters train: the low-rank term stands in for the gradient, which no base weight needs then.

Source: LoRAShear (arXiv 2310.18356), section 4.2: five criteria, each over its norm over all units, with equal weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from resect.graph import Group, Member
from resect.saliency.score import unit_values

SHARES = (0.2, 0.2, 0.2, 0.2, 0.2)
"""Weights of magnitude, average magnitude, cosine, and Taylor terms of first and second order."""


def adapted_scores(
    groups: Sequence[Group], weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, " units"]]:
    """The saliency of every unit of some groups, `{group: [units]}`, float64, lowest goes first.

    `weights` are the base weights `x` of the network by name, `deltas` what adapters add to them, `s B A`, in the same shapes,
    where there is one. Slices of anything else do not count. Within a kind the order is the paper's. Here: scores of each kind
    add up to its number of weights, because norms grow with the root of that number, and heads would all go before channels.
    """
    members = {group.name: [member for member in group.members if member.parameter in weights] for group in groups}
    named = dict.fromkeys(member.parameter for chosen in members.values() for member in chosen)
    sums = {name: _sums(weights[name], deltas.get(name)) for name in named}
    parts = torch.cat([_parts(members[group.name], sums) for group in groups], 1)
    found = criteria(*parts)
    norms = found.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    total = (found / norms * found.new_tensor(SHARES)[:, None]).sum(0)
    kinds = [group.kind for group in groups for _ in range(group.units)]
    for kind in dict.fromkeys(kinds):
        alike = torch.tensor([one == kind for one in kinds])
        total[alike] *= parts[-1, alike].sum() / total[alike].sum()
    return dict(zip((group.name for group in groups), total.split([group.units for group in groups]), strict=True))


def criteria(size: Tensor, added: Tensor, product: Tensor, count: Tensor) -> Float[Tensor, "criteria units"]:
    """The five criteria of units `x` [units, n] with terms `d` [units, n], from `x·x`, `d·d`, `x·d` and `n` [units] each.

    `‖x‖`, `‖x‖ / n`, `1 + cos(x, d)`, `|x·d|`, `½ (x·d)²`. A unit without a term, or without weights, has cosine 0.
    """
    norms = (size * added).sqrt()
    cosine = torch.where(norms > 0, product / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)
    return torch.stack([size.sqrt(), size.sqrt() / count, 1 + cosine, product.abs(), product.square() / 2])


def _sums(weight: Tensor, delta: Tensor | None) -> dict[str, dict[int, Tensor]]:
    """`x·x`, `d·d`, `x·d` and the number of elements over every axis of a parameter: by name and axis, [positions]."""
    x = weight.detach().double()
    d = torch.zeros_like(x) if delta is None else delta.detach().double()
    products = {"size": x * x, "added": d * d, "product": x * d, "count": torch.ones_like(x)}
    return {name: {axis: _over(value, axis) for axis in range(x.ndim)} for name, value in products.items()}


def _over(values: Tensor, axis: int) -> Tensor:
    others = [other for other in range(values.ndim) if other != axis]
    return values.sum(others).cpu() if others else values.cpu()


def _parts(members: Sequence[Member], sums: Mapping[str, Mapping[str, Mapping[int, Tensor]]]) -> Float[Tensor, "4 units"]:
    """What the criteria of the units of one group are made of."""
    return torch.stack(
        [
            unit_values(members, {member.parameter: sums[member.parameter][name] for member in members}).sum(0)
            for name in ("size", "added", "product", "count")
        ]
    )
