"""Kronecker factors equal second moments by definition, block by block or not, and a model that is looked at stays as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

import resect
from resect.errors import CheckpointError, DampingRaised, DataError, NumericsError, UsageError
from resect.graph import Graph
from resect.saliency.obs import column_losses
from resect.statistics import Classes, Moments, collect_curvature
from resect.statistics.blockwise import BlockCall, Chain
from resect.statistics.curvature import DEAD
from tests.models import FAMILIES, assert_untouched, copy_of, random_tokens, randomise, snapshot
from tests.statistics.explicit import Seen, class_loss, exact_fisher, explicit, next_token_loss

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_LINEARS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("model.layers", LLAMA_LINEARS),
    "llama_biases": ("model.layers", LLAMA_LINEARS),
    "gemma2": ("model.layers", LLAMA_LINEARS),
    "qwen2_sliding": ("model.layers", LLAMA_LINEARS),
    "gpt2": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": ("gpt_neox.layers", ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
}
DOWN = "model.layers.1.mlp.down_proj"
FISHERS = pytest.mark.parametrize("fisher", ["empirical", "sampled", "activations"])
WAYS = pytest.mark.parametrize("whole", [False, True], ids=["block by block", "whole"])


@functools.cache
def exact(family: str) -> tuple[PreTrainedModel, Graph]:
    """A tiny model in float64 and its graph, for reading only."""
    model = FAMILIES[family]().double()
    return model, resect.trace(model)


def paths_of(family: str) -> list[str]:
    """Linear layers in blocks, and the head where it has a name of its own."""
    stack, leaves = LINEARS[family]
    return [f"{stack}.{layer}.{leaf}" for layer in range(3) for leaf in leaves] + ["lm_head"]


def collected(
    model: nn.Module, batches: Sequence[Any], graph: Graph, paths: Sequence[str], **how: Any
) -> tuple[Any, dict[str, Moments]]:
    found: dict[str, Moments] = {}

    def sink(path: str, moments: Moments) -> None:
        assert path not in found
        found[path] = moments

    loss = collect_curvature(model, batches, graph, paths, sink, **how)
    assert found.keys() == set(paths)
    return loss, found


def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no network were a chain of blocks."""
    monkeypatch.setattr(Chain, "of", classmethod(lambda cls, *_: None))


def same(found: Tensor | None, expected: Tensor, rtol: float = 1e-9) -> None:
    """To a share of the largest entry."""
    assert found is not None
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    assert float((found - expected).abs().max() / expected.abs().max()) <= rtol


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def same_moments(found: Moments, expected: Moments, rtol: float = 1e-9) -> None:
    same(found.inputs, expected.inputs, rtol)
    assert (found.gradients is None) == (expected.gradients is None)
    if expected.gradients is not None:
        same(found.gradients, expected.gradients, rtol)
    assert (found.positions, found.predictions) == (expected.positions, expected.predictions)


def assert_seen(found: Moments, seen: Seen, predictions: int, rtol: float = 1e-9) -> None:
    same(found.inputs, seen.A, rtol)
    same(found.gradients, seen.G, rtol)
    assert (found.positions, found.predictions) == (seen.positions, predictions)


class Pictures(nn.Module):
    """A small network of convolutions, linear layers and activations that overwrite what they take in."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 2), dilation=(1, 2))
        self.plain = nn.Conv2d(4, 5, 3, bias=False)
        self.along = nn.Conv1d(5, 3, 3, stride=2, padding=2, dilation=2)
        self.hidden = nn.Linear(3, 6)
        self.head = nn.Linear(6, 4, bias=False)
        self.act = nn.ReLU(inplace)

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.act(self.stem(pixels))
        found = self.plain(found).flatten(2).relu()
        found = self.act(self.along(found)).mean(-1)
        found = self.hidden(found)
        found = torch.tanh_(found) if self.act.inplace else found.tanh()
        return self.head(found)


PICTURE_PATHS = ("stem", "plain", "along", "hidden", "head")


def pictures(sizes: Sequence[int] = (3, 2), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 2, 11, 10, generator=generator, dtype=torch.float64),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]


def network(inplace: bool = True) -> tuple[nn.Module, Graph]:
    model = Pictures(inplace).double()
    randomise(model, seed=2)
    return model, resect.trace(model, (torch.zeros(1, 2, 11, 10, dtype=torch.float64),))


# What is summed


@pytest.mark.parametrize("family", LINEARS)
def test_moments_are_those_of_what_goes_in_and_of_its_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resect.statistics.curvature.PANEL", 7)  # several, the last of them narrower
    model, graph = exact(family)
    batches = [random_tokens(2, 9, seed=1), random_tokens(1, 9, seed=2), random_tokens(3, 5, seed=3)]
    predictions = 3 * 8 + 3 * 4
    loss, found = collected(model, batches, graph, paths_of(family))
    seen = explicit(copy_of(model), paths_of(family), batches, next_token_loss)
    for path, moments in found.items():
        assert_seen(moments, seen[path], predictions)
        assert torch.equal(moments.inputs.tril(-7), moments.inputs.triu(7).mT)
    assert loss == pytest.approx(sum(float(next_token_loss(model, batch).detach()) for batch in batches) / predictions, rel=1e-12)


@pytest.mark.parametrize("inplace", [True, False])
def test_moments_of_convolutions_are_those_of_their_patches(inplace: bool) -> None:
    model, graph = network(inplace)
    batches = pictures()
    loss, found = collected(model, batches, graph, PICTURE_PATHS, objective=Classes())
    seen = explicit(network(inplace=False)[0], PICTURE_PATHS, batches, class_loss)
    for path, moments in found.items():
        assert_seen(moments, seen[path], 5)
    assert found["stem"].positions > found["along"].positions > found["head"].positions == 5
    assert loss == pytest.approx(sum(float(class_loss(model, batch).detach()) for batch in batches) / 5, rel=1e-12)


def test_factors_are_means_with_damping_on_their_diagonals() -> None:
    model, graph = network()
    batches = pictures()
    seen = explicit(network(inplace=False)[0], PICTURE_PATHS, batches, class_loss)
    for path, moments in collected(model, batches, graph, PICTURE_PATHS, objective=Classes())[1].items():
        A, G = seen[path].A / seen[path].positions, seen[path].G / 5
        found = moments.curvature(path, damping=0.02, damping_gradients=0.3)
        same(found.A, A + 0.02 * A.trace() / len(A) * eye(len(A)))
        same(found.G, G + 0.3 * G.trace() / len(G) * eye(len(G)))
        same(found.A_inverse, torch.linalg.inv(found.A))
        assert found.G is not None
        same(found.G_inverse, torch.linalg.inv(found.G))
        same(moments.curvature(path, damping=0.02).G, G + 0.02 * G.trace() / len(G) * eye(len(G)))
        assert found.A.dtype == torch.float64


def test_moments_of_narrow_networks_are_summed_in_float32() -> None:
    model, graph = FAMILIES["llama"]().bfloat16(), exact("llama")[1]
    _, found = collected(model, [random_tokens(2, 9)], graph, [DOWN])
    assert {tensor.dtype for tensor in (found[DOWN].inputs, found[DOWN].gradients) if tensor is not None} == {torch.float32}


# Where the Kronecker product is the Fisher information itself


def kronecker(moments: Moments) -> Tensor:
    assert moments.gradients is not None
    return torch.kron(moments.gradients / moments.predictions, moments.inputs / moments.positions)


def classifier() -> tuple[nn.Module, Graph]:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()
    randomise(model, seed=4)
    return model, resect.trace(model, (torch.zeros(1, 5, dtype=torch.float64),))


def singles(inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(inputs.split(1), labels.split(1), strict=True)


@pytest.mark.parametrize("seed", range(3))
def test_of_one_sample_it_is_the_fisher_information_of_every_layer(seed: int) -> None:
    model, graph = classifier()
    sample = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed)).double(), torch.tensor([seed])
    for path, moments in collected(model, [sample], graph, ["0", "2", "4"], objective=Classes())[1].items():
        same(kronecker(moments), exact_fisher(model.get_submodule(path), model, [sample]))


def test_of_one_sample_it_is_the_fisher_information_of_a_convolution_with_one_place() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, (4, 3), dilation=(2, 1)), nn.LeakyReLU(inplace=True), nn.Flatten(), nn.Linear(3, 4)
    ).double()
    randomise(model, seed=3)
    sample = torch.randn(1, 2, 7, 3, dtype=torch.float64), torch.tensor([2])
    graph = resect.trace(model, (sample[0],))
    plain = copy.deepcopy(model)
    plain[1] = nn.LeakyReLU()
    for path, moments in collected(model, [sample], graph, ["0", "3"], objective=Classes())[1].items():
        same(kronecker(moments), exact_fisher(plain.get_submodule(path), plain, [sample]))


def test_of_one_input_with_many_labels_it_is_the_fisher_information() -> None:
    model, graph = classifier()
    batch = torch.randn(1, 5, dtype=torch.float64).expand(7, 5).contiguous(), torch.tensor([0, 1, 1, 2, 0, 1, 2])
    for path, moments in collected(model, [batch], graph, ["0", "2", "4"], objective=Classes())[1].items():
        same(kronecker(moments), exact_fisher(model.get_submodule(path), model, singles(*batch)))


def test_of_gradients_that_know_nothing_of_inputs_it_is_the_fisher_information() -> None:
    """All labels with all inputs, and logits that do not depend on these."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator]
    inputs = torch.randn(6, 4, dtype=torch.float64).repeat_interleave(4, 0)
    batch = inputs, torch.tensor([0, 1, 2, 2]).repeat(6)
    graph = resect.trace(model, (inputs,))
    moments = collected(model, [batch], graph, ["0"], objective=Classes())[1]["0"]
    same(kronecker(moments), exact_fisher(model.get_submodule("0"), model, singles(*batch)))


def test_in_general_it_is_an_approximation() -> None:
    """So that the tests above say something."""
    model, graph = classifier()
    batch = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 0, 1, 2])
    moments = collected(model, [batch], graph, ["4"], objective=Classes())[1]["4"]
    fisher = exact_fisher(model.get_submodule("4"), model, singles(*batch))
    assert (kronecker(moments) - fisher).abs().max() > 0.01 * fisher.abs().max()


# Sums add


@pytest.mark.parametrize("fisher", ["empirical", "activations"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_halves_make_a_whole(first: int, fisher: str) -> None:
    model, graph = exact("llama")
    batches = [random_tokens(sequences, length, seed=length) for sequences, length in ((2, 9), (1, 7), (3, 5), (1, 4))]
    paths = paths_of("llama")[7:14]
    (one_loss, one), (two_loss, two) = (
        collected(model, part, graph, paths, fisher=fisher) for part in (batches[:first], batches[first:])
    )
    loss, whole = collected(model, batches, graph, paths, fisher=fisher)
    for path in paths:
        before = one[path].inputs.clone()
        same_moments(one[path] + two[path], whole[path], 1e-12)
        same_moments(two[path] + one[path], whole[path], 1e-12)
        assert torch.equal(one[path].inputs, before), "adding changed a part"
    tokens = [sum(batch[:, 1:].numel() for batch in part) for part in (batches[:first], batches[first:])]
    if fisher != "activations":
        assert loss == pytest.approx((one_loss * tokens[0] + two_loss * tokens[1]) / sum(tokens), rel=1e-12)


def test_the_order_of_batches_and_their_sizes_do_not_matter() -> None:
    model, graph = exact("gpt2")
    tokens = random_tokens(6, 8, seed=5)
    paths = paths_of("gpt2")[-5:]
    expected = collected(model, [tokens], graph, paths)[1]
    for batches in (list(tokens.split(1)), list(tokens.flip(0).split(4))):
        for path, moments in collected(model, batches, graph, paths)[1].items():
            same_moments(moments, expected[path])


def test_moments_of_different_layers_do_not_add() -> None:
    one = Moments(torch.ones(2, 2), torch.ones(3, 3), 1, 1)
    for other in (Moments(torch.ones(2, 2), None, 1), Moments(torch.ones(4, 4), torch.ones(3, 3), 1, 1)):
        for pair in ((one, other), (other, one)):
            with pytest.raises(UsageError, match="do not add"):
                pair[0] + pair[1]


@pytest.mark.parametrize("gradients", [torch.randn(3, 3), None], ids=["G", "no G"])
def test_moments_come_back_from_tensors(gradients: Tensor | None) -> None:
    moments = Moments(torch.randn(2, 2), gradients, 11, 7)
    again = Moments.of(moments.tensors())
    assert torch.equal(again.inputs, moments.inputs)
    assert (again.gradients is None) == (gradients is None)
    assert gradients is None or (again.gradients is not None and torch.equal(again.gradients, gradients))
    assert (again.positions, again.predictions) == (11, 7)


# Block by block


@FISHERS
@pytest.mark.parametrize("family", LINEARS)
def test_block_by_block_is_the_same_as_the_whole_network(family: str, fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = exact(family)
    paths = [path for path in paths_of(family) if "." in path]  # a head draws labels of its own
    batches = [random_tokens(2, 9, seed=1), random_tokens(1, 6, seed=2)]
    ran: list[str] = []
    for way in ("run", "forward"):
        monkeypatch.setattr(Chain, way, _noting(getattr(Chain, way), ran))
    loss, found = collected(model, batches, graph, paths, fisher=fisher, draws=2, seed=3)
    assert ran, "the chain of blocks was not used"
    in_one_pass(monkeypatch)
    ran.clear()
    expected_loss, expected = collected(model, batches, graph, paths, fisher=fisher, draws=2, seed=3)
    assert not ran
    assert loss == (expected_loss and pytest.approx(expected_loss, rel=1e-12))
    for path in paths:
        same_moments(found[path], expected[path])


def _noting(method: Any, ran: list[str]) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        ran.append(method.__name__)
        return method(*args, **kwargs)

    return noted


@FISHERS
def test_one_block_is_complete_before_the_next_begins(fisher: str) -> None:
    model, graph = exact("llama")
    order: list[str] = []
    paths = [path for path in paths_of("llama") if "." in path]
    collect_curvature(model, [random_tokens(2, 9)], graph, paths, lambda path, _: order.append(path), fisher=fisher)
    blocks = [int(path.split(".")[2]) for path in order]
    assert blocks == sorted(blocks, reverse=fisher != "activations")


def test_an_image_network_goes_block_by_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4
    )
    config.num_labels = 5
    model = transformers.ViTForImageClassification(config).eval().double()
    randomise(model, seed=1)
    batches = [(torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.arange(n)) for n in (3, 2)]
    graph = resect.trace(model, {"pixel_values": batches[0][0]})
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    ran: list[str] = []
    monkeypatch.setattr(Chain, "run", _noting(Chain.run, ran))
    _, found = collected(model, batches, graph, paths, objective=Classes())
    assert ran
    seen = explicit(model, paths, batches, class_loss)
    for path in paths:
        assert_seen(found[path], seen[path], 5)


class Shared(nn.Module):
    """A language model whose two blocks take turns, one or the other more often; the stream goes around them."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.times = times
        self.embed = nn.Embedding(101, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12)) for _ in range(2))
        self.head = nn.Linear(12, 101, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for number in range(self.times):
            hidden = hidden + self.blocks[number % 2](hidden).tanh()
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


def plain_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits[:, :-1].log_softmax(-1)
    return -logits.gather(2, tokens[:, 1:, None]).sum()


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_blocks_that_are_no_chain_are_seen_in_one_pass(times: int) -> None:
    model = Shared(times).double()
    randomise(model, seed=1)
    graph = resect.trace(model, {"input_ids": random_tokens(1, 5)})
    assert graph.blocks.count == 2
    tokens = random_tokens(2, 6)
    moments = collected(model, [tokens], graph, ["blocks.0.1"])[1]["blocks.0.1"]
    assert moments.positions == 12 * ((times + 1) // 2)
    assert_seen(moments, explicit(model, ["blocks.0.1"], [tokens], plain_loss)["blocks.0.1"], 10)


# Files


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@FISHERS
def test_what_waits_in_files_gives_the_same_bits_and_leaves_none(
    family: str, fisher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = exact(family)
    batches = [random_tokens(2, 9, seed=1), random_tokens(1, 6, seed=2)]
    expected_loss, expected = collected(model, batches, graph, paths_of(family), fisher=fisher)
    stored: list[str] = []
    monkeypatch.setattr(BlockCall, "store", _noting(BlockCall.store, stored))
    loss, found = collected(model, batches, graph, paths_of(family), fisher=fisher, spill=tmp_path)
    assert len(stored) == (0 if fisher == "activations" else 3 * len(batches))
    assert not list(tmp_path.iterdir())
    assert loss == expected_loss
    for path, moments in expected.items():
        for name, tensor in moments.tensors().items():
            assert torch.equal(found[path].tensors()[name], tensor)


def test_a_batch_that_fails_leaves_no_file(tmp_path: Path) -> None:
    model, graph = copy_of(exact("llama")[0]), exact("llama")[1]
    model.get_parameter("model.embed_tokens.weight").data[50] = torch.nan
    before = snapshot(model)
    batches = [torch.full((1, 9), 7), torch.full((1, 9), 50)]
    with pytest.raises(NumericsError):
        collected(model, batches, graph, [DOWN], spill=tmp_path)
    assert not list(tmp_path.iterdir())
    assert_untouched(model, before)


# Whose labels


@WAYS
def test_activations_alone_need_no_gradients(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = exact("gpt2")
    batches = [random_tokens(2, 9, seed=1), random_tokens(1, 6, seed=2)]
    expected_loss, expected = collected(model, batches, graph, paths_of("gpt2"))
    if whole:
        in_one_pass(monkeypatch)
    monkeypatch.setattr(Moments, "take_gradients", _refuse)
    loss, found = collected(model, batches, graph, paths_of("gpt2"), fisher="activations")
    assert loss is None
    for path, moments in found.items():
        same(moments.inputs, expected[path].inputs)
        assert moments.gradients is None
        assert (moments.positions, moments.predictions) == (24, 0)
        assert moments.curvature(path).G is None
        assert moments.curvature(path).G_inverse is None


def _refuse(*_: Any) -> None:
    raise AssertionError("refused")


@WAYS
def test_drawn_labels_come_from_the_seed_alone(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = exact("llama")
    batches = [random_tokens(2, 9, seed=1)]
    if whole:
        in_one_pass(monkeypatch)

    def drawn(seed: int) -> Moments:
        torch.rand(seed + 1)  # whatever the global state is
        return collected(model, batches, graph, [DOWN], fisher="sampled", seed=seed)[1][DOWN]

    empirical = collected(model, batches, graph, [DOWN])[1][DOWN]
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(moments.gradients is not None for moments in (first, again, other))
    assert torch.equal(first.gradients, again.gradients)  # type: ignore[arg-type]
    for different in (other, empirical):
        assert (first.gradients - different.gradients).abs().max() > 0.01 * first.gradients.abs().max()  # type: ignore[operator, union-attr]
    same(first.inputs, empirical.inputs)


def own_fisher(model: nn.Module, paths: Sequence[str], inputs: Tensor) -> dict[str, Tensor]:
    """G under the network's own distribution: every label of every input, weighed by its probability."""
    chances = model(inputs).softmax(-1).detach()
    total = dict.fromkeys(paths, torch.zeros(()))
    for number, one in enumerate(inputs.split(1)):
        for label in range(chances.shape[1]):
            for path, seen in explicit(model, paths, [(one, torch.tensor([label]))], class_loss).items():
                total[path] = total[path] + chances[number, label] * seen.G
    return {path: value / len(inputs) for path, value in total.items()}


def test_drawn_labels_converge_to_the_fisher_information_of_the_network() -> None:
    model, graph = classifier()
    inputs, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    paths = ["0", "2", "4"]
    expected = own_fisher(model, paths, inputs)

    def distances(repeats: int, draws: int) -> dict[str, float]:
        batch = inputs.repeat(repeats, 1), labels.repeat(repeats)
        found = collected(model, [batch], graph, paths, objective=Classes(), fisher="sampled", draws=draws)[1]
        assert all(moments.predictions == moments.positions == 6 * repeats * draws for moments in found.values())
        return {path: distance(moments) for path, moments in zip(found, found.items(), strict=True)}

    def distance(named: tuple[str, Moments]) -> float:
        path, moments = named
        assert moments.gradients is not None
        return float((moments.gradients / moments.predictions - expected[path]).norm() / expected[path].norm())

    few, many = distances(1, 8), distances(200, 60)  # 12,000 draws for every input: a standard error of about 1 %
    truth = collected(model, [(inputs, labels)], graph, paths, objective=Classes())[1]
    for path in paths:
        assert many[path] < 0.03
        assert many[path] < 0.5 * few[path]
        assert distance((path, truth[path])) > 0.1, "the true labels give the same: this shows nothing"


# Padding


def padded(sequences: Sequence[Tensor], side: str, filler: int) -> dict[str, Tensor]:
    """Sequences of different lengths in one batch."""
    longest = max(map(len, sequences))
    tokens, mask = torch.full((len(sequences), longest), filler), torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        at = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        tokens[row, at], mask[row, at] = sequence, 1
    return {"input_ids": tokens, "attention_mask": mask}


@WAYS
@pytest.mark.parametrize("fisher", ["empirical", "activations"])
@pytest.mark.parametrize(
    ("family", "side"), [("llama", "right"), ("llama", "left"), ("gpt2", "right"), ("qwen2_sliding", "right")]
)
def test_padding_counts_for_nothing(family: str, side: str, fisher: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded batch gives what its sequences give one by one, whatever fills the gaps."""
    model, graph = exact(family)
    sequences = [random_tokens(1, length, seed=length)[0] for length in (9, 4, 6)]
    paths = paths_of(family)
    loss, expected = collected(model, [sequence[None] for sequence in sequences], graph, paths, fisher=fisher)
    if whole:
        in_one_pass(monkeypatch)
    for filler in (0, 77):
        batch = padded(sequences, side, filler)
        found_loss, found = collected(model, [batch], graph, paths, fisher=fisher)
        assert found_loss == (loss and pytest.approx(loss, rel=1e-9 if side == "right" else 1e-5))
        for path in paths:
            # Rotations are computed in float32 by transformers; a left-padded sequence has others.
            same_moments(found[path], expected[path], 1e-9 if side == "right" else 1e-4)
    if side == "right":
        masks = [batch["attention_mask"]]
        for path, seen in explicit(model, paths, [batch], next_token_loss, masks).items():
            same(found[path].inputs, seen.A)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_full_batches_mix(side: str) -> None:
    model, graph = exact("llama")
    sequences = [random_tokens(1, length, seed=length)[0] for length in (8, 8, 5)]
    parts = [padded(sequences[:2], side, 0), padded(sequences[1:], side, 0)]
    separate = [collected(model, [part], graph, [DOWN])[1][DOWN] for part in parts]
    together = collected(model, parts, graph, [DOWN])[1][DOWN]
    same_moments(together, separate[0] + separate[1])
    assert (together.positions, together.predictions) == (8 + 8 + 8 + 5, 7 + 7 + 7 + 4)


class Summaries(nn.Module):
    """A language model with a layer that sees sequences, not their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gist, self.head = nn.Embedding(101, 6), nn.Linear(6, 6), nn.Linear(6, 101)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        hidden = hidden + self.gist(hidden[:, 0])[:, None]
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


def test_padding_that_cannot_be_told_apart_is_refused() -> None:
    model = Summaries()
    graph = resect.trace(model, {"input_ids": random_tokens(1, 5)})
    sequences = [random_tokens(1, length)[0] for length in (6, 4)]
    collected(model, [padded(sequences[:1], "right", 0)], graph, ["gist", "head"])
    with pytest.raises(UsageError, match=r"gist sees 2 positions of 12"):
        collected(model, [padded(sequences, "right", 0)], graph, ["head", "gist"])


# The model is left as it was


@WAYS
@FISHERS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_is_bit_identical_afterwards(
    family: str, fisher: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old gradients, frozen parameters, modes and foreign hooks are as before, after a failure too."""
    model, graph = copy_of(exact(family)[0]), exact(family)[1]
    stack, leaves = LINEARS[family]
    model.train()
    model.get_submodule(f"{stack}.1").eval()
    model.get_submodule(f"{stack}.0.mlp").register_forward_hook(lambda *_: None)
    norm = next(parameter for name, parameter in model.named_parameters() if "norm" in name or "ln_f" in name)
    norm.grad = torch.full_like(norm, 3.0)
    model.get_submodule(f"{stack}.2.{leaves[-1]}").requires_grad_(False)
    if whole:
        in_one_pass(monkeypatch)
    before = snapshot(model)
    collected(model, [random_tokens(2, 9)], graph, paths_of(family), fisher=fisher, spill=tmp_path)
    assert_untouched(model, before)
    with pytest.raises(AssertionError, match="refused"):
        collect_curvature(model, [random_tokens(2, 9)], graph, paths_of(family), _refuse, fisher=fisher)
    assert_untouched(model, before)


@FISHERS
def test_a_network_of_convolutions_is_bit_identical_afterwards(fisher: str) -> None:
    model, graph = network()
    before = snapshot(model)
    collected(model, pictures(), graph, PICTURE_PATHS, fisher=fisher, objective=Classes())
    assert_untouched(model, before)


@WAYS
def test_frozen_parameters_old_gradients_and_no_grad_change_nothing(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = exact("llama")
    tokens = [random_tokens(2, 9)]
    expected = collected(model, tokens, graph, paths_of("llama"))[1]
    other = copy_of(model).requires_grad_(False)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    if whole:
        in_one_pass(monkeypatch)
    with torch.no_grad():
        for path, moments in collected(other, tokens, graph, paths_of("llama"))[1].items():
            same_moments(moments, expected[path])


# What is refused


@FISHERS
@WAYS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_an_error(value: float, whole: bool, fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = copy_of(exact("llama")[0]), exact("llama")[1]
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = value
    if whole:
        in_one_pass(monkeypatch)
    before = snapshot(model)
    with pytest.raises(NumericsError, match="loss"):
        collected(model, [random_tokens(2, 9)], graph, [DOWN], fisher=fisher)
    assert_untouched(model, before)


@pytest.mark.parametrize("fisher", ["empirical", "activations"])
def test_a_loss_that_overflows_is_an_error(fisher: str) -> None:
    model, graph = FAMILIES["llama"](), exact("llama")[1]
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(3e38)
    with pytest.raises(NumericsError, match="loss"):
        collected(model, [random_tokens(2, 9)], graph, [DOWN], fisher=fisher)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_no_numbers_are_named(value: float) -> None:
    with pytest.raises(NumericsError, match=r"inputs of blocks\.3\.down"):
        Moments(torch.full((2, 2), value), torch.eye(2), 1, 1).curvature("blocks.3.down")
    with pytest.raises(NumericsError, match=r"gradients of blocks\.3\.down"):
        Moments(torch.eye(2), torch.full((2, 2), value), 1, 1).curvature("blocks.3.down")


def test_an_unknown_fisher_is_refused_with_the_nearest() -> None:
    model, graph = exact("llama")
    with pytest.raises(UsageError, match="empirical"):
        collected(model, [random_tokens()], graph, [DOWN], fisher="emprical")


@pytest.mark.parametrize("draws", [0, -1])
def test_no_draws_are_refused(draws: int) -> None:
    model, graph = exact("llama")
    with pytest.raises(UsageError, match=f"not {draws}"):
        collected(model, [random_tokens()], graph, [DOWN], fisher="sampled", draws=draws)


def test_a_layer_that_is_no_matrix_is_refused_by_name() -> None:
    model, graph = exact("llama")
    with pytest.raises(UsageError, match=r"model\.embed_tokens is a Embedding"):
        collected(model, [random_tokens()], graph, ["model.embed_tokens"])


@WAYS
@FISHERS
@pytest.mark.parametrize("batches", [[], [torch.full((3, 1), 5)]], ids=["no batch", "one token each"])
def test_nothing_to_predict_is_refused(batches: list[Tensor], fisher: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = exact("llama")
    if whole:
        in_one_pass(monkeypatch)
    if batches and fisher == "activations":  # what enters is all that counts
        assert collected(model, batches, graph, [DOWN], fisher=fisher)[1][DOWN].positions == 3
        return
    with pytest.raises(DataError):
        collected(model, batches, graph, [DOWN], fisher=fisher)


# Factors that cannot be inverted


def moments_of(inputs: Tensor, gradients: Tensor | None = None) -> Moments:
    G = None if gradients is None else gradients.T @ gradients
    return Moments(inputs.T @ inputs, G, len(inputs), 0 if gradients is None else len(gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("columns", "tokens"), [(6, 5), (6, 3), (30, 29), (30, 20), (100, 99), (100, 1)])
def test_fewer_tokens_than_columns_raise_a_damping_of_nothing(columns: int, tokens: int, dtype: torch.dtype) -> None:
    for seed in range(10):
        inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        with pytest.warns(DampingRaised, match=r"inputs of blocks\.3\.down: damping 0 was too little, 1e-05 is used"):
            found = moments_of(inputs).curvature("blocks.3.down", damping=0.0)
        A = inputs.double().T @ inputs.double() / tokens
        same(found.A, A + 1e-5 * A.trace() / columns * eye(columns), 1e-6 if dtype == torch.float32 else 1e-9)
        same(found.A @ found.A_inverse, eye(columns), 1e-6)


def test_gradients_that_span_too_little_are_named() -> None:
    """Gradients of a softmax sum to zero over the classes."""
    gradients = torch.randn(50, 5, dtype=torch.float64)
    moments = moments_of(torch.randn(50, 4, dtype=torch.float64), gradients - gradients.mean(1, keepdim=True))
    with pytest.warns(DampingRaised, match="gradients of head"):
        moments.curvature("head", damping_gradients=0.0)
    with pytest.warns(DampingRaised, match="gradients of head"):
        moments.curvature("head", damping=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_that_repeats_the_bias_raises_a_damping_of_nothing(dtype: torch.dtype) -> None:
    for seed in range(10):
        inputs = torch.randn(40, 9, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        inputs[:, 3], inputs[:, -1] = 0.7, 1.0
        with pytest.warns(DampingRaised, match="inputs of fc"):
            moments_of(inputs).curvature("fc", damping=0.0)


def test_enough_tokens_need_no_damping() -> None:
    inputs = torch.randn(60, 20, dtype=torch.float64) * torch.logspace(-3, 0, 20, dtype=torch.float64)
    same(moments_of(inputs).curvature("fc", damping=0.0).A, inputs.T @ inputs / 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_common_damping_does_whatever_the_tokens(tokens: int, dtype: torch.dtype) -> None:
    """No warning, which would be an error here."""
    inputs = torch.randn(tokens, 100, dtype=dtype) * torch.logspace(-4, 3, 100, dtype=dtype)
    found = moments_of(inputs).curvature("fc", damping=0.01)
    assert found.A_inverse.isfinite().all()


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.filterwarnings("ignore::resect.errors.DampingRaised")
def test_dead_inputs_cost_nothing_and_harm_nothing(damping: float) -> None:
    inputs = torch.randn(50, 6, dtype=torch.float64)
    inputs[:, [2, 5]] = 0
    found = moments_of(inputs).curvature("fc", damping=damping)
    losses = column_losses(torch.ones(3, 6, dtype=torch.float64), found)
    assert losses.isfinite().all()
    assert losses[[2, 5]].max() < 0.02 * losses[[0, 1, 3, 4]].min()


def test_dead_inputs_without_damping_are_reported() -> None:
    inputs = torch.randn(50, 6, dtype=torch.float64)
    inputs[:, 2] = 0
    with pytest.warns(DampingRaised, match="inputs of fc"):
        moments_of(inputs).curvature("fc", damping=0.0)


def test_a_dead_layer_costs_next_to_nothing() -> None:
    found = Moments(torch.zeros(3, 3), torch.zeros(2, 2), 5, 4).curvature("dead")
    assert torch.equal(found.A, DEAD * eye(3))
    assert found.G is not None
    assert torch.equal(found.G, DEAD * eye(2))
    never = Moments(torch.zeros(3, 3), torch.zeros(2, 2)).curvature("never ran")
    assert torch.equal(never.A, DEAD * eye(3))


def test_what_no_damping_mends_is_an_error() -> None:
    """No sum of squares at all."""
    indefinite = torch.tensor([[1.0, 0.0], [0.0, -1000.0]]).double() + 1000.5 * eye(2)
    indefinite[0, 1] = indefinite[1, 0] = 1e6
    with pytest.raises(NumericsError, match="cannot be inverted"):
        Moments(indefinite, None, 1).curvature("odd")


# Another implementation


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.filterwarnings("ignore")
def test_another_implementation_finds_the_same_factors(reduction: str) -> None:
    """KFAC-expand of curvlinops: A over samples and positions, G of the summed loss over samples (not, if the loss is summed)."""
    curvlinops = pytest.importorskip("curvlinops")
    first, second = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Linear(4 * 6 * 5, 6, bias=False)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), second, nn.Tanh(), nn.Linear(6, 4)).double()
    randomise(model, seed=5)
    batches, paths = pictures((4, 3)), ["0", "3", "5"]
    graph = resect.trace(model, (batches[0][0],))
    found = collected(model, batches, graph, paths, objective=Classes())[1]
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction=reduction),
        list(model.parameters()),
        batches,
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    for path, moments in found.items():
        assert moments.gradients is not None
        same(moments.inputs / moments.positions, operator._input_covariances[path])
        G = operator._gradient_covariances[path]
        same(moments.gradients / moments.predictions, G if reduction == "mean" else G / 7)


@pytest.mark.filterwarnings("ignore")
def test_another_implementation_expects_the_same_gradients() -> None:
    """Under the network's own distribution, which it computes in closed form."""
    curvlinops = pytest.importorskip("curvlinops")
    model, _ = classifier()
    inputs = torch.randn(6, 5, dtype=torch.float64)
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(inputs, torch.zeros(6, dtype=torch.long))],
        fisher_type="type-2",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    for path, G in own_fisher(model, ["0", "2", "4"], inputs).items():
        same(operator._gradient_covariances[path], G)


def test_a_disk_that_takes_no_more_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("resect.statistics.blockwise.save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        BlockCall(torch.ones(2), (), {}).store(tmp_path / "entering.safetensors")
