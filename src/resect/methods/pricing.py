"""What units cost in one shot, by the ladders of the layers that read them; those reach little further than what goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.graph import Graph, Group
from resect.plan import Plan
from resect.saliency import Ladder, Reader, independent_losses, ladder, reach
from resect.statistics import Curvature, Moments, readers


@dataclass
class Pricing:
    """The groups of a network, what is gone of them, and how the layers that read them are seen."""

    model: nn.Module
    graph: Graph
    groups: Sequence[Group]
    gone: Mapping[str, Sequence[int]]
    """Units that went before, by group."""
    moments: Callable[[str], Moments]
    """Those of a layer."""
    damping: tuple[float, float]
    """Of what layers take in, and of gradients."""
    chosen: Callable[[Mapping[str, Tensor]], Plan]
    """The plan that scores lead to."""
    least: float
    """This share of the units of every group is on its ladder, whatever goes."""
    says: str = "ladders"
    ladders: dict[str, Ladder] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    """What clipping left of the second terms of layers."""

    def scores(self, prices: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """What each unit costs after those of its group that go before it, times the price of the group; nothing if it is gone.

        Units below the end of a ladder stay, however far ladders reach. They are said to cost as much as the last on it, or more,
        in proportion to what they cost alone.
        """
        if not self.ladders:
            went = self.went(self.alone)
            likely = {group.name: float(max(went[group.name], self.least * group.units)) for group in self.groups}
            self._descend({group.name: reach(group.units, likely[group.name]) for group in self.groups})
        while True:
            went = self.went(self._scores(prices))
            short = {name: units for name, units in went.items() if units > len(self.ladders[name].order)}
            if not short:
                return self._scores(prices, self.alone)
            self._descend({name: units + units // 4 for name, units in short.items()})

    def went(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """How many units of each group would go by scores, besides those that are gone."""
        left = self.chosen(scores).groups
        return {name: left[name].removed - len(units) for name, units in self.gone.items()}

    def _scores(self, prices: Mapping[str, float] | None, alone: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for group in self.groups:
            scores = self.ladders[group.name].scores(group.units, alone=alone[group.name] if alone else None)
            scores[list(self.gone[group.name])] = 0
            found[group.name] = (prices or {}).get(group.name, 1.0) * scores
        return found

    @cached_property
    def alone(self) -> dict[str, Tensor]:
        """What each unit would cost if its weights had nothing to do with each other and nothing were made up for."""
        found = dict[str, Tensor]()
        for group in self.groups:
            total = torch.zeros(group.units, dtype=torch.float64)
            for layer, columns in readers(self.model, self.graph, group):
                total += independent_losses(layer.matrix(), Curvature(*self.moments(layer.path).means()), columns)
            total[list(self.gone[group.name])] = 0
            found[group.name] = total
        return found

    def _descend(self, steps: Mapping[str, int]) -> None:
        """Makes the ladders of some groups, of so many steps each."""
        wanted = [group for group in self.groups if group.name in steps]
        for group in tqdm(wanted, desc=self.says, leave=False, delay=2):
            layers = []
            for layer, columns in readers(self.model, self.graph, group):
                damping, second = self.damping
                curvature = self.moments(layer.path).curvature(layer.path, damping=damping, damping_gradients=second)
                layers.append(Reader(layer.matrix(), curvature, columns))
                self.kept[layer.path] = curvature.kept
            self.ladders[group.name] = ladder(layers, gone=self.gone[group.name], steps=steps[group.name])
