"""Units on their way to zero: the slices that produce them are scaled down step by step, while everything else trains.

What produces a unit: rows of the weights that put it out, their biases, rows of an adapter's `B`. Layers that read it stay as
they are; what they read becomes zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resect.graph import Graph, Group
from resect.statistics import layer_of


@dataclass(frozen=True)
class Slice:
    """The positions [units, width] of an axis of a parameter that produce the units of a group."""

    name: str
    parameter: nn.Parameter
    axis: int
    index: Tensor

    @torch.no_grad()
    def take(self, units: Tensor) -> Tensor:
        """The values that belong to some units."""
        return self.parameter.index_select(self.axis, self._positions(units))

    @torch.no_grad()
    def put(self, units: Tensor, values: Tensor) -> None:
        """Writes what belongs to some units, in place."""
        self.parameter.index_copy_(self.axis, self._positions(units), values.to(self.parameter.dtype))

    def _positions(self, units: Tensor) -> Tensor:
        return self.index[units].flatten().to(self.parameter.device)


@dataclass
class Fading:
    """The producing slices of the units of some groups, by group, and what becomes of them.

    Frozen parameters are scaled from the values they had at first, so that a run that goes on later has the same bits.
    """

    slices: Mapping[str, Sequence[Slice]]
    begun: dict[str, Tensor] = field(default_factory=dict)
    """Units [n] that fade, those that have become zero on the way included."""
    zeros: dict[str, Tensor] = field(default_factory=dict)
    """Units [n] that are zero for good."""
    _first: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, groups: Sequence[Group]) -> Fading:
        """Nothing fades yet."""
        return cls({group.name: _producing(model, graph, group) for group in groups})

    @property
    def fading(self) -> dict[str, Tensor]:
        """Units [n] that fade and are not zero yet, by group."""
        left = {name: units[~torch.isin(units, self.zeros.get(name, units[:0]))] for name, units in self.begun.items()}
        return {name: units for name, units in left.items() if len(units)}

    def begin(self, units: Mapping[str, Tensor]) -> None:
        """Lets some units fade; those before them do no more."""
        self.begun = dict(units)
        self._first = {name: [one.take(chosen) for one in self.slices[name]] for name, chosen in units.items()}

    def scale(self, *, left: float, step: float = 1.0) -> None:
        """Makes frozen slices the share `left` of what they were at first, and multiplies trained ones by `step`."""
        for name, units in self.begun.items():
            for one, first in zip(self.slices[name], self._first[name], strict=True):
                one.put(units, one.take(units) * step if one.parameter.requires_grad else first * left)
        self.hold()

    def zero(self, units: Mapping[str, Tensor]) -> None:
        """Sets some units to zero for good."""
        for name, chosen in units.items():
            self.zeros[name] = torch.cat([self.zeros.get(name, chosen[:0]), chosen]).unique()
        self.hold()

    def end(self) -> None:
        """What fades is zero for good."""
        self.zero(self.begun)
        self.begin({})

    def hold(self) -> None:
        """Keeps at zero what is zero, whatever a gradient step has done to it."""
        for name, units in self.zeros.items():
            for one in self.slices[name]:
                one.put(units, torch.zeros_like(one.take(units)))


def _producing(model: nn.Module, graph: Graph, group: Group) -> list[Slice]:
    found = []
    for member in graph.weights(group):
        path, _, leaf = member.parameter.rpartition(".")
        layer = layer_of(model, path) if leaf == "weight" else None
        if layer is None or layer.input_axis != member.axis:
            found.append(Slice(member.parameter, model.get_parameter(member.parameter), member.axis, member.index))
    return found
