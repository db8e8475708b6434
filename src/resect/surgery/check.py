"""Cut equals mask, checked on every run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.calibration import positions_of
from resect.errors import NumericsError
from resect.graph import Graph
from resect.plan import Plan
from resect.surgery.cut import cut
from resect.surgery.gather import Kept, gather
from resect.surgery.mask import masked
from resect.surgery.vocabulary import kept_tokens
from resect.surroundings import unaffected

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a network is called with."""
SHAPE = (2, 16)
"""Sequences and tokens of the check."""
TOLERANCE = 1e-4
"""Largest logit difference as a share of the logits' standard deviation, where rounding allows it."""
ROUNDING = 16
"""How many times the effect of one rounding error per block the difference may reach in deep models."""


@unaffected("changes")
def cut_and_check(model: nn.Module, plan: Plan, graph: Graph, *, seed: int = 0) -> dict[str, float]:
    """Cuts a network in place and holds it against the masked one, on random tokens or on random inputs like its example.

    Where the vocabulary is cut, tokens that stay are compared, under their new numbers in the cut model.
    Gives the largest difference of outputs and what was allowed, both as shares of the outputs' standard deviation. Allowed
    is 1e-4, or a few times what rounding alone does to this model: one relative error of machine precision after every block,
    measured. Half-precision models are widened to float32 meanwhile.
    Raises `NumericsError` above that: discovery has missed a coupling.
    """
    keep = kept_tokens(graph, plan)
    before, after = _inputs(model, graph, keep, seed)
    with masked(model, plan, graph), _widened(model):
        expected = _of_tokens(_outputs(model, before), keep)
        with _rounding_errors(model, graph, seed):
            disturbed = _of_tokens(_outputs(model, before), keep)
    cut(model, plan, graph)
    return _compared(model, after, expected, disturbed)


@unaffected("changes")
def gather_and_check(model: nn.Module, kept: Mapping[str, Kept], graph: Graph, *, seed: int = 0) -> dict[str, float]:
    """Takes rows and columns that are zero out of single layers, in place, and holds the network against itself before.

    Gives and raises what `cut_and_check` does.
    """
    inputs, _ = _inputs(model, graph, None, seed)
    with _widened(model):
        expected = _outputs(model, inputs)
        with _rounding_errors(model, graph, seed):
            disturbed = _outputs(model, inputs)
    gather(model, kept)
    return _compared(model, inputs, expected, disturbed)


def _compared(model: nn.Module, inputs: Inputs, expected: Tensor, disturbed: Tensor) -> dict[str, float]:
    with _widened(model):
        difference = _difference(expected, _outputs(model, inputs))
    allowed = max(TOLERANCE, ROUNDING * _difference(expected, disturbed))
    if not difference <= allowed:
        raise NumericsError(
            f"The cut model does not compute what the masked model computes: outputs differ by {difference:.2e} of their scale, "
            f"{allowed:.0e} is allowed. Please report the architecture; restrict the kinds that are cut to go on."
        )
    return {"difference": difference, "allowed": allowed}


def _inputs(model: nn.Module, graph: Graph, keep: Tensor | None, seed: int) -> tuple[Inputs, Inputs]:
    """Random inputs of the masked and of the cut network; tokens have other numbers there where the vocabulary is cut."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary:
        stays = torch.arange(vocabulary) if keep is None else keep
        shape = (SHAPE[0], min(SHAPE[1], positions_of(model) or SHAPE[1]))
        tokens = torch.randint(len(stays), shape, generator=generator)
        before, after = ({"input_ids": given.to(device), "use_cache": False} for given in (stays[tokens], tokens))
        return ((), before), ((), after)

    def random(given: Tensor) -> Tensor:
        if given.is_floating_point():
            return torch.randn(tuple(given.shape), generator=generator).to(device, given.dtype)
        return torch.zeros(tuple(given.shape), dtype=given.dtype, device=device)

    like: Inputs = tree_map_only(Tensor, random, graph.witness.example)
    return like, like


def _of_tokens(logits: Tensor, keep: Tensor | None) -> Tensor:
    """The logits of the tokens that stay."""
    return logits if keep is None else logits[..., keep.to(logits.device)]


def _difference(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    return float((expected - found).abs().max() / expected.std().clamp_min(1e-30))


def _outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits, or the first tensor that a network puts out."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            found = model(*inputs[0], **inputs[1])
    finally:
        for module in training:
            module.training = True
    logits = getattr(found, "logits", None)
    return logits if isinstance(logits, Tensor) else next(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Half-precision tensors in float32 for a while; the way there and back is exact."""
    halves = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [tensor.dtype for tensor in halves]
    for tensor in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(halves, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _rounding_errors(model: nn.Module, graph: Graph, seed: int) -> Iterator[None]:
    """Disturbs what every block puts out by random relative errors of machine precision."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        noise = torch.randn(hidden.shape, generator=generator).to(hidden)
        hidden = hidden * (1 + noise * torch.finfo(hidden.dtype).eps)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handles = [model.get_submodule(paths[-1]).register_forward_hook(disturb) for paths in graph.blocks.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
