"""The half-space rule, against cases worked out by hand and the definition in float64."""

from __future__ import annotations

import pytest
import torch

from resect.recovery.half_space import penalty, projected, visible_gradient

DOUBLE = torch.float64


def test_the_penalty_is_raised_where_the_gradient_lets_a_unit_grow() -> None:
    product = torch.tensor([3.0, 0.0, -0.006, -1.0, -40.0], dtype=DOUBLE)
    norm = torch.tensor([2.0, 1.0, 2.0, 4.0, 2.0], dtype=DOUBLE)
    # 20 * 0.003 = 0.06; 20 * 0.25 = 5; 20 * 20 = 400, of which 0.01 * 1000 = 10 is left
    assert penalty(product, norm).tolist() == pytest.approx([0.01, 0.01, 0.06, 5.0, 10.0], rel=1e-15)


def test_by_hand() -> None:
    # x = (3, 4), gradient (1, 1): x̂ = (3, 4) - lr ((1, 1) + 0.01 (0.6, 0.8)), so x̂·x = 25 - lr 7.05, negative from 3.5461 on
    product, norm = torch.tensor([7.0], dtype=DOUBLE), torch.tensor([5.0], dtype=DOUBLE)
    assert not projected(product, norm, learning_rate=3.546)
    assert projected(product, norm, learning_rate=3.5462)
    # with epsilon 0.5 what is left must be at least 12.5: lr up to 1.7731
    assert not projected(product, norm, learning_rate=1.773, epsilon=0.5)
    assert projected(product, norm, learning_rate=1.7732, epsilon=0.5)


def test_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 200, 7, generator=generator, dtype=DOUBLE)
    x *= torch.logspace(-4, 0, 200, dtype=DOUBLE)[:, None]
    product, norm = (x * gradient).sum(1), x.norm(dim=1)
    trial = x - 0.1 * (gradient + penalty(product, norm)[:, None] * x / norm[:, None])
    found = projected(product, norm, learning_rate=0.1)
    assert torch.equal(found, (trial * x).sum(1) < 0)
    assert 0 < found.sum() < 200


def test_a_unit_that_is_zero_stays_as_it_is() -> None:
    zero = torch.zeros(1, dtype=DOUBLE)
    assert not projected(zero, zero, learning_rate=1.0)


def test_the_visible_gradient_is_a_projection_of_the_whole_one() -> None:
    generator = torch.Generator().manual_seed(1)
    gradient, down = torch.randn(6, 9, generator=generator, dtype=DOUBLE), torch.randn(3, 9, generator=generator, dtype=DOUBLE)
    base = torch.linalg.qr(down.T).Q
    found = visible_gradient(2.5 * gradient @ down.T, down, 2.5)
    torch.testing.assert_close(found, gradient @ base @ base.T, rtol=1e-12, atol=1e-12)
