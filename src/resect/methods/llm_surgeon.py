"""LLM Surgeon (van der Ouderaa et al.; arXiv 2312.17244): Kronecker curvature, joint updates of what stays, many shots.

Paper: rows and columns of every matrix, left as zeros. Here, by default: whole heads and MLP channels, priced by the columns of
the layers that read them; those layers are updated, and the network really gets smaller. Losses come from the ladder of each
layer, where each unit is priced after those that went before it, because single losses stop adding up when most of a layer goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from resect.checkpoint import Progress
from resect.errors import UsageError
from resect.graph import Graph, Group
from resect.methods.compensation import Compensation, compensate
from resect.methods.method import Method, Units
from resect.plan import Plan, keep_all, select
from resect.saliency import Reader, ladder
from resect.statistics import Data, Moments, collect_curvature, readers
from resect.surgery import masked, reading


class FewPositions(UserWarning):
    """Calibration data shows a layer fewer positions than it has inputs."""


class LLMSurgeon(Method):
    """Settings of the method; every default is explained in docs/methods.md."""

    kinds: tuple[Literal["heads", "channels"], ...] = ("heads", "channels")
    shots: int = Field(default=5, ge=1)
    fisher: Literal["empirical", "sampled", "activations"] = "empirical"
    draws: int = Field(default=1, ge=1)
    damping: float = Field(default=0.01, ge=0)
    damping_gradients: float = Field(default=0.01, ge=0)
    compensation: Compensation | None = Compensation()
    selection: Literal["global", "local"] = "global"
    floor: Units | dict[Literal["heads", "channels"], Units] = 1
    spread: float | None = Field(default=1.2, ge=1)

    @property
    def removes(self) -> tuple[str, ...]:
        """The kinds of units that may go."""
        return self.kinds

    @property
    def writes(self) -> bool:
        """Whether planning changes weights: between shots it does."""
        return self.shots > 1 and self.compensation is not None

    def plan(
        self,
        model: nn.Module,
        graph: Graph,
        data: Data,
        *,
        keep: float,
        of: str = "blocks",
        layout: str = "per-layer",
        align: int = 1,
        seed: int = 42,
        progress: Progress,
    ) -> tuple[Plan, dict[str, Tensor]]:
        """Which units stay, and the last scores: `{group: [units]}`, in nats per prediction.

        What earlier shots than the last one removed is made up for in the weights; `make_up` does it for the last.
        """
        groups = _read(model, graph, self.kinds)
        asked: dict[str, Any] = {
            "of": of,
            "layout": layout,
            "selection": self.selection,
            "align": align,
            "kinds": list(dict.fromkeys(group.kind for group in groups)),
            "groups": [group.name for group in groups],
            "floor": self.floor,
            "spread": self.spread,
        }
        select(graph, {group.name: torch.zeros(group.units) for group in groups}, keep=keep, **asked)  # refused before long work
        plan = keep_all(groups)
        scores: dict[str, Tensor] = {}
        for shot in range(1, self.shots + 1):
            if shot > 1:
                self._make_up(model, graph, plan, data, shot=shot - 1, progress=progress)
            scores = self._scores(model, graph, groups, plan, data, shot=shot, seed=seed, progress=progress)
            plan = select(graph, scores, keep=1 - (1 - keep) * shot / self.shots, **asked)
        return plan, scores

    def make_up(self, model: nn.Module, graph: Graph, plan: Plan, data: Data, progress: Progress) -> None:
        """Updates the weights that stay for what the last shot removed."""
        self._make_up(model, graph, plan, data, shot=self.shots, progress=progress)

    def _scores(
        self,
        model: nn.Module,
        graph: Graph,
        groups: Sequence[Group],
        plan: Plan,
        data: Data,
        *,
        shot: int,
        seed: int,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """What each unit costs after those that go before it; nothing for those that went."""
        if stored := progress.get(f"shot-{shot}/scores"):
            return stored
        self._collect(model, graph, groups, plan, data, shot=shot, seed=seed, progress=progress)
        scores = {}
        for group in tqdm(groups, desc=f"ladders, shot {shot}", leave=False, delay=2):
            layers = []
            for layer, columns in readers(model, graph, group):
                curvature = _moments(progress, shot, layer.path).curvature(
                    layer.path, damping=self.damping, damping_gradients=self.damping_gradients
                )
                layers.append(Reader(layer.matrix(), curvature, columns))
            gone = sorted(set(range(group.units)) - set(plan.groups[group.name].keep))
            scores[group.name] = ladder(layers, gone=gone).scores(group.units)
            scores[group.name][gone] = 0
        progress.put(f"shot-{shot}/scores", scores)
        return scores

    def _collect(
        self,
        model: nn.Module,
        graph: Graph,
        groups: Sequence[Group],
        plan: Plan,
        data: Data,
        *,
        shot: int,
        seed: int,
        progress: Progress,
    ) -> None:
        """Moments of all layers that read a group, of the network as the shots before left it."""
        if progress.noted(f"shot-{shot}/collected"):
            return
        layers = {layer.path: layer for group in groups for layer, _ in readers(model, graph, group)}
        thin: dict[str, tuple[int, int]] = {}

        def sink(path: str, moments: Moments) -> None:
            if moments.positions < layers[path].columns:
                thin[path] = (moments.positions, layers[path].columns)
            progress.put(f"shot-{shot}/moments/{path}", moments.tensors())

        with masked(model, plan, graph):
            loss = collect_curvature(
                model,
                data.batches,
                graph,
                list(layers),
                sink,
                fisher=self.fisher,
                draws=self.draws,
                seed=seed + shot,
                objective=data.objective,
                spill=progress.folder(f"shot-{shot}/entering"),
            )
        progress.drop(f"shot-{shot}/entering")
        progress.note(f"shot-{shot}/collected", loss=loss)
        _warn(thin)

    def _make_up(self, model: nn.Module, graph: Graph, plan: Plan, data: Data, *, shot: int, progress: Progress) -> None:
        """The update of one shot, or what was noted of it."""
        if self.compensation is None or progress.noted(f"shot-{shot}/superseded"):
            return
        layers = [loss.layer for loss in reading(model, graph, plan)]
        stored = progress.get(f"shot-{shot}/weights")
        if stored is None:
            known = (lambda path: _moments(progress, shot, path)) if self.compensation.inputs == "dense" else lambda path: None
            compensate(model, graph, plan, data, self.compensation, known=known)
            progress.put(f"shot-{shot}/weights", {layer.path: layer.matrix() for layer in layers})
        else:
            for layer in layers:
                layer.write(stored[layer.path])
        progress.drop(f"shot-{shot}/moments")
        if shot > 1:
            progress.note(f"shot-{shot - 1}/superseded")
            progress.drop(f"shot-{shot - 1}/weights")


def _read(model: nn.Module, graph: Graph, kinds: Sequence[str]) -> list[Group]:
    """The groups whose units some layer takes in."""
    groups = [group for group in graph.of_kind(*kinds) if readers(model, graph, group)]
    if not groups:
        offered = ", ".join(sorted({group.kind for group in graph.groups})) or "none"
        raise UsageError(
            f"Nothing to cut: {', '.join(kinds)} were asked for, and no linear layer or ungrouped convolution reads any. "
            f"The network offers {offered}."
        )
    return groups


def _moments(progress: Progress, shot: int, path: str) -> Moments:
    found = progress.get(f"shot-{shot}/moments/{path}")
    assert found is not None
    return Moments.of(found)


def _warn(thin: dict[str, tuple[int, int]]) -> None:
    if thin:
        path, (positions, columns) = max(thin.items(), key=lambda item: item[1][1] - item[1][0])
        warnings.warn(
            FewPositions(
                f"{len(thin)} layers see fewer positions than they have inputs; {path} sees {positions} and has {columns}, so "
                f"the second moments have rank {positions} at most and damping decides the rest. Use more calibration text."
            ),
            stacklevel=3,
        )
