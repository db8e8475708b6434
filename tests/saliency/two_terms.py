"""Optimal removal under two Kronecker terms by brute force: the dense KKT system on `F = G1 (x) A1 + G2 (x) A2` written out."""

import torch
from torch import Tensor

from resect.statistics import Curvature
from tests.saliency.kkt import factor, weights


def written_out(curvature: Curvature) -> Tensor:
    """F for the row-major weight."""
    assert curvature.G is not None
    assert curvature.A2 is not None
    assert curvature.G2 is not None
    return torch.kron(curvature.G, curvature.A) + torch.kron(curvature.G2, curvature.A2)


def optimum(weight: Tensor, removed: Tensor, fisher: Tensor) -> tuple[float, Tensor]:
    """The least of half d' F d where `removed` (a mask of weight's shape) becomes zero, and the weight that has it."""
    chosen = removed.flatten().nonzero().flatten()
    n, k = weight.numel(), len(chosen)
    system = torch.zeros(n + k, n + k, dtype=torch.float64)
    system[:n, :n] = fisher
    system[chosen, n + torch.arange(k)] = 1
    system[n + torch.arange(k), chosen] = 1
    step = torch.linalg.solve(system, torch.cat([torch.zeros(n).double(), -weight.flatten()[chosen]]))[:n]
    return 0.5 * float(step @ fisher @ step), weight + step.view_as(weight)


def masked(weight: Tensor, removed: Tensor, fisher: Tensor) -> float:
    """The same without update."""
    step = (-weight * removed).flatten()
    return 0.5 * float(step @ fisher @ step)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Curvature]:
    """A weight, and curvature whose second term adds nine times the first in some directions and takes 0.9 of it in others."""
    A, G = factor(columns, seed + 1), factor(rows, seed + 2)
    return weights(rows, columns, seed=seed), Curvature(A, G, _beside(A, seed + 3), _beside(G, seed + 4))


def _beside(first: Tensor, seed: int) -> Tensor:
    """A symmetric matrix whose eigenvalues relative to `first` go from -0.3 to 3."""
    size = len(first)
    basis = torch.linalg.cholesky(first) @ torch.linalg.qr(weights(size, size, seed=seed))[0]
    return (basis * torch.linspace(-0.3, 3, size, dtype=torch.float64)) @ basis.mT
