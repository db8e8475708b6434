"""The backward pass block by block over all batches, so that one block's gradients are complete before the next begins.

The forward pass keeps the inputs of every block. Then, from the last block to the first, the block is run again on every batch
with gradients for its own parameters, and hands the gradient of its input on. This costs a second forward pass through the
blocks, and saves holding the gradients of all blocks. It is exact when blocks talk through their hidden states alone, which is
tried on a few tokens first. Without gradients the blocks run from the first to the last, all batches through each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from resect.files.progress import noting_progress
from resect.graph import Graph
from resect.statistics.objective import Objective, first_tokens, loss_of

Loss = Callable[[nn.Module, Any], Tensor]
Around = Callable[[int, int], AbstractContextManager[Any]]


Enter = Callable[[int, "list[BlockCall]"], "list[Tensor] | None"]


def _nothing(layer: int, number: int) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass
class BlockCall:
    """The arguments one block was called with; the hidden states apart, in memory or in a file."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    file: Path | None = None

    def store(self, file: Path) -> None:
        """Writes the hidden states to a file and frees them. Raises `CheckpointError` for a disk that takes no more."""
        with noting_progress(file):
            save_file({"hidden": self.hidden.detach().contiguous()}, file)
        self.hidden, self.file = torch.empty(0, device=self.hidden.device), file

    def fetch(self, *, keep: bool = False) -> Tensor:
        """The hidden states; their file is gone then, unless it is to stay."""
        if self.file is None:
            return self.hidden
        hidden = load_file(self.file)["hidden"].to(self.hidden.device)
        if not keep:
            self.file.unlink()
        return hidden

    def again(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Calls the block on other hidden states and gives its hidden states."""
        name = "hidden_states" if "hidden_states" in self.kwargs else ""
        output = block(**self.kwargs | {name: hidden}) if name else block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class _Enough(BaseException):
    """All blocks have run."""


@dataclass
class Chain:
    """A model seen as something before its blocks, the blocks, and something after."""

    model: nn.Module
    path: str
    blocks: Sequence[nn.Module]
    loss: Loss
    calls: list[BlockCall] = field(default_factory=list)
    leaked: bool = False

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, probe: Any, loss: Loss) -> Chain | None:
        """The chain of a model, or None when its blocks do not talk through their hidden states alone.

        `probe`, a small batch, is sent both ways; the gradients of the first block's input must agree.
        """
        if len(graph.blocks.lists) != 1:
            return None
        blocks = model.get_submodule(graph.blocks.path)
        if not isinstance(blocks, nn.ModuleList):
            return None
        chain = cls(model, graph.blocks.path, list(blocks), loss)
        try:
            found = chain._probe(probe)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
            return None
        expected = chain._reference(probe)
        if not expected.isfinite().all():
            return None
        near = torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        return chain if near and not chain.leaked else None

    @classmethod
    def to_predict(cls, model: nn.Module, graph: Graph, batch: Any, objective: Objective) -> Chain | None:
        """The chain for an objective, tried on a small part of a batch."""
        return cls.of(model, graph, first_tokens(batch), lambda model, batch: loss_of(*objective.predict(model, batch)))

    def run(
        self,
        batches: Sequence[Any],
        wanted: Sequence[str] = (),
        take: Callable[[str, int], None] = lambda name, number: None,
        done: Callable[[str], None] = lambda name: None,
        *,
        around: Around = _nothing,
        begin: Callable[[int], None] = lambda number: None,
        passes: Callable[[int], int] = lambda layer: 1,
        spill: Path | None = None,
    ) -> Iterator[float]:
        """Gives the loss of every batch, and between them calls `take(parameter, batch)` on every gradient of a batch.

        `done(parameter)` is called when a parameter has seen all batches; no two blocks hold gradients at a time. While all
        batches run through a block again, the context `around(layer, pass)` lasts, and `begin(batch)` is called before each. They
        do so `passes(layer)` times; gradients of parameters are those of the last. What entered the blocks waits in files under
        `spill` meanwhile, if that is given.
        """
        outside = [name for name in wanted if not name.startswith(f"{self.path}.")]
        for name in outside:
            self.model.get_parameter(name).requires_grad_()
        with _waiting() as saved:
            flowing: list[Tensor] = []
            for number, batch in enumerate(tqdm(batches, desc="forward", unit="batch", leave=False, delay=2)):
                loss, calls, last = self._forward(batch)
                yield float(loss.detach())
                loss.backward()
                self._each(outside, take, number)
                assert last.grad is not None
                saved.append(calls)
                for layer, call in enumerate(calls):
                    if spill and not call.hidden.requires_grad:
                        call.store(spill / f"entering-{layer}-{number}.safetensors")
                flowing.append(last.grad)
            for layer in tqdm(reversed(range(len(self.blocks))), total=len(self.blocks), desc="blocks", leave=False, delay=2):
                early = passes(layer) - 1
                for number_of_pass in range(early):
                    with around(layer, number_of_pass):
                        for number, calls in enumerate(saved):
                            begin(number)
                            self._through(calls[-1], self.blocks[layer], flowing[number], first=False, keep=True)
                own = [name for name in wanted if name.startswith(f"{self.path}.{layer}.")]
                for name in own:
                    self.model.get_parameter(name).requires_grad_()
                with around(layer, early):
                    for number, calls in enumerate(saved):
                        begin(number)
                        flowing[number] = self._through(calls.pop(), self.blocks[layer], flowing[number], first=layer == 0)
                        self._each(own, take, number)
                for name in own:
                    self.model.get_parameter(name).requires_grad_(False)
                    done(name)
            for number, gradient in enumerate(flowing):
                if gradient.requires_grad:
                    gradient.backward()
                    self._each(outside, take, number)

    def calls_of(self, batch: Any) -> list[BlockCall]:
        """What every block is called with when a batch runs; what comes after the blocks does not."""
        self.calls = []
        with self._hooked(stop=True), suppress(_Enough):
            self.loss(self.model, batch)
        return self.calls

    @torch.no_grad()
    def forward(self, batches: Sequence[Any], enter: Enter) -> None:
        """Runs all batches through one block after the other; before each, calls `enter(layer, calls)` with a call a batch.

        That may run the block itself, and then gives what it put out for every batch.
        """
        saved: list[list[BlockCall]] = []
        for batch in tqdm(batches, desc="forward", unit="batch", leave=False, delay=2):
            calls = self.calls_of(batch)
            for call in calls[1:]:
                call.hidden = call.hidden.new_empty(0)
            saved.append(calls)
        for layer, block in enumerate(tqdm(self.blocks, desc="blocks", leave=False, delay=2)):
            current = [calls[layer] for calls in saved]
            last = layer + 1 == len(self.blocks)
            outputs = enter(layer, current)
            for number, (calls, call) in enumerate(zip(saved, current, strict=True)):
                if not last:
                    calls[layer + 1].hidden = outputs[number] if outputs else call.again(block, call.hidden)
                call.hidden = call.hidden.new_empty(0)

    def _each(self, names: Sequence[str], take: Callable[[str, int], None], number: int) -> None:
        for name in names:
            take(name, number)

    def _through(self, call: BlockCall, block: nn.Module, gradient: Tensor, *, first: bool, keep: bool = False) -> Tensor:
        """The gradient of a block's input; of what comes before the blocks, a scalar to go on from."""
        entering = call.fetch(keep=keep)
        hidden = entering.detach().requires_grad_()
        with torch.enable_grad():
            output = call.again(block, hidden)
        output.backward(gradient)
        assert hidden.grad is not None
        if first and entering.requires_grad:
            with torch.enable_grad():
                return (entering * hidden.grad).sum()
        return hidden.grad

    def _forward(self, batch: Any) -> tuple[Tensor, list[BlockCall], Tensor]:
        self.calls = []
        with self._hooked() as last, torch.enable_grad():
            loss = self.loss(self.model, batch)
        return loss, self.calls, last[0]

    @contextmanager
    def _hooked(self, *, stop: bool = False) -> Iterator[list[Tensor]]:
        last: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            rest = [*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")]
            self.leaked |= any(tensor.requires_grad for tensor in _tensors(rest))
            held = {name: None if name == "hidden_states" else value for name, value in kwargs.items()}
            self.calls.append(BlockCall(hidden, args[1:], held))
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": hidden.detach()}
            return (hidden.detach(), *args[1:]), kwargs

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if stop:
                raise _Enough
            hidden = output if isinstance(output, Tensor) else output[0]
            last.append(hidden.detach().requires_grad_())
            return last[0] if isinstance(output, Tensor) else (last[0], *output[1:])

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.blocks]
        handles.append(self.blocks[-1].register_forward_hook(after))
        try:
            yield last
        finally:
            for handle in handles:
                handle.remove()

    def _probe(self, batch: Any) -> Tensor:
        loss, calls, last = self._forward(batch)
        loss.backward()
        gradient = last.grad
        for block, call in zip(reversed(self.blocks), reversed(calls), strict=True):
            assert gradient is not None
            gradient = self._through(call, block, gradient, first=False)
        assert gradient is not None
        return gradient

    def _reference(self, batch: Any) -> Tensor:
        """The gradient of the first block's input by one ordinary backward pass."""
        entering: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            entering.append(hidden.detach().requires_grad_())
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": entering[0]}
            return (entering[0], *args[1:]), kwargs

        handle = self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        try:
            with torch.enable_grad():
                self.loss(self.model, batch).backward()
        finally:
            handle.remove()
        assert entering[0].grad is not None
        return entering[0].grad


@contextmanager
def _waiting() -> Iterator[list[list[BlockCall]]]:
    """A list for the calls of every batch; whatever files they still have are gone afterwards."""
    saved: list[list[BlockCall]] = []
    try:
        yield saved
    finally:
        for call in (call for calls in saved for call in calls):
            if call.file:
                call.file.unlink(missing_ok=True)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients anywhere; everything as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module in training:
            module.training = True
