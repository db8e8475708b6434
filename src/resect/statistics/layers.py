"""Layers seen as matrices: `y = W x (+ b)` at every position of their input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from resect.errors import UsageError
from resect.graph import Graph, Group

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution as the matrix `W` [rows, columns]; a row for each output, a column for each input.

    A convolution has a column for each input channel and place in the kernel, and its positions are those of its output.
    Where there is a bias, it is one more column, for an input that is always 1.
    """

    path: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, in its own shape."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if there is one."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def input_axis(self) -> int:
        """The axis of the weight that inputs run along."""
        return 0 if _transposed(self.module) else 1

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.weight.shape[1 - self.input_axis]

    @property
    def columns(self) -> int:
        """Inputs, the constant one of a bias included."""
        return self.inner_columns + (self.bias is not None)

    @property
    def inner_columns(self) -> int:
        """Inputs without the constant one."""
        return self.weight.numel() // self.rows

    def matrix(self) -> Tensor:
        """`W` [rows, columns] in float64 on the CPU, the bias last."""
        weight = self.weight.detach().cpu().double().clone()
        weight = weight.T if self.input_axis == 0 else weight.flatten(1)
        return weight if self.bias is None else torch.cat([weight, self.bias.detach().cpu().double()[:, None]], 1)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Puts `matrix` [rows, columns] in the place of weight and bias."""
        if self.bias is not None:
            self.bias.copy_(matrix[:, -1])
            matrix = matrix[:, :-1]
        self.weight.copy_(matrix.T if self.input_axis == 0 else matrix.reshape(self.weight.shape))

    def columns_of(self, positions: Tensor) -> Tensor:
        """The columns [units, width] that belong to positions [units, width] of the input."""
        return (positions[..., None] * self._kernel + torch.arange(self._kernel)).flatten(1)

    @property
    def _kernel(self) -> int:
        return self.weight.shape[2:].numel() if isinstance(self.module, CONVOLUTIONS) else 1

    def inputs_of(self, columns: Tensor) -> Tensor:
        """The positions of the input, or input channels, that some columns belong to: [positions], ascending."""
        found: Tensor = (columns // self._kernel).unique()
        return found

    def inputs(self, given: Tensor) -> Tensor:
        """What each position takes in, from the input of the module: [positions, columns], at least float32."""
        given = wide(given.detach())
        if isinstance(self.module, CONVOLUTIONS):
            given = _patches(given, self.module)
        given = given.reshape(-1, given.shape[-1])
        return given if self.bias is None else torch.cat([given, given.new_ones(len(given), 1)], 1)

    def outputs(self, given: Tensor) -> Tensor:
        """What each position puts out, or its gradient, from the output of the module: [positions, rows]."""
        given = wide(given.detach())
        if isinstance(self.module, CONVOLUTIONS):
            given = given.reshape(*_batched(given, self.module).shape).movedim(1, -1)
        return given.reshape(-1, given.shape[-1])


def layer_of(model: nn.Module, path: str) -> Layer | None:
    """The layer at a path, if it is one matrix for every position and runs by itself (the last of torch's attention does not)."""
    module = model.get_submodule(path)
    convolution = isinstance(module, CONVOLUTIONS) and module.groups == 1
    linear = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return Layer(path, module) if convolution or linear or _transposed(module) else None


def layers_of(model: nn.Module, paths: Iterable[str]) -> list[Layer]:
    """The layers at some paths; a module that is no such layer is a `UsageError`."""
    found = []
    for path in paths:
        layer = layer_of(model, path)
        if layer is None:
            raise UsageError(
                f"{path} is a {type(model.get_submodule(path)).__name__}; curvature is collected of linear layers "
                "and ungrouped convolutions."
            )
        found.append(layer)
    return found


def readers(model: nn.Module, graph: Graph, group: Group) -> list[tuple[Layer, Tensor]]:
    """The layers that take in the units of a group, each with the columns [units, width] of every unit."""
    found = []
    for member in graph.weights(group):
        path, _, leaf = member.parameter.rpartition(".")
        layer = layer_of(model, path) if leaf == "weight" else None
        if layer and layer.input_axis == member.axis:
            found.append((layer, layer.columns_of(member.index)))
    return found


def _transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is [inputs, outputs], as GPT-2 has them."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and tuple(weight.shape) == (module.nx, module.nf)  # type: ignore[union-attr]


def wide(tensor: Tensor) -> Tensor:
    """At least float32: squares of half-precision gradients underflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _batched(given: Tensor, module: nn.Module) -> Tensor:
    """With a batch axis in front."""
    kernel: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
    return given if given.ndim == len(kernel) + 2 else given[None]


def _patches(given: Tensor, module: Any) -> Tensor:
    """The inputs of a convolution as its kernel sees them: [batch, *places, channels * kernel]."""
    given = _batched(given, module)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    given = nn.functional.pad(given, module._reversed_padding_repeated_twice, mode=mode)
    dims = len(module.kernel_size)
    for dim, (size, step, spread) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        given = given.unfold(2 + dim, (size - 1) * spread + 1, step)[..., ::spread]
    return given.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)).flatten(1 + dims)
