"""Cross-entropy of rows of logits, and what a teacher says of them: a few rows at a time, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from resect.errors import NumericsError
from resect.statistics.layers import wide

IGNORED = -100
"""The label of a row that nothing is asked of."""
CHUNK = {"cpu": 2**20}
"""Logits looked at together: as many as a cache holds."""
CHUNK_ELSEWHERE = 2**26


def prediction_losses(
    logits: Tensor, labels: Tensor, *, teacher: Tensor | None = None, weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The loss in nats of every row [M, V] whose label [M] is not `IGNORED`, in order: [N], at least float32.

    Its cross-entropy; with a teacher's logits [M, V], `(1 - weight) x cross-entropy + weight x T² KL(teacher || student)`, both
    softened by the temperature T. Logits are widened a few rows at a time and no softmax is kept. The teacher gets no gradient.
    """
    rows = (labels != IGNORED).nonzero().squeeze(1)
    theirs = teacher.detach() if teacher is not None and weight else None
    losses: Tensor = _PredictionLosses.apply(logits, rows, labels[rows], theirs, weight, temperature)  # type: ignore[no-untyped-call]
    return losses


def token_losses(logits: Tensor, labels: Tensor, *, teacher: Tensor | None = None, **asked: float) -> Tensor:
    """`prediction_losses` of each next label [B, T] that is not `IGNORED`, predicted from the place before it, [B, T, V]: [N]."""
    next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    theirs = None if teacher is None else teacher.flatten(0, 1)
    return prediction_losses(logits.flatten(0, 1), next_labels, teacher=theirs, **asked)


def divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """`T² KL(teacher || student)` of each row of logits [N, V], both softened by the temperature T: [N]."""
    ours, theirs = (F.log_softmax(one / temperature, dim=-1) for one in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


class _PredictionLosses(torch.autograd.Function):
    """Softmaxes are computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, labels: Tensor, teacher: Tensor | None, weight: float, temperature: float
    ) -> Tensor:
        """Losses [N] of `rows` [N] of the logits [M, V]."""
        ctx.save_for_backward(logits, rows, labels, teacher)
        ctx.weight, ctx.temperature = weight, temperature
        losses = wide(logits.new_empty(len(rows)))
        for part, ours, theirs in _parts(logits, rows, teacher):
            if theirs is None:
                losses[part] = F.cross_entropy(ours, labels[part], reduction="none")
                continue
            losses[part] = weight * divergence(ours, theirs, temperature=temperature)
            if weight < 1:
                losses[part] += (1 - weight) * F.cross_entropy(ours, labels[part], reduction="none")
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """`softmax - label`, and `T x (softmax - the teacher's)` of the softened logits."""
        logits, rows, labels, teacher = ctx.saved_tensors
        found = torch.zeros_like(logits)
        for part, ours, theirs in _parts(logits, rows, teacher):
            slope = ours.softmax(-1)
            slope.scatter_add_(1, labels[part, None], slope.new_full((len(slope), 1), -1))
            if theirs is not None:
                softened = (ours / ctx.temperature).softmax(-1) - (theirs / ctx.temperature).softmax(-1)
                slope.mul_(1 - ctx.weight).add_(softened, alpha=ctx.weight * ctx.temperature)
            found[rows[part]] = slope.mul_(gradient[part, None]).to(found.dtype)
        return found, None, None, None, None, None


def _parts(logits: Tensor, rows: Tensor, teacher: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """A few rows of logits and the teacher's at a time, in a wide type."""
    size = max(1, CHUNK.get(logits.device.type, CHUNK_ELSEWHERE) // logits.shape[-1])
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part, wide(logits[rows[part]]), None if teacher is None else wide(teacher[rows[part]])


MOST_NATS = 700.0
"""The mean cross-entropy whose perplexity a float still holds."""


def perplexity_of(nats: float, what: str) -> float:
    """The perplexity of a mean cross-entropy in nats per prediction; `what` names the measurement.

    Raises `NumericsError` where it is no number that could be reported: the loss is not finite, or above `MOST_NATS`.
    """
    if not isfinite(nats) or nats > MOST_NATS:
        raise NumericsError(
            f"{what}: the mean loss is {nats:g} nats a token, and no float holds its perplexity. Logits this far off come from "
            "weights out of range or from a cut that is too deep. Look for the former, let more stay, or run in a wider type."
        )
    return exp(nats)
