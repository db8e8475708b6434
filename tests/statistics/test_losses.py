"""Losses of predicted tokens: against dense float64 twins, forwards and backwards, a few rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resect.statistics import IGNORED, divergence, losses, token_losses

VOCABULARY = 11


@pytest.fixture(params=[VOCABULARY, 3 * VOCABULARY, 2**20], autouse=True)
def _rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK, "cpu", request.param)


def made() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student and a teacher [3, 5, V], and labels [3, 5] of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(3, 5, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, VOCABULARY, (3, 5), generator=generator)
    labels[:, 0] = labels[1, 2:4] = labels[2, 4] = IGNORED
    return student.requires_grad_(), teacher, labels


def dense(student: Tensor, teacher: Tensor | None, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """The formula, one token after another."""
    found = []
    for sequence in range(len(labels)):
        for place in range(1, labels.shape[1]):
            label, logits = labels[sequence, place], student[sequence, place - 1]
            if label == IGNORED:
                continue
            loss = -(logits.exp() / logits.exp().sum())[label].log()
            if teacher is not None:
                both = (teacher[sequence, place - 1], logits)
                p, q = ((one / temperature).exp() / (one / temperature).exp().sum() for one in both)
                kl = (p * (p / q).log()).sum()
                loss = (1 - weight) * loss + weight * temperature**2 * kl
            found.append(loss)
    return torch.stack(found)


@pytest.mark.parametrize(("taught", "weight"), [(False, 0.5), (True, 0.3), (True, 0.0), (True, 1.0)])
def test_losses_and_gradients_against_float64_twins(taught: bool, weight: float) -> None:
    student, theirs, labels = made()
    teacher = theirs.requires_grad_() if taught else None
    factors = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    expected = dense(student, teacher, labels, weight, 2.0)
    slope = torch.autograd.grad((expected * factors).sum(), student)[0]
    found = token_losses(student, labels, teacher=teacher, weight=weight, temperature=2.0)
    (found * factors).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(student.grad, slope, rtol=1e-12, atol=1e-14)
    assert student.grad is not None
    assert not student.grad[:, -1].any()
    assert not student.grad[1, 1:3].any()
    assert theirs.grad is None


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, labels = made()
    narrow = student.detach().bfloat16().requires_grad_()
    exact = narrow.detach().float().requires_grad_()
    both = [token_losses(one, labels, teacher=teacher.float(), weight=0.3, temperature=2.0) for one in (narrow, exact)]
    assert torch.equal(*both)
    for one in both:
        one.sum().backward()
    assert narrow.grad is not None
    assert exact.grad is not None
    assert torch.equal(narrow.grad, exact.grad.bfloat16())


def test_nothing_to_predict() -> None:
    student, teacher, labels = made()
    found = token_losses(student, torch.full_like(labels, IGNORED), teacher=teacher)
    assert found.shape == (0,)
    found.sum().backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_divergence_against_a_float64_twin() -> None:
    student, teacher, _ = made()
    ours, theirs = student.detach().flatten(0, 1), teacher.flatten(0, 1)
    p, q = (torch.exp(one / 2) / torch.exp(one / 2).sum(-1, keepdim=True) for one in (theirs, ours))
    expected = 4 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(ours, theirs, temperature=2.0), expected, rtol=1e-12, atol=1e-14)
