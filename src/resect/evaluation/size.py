"""How large a model is."""

from __future__ import annotations

from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
