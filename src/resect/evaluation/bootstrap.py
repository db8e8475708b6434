"""How sure a difference is: both models saw the same windows and items, which are drawn again together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0
DRAWS = 2**22
"""Numbers drawn at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean or a median, and the percentile interval of its bootstrap."""

    value: float
    low: float | None
    """None where there is one sample only, whose spread nobody knows."""
    high: float | None
    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int = SEED


def paired_interval(
    *parts: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The mean of the means of `parts`, each of which holds differences of pairs: one per window, one per item.

    A resample draws as many pairs of each part as there are, with replacement; so several tasks stay of their sizes.
    """
    samples = [torch.tensor(part, dtype=torch.float64) for part in parts]
    value = float(torch.stack([part.mean() for part in samples]).mean())
    if min(map(len, samples)) < 2:
        return Interval(value, None, None, level, resamples, seed)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([_means(part, resamples, generator) for part in samples]).mean(0)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(value, low, high, level, resamples, seed)


def paired_ratio(
    values: Sequence[float], others: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The median of the ratios of pairs, one per round; a resample draws as many rounds as there are, with replacement."""
    ratios = torch.tensor(values, dtype=torch.float64) / torch.tensor(others, dtype=torch.float64)
    value = float(ratios.quantile(0.5))
    if len(ratios) < 2:
        return Interval(value, None, None, level, resamples, seed)
    draws = torch.randint(len(ratios), (resamples, len(ratios)), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = ratios[draws].quantile(0.5, dim=1).quantile(ends).tolist()
    return Interval(value, low, high, level, resamples, seed)


def _means(part: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """The mean of every resample [resamples]."""
    step = max(1, DRAWS // len(part))
    found = []
    for start in range(0, resamples, step):
        shape = (min(step, resamples - start), len(part))
        found.append(part[torch.randint(len(part), shape, generator=generator)].mean(1))
    return torch.cat(found)
