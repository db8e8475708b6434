"""Low-rank terms on every linear layer of a model's blocks, through PEFT; zeros and gathered layers stay what they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resect.errors import ModelError, ResectWarning
from resect.recovery.settings import Recovery
from resect.surgery.modeling_resect import Gathered

NAME = "default"
LITTLE = 0.05
"""The share of the blocks that may stay as it is without a word: norms, biases, routers."""
SHOWN = 3


@dataclass(frozen=True)
class Adapter:
    """The low-rank terms alone, as PEFT stores them."""

    config: LoraConfig
    tensors: dict[str, Tensor]

    def save(self, directory: Path, *, base: str) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` for the model called `base`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.config.base_model_name_or_path = base
        self.config.inference_mode = True
        self.config.save_pretrained(str(directory))
        save_file(self.tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


class OnWeight(lora.Linear):
    """A low-rank term that is added to the weight as the layer holds it: zeros of a pattern stay zero, gathered rows gathered."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, *, keep_zeros: bool, r: int = 0, lora_alpha: int = 1
    ) -> None:
        nn.Module.__init__(self)
        lora.LoraLayer.__init__(self, base_layer)
        transposed = isinstance(base_layer, Conv1D) or getattr(base_layer, "input_axis", 1) == 0
        weight: Any = base_layer.weight
        self.out_features, self.in_features = weight.T.shape if transposed else weight.shape
        self.fan_in_fan_out = transposed
        self.keep_zeros = keep_zeros
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        self.is_target_conv_1d_layer = transposed

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The term in the weight's own shape."""
        delta: Tensor = super().get_delta_weight(adapter)
        return delta * (self.get_base_layer().weight != 0) if self.keep_zeros else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer puts out, and what it would put out with the term for its weight."""
        layer: Any = self.get_base_layer()
        found: Tensor = layer(x)
        if self.disable_adapters or self.merged:
            return found
        term = {"weight": self.get_delta_weight(NAME).to(found.dtype)}
        if layer.bias is not None:
            term["bias"] = torch.zeros_like(layer.bias)
        more: Tensor = functional_call(layer, term, (self.lora_dropout[NAME](x),))
        return found + more


def attach(model: PreTrainedModel, settings: Recovery, *, keep_zeros: Collection[str] = (), seed: int) -> PeftModel:
    """The model with low-rank terms on all linear layers in its blocks, and on experts that are one tensor; the rest is frozen.

    `keep_zeros` names layers whose zeros stay zero. Terms of experts know no dropout, so a model that has such experts is
    trained without. What the terms do not reach is warned of, with its share. Raises `ModelError` for a model without such
    layers.
    """
    layers, experts = dict(linear_layers(model)), list(fused_experts(model))
    if not layers and not experts:
        raise ModelError(f"{type(model).__name__} has no linear layers in a list of blocks. Train all of it: settings.full=true.")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0 if experts else settings.dropout,
        target_modules=list(layers),
        target_parameters=experts or None,
        fan_in_fan_out=bool(layers) and all(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type="CAUSAL_LM",
    )
    special = {id(layer): path in keep_zeros for path, layer in layers.items() if path in keep_zeros or _gathered(layer)}

    def chosen(layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> nn.Module | None:
        """PEFT makes a plain layer where this gives None."""
        if id(layer) not in special:
            return None
        sizes = {name: options[name] for name in ("r", "lora_alpha")}
        return OnWeight(layer, adapter_name, config, keep_zeros=special[id(layer)], **sizes)

    config._register_custom_module({nn.Module: chosen})  # type: ignore[dict-item]
    _tell_unreached(model)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the other kind of layer, where a model has two
        adapted = get_peft_model(model, config, adapter_name=NAME)
    assert isinstance(adapted, PeftModel)
    return adapted


def adapter_of(adapted: PeftModel) -> Adapter:
    """A copy of the low-rank terms."""
    config = adapted.peft_config[NAME]
    assert isinstance(config, LoraConfig)
    tensors = get_peft_model_state_dict(adapted, adapter_name=NAME)
    return Adapter(config, {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})


def reached_share(model: nn.Module) -> float:
    """The share of the parameters in blocks that low-rank terms are trained on."""
    reached, left = _by_reach(model)
    return sum(reached.values()) / max(1, sum(reached.values()) + sum(left.values()))


def _tell_unreached(model: nn.Module) -> None:
    """Warns of tensors in blocks that low-rank terms do not reach, where they are more than `LITTLE` of the blocks."""
    share = 1 - reached_share(model)
    if share <= LITTLE:
        return
    _, left = _by_reach(model)
    largest = sorted(left, key=left.__getitem__, reverse=True)
    kinds = list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in largest))
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    warnings.warn(
        f"{', '.join(kinds[:SHOWN])}{more}, {share:.0%} of the parameters in blocks, are no linear layers and do not learn. "
        "settings.full=true trains all weights.",
        ResectWarning,
        stacklevel=5,
    )


def _by_reach(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """The entries of every parameter in blocks, by name: of those that low-rank terms reach, and of the others."""
    targets = {*fused_experts(model), *(f"{path}.weight" for path, _ in linear_layers(model))}
    reached, left = dict[str, int](), dict[str, int]()
    for name, size in _block_sizes(model):
        (reached if name in targets else left)[name] = size
    return reached, left


def _block_sizes(model: nn.Module) -> Iterator[tuple[str, int]]:
    inside = _lists(model)
    for name, parameter in model.named_parameters():
        if name.startswith(inside):
            yield name, parameter.numel()


def _lists(model: nn.Module) -> tuple[str, ...]:
    """How the names of what lies in lists of modules begin."""
    return tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))


def fused_experts(model: nn.Module) -> Iterator[str]:
    """The parameters inside lists of modules that hold a matrix for every expert, [experts, rows, columns], by name."""
    inside = _lists(model)
    for path, module in model.named_modules():
        if not f"{path}.".startswith(inside) or isinstance(module, _ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                yield f"{path}.{name}"


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers inside lists of modules, by path."""
    inside = _lists(model)
    for path, module in model.named_modules():
        if path.startswith(inside) and (isinstance(module, nn.Linear | Conv1D) or _gathered(module)):
            yield path, module


def _gathered(module: nn.Module) -> bool:
    """Whether this is a linear layer of which only some rows and columns are left, one of each at least."""
    return isinstance(module, Gathered) and not module.spatial and module.weight.numel() > 0
