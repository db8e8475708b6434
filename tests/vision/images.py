"""Classification networks of torchvision and timm with random weights, and images that they take."""

from __future__ import annotations

import re
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import tests.vision.operators  # noqa: F401  # isort: skip
import timm
import torchvision
from timm.models import model_entrypoint

TORCHVISION: tuple[str, ...] = tuple(torchvision.models.list_models(module=torchvision.models))
TIMM: tuple[str, ...] = tuple(name for name in timm.list_models() if not name.startswith("test_"))
SIZES = (64, 96, 128, 160, 192, 224, 240, 256)
"""Sides of an image that are tried, small ones first; what a network is made for comes last."""


def build(name: str, device: str = "cpu") -> nn.Module:
    """The network of a name, `torchvision/resnet18` or `timm/resnet18`, in evaluation mode with random weights."""
    library, _, name = name.partition("/")
    torch.manual_seed(0)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            model: nn.Module = timm.create_model(name)
        else:
            model = torchvision.models.get_model(name, weights=None, **_quiet(name))
    return model.eval()


def _quiet(name: str) -> dict[str, Any]:
    """Two networks want to be told that random weights will do."""
    return {"init_weights": True} if name in ("googlenet", "inception_v3") else {}


def images(model: nn.Module, seed: int = 0) -> Tensor:
    """Two random images of the smallest size that the network takes."""
    generator = torch.Generator().manual_seed(seed)
    own = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    problem: Exception | None = None
    for size in (*(size for size in SIZES if size < own[-1]), own[-1]):
        x = torch.randn(2, own[0], size, size, generator=generator)
        try:
            with torch.no_grad():
                model(x)
        except Exception as refused:
            problem = refused
        else:
            return x
    raise ValueError(f"{type(model).__name__} takes no image: {problem}")


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network with noise on all it has learned and counted, so that nothing is zero or one by default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            own = parameter.std() if parameter.ndim > 1 else parameter.new_zeros(())
            parameter.add_(noise * (own * 0.1 if own > 0 else 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.mul_(0.75 + 0.5 * torch.rand(buffer.shape, generator=generator))
    return model


@cache
def families() -> dict[str, str]:
    """For every family of timm - the module it is written in and the letters its name starts with - the smallest network."""
    best: dict[tuple[str, str], tuple[int, str]] = {}
    for name in TIMM:
        letters = re.match(r"[a-z]+", name)
        assert letters
        family = (model_entrypoint(name).__module__.rpartition(".")[2], letters.group())
        size = sum(parameter.numel() for parameter in build(f"timm/{name}", device="meta").parameters())
        best[family] = min(best.get(family, (size, name)), (size, name))
    return {f"{module}/{letters}": name for (module, letters), (_, name) in best.items()}
