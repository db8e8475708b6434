"""Weight updates that let what stays make up for what goes, for a loss that is quadratic with curvature `G ⊗ A`.

Source: LLM Surgeon (arXiv 2312.17244), sections 3.3 and 3.4. `W` is [rows, columns]; everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from resect.graph import Graph
from resect.plan import Plan
from resect.statistics import Curvature, Layer, layer_of
from resect.surgery.positions import kept_positions, missing

Matrix = Float[Tensor, "rows columns"]
MAX_CORRELATE = 500
"""Elements that are updated jointly. Paper: 2000. Here: fewer, because the time for all of them grows with its square."""


@dataclass(frozen=True)
class Loss:
    """A layer that reads units which a plan removes, and its columns [gone] that go with them."""

    layer: Layer
    columns: Tensor


def reading(model: nn.Module, graph: Graph, plan: Plan) -> list[Loss]:
    """The layers that lose inputs, in the order of the network."""
    found = []
    for name, axes in kept_positions(graph, plan).items():
        path, _, leaf = name.rpartition(".")
        layer = layer_of(model, path) if leaf == "weight" else None
        if layer and layer.input_axis in axes:
            gone = missing(graph.shapes[name][layer.input_axis], axes[layer.input_axis]).nonzero()
            found.append(Loss(layer, layer.columns_of(gone).flatten()))
    order = {name: place for place, name in enumerate(graph.shapes)}
    return sorted(found, key=lambda loss: order[f"{loss.layer.path}.weight"])


def without_columns(weight: Matrix, A: Float[Tensor, "columns columns"], columns: Int[Tensor, " gone"]) -> Matrix:
    """`W` with zeros in some columns, the others the best for inputs with second moments `A`: `Ŵ_S = W A[:,S] (A_SS)⁻¹`.

    The same as `W − W_C ([A⁻¹]_CC)⁻¹ A⁻¹[C,:]`, which no `G` changes.
    """
    stays = torch.ones(weight.shape[1], dtype=torch.bool)
    stays[columns] = False
    found = torch.zeros_like(weight)
    root = torch.linalg.cholesky(A[stays][:, stays])
    found[:, stays] = torch.cholesky_solve((weight @ A[:, stays]).mT, root).mT
    return found


def without_columns_after(
    weight: Matrix,
    inputs: Float[Tensor, "columns columns"],
    crossing: Float[Tensor, "columns columns"],
    columns: Int[Tensor, " gone"],
    *,
    damping: float,
) -> Matrix:
    """The same where inputs have changed: `Ŵ` minimises `E‖W x − Ŵ x̂‖² + λ ‖W − Ŵ‖²` over matrices with zeros in some columns.

    `inputs` are the second moments `E x̂ x̂ᵀ`, `crossing` is `E x x̂ᵀ`, `λ` is `damping` times the mean of the diagonal of `inputs`.
    """
    stays = torch.ones(weight.shape[1], dtype=torch.bool)
    stays[columns] = False
    ridge = damping * inputs.diagonal().mean()
    square = inputs[stays][:, stays] + ridge * torch.eye(int(stays.sum()), dtype=inputs.dtype)
    found = torch.zeros_like(weight)
    wanted = weight @ crossing[:, stays] + ridge * weight[:, stays]
    found[:, stays] = torch.cholesky_solve(wanted.mT, torch.linalg.cholesky(square)).mT
    return found


def without_rows_and_columns(
    weight: Matrix, curvature: Curvature, rows: Int[Tensor, " rows_gone"], columns: Int[Tensor, " columns_gone"]
) -> Matrix:
    """`W` with zeros in some rows and columns, the rest the joint optimum `Π_G W Π_A`.

    `Π_A = I − E_C ([A⁻¹]_CC)⁻¹ E_Cᵀ A⁻¹`, and `Π_G` likewise from the left.
    """
    found = without_columns(weight, curvature.A, columns)
    if curvature.G is None:
        found[rows] = 0
        return found
    return without_columns(found.mT, curvature.G, rows).mT


def without_elements(
    weight: Matrix,
    curvature: Curvature,
    gone: Bool[Tensor, "rows columns"],
    *,
    max_correlate: int = MAX_CORRELATE,
    sweeps: int = 1,
) -> Matrix:
    """`W` with zeros in some elements, the rest updated jointly for at most `max_correlate` of them at a time.

    For the elements `Q` of a chunk, `(G⁻¹[Q_r,Q_r] ∘ A⁻¹[Q_c,Q_c]) m = w_Q` and `ΔW = −G⁻¹ M A⁻¹`, where `M` holds `m` at `Q`;
    later chunks see what earlier ones did. A chunk is a run of elements in the order of rows, because inputs are correlated
    most. Earlier elements drift from zero meanwhile and are set to zero at the end; every further sweep brings the
    whole closer to the joint optimum of all elements, which one chunk reaches at once.
    """
    G_inverse, A_inverse = curvature.G_inverse, curvature.A_inverse
    found = weight.clone()
    chunks = gone.nonzero().split(max_correlate)
    for chunk in chunks * sweeps:
        r, c = chunk.unbind(1)
        rows, at = r.unique_consecutive(return_inverse=True)
        between = (r[:, None] == r) if G_inverse is None else G_inverse[r][:, r]
        root = torch.linalg.cholesky(between * A_inverse[c][:, c])
        M = found.new_zeros(len(rows), weight.shape[1])
        M[at, c] = torch.cholesky_solve(found[r, c][:, None], root).flatten()
        if G_inverse is None:
            found[rows] -= M @ A_inverse
        else:
            found -= G_inverse[:, rows] @ (M @ A_inverse)
    return found.masked_fill(gone, 0)
