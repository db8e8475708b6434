"""Situations other than the example's: a cut network must compute what the masked one computes there, too.

Another batch size, another length or resolution, padding, training. The dense network says which of them there are: what it
cannot take is no situation, and what comes out otherwise every time cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_map_with_path

from resect.graph import Unwritten, reachable

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a network."""
TOKENS = "input_ids"
"""How arguments that are numbers of tokens are called, alone or at the end of a name."""
PADDED = 3
"""Tokens of padding in front of the first sequence."""
MOST_LENGTHS = 3
"""Lengths of axes of the inputs that are tried in other sizes, the longest first."""


@dataclass(frozen=True)
class Situation:
    """Inputs, and how the network is run on them."""

    name: str
    """As in: the cut network does not compute this ..."""
    inputs: Inputs
    training: bool = False


@dataclass(frozen=True)
class Witnessed:
    """What the masked network puts out in a situation; None in training where that differs from run to run."""

    situation: Situation
    outputs: Tensor | None
    learns: bool = False
    """Whether gradients reach the first parameter."""


def situations(inputs: Inputs, *, text: bool) -> Iterator[list[Situation]]:
    """What is tried, each a list of which the first that the network takes is enough.

    `text` says that the inputs are tokens of a language model alone, whose length is another than the example's anyway.
    """
    if text:
        tokens = inputs[1]["input_ids"]
        mask = torch.ones_like(tokens)
        mask[0, : min(PADDED, tokens.shape[1] - 1)] = 0
        yield [Situation("with padding", (inputs[0], {**inputs[1], "attention_mask": mask}))]
    else:
        yield from _other_sizes(inputs)
    yield [Situation("in training", inputs, training=True)]


def witness(model: nn.Module, tried: Iterator[list[Situation]], keep: Tensor | None) -> list[Witnessed]:
    """What the masked network puts out wherever it runs. `keep` are the tokens that stay where the vocabulary is cut."""
    found = []
    for choices in tried:
        seen = (_witnessed(model, one, keep) for one in choices)
        found += [one for one in seen if one is not None][:1]
    return found


def numbered(inputs: Inputs, keep: Tensor | None) -> Inputs:
    """The inputs with the numbers that their tokens had before the vocabulary was cut."""
    if keep is None:
        return inputs

    def before(path: Any, given: Any) -> Any:
        tokens = isinstance(given, Tensor) and not given.is_floating_point() and key(path).endswith(TOKENS)
        return keep.to(given.device)[given] if tokens else given

    found: Inputs = tree_map_with_path(before, inputs)
    return found


def key(path: Any) -> str:
    """The last name on the way to a leaf; empty for places in a sequence."""
    return str(getattr(path[-1], "key", "")) if path else ""


def _witnessed(model: nn.Module, situation: Situation, keep: Tensor | None) -> Witnessed | None:
    inputs = numbered(situation.inputs, keep)
    try:
        outputs = again = run(model, situation, inputs, keep=keep)
        if situation.training:
            again = run(model, situation, inputs, keep=keep, seed=1)
    except Exception:  # whatever a stranger's code raises: the network does not take this
        return None
    if not outputs.isfinite().all():
        return None
    return Witnessed(situation, outputs if outputs.equal(again) else None, situation.training and _learns(model, inputs))


def _learns(model: nn.Module, inputs: Inputs) -> bool:
    try:
        learn(model, inputs)
    except Exception:  # an operator without a gradient, a loss without labels
        return False
    return True


def run(
    model: nn.Module, situation: Situation, inputs: Inputs, *, keep: Tensor | None = None, seed: int = 0
) -> Tensor:
    """What the network puts out that counts, in one row: the logits of tokens that stay, or all numbers that are not whole."""
    with torch.no_grad(), _as_before(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train(situation.training)
        output = model(*inputs[0], **inputs[1])
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        logits = logits if keep is None else logits[..., keep.to(logits.device)]
        mask = inputs[1].get("attention_mask")
        if mask is not None and mask.shape == logits.shape[: mask.ndim]:
            logits = logits[mask.bool()]
        return logits.flatten()
    floating = [tensor for tensor in reachable(output) if tensor.is_floating_point()]
    if keep is not None:  # the vocabulary lies along the last axis of the first
        floating = [floating[0][..., keep.to(floating[0].device)]]
    return torch.cat([tensor.flatten().double() for tensor in floating])


def learn(model: nn.Module, inputs: Inputs) -> None:
    """One step of training, of which nothing is kept: gradients reach the network's first parameter, or it raises."""
    name, first = next((name, one) for name, one in model.named_parameters() if one.is_floating_point())
    with torch.enable_grad(), _as_before(model), torch.random.fork_rng(devices=[]):
        model.train()
        state = {name: first.detach().clone().requires_grad_()}
        output = torch.func.functional_call(model, state, *inputs)
        floating = [tensor for tensor in reachable(output) if tensor.requires_grad]
        if floating:
            whole = torch.stack([tensor.float().mean() for tensor in floating]).sum()
            torch.autograd.grad(whole, state[name], allow_unused=True)


def _other_sizes(inputs: Inputs) -> Iterator[list[Situation]]:
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        return
    batch = tensors[0].shape[0]
    yield [Situation("at another batch size", _resized(inputs, batch, batch + 1, leading=True))]
    lengths = sorted({size for tensor in tensors for size in tensor.shape[1:] if size > 1}, reverse=True)
    for length in lengths[:MOST_LENGTHS]:
        sizes = [length * 3 // 2, length * 2] if length % 2 == 0 else [length + 2, length * 2]
        yield [Situation("at another length or resolution", _resized(inputs, length, size, leading=False)) for size in sizes]


def _resized(inputs: Inputs, old: int, new: int, *, leading: bool) -> Inputs:
    """The inputs with all first axes, or all others, that are of one length made longer; what is new repeats what is there."""

    def longer(tensor: Tensor) -> Tensor:
        for axis, size in enumerate(tensor.shape):
            if size == old and (axis == 0) is leading:
                tensor = tensor.index_select(axis, torch.arange(new, device=tensor.device) % old)
        return tensor

    found: Inputs = tree_map_only(Tensor, longer, inputs)
    return found


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Whatever modules note of a run is gone afterwards, their mode too, and what is written into weights and buffers."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    keeper = Unwritten(model)
    try:
        with keeper:
            yield
    finally:
        for module, values in before:
            vars(module).clear()
            vars(module).update(values)
        keeper.undo()
