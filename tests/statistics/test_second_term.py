"""The second Kronecker term is the one nearest to what the first leaves of the Fisher information, whatever way data takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import SecondTermClipped, UsageError
from resect.statistics import Classes, Curvature, Moments, collect_curvature, residual, tell_clipped
from resect.statistics.curvature import Collection
from resect.statistics.joint import LEAST, Joint, Side
from resect.statistics.residual import Fit
from tests.models import assert_untouched, copy_of, random_tokens, randomise, snapshot, tiny
from tests.saliency.kkt import factor, weights
from tests.saliency.two_terms import problem, written_out
from tests.statistics.explicit import Seen, class_loss, explicit, next_token_loss

LAYER = "model.layers.1."
PATHS = [f"{LAYER}mlp.down_proj", f"{LAYER}self_attn.o_proj", "model.layers.0.mlp.up_proj"]


def rearranged(fisher: Tensor, rows: int, columns: int) -> Tensor:
    """Van Loan's: of a Kronecker product of [rows, rows] and [columns, columns] the outer product of their entries."""
    return fisher.reshape(rows, columns, rows, columns).transpose(1, 2).reshape(rows * rows, columns * columns)


def written(seen: Seen, predictions: int) -> Tensor:
    """F by definition: a position after the other, per prediction."""
    pairs = zip(torch.cat(seen.gradients), torch.cat(seen.inputs), strict=True)
    return sum((torch.kron(torch.outer(g, g), torch.outer(x, x)) for g, x in pairs), torch.zeros(())) / predictions


def alternated(seen: Seen, predictions: int, steps: int) -> Tensor:
    """`G₂ ⊗ A₂` by least squares in turn on F, from the identity in the place of `G₂`."""
    rows, columns = seen.gradients[0].shape[1], seen.inputs[0].shape[1]
    first = torch.kron(seen.G / predictions, seen.A / seen.positions)
    left = rearranged(written(seen, predictions) - first, rows, columns)
    G, A = torch.eye(rows, dtype=left.dtype).flatten(), left[0]
    for step in range(1 + steps):
        if step % 2 == 0:
            A = left.T @ G / (G @ G)
        else:
            G = left @ A / (A @ A)
    return torch.kron(G.view(rows, rows), A.view(columns, columns))


def same(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert expected.abs().max() > 0
    assert float((found - expected).abs().max() / expected.abs().max()) <= rtol


def product(moments: Moments) -> Tensor:
    assert moments.second is not None
    return torch.kron(moments.second[1], moments.second[0])


def data(rows: int = 3, columns: int = 4, positions: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, and gradients that are large where inputs are."""
    x = weights(positions, columns, seed=seed)
    return x, weights(positions, rows, seed=seed + 1) * (0.2 + x[:, :1].square())


def fitted(x: Tensor, g: Tensor, steps: int) -> tuple[Moments, Fit]:
    moments = Moments(x.T @ x, g.T @ g, len(x), len(x))
    fit = Fit(x, g.shape[1], x.shape[1])
    A, G = moments.means()
    assert G is not None
    for _ in range(1 + steps):
        for some, others in zip(x.split(7), g.split(7), strict=True):
            fit.take(some, others)
        fit.step(A, G, len(x))
    moments.second = fit.factors(A)
    return moments, fit


# The fit


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [100, 101])
def test_it_is_the_best_that_a_kronecker_product_can_do(seed: int, steps: int) -> None:
    """By the singular values of the residual, rearranged."""
    x, g = data(seed=10 * seed)
    moments, fit = fitted(x, g, steps)
    seen = Seen([x], [g])
    left = written(seen, len(x)) - torch.kron(seen.G, seen.A) / len(x) ** 2
    U, S, V = torch.linalg.svd(rearranged(left, 3, 4))
    assert S[0] > 1.2 * S[1], "the best is not one but many"
    expected = S[0] * torch.kron(U[:, 0].view(3, 3), V[0].view(4, 4))
    same(product(moments), expected)
    assert fit.norm == pytest.approx(float(S[0]), rel=1e-9)
    assert float((left - product(moments)).norm()) == pytest.approx(float(S[1:].norm()), rel=1e-9)


def test_no_step_makes_the_fit_worse() -> None:
    x, g = data(seed=4)
    seen = Seen([x], [g])
    left = written(seen, len(x)) - torch.kron(seen.G, seen.A) / len(x) ** 2
    distances = [float(left.norm())]
    distances += [float((left - product(fitted(x, g, steps)[0])).norm()) for steps in range(1, 8)]
    assert all(after <= before * (1 + 1e-12) for before, after in zip(distances, distances[1:], strict=False))
    assert distances[-1] < 0.95 * distances[0]


def test_a_sum_of_two_products_is_found_exactly() -> None:
    """Of two kinds of positions, in each of which gradients know nothing of inputs: what the first term leaves is one product."""
    kinds = [(weights(6, 4, seed=seed), weights(5, 3, seed=seed + 1)) for seed in (1, 7)]
    x = torch.cat([x.repeat_interleave(len(g), 0) for x, g in kinds])
    g = torch.cat([g.repeat(len(x), 1) for x, g in kinds])
    moments, _ = fitted(x, g, 3)
    A, G = moments.means()
    assert G is not None
    same(torch.kron(G, A) + product(moments), written(Seen([x], [g]), len(x)), 1e-12)
    found = moments.curvature("layer", damping=0.0, damping_gradients=0.0)
    same(written_out(found), written(Seen([x], [g]), len(x)), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_is_left_there_is_no_second_term(dtype: torch.dtype) -> None:
    """All gradients with all inputs: the first term is the Fisher information."""
    x, g = weights(40, 4, seed=1).repeat_interleave(30, 0).to(dtype), weights(30, 3, seed=2).repeat(40, 1).to(dtype)
    moments, _ = fitted(x, g, 5)
    assert moments.second is None
    one = Moments(moments.inputs, moments.gradients, moments.positions, moments.predictions)
    assert moments.tensors().keys() == one.tensors().keys()
    assert moments.curvature().joint is None


def test_of_a_dead_layer_there_is_no_second_term() -> None:
    assert fitted(torch.zeros(9, 4), torch.randn(9, 3), 2)[0].second is None
    assert fitted(torch.randn(9, 4), torch.zeros(9, 3), 2)[0].second is None


# Collection


def collected(
    model: nn.Module, batches: Sequence[Any], graph: resect.Graph, paths: Sequence[str], **how: Any
) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    collect_curvature(model, batches, graph, paths, found.__setitem__, **how)
    return found


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, resect.Graph]:
    """In float64, with layers small enough for a Fisher matrix of their own."""
    sizes = {"hidden_size": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 5}
    model = tiny("Llama", **sizes, num_hidden_layers=2, vocab_size=101).double()
    return model, resect.trace(model)


BATCHES = [random_tokens(2, 9, seed=1), random_tokens(1, 6, seed=2)]


@pytest.mark.parametrize("whole", [False, True], ids=["block by block", "whole"])
def test_passes_over_a_network_are_least_squares_in_turn(
    whole: bool, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = small
    paths = [*PATHS, "lm_head"]
    if whole:
        monkeypatch.setattr("resect.statistics.blockwise.Chain.of", classmethod(lambda cls, *_: None))
    before, labels = snapshot(model), 2 * 8 + 5
    one, two = (collected(model, BATCHES, graph, paths, terms=terms, spill=tmp_path) for terms in (1, 2))
    assert_untouched(model, before)
    assert not list(tmp_path.iterdir())
    seen = explicit(copy_of(model), paths, BATCHES, next_token_loss)
    for path in paths:
        assert torch.equal(one[path].inputs, two[path].inputs)
        assert torch.equal(one[path].gradients, two[path].gradients)  # type: ignore[arg-type]
        assert (one[path].positions, one[path].predictions) == (two[path].positions, two[path].predictions)
        if path != "lm_head":
            same(product(two[path]), alternated(seen[path], labels, residual.STEPS))


def test_padding_counts_for_nothing(small: Any) -> None:
    model, graph = small
    sequences = [random_tokens(1, length, seed=length)[0] for length in (9, 4)]
    alone = collected(model, [sequence[None] for sequence in sequences], graph, PATHS, terms=2)
    tokens, mask = torch.full((2, 9), 77), torch.zeros(2, 9, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    padded = collected(model, [{"input_ids": tokens, "attention_mask": mask}], graph, PATHS, terms=2)
    for path in PATHS:
        same(product(padded[path]), product(alone[path]))


@pytest.mark.parametrize("whole", [False, True], ids=["block by block", "whole"])
def test_drawn_labels_are_the_same_in_every_pass(whole: bool, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise gradients of the second term would not be those that the first had."""
    model, graph = small
    if whole:
        monkeypatch.setattr("resect.statistics.blockwise.Chain.of", classmethod(lambda cls, *_: None))
    taken: dict[int, list[Tensor]] = {}
    take = Fit.take

    def noted(self: Fit, inputs: Tensor, gradients: Tensor) -> None:
        taken.setdefault(id(self), []).append(gradients)
        take(self, inputs, gradients)

    monkeypatch.setattr(Fit, "take", noted)
    drawn = collected(model, BATCHES, graph, PATHS[:1], terms=2, fisher="sampled", draws=2, seed=5)[PATHS[0]]
    (gradients,) = taken.values()
    batches = 2 * len(BATCHES)
    assert len(gradients) == batches * (1 + residual.STEPS)
    assert not torch.equal(gradients[0], gradients[1]), "the same labels were drawn twice: this shows nothing"
    for number, gradient in enumerate(gradients):
        assert torch.equal(gradient, gradients[number % batches])
    once = collected(model, BATCHES, graph, PATHS[:1], fisher="sampled", draws=2, seed=5)[PATHS[0]]
    assert torch.equal(once.gradients, drawn.gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("inplace", [True, False])
def test_layers_whose_inputs_are_overwritten_and_convolutions(inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace), nn.Flatten(), nn.Linear(12, 3), nn.ReLU(inplace), nn.Linear(3, 4))
    randomise(model.double(), seed=2)
    batches = [(weights(n, 2, 3, 3, seed=n), torch.arange(n)) for n in (3, 2)]
    graph = resect.trace(model, (batches[0][0],))
    plain = copy.deepcopy(model)
    for place in (1, 4):
        plain[place] = nn.ReLU()
    paths = ["0", "3", "5"]
    seen = explicit(plain, paths, batches, class_loss)
    for path, moments in collected(model, batches, graph, paths, objective=Classes(), terms=2).items():
        same(product(moments), alternated(seen[path], 5, residual.STEPS))


def test_one_block_is_held_at_a_time(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = small
    held: list[set[str]] = []
    take = Fit.take

    def noted(self: Fit, *args: Tensor) -> None:
        held.append({one.layer.path.split(".")[2] for one in collection[0].watched})
        take(self, *args)

    collection: list[Collection] = []
    blockwise = Collection.blockwise
    monkeypatch.setattr(Fit, "take", noted)

    def remembered(self: Collection, *args: Any) -> float:
        collection.append(self)
        return blockwise(self, *args)

    monkeypatch.setattr(Collection, "blockwise", remembered)
    collected(model, BATCHES, graph, PATHS, terms=2)
    assert held
    assert all(len(blocks) == 1 for blocks in held)
    assert not collection[0].watched


def test_moments_keep_it_and_do_not_add() -> None:
    moments, _ = fitted(*data(), 3)
    again = Moments.of(moments.tensors())
    assert moments.second is not None
    assert again.second is not None
    assert all(torch.equal(*pair) for pair in zip(again.second, moments.second, strict=True))
    plain = Moments(moments.inputs, moments.gradients, moments.positions, moments.predictions)
    for pair in ((moments, plain), (plain, moments)):
        with pytest.raises(UsageError, match="do not add"):
            pair[0] + pair[1]


def test_the_part_of_a_matrix_is_part_of_the_fisher_information() -> None:
    moments, _ = fitted(*data(), 3)
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 2, 3])
    part = moments.part(rows, columns)
    at = (rows[:, None] * 4 + columns).flatten()
    same(product(part), product(moments)[at][:, at])
    _, curvature = problem(3, 4)
    same(written_out(curvature.part(rows, columns)), written_out(curvature)[at][:, at])


@pytest.mark.parametrize("fisher", ["activations", "identity"])
def test_without_gradients_there_is_none(fisher: str, small: Any) -> None:
    model, graph = small
    with pytest.raises(UsageError, match=f"fisher={fisher} has none"):
        collected(model, BATCHES, graph, PATHS, terms=2, fisher=fisher)
    with pytest.raises(UsageError, match="not 3"):
        collected(model, BATCHES, graph, PATHS, terms=3)


# The joint basis


def test_both_terms_are_diagonal_in_the_joint_basis() -> None:
    weight, curvature = problem(3, 5)
    joint, fisher = curvature.joint, written_out(curvature)
    assert joint is not None
    P = torch.kron(joint.G.P, joint.A.P)
    same(P / joint.inverse.flatten() @ P.T, fisher)
    same(torch.kron(joint.G.Q, joint.A.Q) @ P.T, torch.eye(15).double())
    same(joint.solved(weight).flatten(), torch.linalg.solve(fisher, weight.flatten()))
    same(joint.inverse_diagonal.flatten(), torch.linalg.inv(fisher).diagonal())
    same(curvature.times(weight).flatten(), fisher @ weight.flatten())
    same(joint.A.second(), curvature.A2 if curvature.A2 is not None else weight)


def shifted(size: int, shift: float) -> Tensor:
    """A symmetric matrix with the more eigenvalues below zero, the larger the shift."""
    root = weights(size, size, seed=size)
    return root @ root.mT - shift * size * torch.eye(size)


@pytest.mark.parametrize("turned", [1, -1])
@pytest.mark.parametrize("mixed", [(0.4, 0.3), (0.5, 0.0), (0.0, 0.5), (1.0, 1.0)])
def test_what_takes_too_much_is_clipped_and_said(mixed: tuple[float, float], turned: int) -> None:
    """Values of both signs: those that the first term cannot bear are brought back, the others stay."""
    A, G = factor(6, 1), factor(4, 2)
    A2, G2 = (turned * shifted(size, shift) for size, shift in zip((6, 4), mixed, strict=True))
    moments = Moments(A, G, 1, 1, (A2, G2))
    found = moments.curvature(damping=0.0)
    assert found.joint is not None
    fisher, first = written_out(found), torch.kron(G, A)
    least = torch.linalg.eigvals(torch.linalg.solve(first, fisher)).real.min()
    assert float(least) == pytest.approx(LEAST, rel=1e-6)
    plain = Joint(Side.of(A, A2), Side.of(G, G2))
    before, after = (torch.outer(one.G.values, one.A.values) for one in (plain, found.joint))
    assert (before * after >= 0).all(), "a clipped value changed its sign"
    assert (after.abs() <= before.abs()).all()
    assert found.kept == pytest.approx(float(after.square().sum() / before.square().sum()))
    with pytest.warns(SecondTermClipped, match=rf"In 1 of 2 layers .* 0\.1 of the first .* most in down, to {found.kept:.0%}"):
        tell_clipped({"up": 1.0, "down": found.kept})
    other = Joint(Side.of(A, -A2), Side.of(G, -G2)).positive()
    assert torch.allclose(other.inverse.flatten().sort().values, found.joint.inverse.flatten().sort().values, rtol=1e-9)
    for t, s in ((plain.G.values, plain.A.values), (-plain.G.values, -plain.A.values)):
        way = torch.outer(t.clamp_min((LEAST - 1) / float(s.max())), s.clamp_min((LEAST - 1) / float(t.max())))
        assert (after - before).norm() <= (way - before).norm() * (1 + 1e-9)
    recomputed = Curvature(found.A, found.G, found.A2, found.G2).joint
    assert recomputed is not None
    same(recomputed.inverse_diagonal, found.joint.inverse_diagonal)


def test_what_leaves_enough_is_left_alone() -> None:
    _, curvature = problem(4, 6)
    assert curvature.A2 is not None
    assert curvature.G2 is not None
    weaker = Moments(curvature.A, curvature.G, 1, 1, (0.99 * curvature.A2, curvature.G2)).curvature(damping=0.0)
    assert torch.equal(weaker.A2, 0.99 * curvature.A2)  # type: ignore[arg-type]
    assert weaker.kept == 1
    tell_clipped({"down": weaker.kept})

