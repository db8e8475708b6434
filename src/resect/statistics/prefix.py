"""What layers take in when everything before them is cut already, beside what they took in before.

All batches go through the blocks twice, side by side: as the network was, and as it is with the blocks so far changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.statistics.blockwise import BlockCall, Chain
from resect.statistics.curvature import Moments
from resect.statistics.layers import Layer

Counted = Callable[[Any], "Tensor | None"]


@dataclass
class Pairs:
    """Sums over positions of a layer: `x̂ x̂ᵀ` and `x x̂ᵀ`, both [columns, columns], `x` of the network as it was, `x̂` as it is."""

    inputs: Tensor
    crossing: Tensor
    positions: int = 0

    @classmethod
    def zeros(cls, layer: Layer) -> Pairs:
        """Nothing yet."""
        like = layer.weight.new_empty(0, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
        square = like.new_zeros(layer.columns, layer.columns)
        return cls(square, square.clone())

    def means(self) -> tuple[Tensor, Tensor]:
        """`E x̂ x̂ᵀ` and `E x x̂ᵀ` in float64 on the CPU."""
        inputs, crossing = (sums.cpu().double() / max(self.positions, 1) for sums in (self.inputs, self.crossing))
        return inputs, crossing

    def __add__(self, other: Pairs) -> Pairs:
        """Sums over both."""
        return Pairs(self.inputs + other.inputs, self.crossing + other.crossing, self.positions + other.positions)


class Prefix:
    """All batches on their way through the blocks."""

    def __init__(self, chain: Chain, batches: Sequence[Any], counted: Counted) -> None:
        self.chain, self.batches, self.counted = chain, batches, counted
        self.calls: list[list[BlockCall]] = []
        with torch.no_grad():
            for batch in tqdm(batches, desc="forward", unit="batch", leave=False, delay=2):
                calls = chain.calls_of(batch)
                for call in calls[1:]:
                    call.hidden = call.hidden.new_empty(0)
                self.calls.append(calls)
        self.was = [calls[0].hidden for calls in self.calls]
        self.now = list(self.was)
        self.number = 0
        self.dense: nn.Module = nn.Identity()

    def blocks(self) -> Iterator[int]:
        """Every block in turn; whoever changes one calls `advance` before going on."""
        for number, block in enumerate(tqdm(self.chain.blocks, desc="blocks", leave=False, delay=2)):
            self.number, self.dense = number, copy.deepcopy(block)
            yield number

    @torch.no_grad()
    def sees_all(self, layer: Layer) -> bool:
        """Whether a layer of this block sees every position once; one that tokens are sent to need not see the same in both."""
        hidden = self.now[0]
        seen = self._inputs(self.chain.blocks[self.number], [layer], self._inside, self.calls[0][self.number], hidden)
        return [len(x) for x in seen[layer.path]] == [hidden.numel() // hidden.shape[-1]]

    @torch.no_grad()
    def measure(self, layers: Sequence[Layer]) -> dict[str, Pairs]:
        """The sums of some layers of this block, which is as it is now; they see every position once."""
        inside = self._inside
        found = {layer.path: Pairs.zeros(layer) for layer in layers}
        for calls, batch, was, now in zip(self.calls, self.batches, self.was, self.now, strict=True):
            real = self.counted(batch)
            before, after = (
                self._inputs(block, layers, inside, calls[self.number], hidden)
                for block, hidden in ((self.dense, was), (self.chain.blocks[self.number], now))
            )
            for layer in layers:
                for x, x_now in zip(before[layer.path], after[layer.path], strict=True):
                    keep = slice(None) if real is None else real.flatten().to(x.device)
                    x, x_now = x[keep], x_now[keep]
                    found[layer.path].inputs.addmm_(x_now.T, x_now)
                    found[layer.path].crossing.addmm_(x.T, x_now)
                    found[layer.path].positions += len(x)
        return found

    @torch.no_grad()
    def advance(self) -> None:
        """All batches go through this block."""
        for place, calls in enumerate(self.calls):
            call = calls[self.number]
            self.was[place] = call.again(self.dense, self.was[place])
            self.now[place] = call.again(self.chain.blocks[self.number], self.now[place])

    @torch.no_grad()
    def moments(self, layers: Sequence[Layer]) -> dict[str, Moments]:
        """The moments of what some layers of this block take in now; those that tokens are sent to need no pairs."""
        found = {layer.path: Moments.zeros(layer, gradients=False) for layer in layers}
        for calls, now in zip(self.calls, self.now, strict=True):
            seen = self._inputs(self.chain.blocks[self.number], layers, self._inside, calls[self.number], now)
            for path, inputs in seen.items():
                for x in inputs:
                    found[path].take_inputs(x)
        for moments in found.values():
            moments.mirror()
        return found

    @property
    def _inside(self) -> str:
        return f"{self.chain.path}.{self.number}."

    def _inputs(
        self, block: nn.Module, layers: Sequence[Layer], inside: str, call: BlockCall, hidden: Tensor
    ) -> dict[str, list[Tensor]]:
        """What some layers take in when a block, or its copy, runs; a tensor for each call."""
        found: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
        with _hooked(block, layers, inside, found):
            call.again(block, hidden)
        return found


@contextmanager
def _hooked(block: nn.Module, layers: Sequence[Layer], inside: str, found: dict[str, list[Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:

            def take(module: nn.Module, given: Any, layer: Layer = layer) -> None:
                found[layer.path].append(layer.inputs(given[0]))

            module = block.get_submodule(layer.path.removeprefix(inside))
            stack.callback(module.register_forward_pre_hook(take).remove)
        yield
