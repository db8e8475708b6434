"""What a network predicts from a batch, and what was right: that is all that its curvature asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from resect.errors import UsageError
from resect.statistics.layers import wide
from resect.statistics.losses import prediction_losses


@runtime_checkable
class Objective(Protocol):
    """Predictions and labels of a batch."""

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits [predictions, classes] and labels [predictions]."""
        ...

    def counted(self, batch: Any) -> Tensor | None:
        """Which positions [sequences, length] are no padding; None where all count."""
        ...


class NextToken:
    """A language model's: batches are tokens [sequences, length], or a mapping of `input_ids` and `attention_mask`."""

    def predict(self, model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and labels of all tokens that follow a token; padding neither predicts nor is predicted."""
        batch = _beside(model, batch)
        given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        logits = model(**given, use_cache=False).logits[:, :-1]
        labels = given["input_ids"][:, 1:]
        counted = self.counted(batch)
        if counted is None:
            return logits.flatten(0, 1), labels.flatten()
        real = counted[:, 1:] & counted[:, :-1]
        return logits[real], labels[real]

    def counted(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor | None:
        """The attention mask."""
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        return None if mask is None else mask.bool()


class Classes:
    """A classifier's: batches are pairs of inputs and labels [samples]."""

    def predict(self, model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and labels of all samples."""
        inputs, labels = _beside(model, batch)
        found = model(inputs)
        return getattr(found, "logits", found), labels

    def counted(self, batch: Sequence[Tensor]) -> None:
        """All of them."""


@dataclass(frozen=True)
class Data:
    """Calibration batches, and what is predicted from them."""

    batches: Sequence[Any]
    objective: Objective = field(default_factory=NextToken)

    def tokens(self) -> Tensor:
        """All batches as one, [sequences, length]; `UsageError` where they are something else."""
        if not all(isinstance(batch, Tensor) for batch in self.batches):
            raise UsageError(
                "Gradient criteria and analyses look at the next token's loss and take batches of tokens [sequences, length]. "
                "For other networks use method llm-pruner with criterion l1, l2 or random, or method llm-surgeon."
            )
        return torch.cat(list(self.batches))


def loss_of(logits: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Cross-entropy in nats summed over predictions; with a generator, of labels that the network itself draws."""
    if generator is not None:
        chances = wide(logits.detach()).softmax(-1).cpu()
        if chances.isnan().any():
            return wide(logits.new_tensor(torch.nan))  # as the loss of any label would be
        labels = torch.multinomial(chances, 1, generator=generator).flatten().to(logits.device)
    return prediction_losses(logits, labels).sum()


def _beside(model: nn.Module, batch: Any) -> Any:
    """A batch on the device of the model."""
    device = next(model.parameters()).device
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def first_tokens(batch: Any) -> Any:
    """A small part of a batch of tokens; of another, all."""
    return batch[:1, :8] if isinstance(batch, Tensor) and batch.ndim == 2 else batch
