"""Second moments by definition: all inputs and gradients of a layer are kept, cut into patches by torch and summed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Seen:
    """All that a layer took in [positions, columns], and the gradients of what it put out [positions, rows]."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def A(self) -> Tensor:
        """The sum of x x'."""
        return torch.einsum("pi,pj->ij", torch.cat(self.inputs), torch.cat(self.inputs))

    @property
    def G(self) -> Tensor:
        """The sum of g g'."""
        return torch.einsum("pi,pj->ij", torch.cat(self.gradients), torch.cat(self.gradients))

    @property
    def positions(self) -> int:
        """How many."""
        return sum(map(len, self.inputs))


def explicit(
    model: nn.Module, paths: Iterable[str], batches: Sequence[Any], loss: Loss, masks: Sequence[Tensor] | None = None
) -> dict[str, Seen]:
    """What layers saw in ordinary passes over the batches; with masks, at their positions alone."""
    seen = {path: Seen() for path in paths}
    for number, batch in enumerate(batches):
        calls: list[tuple[str, Tensor, Tensor]] = []
        handles = [model.get_submodule(path).register_forward_hook(_keep(calls, path)) for path in seen]
        summed = loss(model, batch)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(summed, [output for _, _, output in calls])
        for (path, given, _), gradient in zip(calls, gradients, strict=True):
            module = model.get_submodule(path)
            inputs, outputs = rows_of(module, given), channels_last(module, gradient)
            chosen = slice(None) if masks is None else masks[number].bool().flatten()
            seen[path].inputs.append(inputs[chosen])
            seen[path].gradients.append(outputs[chosen])
    return seen


def _keep(calls: list[tuple[str, Tensor, Tensor]], path: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, given: Any, output: Tensor) -> None:
        calls.append((path, given[0].detach(), output))

    return hook


def rows_of(module: nn.Module, given: Tensor) -> Tensor:
    """Inputs [positions, columns], with a 1 for the bias."""
    if isinstance(module, nn.Conv1d):
        flat = (1, *module.kernel_size), (1, *module.stride), (0, *_ints(module)), (1, *module.dilation)
        given = _unfold(given[:, :, None], *flat)
    elif isinstance(module, nn.Conv2d):
        given = _unfold(given, module.kernel_size, module.stride, _ints(module), module.dilation)
    given = given.flatten(0, -2)
    return given if module.bias is None else torch.cat([given, torch.ones(len(given), 1, dtype=given.dtype)], 1)


def _ints(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(module.padding, str)
    return module.padding


def _unfold(given: Tensor, size: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    patches = nn.functional.unfold(given, size, dilation=dilation, padding=padding, stride=stride)
    return patches.transpose(1, 2)


def channels_last(module: nn.Module, output: Tensor) -> Tensor:
    """Outputs [positions, rows]."""
    return (output.movedim(1, -1) if isinstance(module, nn.Conv1d | nn.Conv2d) else output).flatten(0, -2)


def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Summed over predictions, one after the other; padding neither predicts nor is predicted."""
    tokens = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = torch.ones_like(tokens) if isinstance(batch, Tensor) else batch["attention_mask"]
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    total = logits.new_zeros(())
    for row in range(len(tokens)):
        for now in range(tokens.shape[1] - 1):
            if mask[row, now] and mask[row, now + 1]:
                total = total - logits[row, now, tokens[row, now + 1]]
    return total


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Summed over samples."""
    found = model(batch[0])
    logits = getattr(found, "logits", found).log_softmax(-1)
    return -logits[torch.arange(len(batch[1])), batch[1]].sum()


def exact_fisher(module: nn.Module, model: nn.Module, samples: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over single samples of the outer product of the gradient of [W b], row-major."""
    total, many = torch.zeros(()), 0
    for sample in samples:
        parameters = [module.weight, *([] if module.bias is None else [module.bias])]
        gradients = torch.autograd.grad(class_loss(model, sample), parameters)  # type: ignore[arg-type]
        flat = torch.cat([part.reshape(len(part), -1) for part in gradients], 1).flatten()
        total, many = total + torch.outer(flat, flat), many + 1
    return total / many
