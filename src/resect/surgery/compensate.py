"""Weight updates that let what stays make up for what goes, for a loss that is quadratic with curvature `G ⊗ A`, or a sum of two.

Source: LLM Surgeon (arXiv 2312.17244), sections 3.3 and 3.4. `W` is [rows, columns]; everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from resect.graph import Graph
from resect.plan import Plan
from resect.statistics import Curvature, Joint, Layer, layer_of, root_of, solved_by
from resect.surgery.positions import kept_positions, missing

Matrix = Float[Tensor, "rows columns"]
TOLERANCE = 2e-3
"""Conjugate gradients end when a step gains less than this share of the loss that is left."""
STEPS = 50
"""Conjugate gradients end after so many steps in any case."""
NEAR = 64
"""Rows that are brought up to date together while elements go one chunk after the other."""


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
    root = root_of(A[stays][:, stays], "the inputs that stay")
    found[:, stays] = solved_by(root, (weight @ A[:, stays]).mT).mT
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
    found[:, stays] = solved_by(root_of(square, "the inputs that stay"), wanted.mT).mT
    return found


def without_columns_under(weight: Matrix, curvature: Curvature, columns: Int[Tensor, " gone"]) -> Matrix:
    """The same for any curvature: with two terms, outputs count, too."""
    if curvature.joint is None:
        return without_columns(weight, curvature.A, columns)
    return without_rows_and_columns(weight, curvature, columns.new_empty(0), columns)


def without_rows_and_columns(
    weight: Matrix, curvature: Curvature, rows: Int[Tensor, " rows_gone"], columns: Int[Tensor, " columns_gone"]
) -> Matrix:
    """`W` with zeros in some rows and columns, the rest the joint optimum: `Π_G W Π_A`, for one term.

    `Π_A = I − E_C ([A⁻¹]_CC)⁻¹ E_Cᵀ A⁻¹`, and `Π_G` likewise from the left. With two it is no such product; but what stays are
    rows `R` and columns `S`, so that `G_RR ⊗ A_SS + G₂_RR ⊗ A₂_SS` has a joint basis, too, in which
    `G_RR X A_SS + G₂_RR X A₂_SS = (G W A + G₂ W A₂)_RS` is solved entry by entry.
    """
    if curvature.joint:
        return _without_lines(weight, curvature, rows, columns)
    found = without_columns(weight, curvature.A, columns)
    if curvature.G is None:
        found[rows] = 0
        return found
    return without_columns(found.mT, curvature.G, rows).mT


def _without_lines(weight: Tensor, curvature: Curvature, rows: Tensor, columns: Tensor) -> Tensor:
    R, S = (_staying(size, gone) for size, gone in zip(weight.shape, (rows, columns), strict=True))
    found = torch.zeros_like(weight)
    if not len(R) or not len(S):
        return found
    if len(R) == len(weight) and len(S) == weight.shape[1]:
        return weight.clone()
    joint = curvature.part(R, S).joint
    assert joint is not None
    found[R[:, None], S] = joint.solved(curvature.times(weight)[R][:, S])
    return found


def _staying(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def without_elements(
    weight: Matrix, curvature: Curvature, gone: Bool[Tensor, "rows columns"], *, tolerance: float = TOLERANCE
) -> Matrix:
    """`W` with zeros in some elements, the rest the joint optimum, for one term or two.

    The change `D` is `−W` where elements go; elsewhere `F D` must vanish, and `⟨D, F D⟩` is least. That is solved by conjugate
    gradients on the elements that stay, preconditioned with those of `F⁻¹`; each step costs four products with the factors. They
    end when a step gains less than `tolerance` of what is left of the loss.
    """
    change = weight.neg().masked_fill(~gone, 0)
    pushed = curvature.times(change)
    loss, residual = float((change * pushed).sum()), pushed.neg().masked_fill(gone, 0)
    step, before = torch.zeros_like(weight), 1.0
    for taken in range(STEPS):
        preconditioned = curvature.solved(residual).masked_fill(gone, 0)
        left = float((residual * preconditioned).sum())
        if left <= 0:
            break
        step = preconditioned + left / before * step if taken else preconditioned
        pushed = curvature.times(step).masked_fill(gone, 0)
        length = left / float((step * pushed).sum())
        change += length * step
        residual -= length * pushed
        before, gained = left, length * left
        loss -= gained
        if gained <= tolerance * loss:
            break
    return (weight + change).masked_fill(gone, 0)


def without_elements_in_chunks(
    weight: Matrix, curvature: Curvature, gone: Bool[Tensor, "rows columns"], *, max_correlate: int, sweeps: int = 1
) -> Matrix:
    """`W` with zeros in some elements, the rest updated jointly for at most `max_correlate` of them at a time, as in the paper.

    For the elements `Q` of a chunk, `(G⁻¹[Q_r,Q_r] ∘ A⁻¹[Q_c,Q_c]) m = w_Q` and `ΔW = −G⁻¹ M A⁻¹`, where `M` holds `m` at `Q`
    (with two terms, `F⁻¹[Q,Q] m = w_Q` and `ΔW = −F⁻¹ M`); later chunks see what earlier ones did. A chunk is a run of elements
    in the order of rows, because inputs are correlated most. Earlier elements drift from zero meanwhile and are set to zero at
    the end; every further sweep brings the whole closer to the joint optimum of all elements, which one chunk reaches at once.
    """
    chunks = gone.nonzero().split(max_correlate)
    if curvature.joint:
        return _in_chunks(weight, curvature.joint, chunks * sweeps).masked_fill(gone, 0)
    G_inverse, A_inverse = curvature.G_inverse, curvature.A_inverse
    done = torch.zeros_like(weight)  # M A⁻¹ of all chunks so far; G⁻¹ of it is what they took from the weights
    for several in _near(chunks * sweeps):
        first, last = int(several[0][0, 0]), int(several[-1][-1, 0]) + 1
        across = None if G_inverse is None else G_inverse[first:last]
        now = weight[first:last] - (done[first:last] if across is None else across @ done)
        for chunk in several:
            r, c = chunk.unbind(1)
            rows, at = r.unique_consecutive(return_inverse=True)
            between = (r[:, None] == r) if G_inverse is None else G_inverse[r[:, None], r]
            root = root_of(between * A_inverse[c[:, None], c], "the inverse curvature")
            M = weight.new_zeros(len(rows), weight.shape[1])
            M[at, c] = solved_by(root, now[r - first, c][:, None]).flatten()
            step = M @ A_inverse
            done[rows] += step
            if across is None:
                now[rows - first] -= step
            else:
                now -= across[:, rows] @ step
    return (weight - (done if G_inverse is None else G_inverse @ done)).masked_fill(gone, 0)


def _near(chunks: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Chunks in runs of a few rows, which are brought up to date together: so many rows are faster than one at a time."""
    several: list[Tensor] = []
    for chunk in chunks:
        if several and not 0 <= int(chunk[-1, 0] - several[0][0, 0]) < NEAR:
            yield several
            several = []
        several.append(chunk)
    if several and len(several[0]):
        yield several


def _in_chunks(weight: Tensor, joint: Joint, chunks: Sequence[Tensor]) -> Tensor:
    """The same with two terms, chunk by chunk in the basis of both: `P_Gᵀ W P_A` loses `d ∘ (Q_Gᵀ M Q_A)`."""
    if not chunks[0].numel():
        return weight.clone()
    Q_G, Q_A, d = joint.G.Q, joint.A.Q, joint.inverse
    within = joint.G.P.mT @ weight @ joint.A.P
    for chunk in chunks:
        rows, at = chunk[:, 0].unique_consecutive(return_inverse=True)
        left, right = Q_G[rows], Q_A[chunk[:, 1]]
        now = ((left @ within)[at] * right).sum(1)
        m = solved_by(root_of(_between(left, right, d, at), "the inverse curvature"), now[:, None])
        parts = torch.zeros(len(rows), Q_A.shape[1], dtype=weight.dtype).index_add_(0, at, m * right)
        within -= d * (left.mT @ parts)
    return Q_G @ within @ Q_A.mT


def _between(left: Tensor, right: Tensor, d: Tensor, at: Tensor) -> Tensor:
    """`F⁻¹[Q,Q]` for elements in a few rows: `left` [rows, ·] and `right` [elements, ·] are their parts of `Q_G` and `Q_A`."""
    found = right.new_empty(len(at), len(at))
    for row in range(len(left)):
        own = (at == row).nonzero().flatten()
        weights = (left * left[row]) @ d  # [rows, columns]
        found[own] = right[own] @ (weights[at] * right).mT
    return found
