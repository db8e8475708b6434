"""The ladder of column blocks: its losses are those of the dense KKT system at every step, its order is greedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import resect.saliency.ladders as ladder_module
from resect.saliency.ladders import Ladder, Reader, ladder, line_ladders
from resect.saliency.obs import block_losses
from resect.statistics import Curvature
from tests.saliency.kkt import factor, optimum, weights

UNITS = 6
PENDING = pytest.mark.parametrize("pending", [1, 2, 5, 128])
WIDTH = pytest.mark.parametrize("width", [1, 2, 3])
READERS = pytest.mark.parametrize("many", [1, 2])
WITH_G = pytest.mark.parametrize("with_G", [True, False], ids=["G", "no G"])


def readers(many: int, width: int, with_G: bool, seed: int = 0) -> list[Reader]:
    """Layers of different sizes that take in the same units, in columns out of order; one column more belongs to no unit."""
    found = []
    for number in range(many):
        rows, columns = 3 + number, UNITS * width + 1
        generator = torch.Generator().manual_seed(seed + number)
        at = torch.randperm(columns, generator=generator)[: UNITS * width].view(UNITS, width)
        curvature = Curvature(factor(columns, seed + 10 + number), factor(rows, seed + 20 + number) if with_G else None)
        found.append(Reader(weights(rows, columns, seed=seed + 30 + number), curvature, at))
    return found


def cost(layers: list[Reader], units: list[int]) -> float:
    """What some units cost together, by brute force."""
    total = 0.0
    for layer in layers:
        removed = torch.zeros(layer.weight.shape, dtype=torch.bool)
        removed[:, layer.columns[units].flatten()] = True
        total += optimum(layer.weight, removed, layer.curvature.G, layer.curvature.A)[0]
    return total


def greedy(layers: list[Reader], steps: int = UNITS, gone: tuple[int, ...] = ()) -> tuple[list[int], list[float]]:
    """The order and the losses together, by trying every unit at every step."""
    order: list[int] = []
    losses: list[float] = []
    while len(order) < min(steps, UNITS - len(gone)):
        trials = {unit: cost(layers, [*gone, *order, unit]) for unit in range(UNITS) if unit not in {*gone, *order}}
        cheapest = min(trials, key=lambda unit: trials[unit])
        order.append(cheapest)
        losses.append(trials[cheapest])
    return order, losses


def assert_greedy(found: Ladder, layers: list[Reader], steps: int = UNITS, gone: tuple[int, ...] = ()) -> None:
    order, together = greedy(layers, steps, gone)
    assert found.order.tolist() == order
    before = cost(layers, list(gone)) if gone else 0.0
    expected = torch.tensor(together, dtype=torch.float64) - before
    torch.testing.assert_close(found.losses.cumsum(0), expected, rtol=1e-9, atol=1e-9 * before)


@WITH_G
@READERS
@WIDTH
@PENDING
def test_every_step_is_the_cheapest_and_costs_what_the_dense_system_says(
    pending: int, width: int, many: int, with_G: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder_module, "PENDING", pending)
    layers = readers(many, width, with_G)
    assert_greedy(ladder(layers), layers)


@WITH_G
@PENDING
@pytest.mark.parametrize("gone", [(4,), (5, 1), (0, 2, 3)])
@pytest.mark.parametrize("width", [1, 2])
def test_what_went_before_is_taken_off_first(
    pending: int, width: int, gone: tuple[int, ...], with_G: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder_module, "PENDING", pending)
    layers = readers(2, width, with_G, seed=3)
    assert_greedy(ladder(layers, gone=gone), layers, gone=gone)


@pytest.mark.parametrize("steps", [0, 2, 5, 6, 7])
@pytest.mark.parametrize("gone", [(), (2,)])
def test_a_ladder_has_no_more_steps_than_asked(steps: int, gone: tuple[int, ...]) -> None:
    layers = readers(1, 2, with_G=True)
    found = ladder(layers, steps=steps, gone=gone)
    assert len(found.order) == len(found.losses) == min(steps, UNITS - len(gone))
    assert_greedy(found, layers, steps, gone)


def test_a_ladder_goes_on_where_another_stopped() -> None:
    layers = readers(2, 2, with_G=True, seed=5)
    whole, first = ladder(layers), ladder(layers, steps=3)
    rest = ladder(layers, gone=first.order.tolist())
    assert torch.equal(torch.cat([first.order, rest.order]), whole.order)
    torch.testing.assert_close(torch.cat([first.losses, rest.losses]), whole.losses, rtol=1e-9, atol=0)


@WITH_G
def test_the_first_step_costs_what_the_block_alone_costs(with_G: bool) -> None:
    layers = readers(2, 3, with_G, seed=7)
    alone = sum(block_losses(layer.weight, layer.curvature, layer.columns) for layer in layers)
    assert isinstance(alone, Tensor)
    found = ladder(layers)
    assert int(found.order[0]) == int(alone.argmin())
    assert float(found.losses[0]) == pytest.approx(float(alone.min()), rel=1e-10)


def test_hundreds_of_columns_keep_their_precision() -> None:
    """More columns than wait at a time; the last losses still agree with the least squares of all columns gone."""
    columns, rows = 300, 4
    layer = Reader(weights(rows, columns, seed=1), Curvature(factor(columns, 2), factor(rows, 3)), torch.arange(columns)[:, None])
    found = ladder([layer])
    assert sorted(found.order.tolist()) == list(range(columns))
    A, G = layer.curvature.A, layer.curvature.G
    assert G is not None
    for kept in (0, 1, 60, 150, 299):
        gone, stays = found.order[: columns - kept], found.order[columns - kept :]
        rest = A[gone][:, gone] - A[gone][:, stays] @ torch.linalg.solve(A[stays][:, stays], A[stays][:, gone])
        expected = 0.5 * torch.trace(G @ layer.weight[:, gone] @ rest @ layer.weight[:, gone].T)
        assert float(found.losses[: columns - kept].sum()) == pytest.approx(float(expected), rel=1e-8)


def test_inputs_are_left_alone() -> None:
    layers = readers(2, 2, with_G=False)
    before = [(layer.weight.clone(), layer.curvature.A.clone(), layer.curvature.A_inverse.clone()) for layer in layers]
    ladder(layers)
    ladder(layers, gone=[1])
    for layer, (weight, A, inverse) in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.curvature.A, A)
        assert torch.equal(layer.curvature.A_inverse, inverse)


@pytest.mark.parametrize("seed", range(20))
def test_scores_never_fall_along_the_order(seed: int) -> None:
    layers = readers(2, 1, with_G=True, seed=100 * seed)
    found = ladder(layers, steps=4)
    scores = found.scores(UNITS)
    along = scores[found.order]
    assert (along[1:] >= along[:-1]).all()
    assert (along >= found.losses).all()
    staying = sorted(set(range(UNITS)) - set(found.order.tolist()))
    assert len(staying) == 2
    assert (scores[staying] > along[-1]).all()
    further = ladder(layers).scores(UNITS)
    assert torch.equal(further[found.order], along)
    assert (further[staying] >= scores[staying]).all(), "what is below costs no less"


def test_what_is_below_rises_with_what_it_costs_alone() -> None:
    """By how many times it costs more alone than the dearest that goes does; as much as the last that goes at least."""
    steps = Ladder(torch.tensor([2, 0]), torch.tensor([1.0, 3.0], dtype=torch.float64))
    alone = torch.tensor([4.0, 10.0, 2.0, 3.0, 6.0, 10.0], dtype=torch.float64)
    scores = steps.scores(6, alone=alone)
    assert torch.allclose(scores, torch.tensor([3.0, 7.5, 1.0, 3.0, 4.5, 7.5], dtype=torch.float64), rtol=1e-11, atol=0)
    assert scores.argsort().tolist() == [2, 0, 3, 4, 1, 5]
    assert torch.equal(steps.scores(6, alone=torch.zeros(6, dtype=torch.float64)), steps.scores(6))


def test_a_loss_that_falls_is_raised_to_the_one_before() -> None:
    steps = Ladder(torch.tensor([2, 0, 3]), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64))
    scores = steps.scores(4)
    assert scores[2] < scores[0] < scores[3] < scores[1]  # the order is told by the scores alone
    assert torch.allclose(scores, torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("inner", [None, 4])
@WITH_G
def test_rows_and_columns_are_priced_after_those_of_their_side(with_G: bool, inner: int | None) -> None:
    weight, G, A = weights(4, 5, seed=1), factor(4, 2) if with_G else None, factor(5, 3)
    scores = line_ladders(weight, Curvature(A, G), inner=inner)
    for side, axis in zip(scores, (0, 1), strict=True):
        together = [0.0]
        for count in range(1, len(side) + 1):
            removed = torch.zeros(4, 5, dtype=torch.bool)
            removed.transpose(0, axis)[side.argsort()[:count]] = True
            together.append(optimum(weight, removed, G, A)[0])
        expected = torch.tensor(together, dtype=torch.float64).diff().cummax(0).values
        torch.testing.assert_close(side.sort().values, expected, rtol=1e-9, atol=0)
    assert len(scores[1]) == (inner or 5)
