"""What a model is run with to see whether another computes the same: what it was traced with, or what it is made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.calibration import positions_of
from resect.errors import UsageError
from resect.surgery import inputs_like, outputs_of, takes, tokens_alone

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a network is called with."""
LENGTH = 24


def example_of(model: nn.Module, given: Any = None) -> Inputs:
    """Inputs for a model, the same every time: like those that are given, like those that it was traced with, or tokens.

    Raises `UsageError` for a network of which nothing says what it takes in.
    """
    example = _plain(given) if given is not None else getattr(model, "resect_example", None)
    if example is not None and not (given is None and tokens_alone(model, example)):
        like = inputs_like(example, model, 0)
        has_values = not any(leaf.is_meta for leaf in tree_leaves(example) if isinstance(leaf, Tensor))
        return example if has_values and not takes(model, like) else like
    vocabulary = _vocabulary(model)
    if not vocabulary or getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} was to be checked, and nothing says what it takes in. Pass inputs, as to resect.trace."
        )
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, positions_of(model) or LENGTH)
    tokens = torch.randint(vocabulary, (2, length), generator=generator)
    device = next(model.parameters()).device
    return (), {"input_ids": tokens.to(device), "use_cache": False}


@torch.no_grad()
def difference_between(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """Largest difference of what two networks put out, relative to the spread of the second's."""
    return relative_difference(outputs_of(model, inputs), outputs_of(other, inputs))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over the standard deviation of `expected`; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    spread = expected.double().std(correction=0).clamp_min(1e-30)
    return float((found.double() - expected.double()).abs().max() / spread)


def on_cpu(inputs: Inputs) -> Inputs:
    """The inputs in main memory."""
    moved: Inputs = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu(), inputs)
    return moved


def is_language_model(model: nn.Module) -> bool:
    """Whether a model is called with numbers of tokens, as far as it says."""
    example = getattr(model, "resect_example", None)
    return bool(_vocabulary(model)) and (example is None or tokens_alone(model, example))


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or 0


def _plain(given: Any) -> Inputs:
    if isinstance(given, Mapping):
        return (), dict(given)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
        raise UsageError(f"inputs={given!r} hold no tensor. Pass what the network is called with, as to resect.trace.")
    return (given if isinstance(given, tuple) else (given,)), {}
