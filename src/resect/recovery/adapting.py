"""Low-rank adapters on the linear layers of any network, through PEFT: put on, trained, added to the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from resect.recovery.settings import AdapterSettings
from resect.statistics import wide

ADAPTER = "default"


@contextmanager
def adapted(model: nn.Module, paths: Sequence[str], asked: AdapterSettings, *, seed: int = 0) -> Iterator[dict[str, LoraLayer]]:
    """A network whose layers at `paths` have adapters while the context lasts, by path; nothing else takes gradients.

    Afterwards they are added to the weights and taken off; after an exception they are taken off alone.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    config = LoraConfig(r=asked.rank, lora_alpha=asked.alpha, lora_dropout=asked.dropout, target_modules=list(paths))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT sets what it finds missing
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:  # small steps would be lost in half precision
            parameter.data = wide(parameter.data)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    model.eval()
    for layer in layers.values():
        layer.lora_dropout.train()
    try:
        yield layers
        for layer in layers.values():
            layer.merge()
    finally:
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
        vars(model).pop("peft_config", None)
        for parameter, required in flags:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training


def factors(layer: Any) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """`A` [rank, columns], `B` [rows, rank], the scale of what an adapter adds to its layer, `s B A`, and the gradient of `B`."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    step = None if up.grad is None else up.grad.flatten(1)
    return down.flatten(1), up.flatten(1), float(layer.scaling[ADAPTER]), step


def trained(layers: Mapping[str, LoraLayer]) -> dict[str, nn.Parameter]:
    """The parameters of adapters, by name."""
    return {
        f"{path}.{name}": getattr(layer, name)[ADAPTER].weight for path, layer in layers.items() for name in ("lora_A", "lora_B")
    }


def deltas(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """What every adapter adds to the weight of its layer, in the weight's shape, by the weight's name."""
    with torch.no_grad():
        return {f"{path}.base_layer.weight": _added(layer) for path, layer in layers.items()}


def _added(layer: Any) -> Tensor:
    added: Tensor = layer.get_delta_weight(ADAPTER)
    return added
