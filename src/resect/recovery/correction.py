"""Low-rank corrections between shots: trained on a little of the calibration data, added to the weights, zeros kept.

Source: LLM Surgeon (arXiv 2312.17244), section 3.6: rank 8, Adam with learning rate 1e-4, one epoch on 2.5 % of the data after
every shot, five after the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from resect.errors import NumericsError
from resect.ranges import Numbers
from resect.statistics import Data, Layer, loss_of, prepared


class Correction(Numbers):
    """Settings of the corrections."""

    rank: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    epochs: int = Field(default=1, ge=0)
    last_epochs: int = Field(default=5, ge=0)
    share: float = Field(default=0.025, gt=0, le=1)
    """Of the calibration batches."""


class LowRank(nn.Module):
    """A weight with a low-rank term added, as far as a mask lets it: `W + (B A) ∘ keep`."""

    def __init__(self, layer: Layer, keep: Tensor, *, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = keep.shape
        weight = layer.weight
        start = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.A = nn.Parameter(start.to(weight.device, torch.float32))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.keep = keep.to(weight.device)
        self.transposed = layer.input_axis == 0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in its own shape."""
        term = (self.B @ self.A) * self.keep
        return weight + (term.T if self.transposed else term.reshape(weight.shape)).to(weight.dtype)


def correct(
    layers: Sequence[Layer],
    keep: Mapping[str, Tensor],
    model: nn.Module,
    data: Data,
    asked: Correction,
    *,
    last: bool,
    seed: int = 0,
) -> float:
    """Trains a low-rank term for every layer and adds it to the weight, in place; gives the mean loss of the last epoch.

    `keep[path]` [rows, columns] says which elements may change. Batches are drawn without repetition. Raises `NumericsError`
    when the loss is not finite; the weights are then what they were.
    """
    epochs = asked.last_epochs if last else asked.epochs
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(asked.share * len(data.batches)))
    chosen = torch.randperm(len(data.batches), generator=generator)[:count].tolist()
    mean = 0.0
    with prepared(model), ExitStack() as stack:
        terms = [LowRank(layer, keep[layer.path], rank=asked.rank, generator=generator) for layer in layers]
        done = [False]
        for layer, term in zip(layers, terms, strict=True):
            parametrize.register_parametrization(layer.module, "weight", term, unsafe=True)
            stack.callback(_remove, layer, done)
        optimizer = torch.optim.Adam([p for term in terms for p in (term.A, term.B)], lr=asked.learning_rate)
        for epoch in range(epochs):
            total, predictions = 0.0, 0
            for number in tqdm(chosen, desc=f"correction, epoch {epoch + 1}", unit="batch", leave=False, delay=2):
                with torch.enable_grad():
                    logits, labels = data.objective.predict(model, data.batches[number])
                    loss = loss_of(logits, labels)
                    (loss / len(labels)).backward()
                if not loss.isfinite():
                    raise NumericsError("The loss of a correction is not finite. Lower its learning rate, or use a wider dtype.")
                optimizer.step()
                optimizer.zero_grad()
                total, predictions = total + float(loss.detach()), predictions + len(labels)
            mean = total / predictions
        done[0] = True
    return mean


def _remove(layer: Layer, done: Sequence[bool]) -> None:
    """Takes the term off again, added to the weight if all went well."""
    parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=done[0])
