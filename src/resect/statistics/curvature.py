"""Kronecker-factored curvature of the loss: second moments of what layers take in, and of the gradients of what they put out.

For a layer `y = W x` the Fisher information of the loss, in nats per prediction, is approximated by `G ⊗ A`: `A`
[columns, columns] is the mean of `x xᵀ` over positions, `G` [rows, rows] the sum of `g gᵀ` over positions per prediction, where
`g` is the gradient of the summed loss. Source: LLM Surgeon (arXiv 2312.17244), section 3.1. Paper: means over positions for both.
Here: the same for language models, where every position predicts; a convolution sees several positions for one prediction, and
what it loses adds up over them. A second term, `G₁ ⊗ A₁ + G₂ ⊗ A₂`, is fitted to what the first leaves (`residual`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.errors import DampingRaised, DataError, NumericsError, SecondTermClipped, UsageError, nearest
from resect.graph import Graph
from resect.statistics import residual
from resect.statistics.blockwise import BlockCall, Chain, prepared
from resect.statistics.cholesky import inverse_of
from resect.statistics.joint import LEAST, Joint, Side
from resect.statistics.layers import Layer, layers_of
from resect.statistics.objective import NextToken, Objective, loss_of

FISHERS = ("empirical", "sampled", "activations", "identity")
"""Labels of the text, labels that the network draws, no gradients (`G` = 1), or no text at all (`G` = `A` = 1: magnitudes)."""
WITHOUT_GRADIENTS = ("activations", "identity")
"""Those of them to which no second term can be fitted."""
DEAD = 1e-30
"""The diagonal of a factor of zeros: what goes there costs next to nothing, and can still be divided by."""
RAISES = 4
"""How often damping is raised tenfold before a factor is given up."""
PANEL = 384
"""Columns of a second moment that are added to at a time, so that little more than half of the symmetric matrix is."""
SECOND = ("second_inputs", "second_gradients")
"""The factors of a second term among the tensors of moments."""


@dataclass
class Moments:
    """Sums of one layer over calibration data; `a + b` is what both data together give.

    `inputs` [columns, columns] sums `x xᵀ` over `positions`; `gradients` [rows, rows] sums `g gᵀ`, for so many `predictions`.
    `second` holds the factors `A₂` and `G₂` of a second term, which are no sums and do not add.
    """

    inputs: Tensor
    gradients: Tensor | None = None
    positions: int = 0
    predictions: int = 0
    second: tuple[Tensor, Tensor] | None = None

    @classmethod
    def zeros(cls, layer: Layer, *, gradients: bool) -> Moments:
        """Nothing yet."""
        like = layer.weight.new_empty(0, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        square = like.new_zeros(layer.rows, layer.rows) if gradients else None
        return cls(like.new_zeros(layer.columns, layer.columns), square)

    def take_inputs(self, x: Tensor) -> None:
        """Adds what a call of the layer took in, [positions, columns]; `mirror` has to follow the last."""
        _add_square(self.inputs, x)
        self.positions += len(x)

    def take_gradients(self, g: Tensor) -> None:
        """Adds the gradients of what a call of the layer put out, [positions, rows]; `mirror` has to follow the last."""
        assert self.gradients is not None
        _add_square(self.gradients, g)

    def mirror(self) -> None:
        """Makes the sums symmetric, of which only one half was added to."""
        for sums in (self.inputs, self.gradients):
            if sums is not None:
                for start in range(PANEL, len(sums), PANEL):
                    panel = slice(start - PANEL, start)
                    sums[panel, start:] = sums[start:, panel].mT

    def __add__(self, other: Moments) -> Moments:
        """Sums over both."""
        if (self.gradients is None) != (other.gradients is None) or self.inputs.shape != other.inputs.shape:
            raise UsageError("Moments of different layers, or with gradients and without, do not add.")
        if self.second or other.second:
            raise UsageError("Moments with a second term do not add: it is fitted to all data together. Collect from all of it.")
        gradients = None if self.gradients is None or other.gradients is None else self.gradients + other.gradients
        positions, predictions = self.positions + other.positions, self.predictions + other.predictions
        return Moments(self.inputs + other.inputs, gradients, positions, predictions)

    def part(self, rows: Tensor, columns: Tensor) -> Moments:
        """Those of a matrix of which only some rows and columns are left."""
        gradients = None if self.gradients is None else self.gradients[rows][:, rows]
        second = None if self.second is None else (self.second[0][columns][:, columns], self.second[1][rows][:, rows])
        return Moments(self.inputs[columns][:, columns], gradients, self.positions, self.predictions, second)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors by name, to be written to a file."""
        counts = {"positions": torch.tensor(self.positions), "predictions": torch.tensor(self.predictions)}
        second = {} if self.second is None else dict(zip(SECOND, self.second, strict=True))
        return {"inputs": self.inputs, **counts, **second} | ({} if self.gradients is None else {"gradients": self.gradients})

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Moments:
        """From `tensors`."""
        counts = int(tensors["positions"]), int(tensors["predictions"])
        second = (tensors[SECOND[0]], tensors[SECOND[1]]) if SECOND[0] in tensors else None
        return cls(tensors["inputs"], tensors.get("gradients"), *counts, second)

    def means(self) -> tuple[Tensor, Tensor | None]:
        """`A` and `G` in float64 on the CPU, not damped."""
        G = None if self.gradients is None else self.gradients.cpu().double() / max(self.predictions, 1)
        return self.inputs.cpu().double() / max(self.positions, 1), G

    def curvature(self, name: str = "the layer", *, damping: float = 0.01, damping_gradients: float | None = None) -> Curvature:
        """`A` and `G` in float64 on the CPU, with `damping` times the mean of their diagonals added to these.

        A second term that would leave less than `LEAST` of the first in some direction is clipped there.
        """
        A, G = self.means()
        also = damping if damping_gradients is None else damping_gradients
        precision = torch.finfo(self.inputs.dtype).eps
        A2, G2 = (factor.cpu().double() for factor in self.second) if self.second else (None, None)
        A, root = damped(A, damping, f"the inputs of {name}", precision)
        G = None if G is None else damped(G, also, f"the gradients of {name}", precision)[0]
        return Curvature(A, G, A2, G2, root=root).positive()


@dataclass
class Curvature:
    """`G ⊗ A` of one layer in float64, damped: `A` [columns, columns], `G` [rows, rows] (None stands for the identity).

    With a second term it is `G ⊗ A + G₂ ⊗ A₂`, positive definite; there is a `G` then. Where that took clipping, `kept` is the
    share of the second term that is left.
    """

    A: Tensor
    G: Tensor | None = None
    A2: Tensor | None = None
    G2: Tensor | None = None
    kept: float = 1.0
    root: Tensor | None = None
    """The Cholesky factor of `A`, until it was used."""

    @cached_property
    def A_inverse(self) -> Tensor:
        """`A⁻¹`."""
        root, self.root = self.root, None
        return inverse_of(self.A, "curvature of inputs") if root is None else torch.cholesky_inverse(root)

    @cached_property
    def G_inverse(self) -> Tensor | None:
        """`G⁻¹`."""
        return None if self.G is None else inverse_of(self.G, "curvature of gradients")

    @cached_property
    def joint(self) -> Joint | None:
        """The basis in which both terms are diagonal, if there are two."""
        if self.A2 is None or self.G is None or self.G2 is None:
            return None
        return Joint(Side.of(self.A, self.A2), Side.of(self.G, self.G2))

    @property
    def terms(self) -> list[tuple[Tensor, Tensor | None]]:
        """`A` and `G` of the terms."""
        return [(self.A, self.G)] + ([] if self.A2 is None else [(self.A2, self.G2)])

    def times(self, weight: Tensor) -> Tensor:
        """`F W`: the sum of `G W A` over the terms."""
        return torch.stack([(weight if G is None else G @ weight) @ A for A, G in self.terms]).sum(0)

    def solved(self, right: Tensor) -> Tensor:
        """`F⁻¹` times a matrix: `G⁻¹ B A⁻¹`, or entry by entry in the basis of two terms."""
        if self.joint:
            return self.joint.solved(right)
        within = right @ self.A_inverse
        return within if self.G_inverse is None else self.G_inverse @ within

    def part(self, rows: Tensor, columns: Tensor) -> Curvature:
        """That of a matrix of which only some rows and columns are free to change."""
        A, A2 = (None if factor is None else factor[columns][:, columns] for factor in (self.A, self.A2))
        G, G2 = (None if factor is None else factor[rows][:, rows] for factor in (self.G, self.G2))
        assert A is not None
        return Curvature(A, G, A2, G2)

    def positive(self) -> Curvature:
        """Itself, with a second term that is clipped where it must be."""
        clipped = self.joint and self.joint.positive()
        if self.joint is None or clipped is None or clipped is self.joint:
            return self
        found = Curvature(self.A, self.G, clipped.A.second(), clipped.G.second(), clipped.kept(self.joint))
        found.joint = clipped
        return found


def tell_clipped(kept: Mapping[str, float]) -> None:
    """Warns where second terms were clipped, given the share of each that is left by the names of layers."""
    clipped = {path: share for path, share in kept.items() if share < 1}
    if clipped:
        path, least = min(clipped.items(), key=lambda item: item[1])
        warnings.warn(
            SecondTermClipped(
                f"In {len(clipped)} of {len(kept)} layers the second Kronecker term would leave less than {LEAST:g} of the first "
                f"in some directions. It is clipped there, most in {path}, to {least:.0%} of its squares."
            ),
            stacklevel=3,
        )


def _add_square(sums: Tensor, rows: Tensor) -> None:
    """Adds `Xᵀ X` of rows [positions, n] to the lower panels of [n, n]."""
    for start in range(0, len(sums), PANEL):
        panel = slice(start, start + PANEL)
        sums[start:, panel].addmm_(rows[:, start:].mT, rows[:, panel])


def damped(
    factor: Tensor, damping: float, name: str, precision: float = torch.finfo(torch.float64).eps
) -> tuple[Tensor, Tensor]:
    """A symmetric factor with `damping` times the mean of its diagonal on the diagonal, and the Cholesky factor of that.

    Where that does not do, more is added, and a warning says so; a factor of zeros (a dead layer) becomes `DEAD` times the
    identity.
    `precision` is that of the sums: without damping, eigenvalues that it cannot tell from zero are taken for zero.
    Raises `NumericsError` for NaN, infinity and factors that no damping mends.
    """
    if not factor.isfinite().all():
        raise NumericsError(f"The second moments of {name} hold NaN or infinity. Use a wider dtype or other text.")
    scale = factor.diagonal().mean()
    if scale <= 0:
        found = DEAD * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return found, found / DEAD**0.5
    for raised in range(RAISES + 1):
        added = (damping or 1e-6 * bool(raised)) * 10**raised
        found = factor.clone()
        found.diagonal().add_(added * scale)
        root, info = torch.linalg.cholesky_ex(found)
        if not info.any() and (added or _full(found, precision)):
            if raised:
                warnings.warn(DampingRaised(f"{name}: damping {damping:g} was too little, {added:g} is used."), stacklevel=2)
            return found, root
    raise NumericsError(
        f"The second moments of {name} cannot be inverted, even with damping {added:g}. Use more text, or more damping."
    )


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
    terms: int = 1,
    objective: Objective | None = None,
    spill: Path | None = None,
) -> float | None:
    """Hands the moments of the layers at `paths` to `sink(path, moments)`; gives the mean loss in nats per prediction.

    Where blocks talk through their hidden states alone, one block's moments are held at a time (from the last to the first
    with gradients); what enters the blocks then waits in files under `spill`, if that is given. `fisher` says whose labels give
    the gradients, `draws` how many the network draws for each prediction; without gradients there is no loss. With two `terms`
    all batches pass `residual.STEPS` times more through each block, with the same labels. The model is left bit-identical.
    Raises `UsageError`, and `NumericsError` for a loss that is not finite.
    """
    if fisher not in FISHERS:
        raise UsageError(f"There is no fisher {fisher!r}. {nearest(fisher, FISHERS)}")
    if draws < 1:
        raise UsageError(f"The network draws 1 label or more for each prediction, not {draws}.")
    if terms not in (1, 2):
        raise UsageError(f"Curvature has 1 Kronecker term or 2, not {terms}.")
    if terms == 2 and fisher in WITHOUT_GRADIENTS:
        raise UsageError(f"A second Kronecker term is fitted to gradients, and fisher={fisher} has none. Use terms=1.")
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
    collection = Collection(model, batches, objective or NextToken(), sink, generator, fisher != "activations", terms)
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
class Watched:
    """A layer whose moments are filled, and the second term that is fitted to it, if one is."""

    layer: Layer
    moments: Moments
    fit: residual.Fit | None = None
    collected: bool = False

    @classmethod
    def of(cls, layer: Layer, *, gradients: bool, terms: int) -> Watched:
        """Nothing yet."""
        moments = Moments.zeros(layer, gradients=gradients)
        return cls(layer, moments, residual.Fit(moments.inputs, layer.rows, layer.columns) if terms == 2 else None)

    def passed(self, predictions: int, *, last: bool) -> None:
        """All data went by, with so many predictions, perhaps for the last time."""
        if not self.collected:
            self.moments.mirror()
        self.moments.predictions, self.collected = predictions, True
        if self.fit:
            A, G = self.moments.means()
            assert G is not None
            self.fit.step(A, G, predictions)
            self.moments.second = self.fit.factors(A) if last else None


@dataclass
class Collection:
    """Passes over calibration data that fill moments."""

    model: nn.Module
    batches: Sequence[Any]
    objective: Objective
    sink: Sink
    generator: torch.Generator | None
    gradients: bool
    terms: int = 1
    predictions: int = 0
    total: float = 0.0
    watched: list[Watched] = field(default_factory=list)

    @property
    def passes(self) -> int:
        """How often all data passes a layer."""
        return 1 if self.terms == 1 else 1 + residual.STEPS

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
        """All layers at once, in passes over the network."""
        drawing = self.generator.get_state() if self.generator else None
        for number in range(self.passes):
            self.predictions, self.total = 0, 0.0
            if self.generator and drawing is not None:
                self.generator.set_state(drawing)
            with _flowing(self.model, self.gradients), self.watching(layers, number) as begin:
                self._once(begin)
        return self.total / max(self.predictions, 1)

    def _once(self, begin: Callable[[int], None]) -> None:
        with torch.set_grad_enabled(self.gradients):
            for number, batch in enumerate(tqdm(self.batches, desc="curvature", unit="batch", leave=False, delay=2)):
                begin(number)
                loss = self.loss(self.model, batch)
                if self.gradients:
                    loss.backward()

    def blockwise(self, chain: Chain, graph: Graph, layers: Sequence[Layer], spill: Path | None) -> float:
        """One block at a time."""
        own: dict[int, list[Layer]] = {}
        for layer in layers:
            own.setdefault(graph.blocks.layer_of(f"{layer.path}.weight") or 0, []).append(layer)
        current: list[Callable[[int], None]] = []

        @contextmanager
        def around(block: int, number: int) -> Iterator[None]:
            with self.watching(own.get(block, []), number) as begin:
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
            passes = dict.fromkeys(own, self.passes)
            how: dict[str, Any] = {"around": around, "begin": lambda number: current[0](number)}
            for _ in chain.run(self.batches, **how, passes=lambda block: passes.get(block, 1), spill=spill):
                pass
        else:
            chain.forward(self.batches, enter)
        return self.total / max(self.predictions, 1)

    @contextmanager
    def watching(self, layers: Sequence[Layer], number: int = 0) -> Iterator[Callable[[int], None]]:
        """Fills the moments of some layers in a pass, and hands them on after the last; gives what is told the batch number."""
        if number == 0:
            self.watched = [Watched.of(layer, gradients=self.gradients, terms=self.terms) for layer in layers]
        counted: list[Tensor | None] = [None]

        def begin(number: int) -> None:
            counted[0] = self.objective.counted(self.batches[number])

        handles = [one.layer.module.register_forward_hook(partial(_take, one, counted)) for one in self.watched]
        try:
            yield begin
        finally:
            for handle in handles:
                handle.remove()
        if self.gradients and not self.predictions:
            raise DataError("There is nothing to predict in the calibration data. Give sequences of two tokens or more.")
        last = number + 1 == self.passes
        for one in self.watched:
            one.passed(self.predictions if self.gradients else 0, last=last)
            if last:
                self.sink(one.layer.path, one.moments)
        if last:
            self.watched = []


def _take(watched: Watched, counted: Sequence[Tensor | None], module: nn.Module, given: Any, output: Tensor) -> None:
    """Adds one call of a layer to its moments, and the gradient of what it puts out when that is known."""
    layer, moments = watched.layer, watched.moments
    inputs = layer.inputs(given[0])
    real, chosen = counted[0], None
    if real is not None and not real.all():
        if real.numel() != len(inputs):
            raise UsageError(
                f"{layer.path} sees {len(inputs)} positions of {real.numel()}: padding cannot be told apart there. "
                "Use windows without padding."
            )
        chosen = real.flatten().to(inputs.device)
        inputs = inputs[chosen]
    if not watched.collected:
        moments.take_inputs(inputs)
    if moments.gradients is None or not output.requires_grad:
        return
    if not watched.collected:
        output.register_hook(lambda gradient: moments.take_gradients(layer.outputs(gradient)))
    if fit := watched.fit:
        inputs = inputs.clone()  # others may write into what it took in
        output.register_hook(lambda gradient: _take_pairs(layer, fit, inputs, chosen, gradient))


def _take_pairs(layer: Layer, fit: residual.Fit, inputs: Tensor, chosen: Tensor | None, gradient: Tensor) -> None:
    found = layer.outputs(gradient)
    fit.take(inputs, found if chosen is None else found[chosen])


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
