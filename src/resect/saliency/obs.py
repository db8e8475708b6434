"""Losses of removal under Kronecker curvature, in nats per prediction: half the quadratic form, with the rest updated or not.

`W` [rows, columns] is a layer's matrix, `F = G ⊗ A` its curvature. *OBS* (optimal brain surgeon) lets what stays make up for what
goes, *OBD* (optimal brain damage) does not. Source: LLM Surgeon (arXiv 2312.17244), section 3.2; Optimal Brain Surgeon
(Hassibi, Stork 1993). Of two terms, `F = G₁ ⊗ A₁ + G₂ ⊗ A₂`, OBD sums both; OBS works in the basis where both are diagonal, with
`F⁻¹ = (Q_G ⊗ Q_A) diag(d) (Q_G ⊗ Q_A)ᵀ` (`resect.statistics.joint`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resect.errors import UsageError
from resect.statistics import Curvature, Joint, root_of, solved_by

Matrix = Float[Tensor, "rows columns"]
CHUNK = 1 << 24
"""Numbers that block losses of two terms hold at a time."""


def element_losses(weight: Matrix, curvature: Curvature, *, update: bool = True) -> Matrix:
    """Of each element: `w² / (2 [G⁻¹]_rr [A⁻¹]_cc)`, or `w² G_rr A_cc / 2` without update."""
    if update and curvature.joint:
        return 0.5 * weight.square() / curvature.joint.inverse_diagonal
    if not update:
        return _summed(0.5 * weight.square() * _outputs(G, weight)[:, None] * A.diagonal() for A, G in curvature.terms)
    return 0.5 * weight.square() * _row_prices(curvature, len(weight))[:, None] * _column_prices(curvature)


def row_losses(weight: Matrix, curvature: Curvature, *, update: bool = True) -> Float[Tensor, " rows"]:
    """Of each row: `w_rᵀ A w_r / (2 [G⁻¹]_rr)`, or `G_rr w_rᵀ A w_r / 2` without update.

    Of two terms: `Σ_j w̃_rj² / (2 Σ_i [Q_G]_ri² d_ij)` with `W̃ = W P_A`.
    """
    if update and (joint := curvature.joint):
        return 0.5 * ((weight @ joint.A.P).square() / (joint.G.Q.square() @ joint.inverse)).sum(1)
    if not update:
        return _summed(0.5 * (weight @ A * weight).sum(1) * _outputs(G, weight) for A, G in curvature.terms)
    return 0.5 * (weight @ curvature.A * weight).sum(1) * _row_prices(curvature, len(weight))


def column_losses(weight: Matrix, curvature: Curvature, *, update: bool = True) -> Float[Tensor, " columns"]:
    """Of each column: `w_cᵀ G w_c / (2 [A⁻¹]_cc)`, or `A_cc w_cᵀ G w_c / 2` without update.

    Of two terms: `Σ_i w̃_ic² / (2 Σ_j [Q_A]_cj² d_ij)` with `W̃ = P_Gᵀ W`.
    """
    if update and (joint := curvature.joint):
        return 0.5 * ((joint.G.P.mT @ weight).square() / (joint.inverse @ joint.A.Q.square().mT)).sum(0)
    if not update:
        return _summed(0.5 * (weight * _weighed(weight, G)).sum(0) * A.diagonal() for A, G in curvature.terms)
    return 0.5 * (weight * _weighed(weight, curvature.G)).sum(0) * _column_prices(curvature)


def block_losses(
    weight: Matrix, curvature: Curvature, blocks: Int[Tensor, "units width"], *, update: bool = True
) -> Float[Tensor, " units"]:
    """Of each block of columns `C`: `tr(([A⁻¹]_CC)⁻¹ W_Cᵀ G W_C) / 2`, or `tr(A_CC W_Cᵀ G W_C) / 2` without update.

    Of two terms: `Σ_i w̃_iCᵀ ([Q_A]_C diag(d_i) [Q_A]_Cᵀ)⁻¹ w̃_iC / 2` with `W̃ = P_Gᵀ W`.
    """
    if update and (joint := curvature.joint):
        within = joint.G.P.mT @ weight
        return 0.5 * torch.stack([_block_loss(joint, within[:, block], block) for block in blocks])
    square = blocks[:, :, None], blocks[:, None, :]
    parts = weight.T[blocks].mT  # [units, rows, width]
    if not update:
        return _summed(0.5 * (A[square] * (parts.mT @ _weighed(parts, G))).sum((1, 2)) for A, G in curvature.terms)
    root = root_of(curvature.A_inverse[square], "blocks of the inverse curvature")
    solved = solved_by(root, parts.mT @ _weighed(parts, curvature.G))
    return 0.5 * solved.diagonal(dim1=1, dim2=2).sum(1)


def independent_losses(
    weight: Matrix, curvature: Curvature, blocks: Int[Tensor, "units width"]
) -> Float[Tensor, " units"]:
    """Of each block of columns, without update, if its elements had nothing to do with each other: their losses summed."""
    return element_losses(weight, curvature, update=False).sum(0)[blocks].sum(1)


def _block_loss(joint: Joint, weight: Tensor, block: Tensor) -> Tensor:
    """Twice what one block costs, from its columns [rows, width] in the basis of the outputs, some rows at a time."""
    Q = joint.A.Q[block]
    chunks = zip(*(each.split(max(1, CHUNK // Q.numel())) for each in (weight, joint.inverse)), strict=True)
    losses = []
    for part, d in chunks:
        root = root_of((Q * d[:, None]) @ Q.mT, "blocks of the inverse curvature")
        losses.append((part * solved_by(root, part[..., None])[..., 0]).sum())
    return torch.stack(losses).sum()


def pattern_losses(losses: Matrix, keep: int, of: int) -> tuple[Float[Tensor, "rows groups"], Bool[Tensor, "rows columns"]]:
    """Of every `of` neighbours in a row, the summed losses of all but the `keep` dearest, and a mask of what goes.

    Raises `UsageError` where the columns do not divide.
    """
    rows, columns = losses.shape
    if not 0 < keep < of or columns % of:
        raise UsageError(
            f"A pattern of {keep}:{of} was asked; {columns} columns do not divide into groups of {of} that keep some."
        )
    grouped = losses.reshape(rows, columns // of, of)
    order = grouped.argsort(dim=2, stable=True)[..., : of - keep]
    goes = torch.zeros_like(grouped, dtype=torch.bool).scatter(2, order, True)
    return (grouped * goes).sum(2), goes.reshape(rows, columns)


def _weighed(weight: Tensor, G: Tensor | None) -> Tensor:
    """`G W`."""
    return weight if G is None else G @ weight


def _outputs(G: Tensor | None, weight: Tensor) -> Float[Tensor, " rows"]:
    return weight.new_ones(len(weight)) if G is None else G.diagonal()


def _summed(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def _row_prices(curvature: Curvature, rows: int) -> Float[Tensor, " rows"]:
    return curvature.A.new_ones(rows) if curvature.G_inverse is None else 1 / curvature.G_inverse.diagonal()


def _column_prices(curvature: Curvature) -> Float[Tensor, " columns"]:
    return 1 / curvature.A_inverse.diagonal()
