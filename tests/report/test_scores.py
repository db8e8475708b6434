"""Scores folded into quantiles and histograms lose no unit."""

from __future__ import annotations

import pytest
import torch

from resect.plan import Kept, Plan, part_of
from resect.report import saliency
from tests.report.made import scored


def test_quantiles_and_the_threshold_are_those_of_the_scores() -> None:
    found = saliency(*scored())
    assert found is not None
    first, last = found.groups[0], found.groups[-1]
    assert (first.quantiles[0], first.quantiles[-1]) == (1, 8)
    assert first.quantiles[found.levels.index(0.5)] == 4.5
    assert first.quantiles[found.levels.index(0.25)] == 2.75  # between 2 and 3: 1 + 0.25 * 7
    assert [first.threshold, last.threshold] == pytest.approx([5, 0.005])


def test_every_unit_is_in_one_bin_on_its_side() -> None:
    plan, scores = scored()
    scores["0.channels"][5] = 0  # stays, and is worth nothing
    found = saliency(plan, scores)
    assert found is not None
    (one,) = found.histograms
    assert (sum(one.kept), sum(one.removed), one.nothing) == (15, 16, 1)
    for place, (low, high) in enumerate(zip(one.edges, one.edges[1:], strict=False)):
        exact = [v for s in scores.values() for v in s[4:].tolist() if v > 0 and 10**low <= v < 10**high]
        assert one.kept[place] == len(exact)


def test_a_group_that_stays_whole_has_no_threshold_and_nothing_scored_is_nothing() -> None:
    plan = Plan(groups={"a": Kept(kind="heads", layer=0, units=2, keep=(0, 1))})
    found = saliency(plan, {"a": torch.tensor([1.0, 1.0]), "elsewhere": torch.ones(3)})
    assert found is not None
    assert [(one.name, one.threshold) for one in found.groups] == [("a", None)]
    assert sum(found.histograms[0].kept) == 2
    assert saliency(plan, {}) is None


def test_stops_on_the_way_remove_the_lowest_of_what_the_plan_removes() -> None:
    plan = Plan(groups={"a": Kept(kind="channels", layer=0, units=6, keep=(1, 4))})
    scores = {"a": torch.tensor([3.0, 0.0, 1.0, 4.0, 9.0, 2.0])}  # a plan may keep what scores low
    kept = [part_of(plan, scores, share).groups["a"].keep for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert kept == [(0, 1, 2, 3, 4, 5), (0, 1, 3, 4, 5), (0, 1, 3, 4), (1, 3, 4), (1, 4)]
