"""Where a model keeps its repeated blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Blocks:
    """A list of like modules that carries most of the model's parameters."""

    path: str
    count: int

    def layer_of(self, parameter: str) -> int | None:
        """The number of the block a parameter, or a module's path with a dot at its end, belongs to; None outside."""
        prefix = self.path + "."
        if not self.count or not parameter.startswith(prefix):
            return None
        number = parameter[len(prefix) :].partition(".")[0]
        return int(number) if number.isdigit() else None


def find_blocks(model: nn.Module) -> Blocks:
    """The `ModuleList` of like children with the most parameters; a count of zero when there is none."""
    best, most = Blocks("", 0), 0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > most:
                best, most = Blocks(path, len(module)), size
    return best
