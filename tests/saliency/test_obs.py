"""Losses of removal equal those of the dense KKT system on the whole Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from resect.errors import UsageError
from resect.saliency.obs import block_losses, column_losses, element_losses, pattern_losses, row_losses
from resect.statistics import Curvature
from tests.saliency.kkt import factor, masked, optimum, weights

ROWS, COLUMNS = 5, 8
BLOCKS = torch.tensor([[0, 5], [7, 2], [3, 1]])  # neither sorted nor all of the columns
WITH_G = pytest.mark.parametrize("with_G", [True, False], ids=["G", "no G"])
UPDATE = pytest.mark.parametrize("update", [True, False], ids=["OBS", "OBD"])
Losses = Callable[[Tensor, Curvature, bool], Tensor]


def problem(with_G: bool, seed: int = 0, *, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Curvature]:
    """A layer whose inputs and outputs are correlated."""
    G = factor(rows, seed + 2) if with_G else None
    return weights(rows, columns, seed=seed), Curvature(factor(columns, seed + 1), G)


def price(weight: Tensor, curvature: Curvature, removed: Tensor, update: bool) -> float:
    """By brute force."""
    return optimum(weight, removed, curvature.G, curvature.A)[0] if update else masked(weight, removed, curvature.G, curvature.A)


def mask(shape: torch.Size, rows: object = slice(None), columns: object = slice(None)) -> Tensor:
    found = torch.zeros(shape, dtype=torch.bool)
    found[rows, columns] = True  # type: ignore[index]
    return found


def same(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).view_as(found), rtol=1e-9, atol=0)


@UPDATE
@WITH_G
def test_an_element_costs_what_the_dense_system_says(with_G: bool, update: bool) -> None:
    weight, curvature = problem(with_G)
    expected = [
        price(weight, curvature, mask(weight.shape, row, column), update) for row in range(ROWS) for column in range(COLUMNS)
    ]
    same(element_losses(weight, curvature, update=update), expected)


@UPDATE
@WITH_G
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4), (4, 1), (1, 1)])
def test_a_row_costs_what_the_dense_system_says(with_G: bool, update: bool, shape: tuple[int, int]) -> None:
    weight, curvature = problem(with_G, rows=shape[0], columns=shape[1])
    expected = [price(weight, curvature, mask(weight.shape, row), update) for row in range(shape[0])]
    same(row_losses(weight, curvature, update=update), expected)


@UPDATE
@WITH_G
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4), (4, 1), (1, 1)])
def test_a_column_costs_what_the_dense_system_says(with_G: bool, update: bool, shape: tuple[int, int]) -> None:
    weight, curvature = problem(with_G, rows=shape[0], columns=shape[1])
    expected = [price(weight, curvature, mask(weight.shape, columns=column), update) for column in range(shape[1])]
    same(column_losses(weight, curvature, update=update), expected)


@UPDATE
@WITH_G
def test_a_block_of_columns_costs_what_the_dense_system_says(with_G: bool, update: bool) -> None:
    weight, curvature = problem(with_G)
    expected = [price(weight, curvature, mask(weight.shape, columns=block), update) for block in BLOCKS]
    same(block_losses(weight, curvature, BLOCKS, update=update), expected)


@UPDATE
@WITH_G
def test_a_block_of_one_column_costs_what_the_column_costs(with_G: bool, update: bool) -> None:
    weight, curvature = problem(with_G)
    blocks = torch.arange(COLUMNS).flip(0)[:, None]
    found = block_losses(weight, curvature, blocks, update=update)
    torch.testing.assert_close(found, column_losses(weight, curvature, update=update).flip(0), rtol=1e-12, atol=0)


@WITH_G
@pytest.mark.parametrize(
    "losses",
    [
        lambda w, c, update: element_losses(w, c, update=update),
        lambda w, c, update: row_losses(w, c, update=update),
        lambda w, c, update: column_losses(w, c, update=update),
        lambda w, c, update: block_losses(w, c, BLOCKS, update=update),
    ],
    ids=["element", "row", "column", "block"],
)
def test_an_update_never_costs_more_than_none(losses: Losses, with_G: bool) -> None:
    for seed in range(20):
        weight, curvature = problem(with_G, seed=10 * seed)
        assert (losses(weight, curvature, True) <= losses(weight, curvature, False) * (1 + 1e-12)).all()


@WITH_G
def test_with_uncorrelated_inputs_and_outputs_an_update_does_not_help(with_G: bool) -> None:
    weight, curvature = problem(with_G)
    diagonal = Curvature(curvature.A.diag().diag(), None if curvature.G is None else curvature.G.diag().diag())
    for losses in (element_losses, row_losses, column_losses):
        torch.testing.assert_close(losses(weight, diagonal), losses(weight, diagonal, update=False), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (7, 8)])
@WITH_G
def test_a_pattern_takes_the_cheapest_of_each_group(keep: int, of: int, with_G: bool) -> None:
    weight, curvature = problem(with_G)
    losses = element_losses(weight, curvature)
    found, goes = pattern_losses(losses, keep, of)
    for row in range(ROWS):
        for group in range(COLUMNS // of):
            every = range(group * of, (group + 1) * of)
            cheapest = min(combinations(every, of - keep), key=lambda some: float(losses[row, list(some)].sum()))
            assert set(goes[row].nonzero().flatten().tolist()) & set(every) == set(cheapest)
            assert float(found[row, group]) == pytest.approx(float(losses[row, list(cheapest)].sum()), rel=1e-12)


def test_equal_elements_go_from_the_left() -> None:
    found, goes = pattern_losses(torch.ones(1, 4), 2, 4)
    assert goes.tolist() == [[True, True, False, False]]
    assert found.tolist() == [[2.0]]


@pytest.mark.parametrize(("keep", "of"), [(2, 3), (2, 5), (8, 16), (0, 4), (4, 4), (5, 4), (-1, 2)])
def test_a_pattern_that_does_not_divide_is_refused(keep: int, of: int) -> None:
    with pytest.raises(UsageError, match=f"{keep}:{of}"):
        pattern_losses(torch.ones(ROWS, COLUMNS), keep, of)
