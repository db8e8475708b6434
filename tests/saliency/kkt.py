"""Optimal removal by brute force: the dense KKT system of 1/2 d' F d subject to (w + d)_Q = 0, with F = G (x) A written out."""

import torch
from torch import Tensor


def optimum(weight: Tensor, removed: Tensor, outputs: Tensor | None, inputs: Tensor) -> tuple[float, Tensor]:
    """The least loss of setting `removed` (a mask of weight's shape) to zero, and the weight that has it."""
    fisher = dense(weight, outputs, inputs)
    chosen = removed.flatten().nonzero().flatten()
    n, k = weight.numel(), len(chosen)
    selector = torch.zeros(n, k, dtype=torch.float64)
    selector[chosen, torch.arange(k)] = 1.0
    system = torch.cat([torch.cat([fisher, selector], 1), torch.cat([selector.T, torch.zeros(k, k, dtype=torch.float64)], 1)])
    right = torch.cat([torch.zeros(n, dtype=torch.float64), -weight.double().flatten()[chosen]])
    step = torch.linalg.solve(system, right)[:n]
    return 0.5 * float(step @ fisher @ step), weight.double() + step.view_as(weight)


def masked(weight: Tensor, removed: Tensor, outputs: Tensor | None, inputs: Tensor) -> float:
    """The loss of setting `removed` to zero and touching nothing else."""
    step = torch.where(removed, -weight.double(), 0.0).flatten()
    return 0.5 * float(step @ dense(weight, outputs, inputs) @ step)


def dense(weight: Tensor, outputs: Tensor | None, inputs: Tensor) -> Tensor:
    """F = G (x) A for the row-major weight; without G the outputs count alike."""
    whole = torch.eye(weight.shape[0], dtype=torch.float64) if outputs is None else outputs.double()
    return torch.kron(whole, inputs.double())


def factor(size: int, seed: int) -> Tensor:
    """A well-conditioned positive definite factor with strong correlations."""
    made = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made = made @ (torch.eye(size, dtype=torch.float64) + 0.5)
    return made.T @ made / (2 * size)


def weights(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
