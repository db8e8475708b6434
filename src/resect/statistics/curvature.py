"""Kronecker-factored curvature of the loss: second moments of what layers take in, and of the gradients of what they put out.

For a layer `y = W x` the Fisher information of the loss, in nats per prediction, is approximated by `G ⊗ A`: `A`
[columns, columns] is the mean of `x xᵀ` over positions, `G` [rows, rows] the sum of `g gᵀ` over positions per prediction, where
`g` is the gradient of the summed loss. Source: LLM Surgeon (arXiv 2312.17244), section 3.1. Paper: means over positions for both.
Here: the same for language models, where every position predicts; a convolution sees several positions for one prediction, and
what it loses adds up over them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.errors import DampingRaised, DataError, NumericsError, UsageError, nearest
from resect.graph import Graph
from resect.statistics.blockwise import BlockCall, Chain, prepared
from resect.statistics.layers import Layer, layers_of
from resect.statistics.objective import NextToken, Objective, loss_of

FISHERS = ("empirical", "sampled", "activations", "identity")
"""Labels of the text, labels that the network draws, no gradients (`G` = 1), or no text at all (`G` = `A` = 1: magnitudes)."""
DEAD = 1e-30
"""The diagonal of a factor of zeros: what goes there costs next to nothing, and can still be divided by."""
RAISES = 4
"""How often damping is raised tenfold before a factor is given up."""


@dataclass
class Moments:
    """Sums of one layer over calibration data; `a + b` is what both data together give.

    `inputs` [columns, columns] sums `x xᵀ` over `positions`; `gradients` [rows, rows] sums `g gᵀ`, for so many `predictions`.
    """

    inputs: Tensor
    gradients: Tensor | None = None
    positions: int = 0
    predictions: int = 0

    @classmethod
    def zeros(cls, layer: Layer, *, gradients: bool) -> Moments:
        """Nothing yet."""
        like = layer.weight.new_empty(0, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        square = like.new_zeros(layer.rows, layer.rows) if gradients else None
        return cls(like.new_zeros(layer.columns, layer.columns), square)

    def __add__(self, other: Moments) -> Moments:
        """Sums over both."""
        if (self.gradients is None) != (other.gradients is None) or self.inputs.shape != other.inputs.shape:
            raise UsageError("Moments of different layers, or with gradients and without, do not add.")
        gradients = None if self.gradients is None or other.gradients is None else self.gradients + other.gradients
        positions, predictions = self.positions + other.positions, self.predictions + other.predictions
        return Moments(self.inputs + other.inputs, gradients, positions, predictions)

    def part(self, rows: Tensor, columns: Tensor) -> Moments:
        """Those of a matrix of which only some rows and columns are left."""
        gradients = None if self.gradients is None else self.gradients[rows][:, rows]
        return Moments(self.inputs[columns][:, columns], gradients, self.positions, self.predictions)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors by name, to be written to a file."""
        counts = {"positions": torch.tensor(self.positions), "predictions": torch.tensor(self.predictions)}
        return {"inputs": self.inputs, **counts} | ({} if self.gradients is None else {"gradients": self.gradients})

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Moments:
        """From `tensors`."""
        counts = int(tensors["positions"]), int(tensors["predictions"])
        return cls(tensors["inputs"], tensors.get("gradients"), *counts)

    def curvature(self, name: str = "the layer", *, damping: float = 0.01, damping_gradients: float | None = None) -> Curvature:
        """`A` and `G` in float64 on the CPU, with `damping` times the mean of their diagonals added to these."""
        A = self.inputs.cpu().double() / max(self.positions, 1)
        G = None if self.gradients is None else self.gradients.cpu().double() / max(self.predictions, 1)
        second = damping if damping_gradients is None else damping_gradients
        precision = torch.finfo(self.inputs.dtype).eps
        return Curvature(
            damped(A, damping, f"the inputs of {name}", precision),
            None if G is None else damped(G, second, f"the gradients of {name}", precision),
        )


@dataclass
class Curvature:
    """`G ⊗ A` of one layer in float64, damped: `A` [columns, columns], `G` [rows, rows] (None stands for the identity)."""

    A: Tensor
    G: Tensor | None = None

    @cached_property
    def A_inverse(self) -> Tensor:
        """`A⁻¹`."""
        return _inverse(self.A)

    @cached_property
    def G_inverse(self) -> Tensor | None:
        """`G⁻¹`."""
        return None if self.G is None else _inverse(self.G)


def _inverse(factor: Tensor) -> Tensor:
    found: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(factor))
    return found


def damped(factor: Tensor, damping: float, name: str, precision: float = torch.finfo(torch.float64).eps) -> Tensor:
    """A symmetric factor with `damping` times the mean of its diagonal on the diagonal, so that it can be inverted.

    Where that does not do, more is added, and a warning says so; a factor of zeros (a dead layer) becomes `DEAD` times the
    identity.
    `precision` is that of the sums: without damping, eigenvalues that it cannot tell from zero are taken for zero.
    Raises `NumericsError` for NaN, infinity and factors that no damping mends.
    """
    if not factor.isfinite().all():
        raise NumericsError(f"The second moments of {name} hold NaN or infinity. Use a wider dtype or other text.")
    scale = factor.diagonal().mean()
    if scale <= 0:
        return DEAD * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    for raised in range(RAISES + 1):
        added = (damping or 1e-6 * bool(raised)) * 10**raised
        found: Tensor = factor + added * scale * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        if _regular(found) and (added or _full(found, precision)):
            if raised:
                warnings.warn(DampingRaised(f"{name}: damping {damping:g} was too little, {added:g} is used."), stacklevel=2)
            return found
    raise NumericsError(
        f"The second moments of {name} cannot be inverted, even with damping {added:g}. Use more text, or more damping."
    )


def _regular(factor: Tensor) -> bool:
    return not torch.linalg.cholesky_ex(factor).info.any()


def _full(factor: Tensor, precision: float) -> bool:
    """Whether no eigenvalue is zero: of one that is, rounding makes a small number of either sign, which Cholesky may miss."""
    values = torch.linalg.eigvalsh(factor)
    return bool(values[0] > len(factor) * precision * values[-1])


Sink = Callable[[str, Moments], None]


def collect_curvature(
    model: nn.Module,
    batches: Sequence[Any],
    graph: Graph,
    paths: Sequence[str],
    sink: Sink,
    *,
    fisher: str = "empirical",
    draws: int = 1,
    seed: int = 0,
    objective: Objective | None = None,
    spill: Path | None = None,
) -> float | None:
    """Hands the moments of the layers at `paths` to `sink(path, moments)`; gives the mean loss in nats per prediction.

    Where blocks talk through their hidden states alone, one block's moments are held at a time (from the last to the first
    with gradients); what enters the blocks then waits in files under `spill`, if that is given. `fisher` says whose labels give
    the gradients, `draws` how many the network draws for each prediction; without gradients there is no loss. The model is
    left bit-identical.
    Raises `UsageError`, and `NumericsError` for a loss that is not finite.
    """
    if fisher not in FISHERS:
        raise UsageError(f"There is no fisher {fisher!r}. {nearest(fisher, FISHERS)}")
    if draws < 1:
        raise UsageError(f"The network draws 1 label or more for each prediction, not {draws}.")
    if not batches:
        raise DataError("There is no calibration data. Give at least one batch.")
    layers = layers_of(model, paths)
    if fisher == "identity":
        for layer in layers:
            sink(layer.path, Moments(torch.eye(layer.columns), None, 1))
        return None
    if fisher == "sampled":
        batches = [batch for batch in batches for _ in range(draws)]
    generator = torch.Generator().manual_seed(seed) if fisher == "sampled" else None
    collection = Collection(model, batches, objective or NextToken(), sink, generator, gradients=fisher != "activations")
    with prepared(model):
        chain = Chain.to_predict(model, graph, batches[0], collection.objective)
        inside = [layer for layer in layers if chain and graph.blocks.layer_of(f"{layer.path}.weight") is not None]
        loss = 0.0
        if chain and inside:
            chain.loss = collection.loss
            loss = collection.blockwise(chain, graph, inside, spill)
        if outside := [layer for layer in layers if layer not in inside]:
            loss = collection.whole(outside)
    return loss if collection.gradients else None


@dataclass
class Collection:
    """A pass over calibration data that fills moments."""

    model: nn.Module
    batches: Sequence[Any]
    objective: Objective
    sink: Sink
    generator: torch.Generator | None
    gradients: bool
    predictions: int = 0
    total: float = 0.0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The summed loss of a batch, counted."""
        logits, labels = self.objective.predict(model, batch)
        loss = loss_of(logits, labels, self.generator)
        self.predictions += len(labels)
        self.total += float(loss.detach())
        if not isfinite(self.total):
            raise NumericsError("The loss of a calibration batch is not finite. Check the weights, or use a wider dtype.")
        return loss

    def whole(self, layers: Sequence[Layer]) -> float:
        """All layers at once, in one pass over the network."""
        self.predictions, self.total = 0, 0.0
        with _flowing(self.model, self.gradients), self.watching(layers) as begin, torch.set_grad_enabled(self.gradients):
            for number, batch in enumerate(tqdm(self.batches, desc="curvature", unit="batch", leave=False, delay=2)):
                begin(number)
                loss = self.loss(self.model, batch)
                if self.gradients:
                    loss.backward()
        return self.total / max(self.predictions, 1)

    def blockwise(self, chain: Chain, graph: Graph, layers: Sequence[Layer], spill: Path | None) -> float:
        """One block at a time."""
        own: dict[int, list[Layer]] = {}
        for layer in layers:
            own.setdefault(graph.blocks.layer_of(f"{layer.path}.weight") or 0, []).append(layer)
        current: list[Callable[[int], None]] = []

        @contextmanager
        def around(number: int) -> Iterator[None]:
            with self.watching(own.get(number, [])) as begin:
                current[:] = [begin]
                yield

        def enter(number: int, calls: list[BlockCall]) -> list[Tensor]:
            outputs = []
            with self.watching(own.get(number, [])) as begin:
                for batch, call in enumerate(calls):
                    begin(batch)
                    outputs.append(call.again(chain.blocks[number], call.hidden))
            return outputs

        if self.gradients:
            for _ in chain.run(self.batches, around=around, begin=lambda number: current[0](number), spill=spill):
                pass
        else:
            chain.forward(self.batches, enter)
        return self.total / max(self.predictions, 1)

    @contextmanager
    def watching(self, layers: Sequence[Layer]) -> Iterator[Callable[[int], None]]:
        """Fills the moments of some layers while it lasts, and hands them on afterwards; gives what is told the batch number."""
        moments = {layer.path: Moments.zeros(layer, gradients=self.gradients) for layer in layers}
        counted: list[Tensor | None] = [None]

        def begin(number: int) -> None:
            counted[0] = self.objective.counted(self.batches[number])

        handles = [layer.module.register_forward_hook(partial(_take, layer, moments[layer.path], counted)) for layer in layers]
        try:
            yield begin
        finally:
            for handle in handles:
                handle.remove()
        if self.gradients and not self.predictions:
            raise DataError("There is nothing to predict in the calibration data. Give sequences of two tokens or more.")
        for path, found in moments.items():
            found.predictions = self.predictions if self.gradients else 0
            self.sink(path, found)


def _take(
    layer: Layer, moments: Moments, counted: Sequence[Tensor | None], module: nn.Module, given: Any, output: Tensor
) -> None:
    """Adds one call of a layer to its moments, and the gradient of what it puts out when that is known."""
    inputs = layer.inputs(given[0])
    real = counted[0]
    if real is not None and not real.all():
        if real.numel() != len(inputs):
            raise UsageError(
                f"{layer.path} sees {len(inputs)} positions of {real.numel()}: padding cannot be told apart there. "
                "Use windows without padding."
            )
        inputs = inputs[real.flatten().to(inputs.device)]
    moments.inputs.addmm_(inputs.T, inputs)
    moments.positions += len(inputs)
    if moments.gradients is not None and output.requires_grad:
        output.register_hook(lambda gradient: _take_gradient(layer, moments, gradient))


def _take_gradient(layer: Layer, moments: Moments, gradient: Tensor) -> None:
    found = layer.outputs(gradient)
    assert moments.gradients is not None
    moments.gradients.addmm_(found.T, found)


@contextmanager
def _flowing(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Lets gradients flow through a network whose parameters ask for none: whatever its first layers put out asks for it."""
    if not gradients:
        yield
        return

    def ask(module: nn.Module, given: Any, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            return output.detach().requires_grad_().clone()  # others may write into it
        return None

    owners = (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    handles = [module.register_forward_hook(ask) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
