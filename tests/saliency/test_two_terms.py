"""Losses, ladders and updates under two Kronecker terms equal those of the dense KKT system on the whole Fisher matrix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log

import pytest
import torch
from torch import Tensor

import resect.saliency.ladders as ladder_module
from resect.saliency import Reader, block_losses, column_losses, element_losses, ladder, row_losses
from resect.saliency.ladders import _alike
from resect.statistics import Curvature
from resect.surgery import (
    without_columns_under,
    without_elements,
    without_elements_in_chunks,
    without_rows_and_columns,
)
from tests.saliency.two_terms import masked, optimum, problem, written_out

ROWS, COLUMNS = 5, 8
BLOCKS = torch.tensor([[0, 5], [7, 2], [3, 1]])
UPDATE = pytest.mark.parametrize("update", [True, False], ids=["OBS", "OBD"])


def mask(rows: object = slice(None), columns: object = slice(None), shape: tuple[int, int] = (ROWS, COLUMNS)) -> Tensor:
    found = torch.zeros(shape, dtype=torch.bool)
    found[rows, columns] = True  # type: ignore[index]
    return found


def prices(weight: Tensor, curvature: Curvature, removed: list[Tensor], update: bool) -> Tensor:
    fisher = written_out(curvature)
    return torch.tensor(
        [optimum(weight, one, fisher)[0] if update else masked(weight, one, fisher) for one in removed], dtype=torch.float64
    )


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.view_as(found), rtol=1e-9, atol=1e-12)


def test_the_second_term_is_no_trifle() -> None:
    """So that the tests below say something."""
    weight, curvature = problem(ROWS, COLUMNS)
    one = Curvature(curvature.A, curvature.G)
    for losses in (element_losses, row_losses, column_losses):
        assert ((losses(weight, curvature) / losses(weight, one)).log().abs() > 0.05).double().mean() > 0.5


@UPDATE
@pytest.mark.parametrize("seed", [0, 10])
def test_elements_rows_columns_and_blocks_cost_what_the_dense_system_says(seed: int, update: bool) -> None:
    weight, curvature = problem(ROWS, COLUMNS, seed)
    every = [mask(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    same(element_losses(weight, curvature, update=update), prices(weight, curvature, every, update))
    same(row_losses(weight, curvature, update=update), prices(weight, curvature, [mask(row) for row in range(ROWS)], update))
    columns = [mask(columns=column) for column in range(COLUMNS)]
    same(column_losses(weight, curvature, update=update), prices(weight, curvature, columns, update))
    blocks = [mask(columns=block) for block in BLOCKS]
    same(block_losses(weight, curvature, BLOCKS, update=update), prices(weight, curvature, blocks, update))


def test_a_second_term_of_nothing_changes_nothing() -> None:
    weight, both = problem(ROWS, COLUMNS)
    zeros = torch.zeros_like(both.A), torch.zeros(ROWS, ROWS, dtype=torch.float64)
    one, nothing = Curvature(both.A, both.G), Curvature(both.A, both.G, *zeros)
    for update in (True, False):
        for losses in (element_losses, row_losses, column_losses):
            same(losses(weight, nothing, update=update), losses(weight, one, update=update))
        same(block_losses(weight, nothing, BLOCKS, update=update), block_losses(weight, one, BLOCKS, update=update))
    rows, columns, gone = torch.tensor([1]), torch.tensor([0, 4]), mask(columns=[2, 3])
    same(without_rows_and_columns(weight, nothing, rows, columns), without_rows_and_columns(weight, one, rows, columns))
    same(without_elements(weight, nothing, gone), without_elements(weight, one, gone))
    steps = [ladder([Reader(weight, curvature, BLOCKS)]) for curvature in (nothing, one)]
    assert torch.equal(steps[0].order, steps[1].order)
    same(steps[0].losses, steps[1].losses)


def test_blocks_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, curvature = problem(ROWS, COLUMNS)
    expected = block_losses(weight, curvature, BLOCKS)
    monkeypatch.setattr("resect.saliency.obs.CHUNK", 2 * 2 * COLUMNS)
    same(block_losses(weight, curvature, BLOCKS), expected)


@pytest.mark.parametrize(
    ("rows", "columns"), [([], []), ([], [3]), ([], [6, 0, 2]), ([1], []), ([0, 3], [5, 1, 2]), (range(5), [0]), ([], range(8))]
)
def test_rows_and_columns_are_made_up_for_together(rows: Sequence[int], columns: Sequence[int]) -> None:
    weight, curvature = problem(ROWS, COLUMNS)
    gone = mask(list(rows)) | mask(columns=list(columns))
    expected = optimum(weight, gone, written_out(curvature))[1].masked_fill(gone, 0)
    indices = [torch.tensor(list(some), dtype=torch.long) for some in (rows, columns)]
    found = without_rows_and_columns(weight, curvature, *indices)
    same(found, expected)
    assert (found[gone] == 0).all()
    if not rows:
        same(without_columns_under(weight, curvature, indices[1]), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("chunk", [4, 100])
def test_elements_are_made_up_for_chunk_by_chunk(share: float, chunk: int) -> None:
    weight, curvature = problem(ROWS, COLUMNS)
    gone = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < share
    expected, fisher = weight, written_out(curvature)
    for part in gone.nonzero().split(chunk):
        expected = optimum(expected, mask(*part.unbind(1)), fisher)[1]
    same(without_elements_in_chunks(weight, curvature, gone, max_correlate=chunk), expected.masked_fill(gone, 0))
    together = optimum(weight, gone, fisher)[1].masked_fill(gone, 0)
    same(without_elements(weight, curvature, gone, tolerance=1e-20), together)
    if share == 0.3:
        swept = without_elements_in_chunks(weight, curvature, gone, max_correlate=8, sweeps=200)
        torch.testing.assert_close(swept, together, rtol=1e-6, atol=1e-6)


# Ladders

UNITS = 6


def readers(width: int, seed: int = 0) -> list[Reader]:
    """One layer with two terms and one with one, that take in the same units."""
    found = []
    for number, rows in enumerate((4, 3)):
        columns = UNITS * width + 1
        at = torch.randperm(columns, generator=torch.Generator().manual_seed(seed + number))[: UNITS * width].view(UNITS, width)
        weight, curvature = problem(rows, columns, seed + 10 * number)
        found.append(Reader(weight, curvature if number == 0 else Curvature(curvature.A, curvature.G), at))
    return found


def cost(layers: list[Reader], units: list[int]) -> float:
    """What some units cost together, by brute force."""
    total = 0.0
    for layer in layers:
        curvature = layer.curvature
        assert curvature.G is not None
        fisher = torch.kron(curvature.G, curvature.A) if curvature.A2 is None else written_out(curvature)
        gone = mask(columns=layer.columns[units].flatten(), shape=tuple(layer.weight.shape))  # type: ignore[arg-type]
        total += optimum(layer.weight, gone, fisher)[0]
    return total


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("gone", [(), (4, 1)])
def test_every_step_is_the_cheapest_and_costs_what_the_dense_system_says(
    width: int, gone: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder_module, "NEAR", 1.0)
    layers = readers(width)
    found, units = ladder(layers, gone=gone), list(gone)
    before = cost(layers, units) if gone else 0.0
    for unit, loss in zip(found.order.tolist(), found.losses.tolist(), strict=True):
        trials = {other: cost(layers, [*units, other]) for other in range(UNITS) if other not in units}
        assert unit == min(trials, key=lambda other: trials[other])
        assert loss == pytest.approx(trials[unit] - before, rel=1e-9)
        units, before = [*units, unit], trials[unit]
    assert sorted(units) == list(range(UNITS))


@pytest.mark.parametrize("near", [1.1, 4.0])
def test_shared_moments_keep_sums_of_losses_near(near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_module, "NEAR", near)
    weight, curvature = problem(40, 12, seed=5)
    layer = Reader(weight, curvature, torch.arange(12)[:, None])
    parts = ladder_module._parts(layer)
    assert 1 < len(parts) < 40
    found = ladder([layer])
    ratios = []
    for count in range(1, 13):
        gone = found.order[:count]
        left = without_columns_under(weight, curvature, gone) - weight
        exact = 0.5 * float((left * curvature.times(left)).sum())
        ratios.append(float(found.losses[:count].sum()) / exact)
    assert 1 / near <= min(ratios) <= max(ratios) <= near
    assert max(abs(ratio - 1) for ratio in ratios) > 1e-6, "nothing was shared: this shows nothing"


@pytest.mark.parametrize("ends", [(-0.5, 3.0), (0.1, 2.0), (-1.0, -0.1)])
def test_rows_that_share_differ_by_little_in_every_direction(
    ends: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder_module, "NEAR", 1.1)
    s = torch.linspace(*ends, 7, dtype=torch.float64)
    t = torch.linspace(-0.3, 0.9, 60, dtype=torch.float64)[torch.randperm(60)]
    sets = _alike(t, s)
    assert sorted(torch.cat(sets).tolist()) == list(range(60))
    assert 1 < len(sets) < 60
    spans = []
    for rows in sets:
        logs = torch.log1p(t[rows][:, None] * s)
        spans.append(float((logs.max(0).values - logs.min(0).values).max()))
    assert max(spans) <= log(1.1) + 1e-12
    together = [torch.log1p(t[torch.cat(pair)][:, None] * s) for pair in pairwise(sets)]
    assert all(float((logs.max(0).values - logs.min(0).values).max()) > log(1.1) for logs in together)
