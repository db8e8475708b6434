"""Threads that the caller set change rounding at most: the same scores, the same plan, the same pattern."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resect
from resect.saliency.ladders import Reader, ladder
from resect.saliency.obs import block_losses
from resect.statistics import Curvature
from tests.models import _llama, random_tokens
from tests.saliency.kkt import factor, weights

SOURCES = sorted(Path(resect.__file__).parent.rglob("*.py"))
THROUGH_LU = {
    *("solve", "solve_ex", "inv", "inv_ex", "inverse", "det", "logdet", "slogdet", "lu", "lu_factor", "lu_factor_ex"),
    *("lu_solve", "lu_unpack", "tensorinv", "tensorsolve", "matrix_power", "cond"),
}
"""Functions and methods of torch that factor a matrix as LU, which several threads get wrong for batches on a CPU."""
TOKENS = random_tokens(6, 12, seed=3)
WIDTH = 192
"""Columns a unit: the fault of batched LU begins at about 160."""
STEPS = {"warmup_steps": 1, "periods": 2, "period_steps": 2, "analysis": None}
METHODS: dict[str, dict[str, Any]] = {
    "llm-pruner element2": {"method": "llm-pruner"},
    "llm-pruner mix": {"method": "llm-pruner", "settings": {"criterion": "mix", "iterations": 2}},
    "llm-pruner l2": {"method": "llm-pruner", "settings": {"criterion": "l2"}},
    "llm-pruner random": {"method": "llm-pruner", "settings": {"criterion": "random"}},
    "llm-surgeon": {"method": "llm-surgeon", "settings": {"shots": 2}},
    "llm-surgeon rows-columns": {"method": "llm-surgeon", "settings": {"mode": "rows-columns", "shots": 1}},
    "llm-surgeon unstructured": {"method": "llm-surgeon", "settings": {"mode": "unstructured", "shots": 1}},
    "llm-surgeon 2:4": {"method": "llm-surgeon", "settings": {"mode": "2:4", "shots": 1}},
    "lorashear": {"method": "lorashear", "settings": STEPS},
}


@pytest.fixture(autouse=True)
def _threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_nothing_is_solved_through_lu() -> None:
    found = {str(path): THROUGH_LU.intersection(_called(path)) for path in SOURCES}
    assert len(found) > 100
    assert {name: calls for name, calls in found.items() if calls} == {}


def _called(path: Path) -> set[str]:
    """The names of all functions and methods that a file calls."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node.func for node in nodes if isinstance(node, ast.Call)]
    return {function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "") for function in functions}


def test_wide_units_cost_the_same_with_threads() -> None:
    columns = torch.arange(3 * WIDTH).view(3, WIDTH)
    curvature = Curvature(factor(3 * WIDTH, 1), factor(12, 2))
    weight = weights(12, 3 * WIDTH, seed=3)
    found: dict[int, list[Tensor]] = {}
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        descent = ladder([Reader(weight, curvature, columns)])
        found[threads] = [block_losses(weight, curvature, columns), descent.losses, descent.order.double()]
    for threads in (2, 4):
        for now, before in zip(found[threads], found[1], strict=True):
            torch.testing.assert_close(now, before, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_decides_the_same_with_threads(name: str) -> None:
    found: dict[int, resect.Result] = {}
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        model = _llama(num_hidden_layers=2)
        found[threads] = resect.prune(model, data=TOKENS, keep=0.7, layout="per-layer", **METHODS[name])
        assert torch.get_num_threads() == threads
    for threads in (2, 4):
        assert found[threads].plan == found[1].plan
        assert found[threads].pattern == found[1].pattern
        assert found[threads].scores.keys() == found[1].scores.keys()
        for group, scores in found[1].scores.items():
            torch.testing.assert_close(found[threads].scores[group], scores, rtol=1e-3, atol=1e-6 * float(scores.abs().max()))
        for one, other in zip(found[threads].model.parameters(), found[1].model.parameters(), strict=True):
            assert torch.equal(one == 0, other == 0)
            assert (one - other).norm() <= 1e-2 * other.norm()  # conjugate gradients end a step earlier or later
