"""Paired intervals against what is known of the bootstrap's distribution."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, pstdev

import pytest
import torch

from resect.evaluation import bootstrap
from resect.evaluation.bootstrap import paired_interval, paired_ratio


def test_two_pairs_have_three_resamples() -> None:
    found = paired_interval([0.0, 1.0])  # means 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    narrow = paired_interval([0.0, 1.0], level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_large_samples_are_normal() -> None:
    part = torch.randn(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul(2).add(0.3).tolist()
    found = paired_interval(part, level=0.9)
    half = NormalDist().inv_cdf(0.95) * pstdev(part) / math.sqrt(500)
    assert found.value == pytest.approx(fmean(part))
    assert found.low == pytest.approx(fmean(part) - half, abs=0.1 * half)
    assert found.high == pytest.approx(fmean(part) + half, abs=0.1 * half)


def test_every_task_counts_alike_whatever_its_size() -> None:
    small, large = [1.0, -1.0] * 8, [0.0, 1.0] * 200
    found = paired_interval(small, large)
    error = math.hypot(pstdev(small) / 4, pstdev(large) / 20) / 2
    assert found.value == pytest.approx(0.25)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)  # type: ignore[operator]


def test_the_same_seed_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    part = [0.1, 0.5, -0.2, 0.9, 0.0]
    state = torch.get_rng_state()
    assert paired_interval(part, seed=4) == paired_interval(part, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    wide = paired_interval(part, seed=4, resamples=50)
    assert wide != paired_interval(part, seed=5, resamples=50)
    monkeypatch.setattr(bootstrap, "DRAWS", 35)  # 7 resamples at a time, and one left over
    chunked = paired_interval(part, seed=4, resamples=50)
    assert (chunked.low, chunked.high) == pytest.approx((wide.low, wide.high))


def test_one_pair_has_no_interval() -> None:
    found = paired_interval([0.25], [0.5, 0.5])
    assert (found.value, found.low, found.high) == (0.375, None, None)


def test_ratios_of_rounds() -> None:
    """Twice as fast in every round, busy or not, is twice as fast for sure."""
    found = paired_ratio([2.0, 4.0, 20.0], [1.0, 2.0, 10.0])
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    found = paired_ratio([2.0, 4.0, 20.0], [1.0, 4.0, 5.0])
    assert (found.value, found.low, found.high) == (2.0, 1.0, 4.0)
    assert paired_ratio([3.0], [2.0]).low is None
