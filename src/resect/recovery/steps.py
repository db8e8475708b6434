"""Gradient steps on adapters alone: one batch after another, on as many processes as accelerate runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from resect.environment import recipe_decides
from resect.errors import NumericsError
from resect.statistics import Data, loss_of


class Steps:
    """AdamW on some parameters; its state is a set of tensors, so that a run that was cut short goes on with the same bits."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], data: Data, *, learning_rate: float, seed: int = 0
    ) -> None:
        self.losses: list[float] = []
        """Mean loss of every step so far, in nats a prediction."""
        self._model, self._parameters, self._data, self._seed = model, dict(parameters), data, seed
        with recipe_decides(bf16=False):
            self._accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=learning_rate, weight_decay=0.0)

    def step(self, number: int) -> None:
        """The step of a number, from 0, on the batch that is its turn. Gradients stay until the next.

        With several processes everyone takes a batch of its own, and gradients are their mean. Raises `NumericsError` when the
        loss is not finite; nothing has changed then.
        """
        self._optimizer.zero_grad(set_to_none=True)
        device = next(iter(self._parameters.values())).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(self._seed + number)
            logits, labels = self._data.objective.predict(self._model, self._batch(number))
            loss = loss_of(logits, labels) / max(len(labels), 1)
            if not loss.isfinite():
                raise NumericsError(
                    "The loss of a training step is not finite. Lower the learning rate, or use a wider dtype; "
                    "the state before that step is noted, and a resumed run goes on from it."
                )
            self._accelerator.backward(loss)
        if self._accelerator.num_processes > 1:
            for parameter in self._parameters.values():
                parameter.grad = self._accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self.losses.append(float(self._accelerator.reduce(loss.detach(), "mean")))

    def _batch(self, number: int) -> Any:
        """Batches in an order drawn anew for every round through them."""
        place = number * self._accelerator.num_processes + self._accelerator.process_index
        turn, place = divmod(place, len(self._data.batches))
        order = torch.randperm(len(self._data.batches), generator=torch.Generator().manual_seed(self._seed + turn))
        return self._data.batches[int(order[place])]

    def state(self) -> dict[str, Tensor]:
        """Parameters and what the optimizer keeps of them."""
        found = {f"{name}/value": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            kept = self._optimizer.state.get(parameter, {})
            found |= {f"{name}/{key}": value for key, value in kept.items()}
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], *, losses: Sequence[float]) -> None:
        """Puts back what `state` gave, and the losses until then."""
        self.losses = list(losses)
        for name, parameter in self._parameters.items():
            parameter.copy_(state[f"{name}/value"])
            kept = {key.rpartition("/")[2]: value for key, value in state.items() if key.rpartition("/")[0] == name}
            kept.pop("value")
            if kept:
                self._optimizer.state[parameter] = {
                    key: value.to(parameter.device) if key != "step" else value for key, value in kept.items()
                }
