"""Which source the next examples come from: equal shares, or rounds that favour what the model has lost most of.

Source of the rounds: LoRAShear (arXiv 2310.18356), dynamic knowledge recovery: text of the pre-training kind first, instructions
last; before every round the model is measured beside the dense one, and the next examples are drawn where it lags. The paper
does not print its constants: those here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from resect.recovery.examples import Example
from resect.recovery.facts import Nats, Round
from resect.recovery.settings import Mixture

Draw = dict[str, int]
"""How many examples of every source."""


class Supply:
    """The training examples of every source in an endless seeded order: all of them before any comes again."""

    def __init__(self, examples: Mapping[str, Sequence[Example]], *, seed: int) -> None:
        self.examples = examples
        self._orders = {source: _endless(len(some), seed + place) for place, (source, some) in enumerate(examples.items())}
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, counts: Draw) -> list[Example]:
        """The next examples of every source, in random order."""
        found = [self.examples[source][next(self._orders[source])] for source, count in counts.items() for _ in range(count)]
        return [found[place] for place in torch.randperm(len(found), generator=self._generator).tolist()]


def gaps_of(nats: Nats, dense: Nats) -> dict[str, float]:
    """δ = max(0, log perplexity - log perplexity of the dense model), source by source of `dense`."""
    return {source: max(0.0, nats[source] - dense[source]) for source in dense}


def weights_of(gaps: Mapping[str, float], *, floor: float) -> dict[str, float]:
    """w ∝ δ + floor x mean(δ), adding up to 1; equal where there is no gap at all."""
    mean = sum(gaps.values()) / len(gaps)
    raised = {source: gap + floor * mean for source, gap in gaps.items()}
    total = sum(raised.values())
    return {source: value / total if total else 1 / len(gaps) for source, value in raised.items()}


def weighted_gap(gaps: Mapping[str, float], *, floor: float) -> float:
    """Σ w δ."""
    weights = weights_of(gaps, floor=floor)
    return sum(weights[source] * gap for source, gap in gaps.items())


def shares(weights: Mapping[str, float], count: int) -> Draw:
    """`count` examples divided by weight, the largest remainders rounded up."""
    exact = {source: weight * count for source, weight in weights.items()}
    found = {source: int(value) for source, value in exact.items()}
    order = sorted(exact, key=lambda source: found[source] - exact[source])
    for source in order[: count - sum(found.values())]:
        found[source] += 1
    return found


def stalled(weighted: Sequence[float], asked: Mixture) -> bool:
    """Whether each of the last rounds improved the weighted gap by less than the tolerance."""
    steps = list(pairwise(weighted))[-asked.patience :]
    return len(steps) == asked.patience and all(before - after < asked.tolerance * before for before, after in steps)


def rounds(
    stage: str,
    supply: Supply,
    *,
    examples: int,
    multiple: int,
    before: Nats,
    dense: Nats,
    train: Callable[[str, list[Example], int, int], Nats],
    asked: Mixture,
) -> Iterator[Round]:
    """Trains round after round until the model keeps up or stops improving; every round gets an even share of `examples`.

    `train` learns from examples under a name, told how many steps of the stage are done and how many there are at most, and
    gives the loss on each source afterwards. A step takes `multiple` examples. The first round is uniform. Nothing is trained
    where there is no gap.
    """
    gaps = gaps_of(before, dense)
    weighted = [weighted_gap(gaps, floor=asked.floor)]
    yield Round(stage=stage, number=0, gaps=gaps, weighted=weighted[0])
    steps = max(1, round(examples / multiple))
    most = min(asked.rounds, max(1, steps // asked.steps))
    each = round(steps / most)
    number = 0
    while number < most and weighted[-1] > 0 and not stalled(weighted, asked):
        number += 1
        weights = weights_of(gaps, floor=asked.floor) if number > 1 else dict.fromkeys(gaps, 1 / len(gaps))
        drawn = shares(weights, multiple * each)
        nats = train(f"{stage}-{number:02d}", supply.draw(drawn), (number - 1) * each, most * each)
        gaps = gaps_of(nats, dense)
        weighted.append(weighted_gap(gaps, floor=asked.floor))
        yield Round(stage=stage, number=number, weights=weights, drawn=drawn, gaps=gaps, weighted=weighted[-1])


def _endless(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
