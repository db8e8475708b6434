"""Gradient statistics of a language model's token loss, reduced to the positions of every parameter on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.errors import DataError, NumericsError, UsageError, nearest
from resect.graph import KINDS, Graph
from resect.statistics.blockwise import Chain, prepared
from resect.statistics.elements import CRITERIA, Criterion
from resect.statistics.layers import wide
from resect.statistics.losses import token_losses

BATCH_TOKENS = 1024
"""Tokens of one forward and backward pass, where a criterion does not ask for single sequences."""


@dataclass
class Statistics:
    """Sums over calibration text. `a + b` is what both texts together would have given.

    ``positions[parameter][axis]`` [n] sums element values over the rest of the parameter. Where these do not add over
    text (`element1`, `mix`), ``elements[parameter]`` holds the summed gradient and squared gradient themselves, if asked for.
    """

    criterion: Criterion
    sequences: int = 0
    tokens: int = 0  # predicted tokens
    loss: float = 0.0  # nats, summed over predicted tokens
    positions: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    elements: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both texts."""
        if self.criterion != other.criterion:
            raise UsageError(f"Statistics of {self.criterion.name!r} and of {other.criterion.name!r} do not add.")
        total = Statistics(self.criterion, self.sequences + other.sequences, self.tokens + other.tokens, self.loss + other.loss)
        if self.criterion.weights_only:
            total.positions = self.positions
        elif self.elements and other.elements:
            total.elements = {n: (g + other.elements[n][0], f + other.elements[n][1]) for n, (g, f) in self.elements.items()}
            total.positions = {name: dict.fromkeys(axes, torch.empty(0)) for name, axes in self.positions.items()}
        elif self.criterion.adds:
            total.positions = {
                name: {axis: value + other.positions[name][axis] for axis, value in axes.items()}
                for name, axes in self.positions.items()
            }
        else:
            raise UsageError(
                f"Statistics of {self.criterion.name!r} were reduced over elements and do not add. Collect with elements=True."
            )
        return total


def collect(
    model: nn.Module,
    tokens: Tensor,
    graph: Graph,
    criterion: str = "element2",
    *,
    kinds: Sequence[str] = (),
    elements: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> Statistics:
    """What a criterion needs to score the graph's groups, from calibration tokens [sequences, length].

    Gradients are reduced to positions as soon as they are complete and freed, so that no more than one block's are held
    beyond the weights; `elements=True` keeps them (another copy of the prunable weights, or two for `mix`), so that statistics
    of several texts add. `kinds` restricts to groups of some kinds; none means all but the vocabulary.
    The model is left bit-identical.
    Raises `NumericsError` naming the tensor for NaN or infinity in weights, loss or statistics.
    """
    if criterion not in CRITERIA:
        raise UsageError(f"There is no criterion {criterion!r}. {nearest(criterion, CRITERIA)}")
    wanted = CRITERIA[criterion]
    parameters = dict(model.named_parameters())
    axes = _axes(graph, kinds)
    for name in axes:
        if not torch.isfinite(parameters[name]).all():
            raise NumericsError(f"{name} holds NaN or infinity. Repair the checkpoint before pruning it.")
    statistics = Statistics(wanted)
    sums = Sums(statistics, axes, keep=elements and not wanted.adds)
    if wanted.weights_only:
        for name in axes:
            sums.reduce(name, parameters[name], torch.empty(0), torch.empty(0))
        return statistics
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(f"Calibration tokens must be [sequences, length] with length 2 or more; these are {list(tokens.shape)}.")
    with prepared(model):
        _backward(model, tokens, graph, sums, parameters=parameters, batch_tokens=batch_tokens)
    return statistics


class Sums:
    """Takes complete gradients and adds them, or what they reduce to, to the statistics."""

    def __init__(self, statistics: Statistics, axes: Mapping[str, Sequence[int]], *, keep: bool) -> None:
        self.statistics = statistics
        self.axes = axes
        self.keep = keep
        self.totals: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def criterion(self) -> Criterion:
        """What is collected."""
        return self.statistics.criterion

    def sequence_gradient(self, name: str, weight: Tensor, gradient: Tensor, *, predicted: int) -> None:
        """Adds the gradient of a summed token loss over `predicted` tokens; of one sequence where squares are needed."""
        if self.criterion.adds and not self.keep:
            squares = (wide(gradient) / predicted).square() if self.criterion.squares else gradient
            self.reduce(name, weight, gradient, squares)
            return
        total, squared = self.totals.get(name, (None, None))
        total = wide(gradient) if total is None else total.add_(gradient)
        mean = wide(gradient) / predicted if self.criterion.squares else torch.zeros(())
        squared = mean.square() if squared is None else squared.addcmul_(mean, mean)
        self.totals[name] = (total, squared)

    def complete(self, name: str, weight: Tensor) -> None:
        """Called when all text has been seen by a parameter: reduces its totals, or keeps them."""
        if name not in self.totals:
            return
        total, squared = self.totals.pop(name)
        if self.keep:
            self.statistics.elements[name] = (total, squared)
            self.statistics.positions[name] = dict.fromkeys(self.axes[name], torch.empty(0))
        else:
            self.reduce(name, weight, total / self.statistics.tokens, squared / self.statistics.sequences)

    def reduce(self, name: str, weight: Tensor, gradient: Tensor, squares: Tensor) -> None:
        """Adds element values, summed over all axes but one."""
        values = self.criterion.element(wide(weight.detach()), gradient, squares)
        found = self.statistics.positions.setdefault(name, {})
        for axis in self.axes[name]:
            rest = [dim for dim in range(values.ndim) if dim != axis]
            summed = (values.sum(rest) if rest else values).double().cpu()
            if not summed.isfinite().all():
                raise NumericsError(f"The gradient statistics of {name} hold NaN or infinity. Use a wider dtype or other text.")
            found[axis] = found[axis] + summed if axis in found else summed


def position_values(statistics: Statistics, weights: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """The value of every position, normalised by tokens or sequences: `{parameter: {axis: [n]}}`, float64.

    `weights` are needed only where statistics were kept by element.
    """
    criterion, n, t = statistics.criterion, statistics.sequences, statistics.tokens
    if statistics.elements:
        sums = Sums(Statistics(criterion, n, t), {k: list(v) for k, v in statistics.positions.items()}, keep=False)
        for name, (total, squared) in statistics.elements.items():
            sums.reduce(name, weights[name], total / t, squared / n)
        return sums.statistics.positions
    if criterion.weights_only or not criterion.adds:
        return statistics.positions
    scale = t if criterion.gradient else n
    return {
        name: {axis: (value.abs() if criterion.signed else value) / scale for axis, value in axes.items()}
        for name, axes in statistics.positions.items()
    }


def token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, summed over [sequences, length - 1]."""
    return token_losses(model(input_ids=tokens, use_cache=False).logits, tokens).sum()


def _axes(graph: Graph, kinds: Sequence[str]) -> dict[str, list[int]]:
    axes: dict[str, set[int]] = {}
    for group in graph.groups:
        if group.kind in (kinds or set(KINDS) - {"vocabulary"}):
            for member in graph.weights(group):
                axes.setdefault(member.parameter, set()).add(member.axis)
    return {name: sorted(axes[name]) for name in graph.shapes if name in axes}


def _backward(
    model: nn.Module, tokens: Tensor, graph: Graph, sums: Sums, *, parameters: Mapping[str, nn.Parameter], batch_tokens: int
) -> None:
    rows = 1 if sums.criterion.squares else max(1, batch_tokens // tokens.shape[1])
    device = next(iter(parameters.values())).device
    batches = [batch.to(device) for batch in tokens.split(rows)]
    # Squares of a tied parameter need the gradients of both its uses at once, before and after the blocks.
    whole = sums.criterion.adds or sums.keep or len(batches) == 1
    tied = sums.criterion.squares and any(graph.blocks.layer_of(name) is None for name in sums.axes)
    chain = None if whole or tied else Chain.of(model, graph, batches[0][:1, :8], token_loss)
    predicted = [batch[:, 1:].numel() for batch in batches]
    sums.statistics.sequences = len(tokens)
    sums.statistics.tokens = sum(predicted)
    if chain:
        losses = chain.run(
            batches,
            list(sums.axes),
            lambda n, i: _take(sums, n, parameters[n], predicted[i]),
            lambda n: sums.complete(n, parameters[n]),
        )
    else:
        losses = _whole(model, batches, sums, parameters=parameters)
    for number, loss in enumerate(losses):
        if not isfinite(loss):
            raise NumericsError(f"The loss of calibration batch {number} is {loss}. Check the weights, or use a wider dtype.")
        sums.statistics.loss += loss
    for name in sums.axes:
        sums.complete(name, parameters[name])


def _take(sums: Sums, name: str, parameter: nn.Parameter, predicted: int) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None:
        sums.sequence_gradient(name, parameter, gradient, predicted=predicted)


def _whole(model: nn.Module, batches: Sequence[Tensor], sums: Sums, *, parameters: Mapping[str, nn.Parameter]) -> Iterator[float]:
    """One backward pass per batch; every gradient is taken and freed the moment it is complete."""
    current = [1]
    hooks = []
    for name in sums.axes:
        parameter = parameters[name].requires_grad_()

        def hook(parameter: Tensor, name: str = name) -> None:
            _take(sums, name, parameter, current[0])  # type: ignore[arg-type]
            if len(batches) == 1:
                sums.complete(name, parameter)

        hooks.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        for batch in tqdm(batches, desc="gradients", unit="batch", leave=False, delay=2):
            current[0] = batch[:, 1:].numel()
            with torch.enable_grad():
                loss = token_loss(model, batch)
            yield float(loss.detach())
            loss.backward()
    finally:
        for hook_handle in hooks:
            hook_handle.remove()
