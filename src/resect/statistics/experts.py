"""What each expert of a mixture adds where it is asked: REAP (Lasby et al.; arXiv 2510.13999).

The score of an expert is the mean, over the tokens routed to it, of the router's weight times the norm of what the expert
puts out. Only forward passes are needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.errors import NumericsError, UsageError
from resect.graph import Graph, Group
from resect.statistics.blockwise import prepared

ROUTED = ("top_k_index", "top_k_weights")
"""What a module of experts takes beside the hidden states: numbers [T, k] and weights [T, k] of the experts of every token."""


@dataclass
class Activation:
    """Sums over the tokens that were routed to each expert; texts add."""

    norms: Tensor
    """Of weighted outputs, summed: [experts], float64."""
    tokens: Tensor
    """How many there were: [experts]."""

    @property
    def means(self) -> Tensor:
        """The score [experts]; 0 for an expert that no token was routed to."""
        return self.norms / self.tokens.clamp_min(1)

    def __add__(self, other: Activation) -> Activation:
        """What both texts together would have given."""
        return Activation(self.norms + other.norms, self.tokens + other.tokens)


def expert_activations(
    model: nn.Module, tokens: Tensor, graph: Graph, *, batch_tokens: int
) -> dict[str, Activation]:
    """What the experts of every group add to calibration tokens [sequences, length], by the group's name.

    Every layer of experts is run twice: once for the network, once slot by slot for the norms. Raises `UsageError` for
    experts whose module does not take the router's choice, and `NumericsError` for outputs that are not finite.
    """
    groups = graph.of_kind("experts")
    modules = {group.name: _module(model, graph, group) for group in groups}
    found = {
        group.name: Activation(torch.zeros(group.units, dtype=torch.float64), torch.zeros(group.units))
        for group in groups
    }
    rows = max(1, batch_tokens // max(1, tokens.shape[1]))
    device = next(model.parameters()).device
    with prepared(model), torch.no_grad(), _watched(modules, found):
        for batch in tqdm(tokens.split(rows), desc="experts", unit="batch", leave=False, delay=2):
            model(input_ids=batch.to(device), use_cache=False)
    for name, one in found.items():
        if not one.norms.isfinite().all():
            raise NumericsError(f"What the experts of {name} put out is not finite. Use a wider dtype or other text.")
    return found


def _module(model: nn.Module, graph: Graph, group: Group) -> nn.Module:
    """The module that runs the experts of a group on what the router chose."""
    for member in graph.weights(group):
        module = model.get_submodule(member.parameter.rpartition(".")[0])
        if set(ROUTED) <= set(inspect.signature(module.forward).parameters):
            return module
    raise UsageError(
        f"criterion=reap needs the router's choice, and no module of {group.name} takes it ({', '.join(ROUTED)}). "
        "Use another criterion."
    )


@contextmanager
def _watched(modules: Mapping[str, nn.Module], sums: Mapping[str, Activation]) -> Iterator[None]:
    """Adds up, whenever one of the modules runs, what each of its experts puts out."""

    def watch(module: nn.Module, one: Activation) -> Any:
        signature = inspect.signature(module.forward)

        def before(_: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            given = signature.bind(*args, **kwargs).arguments
            numbers, weights = (given.pop(name) for name in ROUTED)
            for slot in range(numbers.shape[-1]):
                chosen = {name: value[:, slot : slot + 1] for name, value in zip(ROUTED, (numbers, weights), strict=True)}
                added = module.forward(**given, **chosen)
                norms = added.flatten(0, -2).double().norm(dim=-1).cpu()
                which = numbers[:, slot].flatten().cpu()
                one.norms.index_add_(0, which, norms)
                one.tokens.index_add_(0, which, torch.ones(len(which)))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    handles = [watch(module, sums[name]) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
