"""LoRAShear (Chen et al.; arXiv 2310.18356): adapters train while redundant units fade, so that others learn what they knew.

The paper names its stages and criteria; public code does not exist. Rank, learning rate, steps and periods are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from resect.errors import UsageError
from resect.files.progress import Progress
from resect.graph import Graph, Group, retrace
from resect.methods.knowledge import RATIOS, analyze
from resect.methods.method import Method, Shot, Units
from resect.plan import Align, Cost, Plan, keep_all, select
from resect.ranges import Numbers
from resect.recovery import AdapterSettings
from resect.report import Knowledge
from resect.saliency import adapted_scores, score
from resect.statistics import Data, collect, layer_of
from resect.surgery import Fading

if TYPE_CHECKING:
    from resect.recovery import Steps


class Analysis(Numbers):
    """How groups are found that stay whole; constants of `resect.analyze`."""

    gamma: float = Field(default=0.1, ge=0, le=1)
    """The share of groups that stays whole."""
    ratios: tuple[Annotated[float, Field(gt=0, le=1)], ...] = RATIOS
    windows: int = Field(default=8, ge=1)
    """Of the calibration text, held out for it; at most half of all."""


class LoRAShear(Method):
    """Settings of the method; docs/methods.md says which are the paper's."""

    recovery: ClassVar[Mapping[str, Any] | None] = {
        "teacher": "dense",
        "settings": {"mixture": {"kind": "dynamic"}, "distillation": {"weight": 0}},
    }
    """The dense model measures how far sources are behind, and does not teach."""

    kinds: tuple[Literal["heads", "channels", "experts"], ...] = ("heads", "channels")
    analysis: Analysis | None = Analysis()
    """None: no group is spared. In a uniform layout none can be, and nothing is analysed."""
    criterion: Literal["adapted", "element2", "element1", "vector", "mix", "l2", "random"] = "adapted"
    """`adapted`: the paper's, from what adapters have added so far. The others are LLM-Pruner's, estimated once, before."""
    adapter: AdapterSettings = AdapterSettings()
    estimate_windows: int = Field(default=64, ge=1)
    """At most so many windows of the calibration text are read for that."""
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    periods: int = Field(default=5, ge=1)
    period_steps: int = Field(default=20, ge=1)
    settle_steps: int = Field(default=0, ge=0)
    """Steps after the last period, in which nothing fades any more."""
    half_space: bool = True
    selection: Literal["global", "local"] = "global"
    spread: float | None = Field(default=1.2, ge=1)
    floor: Units | dict[Literal["heads", "channels", "experts"], Units] = 1
    checkpoint_steps: int = Field(default=25, ge=1)

    @property
    def removes(self) -> tuple[str, ...]:
        """The kinds of units that may go."""
        return self.kinds

    @property
    def long(self) -> bool:
        """Its state is noted every few steps."""
        return True

    @property
    def writes(self) -> bool:
        """What stays has learned."""
        return True

    @property
    def steps(self) -> int:
        """All gradient steps."""
        return self.warmup_steps + self.periods * self.period_steps + self.settle_steps

    def plan(
        self,
        model: nn.Module,
        graph: Graph,
        data: Data,
        *,
        keep: float,
        of: str | Cost = "blocks",
        layout: str = "per-layer",
        align: Align = 1,
        protect: Sequence[str] = (),
        seed: int = 42,
        progress: Progress,
    ) -> tuple[Plan, dict[str, Tensor]]:
        """Trains adapters while units fade, adds them to the weights, and gives what stays with the last scores.

        What the plan removes is zero afterwards.
        """
        from resect.recovery import Steps, adapted, deltas, spent, trained  # PEFT comes with it, and takes seconds

        knowledge, data = self._analysed(model, data, layout, progress, seed)
        spared = set(knowledge.protected if knowledge else ())
        groups = [group for group in graph.of_kind(*self.kinds) if group.name not in spared.union(protect)]
        options: dict[str, Any] = {"of": of, "layout": layout, "align": align, "protect": spared.union(protect)}
        options |= {"selection": self.selection, "kinds": self.kinds, "floor": self.floor, "spread": self.spread}
        select(graph, {group.name: torch.zeros(group.units) for group in groups}, keep=keep, **options)  # refused early
        estimated = self._estimated(model, graph, data, progress, seed)
        plan, scores = keep_all(groups), dict[str, Tensor]()
        with adapted(model, _layers(model, graph), self.adapter, seed=seed) as layers:
            inner = retrace(model, graph)
            twins = _twins(groups, inner)
            base = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
            fading = Fading.of(model, inner, twins)
            steps = Steps(model, trained(layers), data, learning_rate=self.learning_rate, seed=seed)
            first, plans = _resumed(progress, fading, steps, [plan])
            if first:
                fading.scale(left=self._left(first - 1))
            bar = tqdm(range(first, self.steps), "lorashear", self.steps, initial=first, unit="step", leave=False, delay=2)
            for step in bar:
                period = self._begins(step)
                if period:
                    scores = estimated or adapted_scores(twins, base, deltas(layers))
                    share = 1 - (1 - keep) * period / self.periods
                    plans.append(select(graph, scores, keep=share, within=plans[-1], **options))
                    fading.begin(_lost(plans[-1], plans[-2]))
                    progress.put(f"scores-{period}", scores)
                steps.step(step)
                bar.set_postfix_str(f"loss {steps.losses[-1]:.3f}", refresh=False)
                if self.half_space:
                    fading.zero(spent(fading, layers, learning_rate=self.learning_rate))
                fading.scale(left=self._left(step), step=self._ratio(step))
                if self._ends(step):
                    fading.end()
                if (step + 1) % self.checkpoint_steps == 0 or step + 1 == self.steps:
                    _note(progress, step + 1, plans, fading, steps)
        scores = progress.get(f"scores-{self.periods}") or {}
        shots = [
            Shot.of(after, before, progress.get(f"scores-{period}") or {})
            for period, (before, after) in enumerate(pairwise(plans), start=1)
        ]
        notes = {"losses": steps.losses, "shots": shots} | ({"knowledge": knowledge} if knowledge else {})
        whole = keep_all([graph.group(name) for name in sorted(spared - set(protect))])
        return (plans[-1] & whole).model_copy(update={"notes": notes}), scores

    def _analysed(
        self, model: nn.Module, data: Data, layout: str, progress: Progress, seed: int
    ) -> tuple[Knowledge | None, Data]:
        """What the groups are worth, on held-out windows, and the other ones to train on."""
        if self.analysis is None or layout == "uniform":
            return None, data
        tokens, asked = data.tokens(), self.analysis
        held = min(asked.windows, len(tokens) // 2)
        if not isinstance(model, PreTrainedModel) or not held:
            raise UsageError(
                "The analysis that comes first reads windows of a language model's text, two at least. "
                "Give it those, or leave it out (settings.analysis=null)."
            )
        noted = progress.facts("knowledge")
        if noted is None:
            found = analyze(
                model,
                text=tokens[:held],
                kinds=self.kinds,
                ratios=asked.ratios,
                gamma=asked.gamma,
                window=tokens.shape[1],
                limit=None,
                seed=seed,
            )
            noted = found.model_dump(mode="json")
            progress.note("knowledge", **noted)
        rest = tokens[held:].split(max(len(batch) for batch in data.batches))
        return Knowledge.model_validate(noted), Data(rest, data.objective)

    def _estimated(
        self, model: nn.Module, graph: Graph, data: Data, progress: Progress, seed: int
    ) -> dict[str, Tensor]:
        """Scores of the dense model, where they are asked for."""
        if self.criterion == "adapted":
            return {}
        noted = progress.get("estimated")
        if noted is None:
            tokens = data.tokens()[: self.estimate_windows]
            noted = score(graph, collect(model, tokens, graph, self.criterion, kinds=list(self.kinds)), seed=seed)
            progress.put("estimated", noted)
        return noted

    def _turn(self, step: int) -> tuple[int, int]:
        """The period, from 0, and the place of a step in it; negative in the warm-up."""
        return divmod(step - self.warmup_steps, self.period_steps)

    def _begins(self, step: int) -> int:
        """The period, from 1, that begins with a step; 0 if none does."""
        period, turn = self._turn(step)
        return period + 1 if turn == 0 and 0 <= period < self.periods else 0

    def _ends(self, step: int) -> bool:
        return bool(self._begins(step + 1)) or step + 1 == self.warmup_steps + self.periods * self.period_steps

    def _left(self, step: int) -> float:
        """The share of a fading unit that is left after a step: it falls in a straight line to 0."""
        return (self.period_steps - self._turn(step)[1] - 1) / self.period_steps

    def _ratio(self, step: int) -> float:
        """What a step multiplies a fading unit by; over a period the product of these is 0."""
        turn = self._turn(step)[1]
        return (self.period_steps - turn - 1) / (self.period_steps - turn)


def _layers(model: nn.Module, graph: Graph) -> list[str]:
    """The layers that get an adapter: all in blocks, or all where there are no blocks."""
    paths = [path for path, _ in model.named_modules() if path and layer_of(model, path)]
    inside = [path for path in paths if graph.blocks.layer_of(path) is not None]
    if not (inside or paths):
        raise UsageError(f"{type(model).__name__} has no linear layers or convolutions that could take adapters.")
    return inside or paths


def _twins(groups: Sequence[Group], inner: Graph) -> list[Group]:
    """The groups of the adapted network that have the base weights of some groups, and slices of adapters besides."""
    def key(group: Group) -> frozenset[tuple[str, int]]:
        named = ((member.parameter.replace(".base_layer.", "."), member.axis) for member in group.members)
        return frozenset(place for place in named if ".lora_" not in place[0])

    found = {key(group): group for group in inner.groups}
    return [replace(found[key(group)], name=group.name) for group in groups]


def _lost(plan: Plan, earlier: Plan) -> dict[str, Tensor]:
    """The units [n] that one plan removes and an earlier one kept, by group."""
    found = {name: sorted(set(earlier.groups[name].keep) - set(kept.keep)) for name, kept in plan.groups.items()}
    return {name: torch.tensor(units) for name, units in found.items() if units}


def _note(progress: Progress, step: int, plans: Sequence[Plan], fading: Fading, steps: Steps) -> None:
    """Notes everything that the next step needs."""
    progress.put(f"state-{step}/steps", steps.state())
    progress.put(f"state-{step}/zeros", fading.zeros)
    before = progress.facts("state")
    progress.note("state", step=step, plans=[plan.to_json() for plan in plans], losses=steps.losses)
    if before:
        progress.drop(f"state-{before['step']}")


def _resumed(progress: Progress, fading: Fading, steps: Steps, plans: list[Plan]) -> tuple[int, list[Plan]]:
    """The step to go on with, and the plans so far; where nothing was noted, the first and those given."""
    noted = progress.facts("state")
    if noted is None:
        return 0, plans
    plans = [Plan.from_json(text) for text in noted["plans"]]
    steps.restore(progress.need(f"state-{noted['step']}/steps"), losses=noted["losses"])
    if len(plans) > 1:
        fading.begin(_lost(plans[-1], plans[-2]))
    fading.zero(progress.need(f"state-{noted['step']}/zeros"))
    return noted["step"], plans
