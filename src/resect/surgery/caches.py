"""What networks keep from one evaluation to the next."""

from __future__ import annotations

from torch import nn


def forget(model: nn.Module) -> None:
    """Lets a network drop what it keeps for evaluation (attention biases looked up once, say): that goes when training begins.

    Modes are what they were afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.eval()
    for module, training in modes:
        module.training = training
