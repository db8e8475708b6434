"""A network run from one of its blocks on, for many runs that differ only from there.

What the block before put out is kept for every batch. The blocks before are then passed over, and the last of them puts out what
was kept; everything else (embeddings, masks, positions, the head) runs as the network's own code has it. Such a run gives the
bits of the whole run as long as blocks hear of the blocks before them through that output alone, which is tried first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from resect.graph import Graph, Group

PROBE = 16
"""Tokens on which passing over blocks is tried."""


class _Enough(BaseException):
    """The block has run."""


class Onward:
    """The runs of a network over some batches of tokens, from block `layer` on; `advance` goes one block down."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
        self._model = model
        self._blocks = blocks
        self._kept: list[Any] = []
        self.batches = batches
        self.layer = 0

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, batches: Sequence[Tensor]) -> Onward | None:
        """The runs of a network, or None where a run from some block on does not give the bits of a whole run.

        The model must be in evaluation mode.
        """
        paths = [path for path, *others in graph.blocks.modules if not others]
        if not paths or len(paths) != graph.blocks.count:
            return None
        blocks = [model.get_submodule(path) for path in paths]
        with suppress(TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            if cls(model, blocks, [batches[0][:1, :PROBE]])._agrees():
                return cls(model, blocks, batches)
        return None

    @contextmanager
    def passing(self, number: int) -> Iterator[None]:
        """While the context lasts, the model runs from block `layer` on, if it is given batch `number`."""
        with ExitStack() as stack:
            for block in self._blocks[: self.layer]:
                stack.enter_context(_standing_in(block, self._kept[number]))
            yield

    def advance_to(self, layer: int) -> None:
        """Goes down to a block; without blocks to pass over nothing happens."""
        while self.layer < min(layer, len(self._blocks) - 1):
            self.advance()

    def advance(self) -> None:
        """Runs block `layer` on every batch and keeps what it puts out in the place of what it took in."""
        kept: list[Any] = []

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            kept.append(output)
            raise _Enough

        handle = self._blocks[self.layer].register_forward_hook(keep)
        try:
            for number in range(len(self.batches)):
                with self.passing(number), suppress(_Enough):
                    self._run(number)
        finally:
            handle.remove()
        self._kept, self.layer = kept, self.layer + 1

    @torch.no_grad()
    def _run(self, number: int) -> Any:
        device = next(self._model.parameters()).device
        return self._model(input_ids=self.batches[number].to(device), use_cache=False)

    def _agrees(self) -> bool:
        """Whether the logits of the first batch are the same to the bit, whichever block the run begins with."""
        whole = self._run(0).logits
        while self.layer + 1 < len(self._blocks):
            self.advance()
            with self.passing(0):
                if not torch.equal(self._run(0).logits, whole):
                    return False
        return True


@contextmanager
def _standing_in(block: nn.Module, output: Any) -> Iterator[None]:
    """A block that does nothing but put out a copy of what it is told, as long as the context lasts."""
    before = vars(block).get("forward")
    vars(block)["forward"] = lambda *args, **kwargs: tree_map_only(Tensor, Tensor.clone, output)
    try:
        yield
    finally:
        if before is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = before


def first_block(graph: Graph, group: Group) -> int:
    """The block from which on runs differ when a group loses units: the one with all its parameters, or 0 if there is none."""
    inside = {graph.blocks.layer_of(member.parameter) for member in group.members}
    return group.layer if group.layer is not None and inside <= {group.layer} else 0
