"""Low-rank terms on every linear layer of a model's blocks, through PEFT; zeros and gathered layers stay what they are."""

from __future__ import annotations

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
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resect.errors import ModelError
from resect.recovery.settings import Recovery
from resect.surgery.modeling_resect import Gathered

NAME = "default"


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
    """The model with low-rank terms on all linear layers in its blocks; everything else is frozen.

    `keep_zeros` names layers whose zeros stay zero. Raises `ModelError` for a model without such layers.
    """
    layers = dict(linear_layers(model))
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layers in a list of blocks. Train all of it: settings.full=true.")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(layers),
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers.values()),
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


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers inside lists of modules, by path."""
    lists = [f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path, module in model.named_modules():
        if path.startswith(tuple(lists)) and (isinstance(module, nn.Linear | Conv1D) or _gathered(module)):
            yield path, module


def _gathered(module: nn.Module) -> bool:
    """Whether this is a linear layer of which only some rows and columns are left, one of each at least."""
    return isinstance(module, Gathered) and not module.spatial and module.weight.numel() > 0
