"""Updates of what stays equal the solution of the dense KKT system on the whole Fisher matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resect.statistics import Curvature
from resect.surgery.compensate import (
    without_columns,
    without_elements,
    without_elements_in_chunks,
    without_rows_and_columns,
)
from tests.saliency.kkt import dense, factor, optimum, weights

ROWS, COLUMNS = 5, 7
WITH_G = pytest.mark.parametrize("with_G", [True, False], ids=["G", "no G"])


def problem(with_G: bool = True, seed: int = 0) -> tuple[Tensor, Curvature]:
    return weights(ROWS, COLUMNS, seed=seed), Curvature(factor(COLUMNS, seed + 1), factor(ROWS, seed + 2) if with_G else None)


def scattered(share: float = 0.5, seed: int = 0) -> Tensor:
    """Some elements of the matrix."""
    return torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) < share


def best(weight: Tensor, curvature: Curvature, gone: Tensor) -> Tensor:
    return optimum(weight, gone, curvature.G, curvature.A)[1].masked_fill(gone, 0)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@WITH_G
@pytest.mark.parametrize("columns", [[], [3], [6, 0, 2], [0, 1, 2, 3, 4, 5], list(range(7))], ids=len)
def test_columns_are_made_up_for_whatever_the_outputs_weigh(columns: list[int], with_G: bool) -> None:
    weight, curvature = problem(with_G)
    gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    gone[:, columns] = True
    found = without_columns(weight, curvature.A, torch.tensor(columns, dtype=torch.long))
    same(found, best(weight, curvature, gone))
    assert (found[gone] == 0).all()


def test_columns_are_made_up_for_by_least_squares_on_the_inputs() -> None:
    """With A the moments of real inputs, what is found fits the old outputs best."""
    weight, inputs = problem()[0], weights(50, COLUMNS, seed=9)
    found = without_columns(weight, inputs.T @ inputs / 50, torch.tensor([1, 5]))
    stays = [0, 2, 3, 4, 6]
    same(found[:, stays], torch.linalg.lstsq(inputs[:, stays], inputs @ weight.T).solution.T)


@WITH_G
@pytest.mark.parametrize(
    ("rows", "columns"), [([1], [2]), ([0, 3], [5, 1, 2]), ([], [4]), ([2, 4], []), ([], []), ([0, 1, 2, 3, 4], [0])]
)
def test_rows_and_columns_are_made_up_for_together(rows: list[int], columns: list[int], with_G: bool) -> None:
    weight, curvature = problem(with_G)
    gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    gone[:, columns] = True
    gone[rows] = True
    as_index = [torch.tensor(some, dtype=torch.long) for some in (rows, columns)]
    found = without_rows_and_columns(weight, curvature, *as_index)
    same(found, best(weight, curvature, gone))
    assert (found[gone] == 0).all()


@WITH_G
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_elements_are_made_up_for_jointly(share: float, seed: int, with_G: bool) -> None:
    """By conjugate gradients, and by one chunk that holds them all."""
    weight, curvature = problem(with_G, seed=10 * seed)
    gone = scattered(share, seed)
    assert 0 < gone.sum() < gone.numel()
    expected = best(weight, curvature, gone)
    for found in (
        without_elements(weight, curvature, gone, tolerance=1e-20),
        without_elements_in_chunks(weight, curvature, gone, max_correlate=gone.numel()),
    ):
        same(found, expected)
        assert (found[gone] == 0).all()


@WITH_G
@pytest.mark.parametrize("seed", range(4))
def test_conjugate_gradients_end_near_the_joint_optimum(seed: int, with_G: bool) -> None:
    weight, curvature = problem(with_G, seed=10 * seed)
    gone = scattered(seed=seed)
    fisher, target = dense(weight, curvature.G, curvature.A), best(weight, curvature, gone)

    def above(found: Tensor) -> float:
        rest = (found - target).flatten()
        return float(rest @ fisher @ rest)

    assert 0 < above(without_elements(weight, curvature, gone)) < 1e-2 * above(weight.masked_fill(gone, 0))


@WITH_G
def test_elements_that_are_whole_columns_go_as_columns_do(with_G: bool) -> None:
    weight, curvature = problem(with_G)
    gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    gone[:, [1, 4]] = True
    found = without_elements(weight, curvature, gone, tolerance=1e-20)
    same(found, without_columns(weight, curvature.A, torch.tensor([1, 4])))


@WITH_G
@pytest.mark.parametrize("chunk", [1, 4, 17])
def test_many_sweeps_come_to_the_joint_optimum(chunk: int, with_G: bool) -> None:
    weight, curvature = problem(with_G)
    A = curvature.A + curvature.A.diagonal().mean() * torch.eye(COLUMNS)
    G = None if curvature.G is None else curvature.G + curvature.G.diagonal().mean() * torch.eye(ROWS)
    curvature = Curvature(A, G)
    gone = scattered()
    expected = best(weight, curvature, gone)
    same(without_elements_in_chunks(weight, curvature, gone, max_correlate=chunk, sweeps=100), expected)
    once = without_elements_in_chunks(weight, curvature, gone, max_correlate=chunk)
    assert (once - expected).abs().max() > 1e-3, "one sweep does it too: this shows nothing"


@pytest.mark.parametrize("chunk", [1, 3])
def test_every_sweep_brings_the_joint_optimum_nearer(chunk: int) -> None:
    weight, curvature = problem()
    gone = scattered()
    fisher, target = dense(weight, curvature.G, curvature.A), best(weight, curvature, gone)
    distances = []
    for sweeps in (1, 2, 4, 8, 16):
        rest = (without_elements_in_chunks(weight, curvature, gone, max_correlate=chunk, sweeps=sweeps) - target).flatten()
        distances.append(float(rest @ fisher @ rest))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


@WITH_G
@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_a_chunk_sees_what_the_chunks_before_it_did(chunk: int, with_G: bool) -> None:
    """Chunk after chunk by the dense system, each from where the last one ended."""
    weight, curvature = problem(with_G)
    gone = scattered()
    expected = weight
    for part in gone.nonzero().split(chunk):
        now = torch.zeros_like(gone)
        now[part[:, 0], part[:, 1]] = True
        expected = optimum(expected, now, curvature.G, curvature.A)[1]
    same(without_elements_in_chunks(weight, curvature, gone, max_correlate=chunk), expected.masked_fill(gone, 0))


def test_chunks_of_whole_rows_are_exact_where_outputs_count_alike() -> None:
    """Without G rows know nothing of each other, and a row that goes with its neighbours is solved whatever the chunk."""
    weight, curvature = problem(with_G=False)
    gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    gone[:, [0, 3, 6]] = True
    gone[2] = gone[2].roll(1)
    for chunk in (3, 6, 15):
        same(without_elements_in_chunks(weight, curvature, gone, max_correlate=chunk), best(weight, curvature, gone))


def test_without_outputs_every_row_is_its_own_least_squares() -> None:
    inputs = weights(40, COLUMNS, seed=4)
    weight, gone = problem()[0], scattered(seed=6)
    found = without_elements(weight, Curvature(inputs.T @ inputs / 40), gone, tolerance=1e-20)
    for row in range(ROWS):
        stays = ~gone[row]
        fitted = torch.linalg.lstsq(inputs[:, stays], inputs @ weight[row]).solution
        same(found[row, stays], fitted)


@WITH_G
def test_nothing_gone_changes_nothing(with_G: bool) -> None:
    weight, curvature = problem(with_G)
    none = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    assert torch.equal(without_elements(weight, curvature, none), weight)


@WITH_G
def test_everything_gone_leaves_zeros(with_G: bool) -> None:
    weight, curvature = problem(with_G)
    every = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    assert (without_elements(weight, curvature, every) == 0).all()


@WITH_G
def test_the_weight_given_is_left_alone(with_G: bool) -> None:
    weight, curvature = problem(with_G)
    before = weight.clone()
    without_columns(weight, curvature.A, torch.tensor([1]))
    without_rows_and_columns(weight, curvature, torch.tensor([0]), torch.tensor([1]))
    without_elements(weight, curvature, scattered())
    assert torch.equal(weight, before)
