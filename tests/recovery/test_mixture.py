"""Weights, shares and the stopping rule of dynamic recovery, by hand."""

from __future__ import annotations

import pytest
import torch

from resect.recovery import Mixture
from resect.recovery.examples import Example
from resect.recovery.mixture import Supply, gaps_of, rounds, shares, stalled, weighted_gap, weights_of


def numbered(count: int, first: int = 0) -> list[Example]:
    return [Example(torch.tensor([number]), torch.tensor([number])) for number in range(first, first + count)]


def test_gaps_weights_and_their_sum_by_hand() -> None:
    gaps = gaps_of({"a": 3.0, "b": 2.5, "c": 2.0}, {"a": 2.0, "b": 2.0, "c": 2.5})
    assert gaps == {"a": 1.0, "b": 0.5, "c": 0.0}
    weights = weights_of(gaps, floor=0.05)  # the mean gap is 0.5, so 0.025 is added to each: 1.025 + 0.525 + 0.025 = 1.575
    assert weights == pytest.approx({"a": 1.025 / 1.575, "b": 0.525 / 1.575, "c": 0.025 / 1.575}, rel=1e-12)
    assert weighted_gap(gaps, floor=0.05) == pytest.approx((1.025 + 0.2625) / 1.575, rel=1e-12)


def test_without_gaps_weights_are_equal() -> None:
    assert weights_of({"a": 0.0, "b": 0.0}, floor=0.05) == {"a": 0.5, "b": 0.5}


def test_shares_add_up_and_the_largest_remainders_are_rounded_up() -> None:
    assert shares({"a": 0.55, "b": 0.27, "c": 0.18}, 10) == {"a": 5, "b": 3, "c": 2}
    assert shares({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 8) == {"a": 3, "b": 3, "c": 2}


@pytest.mark.parametrize(
    ("weighted", "stops"),
    [
        ([1.0, 0.995, 0.99], True),  # 0.5 % twice
        ([1.0, 0.995], False),
        ([1.0, 0.995, 0.9, 0.895], False),  # not in a row
        ([1.0, 0.9, 0.91, 0.905], True),  # worse, then hardly better
        ([1.0, 0.98, 0.96], False),
    ],
)
def test_two_rounds_in_a_row_without_one_percent_stop(weighted: list[float], stops: bool) -> None:
    assert stalled(weighted, Mixture()) is stops


def test_every_example_comes_once_before_any_comes_again() -> None:
    supply = Supply({"a": numbered(5), "b": numbered(3, first=100)}, seed=1)
    drawn = [example.tokens.item() for _ in range(2) for example in supply.draw({"a": 5, "b": 1})]
    assert sorted(drawn[:6])[:5] == sorted(set(drawn[6:]) & set(range(5))) == [0, 1, 2, 3, 4]
    assert len({number for number in drawn if number >= 100}) == 2
    again = Supply({"a": numbered(5), "b": numbered(3, first=100)}, seed=1)
    assert drawn == [example.tokens.item() for _ in range(2) for example in again.draw({"a": 5, "b": 1})]


def test_rounds_draw_where_the_model_lags_until_nothing_improves() -> None:
    seen: list[tuple[str, int, int, int, int]] = []
    losses = iter([{"a": 1.5, "b": 1.9}, {"a": 1.1, "b": 1.898}, {"a": 1.1, "b": 1.898}, {"a": 1.1, "b": 1.897}])

    def train(name: str, examples: list[Example], done: int, in_all: int) -> dict[str, float]:
        seen.append((name, done, in_all, len(examples), sum(example.tokens.item() >= 100 for example in examples)))
        return next(losses)

    found = list(
        rounds(
            "text",
            Supply({"a": numbered(9), "b": numbered(9, first=100)}, seed=0),
            examples=100,
            multiple=4,
            before={"a": 2.0, "b": 2.0},
            dense={"a": 1.0, "b": 1.8},
            train=train,
            asked=Mixture(rounds=10, steps=1),
        )
    )
    # first uniform; then a lags by 0.5, b by 0.1: 0.515 to 0.115; then 0.1 and 0.098
    assert seen[:3] == [("text-01", 0, 20, 8, 4), ("text-02", 2, 20, 8, 1), ("text-03", 4, 20, 8, 4)]
    assert [one.number for one in found] == [0, 1, 2, 3, 4]
    assert found[2].weights == pytest.approx({"a": 0.515 / 0.63, "b": 0.115 / 0.63})
    assert found[0].gaps == pytest.approx({"a": 1.0, "b": 0.2})
    assert found[4].weighted == pytest.approx(found[3].weighted, rel=0.01)


@pytest.mark.parametrize(
    ("examples", "most", "count"),
    [(400, 10, 40), (160, 4, 40), (76, 1, 76), (20, 1, 20), (2, 1, 4)],  # 100, 40, 19, 5 and 1 steps of 4
)
def test_no_round_is_shorter_than_ten_steps_unless_the_stage_is(examples: int, most: int, count: int) -> None:
    seen = []

    def train(name: str, examples: list[Example], done: int, in_all: int) -> dict[str, float]:
        seen.append((done * 4, in_all * 4, len(examples)))
        return {"a": 2.0 - 0.1 * len(seen)}

    supply = Supply({"a": numbered(9)}, seed=0)
    for _ in rounds(
        "text", supply, examples=examples, multiple=4, before={"a": 2.0}, dense={"a": 0.0}, train=train, asked=Mixture()
    ):
        pass
    assert seen == [(number * count, most * count, count) for number in range(most)]


def test_a_model_that_keeps_up_is_left_alone() -> None:
    def train(name: str, examples: list[Example], done: int, in_all: int) -> dict[str, float]:
        raise AssertionError(name)

    supply = Supply({"a": numbered(3)}, seed=0)
    found = list(
        rounds("text", supply, examples=8, multiple=4, before={"a": 1.0}, dense={"a": 1.2}, train=train, asked=Mixture())
    )
    assert [one.gaps for one in found] == [{"a": 0.0}]
