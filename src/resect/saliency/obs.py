"""Losses of removal under Kronecker curvature, in nats per prediction: half the quadratic form, with the rest updated or not.

`W` [rows, columns] is a layer's matrix, `F = G ⊗ A` its curvature. *OBS* (optimal brain surgeon) lets what stays make up for what
goes, *OBD* (optimal brain damage) does not. Source: LLM Surgeon (arXiv 2312.17244), section 3.2; Optimal Brain Surgeon
(Hassibi, Stork 1993).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resect.errors import UsageError
from resect.statistics import Curvature

Matrix = Float[Tensor, "rows columns"]


def element_losses(weight: Matrix, curvature: Curvature, *, update: bool = True) -> Matrix:
    """Of each element: `w² / (2 [G⁻¹]_rr [A⁻¹]_cc)`, or `w² G_rr A_cc / 2` without update."""
    rows, columns = _row_prices(curvature, update), _column_prices(curvature, update)
    return 0.5 * weight.square() * rows[:, None] * columns


def row_losses(weight: Matrix, curvature: Curvature, *, update: bool = True) -> Float[Tensor, " rows"]:
    """Of each row: `w_rᵀ A w_r / (2 [G⁻¹]_rr)`, or `G_rr w_rᵀ A w_r / 2` without update."""
    return 0.5 * (weight @ curvature.A * weight).sum(1) * _row_prices(curvature, update, rows=len(weight))


def column_losses(weight: Matrix, curvature: Curvature, *, update: bool = True) -> Float[Tensor, " columns"]:
    """Of each column: `w_cᵀ G w_c / (2 [A⁻¹]_cc)`, or `A_cc w_cᵀ G w_c / 2` without update."""
    weighted = weight if curvature.G is None else curvature.G @ weight
    return 0.5 * (weight * weighted).sum(0) * _column_prices(curvature, update)


def block_losses(
    weight: Matrix, curvature: Curvature, blocks: Int[Tensor, "units width"], *, update: bool = True
) -> Float[Tensor, " units"]:
    """Of each block of columns `C`: `tr(([A⁻¹]_CC)⁻¹ W_Cᵀ G W_C) / 2`, or `tr(A_CC W_Cᵀ G W_C) / 2` without update."""
    parts = weight.T[blocks]  # [units, width, rows]
    gram = (parts if curvature.G is None else parts @ curvature.G) @ parts.mT
    square = blocks[:, :, None], blocks[:, None, :]
    if update:
        solved: Tensor = torch.linalg.solve(curvature.A_inverse[square], gram)
        return 0.5 * solved.diagonal(dim1=1, dim2=2).sum(1)
    return 0.5 * (curvature.A[square] * gram).sum((1, 2))


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


def _row_prices(curvature: Curvature, update: bool, rows: int = 1) -> Float[Tensor, " rows"]:
    if curvature.G is None:
        return curvature.A.new_ones(rows)
    assert curvature.G_inverse is not None
    return 1 / curvature.G_inverse.diagonal() if update else curvature.G.diagonal()


def _column_prices(curvature: Curvature, update: bool) -> Float[Tensor, " columns"]:
    return 1 / curvature.A_inverse.diagonal() if update else curvature.A.diagonal()
