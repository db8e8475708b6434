"""When a redundant unit is set to zero: the half-space projection of LHSPG.

Source: LoRAShear (arXiv 2310.18356), section 4.2, and the half-space step of OTO (arXiv 2107.07467). Base weights are frozen and
have no gradient. Here: as much of it as the adapter sees, which its `B` knows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from peft.tuners.lora import LoraLayer
from torch import Tensor

from resect.recovery.adapting import factors
from resect.surgery import Fading, Slice

PENALTY = 1e-2
"""λ, where nothing asks for more."""
AMPLIFICATION = 20.0
"""Of the penalty that would just keep a unit from growing."""
UPPER = 1e3
"""The penalty is at most so many times its usual value."""


def penalty(product: Float[Tensor, " units"], norm: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """λ [units] from `⟨x, ∇f⟩` and `‖x‖`: more of it where the gradient step alone would let a unit grow."""
    needed = -product / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return (AMPLIFICATION * needed).clamp(PENALTY, PENALTY * UPPER)


def projected(
    product: Float[Tensor, " units"], norm: Float[Tensor, " units"], *, learning_rate: float, epsilon: float = 0.0
) -> Bool[Tensor, " units"]:
    """Which units go to zero: those whose trial step `x̂ = x - lr (∇f + λ x/‖x‖)` leaves their half-space, `x̂·x < ε ‖x‖²`."""
    trial = norm.square() - learning_rate * (product + penalty(product, norm) * norm)
    return trial < epsilon * norm.square()


def visible_gradient(
    step: Float[Tensor, "rows rank"], down: Float[Tensor, "rank columns"], scale: float
) -> Float[Tensor, "rows columns"]:
    """The gradient `∇f` of a layer's weight projected onto the rows of `A` [rank, columns], from `∂f/∂B = s ∇f Aᵀ`."""
    inverse: Tensor = torch.linalg.pinv(down @ down.T)
    return step @ inverse @ down / scale


def spent(fading: Fading, layers: Mapping[str, LoraLayer], *, learning_rate: float) -> dict[str, Tensor]:
    """The units [n] that fade and leave their half-space with this step, by group; gradients are those of the adapters' `B`."""
    found = {}
    for name, units in fading.fading.items():
        product = norm = torch.zeros(len(units), dtype=torch.float64)
        for one in fading.slices[name]:
            path = one.name.removesuffix(".base_layer.weight")
            if path in layers and path != one.name:
                x, gradient = (part.cpu().reshape(len(units), -1) for part in _composed(one, units, layers[path]))
                product, norm = product + (x * gradient).sum(1), norm + x.square().sum(1)
        found[name] = units[projected(product, norm.sqrt(), learning_rate=learning_rate)]
    return {name: units for name, units in found.items() if len(units)}


@torch.no_grad()
def _composed(one: Slice, units: Tensor, layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """The rows of `W + s B A` that belong to some units, and their gradient as far as the adapter sees it, in float64."""
    down, up, scale, step = factors(layer)
    rows = one.index[units].flatten().to(up.device)
    weight = one.take(units).movedim(one.axis, 0).flatten(1).double()
    down, gradient = down.double(), torch.zeros_like(up) if step is None else step
    return weight + scale * up[rows].double() @ down, visible_gradient(gradient[rows].double(), down, scale)
