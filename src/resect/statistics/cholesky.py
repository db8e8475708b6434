"""The one way in which matrices are solved and inverted: they are positive definite, and their Cholesky factors say so.

General solvers go through LU factors, which torch gets wrong on CPUs for several matrices at once as soon as
`torch.set_num_threads` was called (pytorch/pytorch#142815, #141358). Cholesky factors cost half and come out right.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from resect.errors import NumericsError

Squares = Float[Tensor, "*batch size size"]


def root_of(squares: Squares, name: str = "curvature") -> Squares:
    """The lower triangular `L` of `L Lᵀ`, for one matrix or many.

    Args:
        squares: Symmetric positive definite matrices [..., size, size].
        name: What they are, for the error.

    Raises:
        NumericsError: One of them is not positive definite, or holds NaN or infinity.
    """
    root: Tensor
    root, info = torch.linalg.cholesky_ex(squares)
    if info.any() or not root.isfinite().all():
        size = squares.shape[-1]
        raise NumericsError(
            f"A matrix of {name} ({size} x {size}) is not positive definite, and cannot be solved. "
            "Use more text, more damping (settings.damping), or look for NaN and infinity among the weights."
        )
    return root


def solved_by(root: Squares, right: Float[Tensor, "*batch size columns"]) -> Float[Tensor, "*batch size columns"]:
    """`(L Lᵀ)⁻¹ B` for the factor `L` [..., size, size] and `B` [..., size, columns]."""
    return torch.cholesky_solve(right, root)


def inverse_of(squares: Squares, name: str = "curvature") -> Squares:
    """The inverse of positive definite matrices; raises as `root_of` does."""
    return torch.cholesky_inverse(root_of(squares, name))
