"""LLM Surgeon (van der Ouderaa et al.; arXiv 2312.17244): Kronecker curvature, joint updates of what stays, many shots.

Paper: rows and columns of every matrix, left as zeros. Here, by default: whole heads and MLP channels, priced by the columns of
the layers that read them; those layers are updated, and the network really gets smaller. Losses come from the ladder of each
layer, where each unit is priced after those that went before it, because single losses stop adding up when most of a layer goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resect.errors import FewPositions, UsageError
from resect.files.progress import SUPERSEDED, Progress
from resect.graph import Graph, Group
from resect.methods.compensation import Compensation, compensate
from resect.methods.method import Method, Shot, Units
from resect.methods.pricing import Pricing
from resect.methods.sparsity import Sparsity, Stays, impose, matrices
from resect.methods.trials import Trials, tried
from resect.plan import Align, Cost, Pattern, Plan, cost_of, keep_all, select
from resect.recovery import Correction, correct
from resect.statistics import WITHOUT_GRADIENTS, Data, Layer, Moments, collect_curvature, readers, tell_clipped
from resect.surgery import check_gatherable, masked, reading


class LLMSurgeon(Method):
    """Settings of the method; every default is explained in docs/methods.md."""

    mode: Annotated[str, Field(pattern=r"^(coupled|rows-columns|unstructured|[1-9]\d*:[1-9]\d*)$")] = "coupled"
    kinds: tuple[Literal["heads", "channels"], ...] = ("heads", "channels")
    shots: int = Field(default=5, ge=1)
    fisher: Literal["empirical", "sampled", "activations", "identity"] = "empirical"
    draws: int = Field(default=1, ge=1)
    terms: Literal[1, 2] = 1
    damping: float = Field(default=0.01, ge=0)
    damping_gradients: float | None = Field(default=None, ge=0)
    compensation: Compensation | None = Compensation()
    trials: Trials | None = None
    ladders: bool = True
    gather: bool = True
    max_correlate: int | None = Field(default=None, ge=1)
    correction: Correction | None = None
    selection: Literal["global", "local"] = "global"
    floor: Units | dict[Literal["heads", "channels"], Units] = 1
    spread: float | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> LLMSurgeon:
        if self.terms == 2 and self.fisher in WITHOUT_GRADIENTS:
            raise ValueError(f"terms = 2 fits a second term to gradients, and fisher = {self.fisher!r} has none. Use terms = 1.")
        if self.trials and not (self.coupled and self.fisher not in WITHOUT_GRADIENTS):
            raise ValueError(
                "trials compare what whole units cost with the nats that they were priced at: they need mode = 'coupled' and a "
                f"fisher with gradients; mode = {self.mode!r}, fisher = {self.fisher!r}. Use trials = null."
            )
        return self

    @property
    def removes(self) -> tuple[str, ...]:
        """The kinds of units that may go."""
        return self.kinds

    @property
    def coupled(self) -> bool:
        """Whether whole units go, and not parts of single matrices."""
        return self.mode == "coupled"

    @property
    def damped(self) -> tuple[float, float]:
        """Damping of `A` and `G`. Paper: ten times as much on `G` where elements go."""
        usual = 0.01 if self.mode in ("coupled", "rows-columns") else 0.1
        return self.damping, usual if self.damping_gradients is None else self.damping_gradients

    @property
    def physical(self) -> bool:
        """Rows and columns are, unless they are to stay as zeros."""
        return self.mode == "rows-columns" and self.gather

    @property
    def long(self) -> bool:
        """Every shot is noted."""
        return True

    @property
    def updates(self) -> bool:
        """Whether what stays is updated."""
        return self.compensation is not None or self.correction is not None

    @property
    def writes(self) -> bool:
        """Whether planning changes weights: between shots it does."""
        return not self.coupled or (self.shots > 1 and self.updates)

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
        """Which units stay, and the last scores: `{group: [units]}`, in nats per prediction.

        What earlier shots than the last one removed is made up for in the weights; `make_up` does it for the last.
        """
        asked = {"keep": keep, "of": of, "layout": layout, "align": align, "protect": protect}
        plan, scores, shots = keep_all(graph.of_kind(*self.kinds)), dict[str, Tensor](), list[Shot]()
        for shot, after, scores in self.shots_of(model, graph, data, asked, seed=seed, progress=progress):
            shots.append(Shot.of(after, plan, scores, progress.facts(f"shot-{shot}/trials")))
            plan = after
        return plan.model_copy(update={"notes": {"shots": shots}}), scores

    def shots_of(
        self, model: nn.Module, graph: Graph, data: Data, asked: Mapping[str, Any], *, seed: int = 42, progress: Progress
    ) -> Iterator[tuple[int, Plan, dict[str, Tensor]]]:
        """The number, plan and scores of every shot in turn; `make_up` for it comes after, at the latest with the next.

        `asked` are the options of `resect.plan.select`.
        """
        groups = _read(model, graph, self.kinds)
        options = self._options(groups, asked)
        equal = {group.name: torch.zeros(group.units) for group in groups}
        select(graph, equal, keep=asked["keep"], **options)  # a budget out of reach is refused before the long part
        groups = [group for group in groups if group.name not in options.get("protect", ())]
        plan = keep_all(groups)
        for shot in range(1, self.shots + 1):
            if shot > 1:
                self.make_up(model, graph, plan, data, progress, shot=shot - 1)
            kept = 1 - (1 - asked["keep"]) * shot / self.shots

            def chosen(scores: Mapping[str, Tensor], kept: float = kept) -> Plan:
                return select(graph, scores, keep=kept, **options)

            timed = shot == self.shots and isinstance(asked.get("of"), Cost)  # another plan may be asked for by these scores
            share = 1.0 if timed else (1 - asked["keep"]) / self.shots / 2
            scores = self._scores(
                model, graph, groups, plan, data, share=share, chosen=chosen, shot=shot, seed=seed, progress=progress
            )
            plan = chosen(scores)
            yield shot, plan, scores

    def again(
        self, model: nn.Module, graph: Graph, scores: Mapping[str, Tensor], *, asked: Mapping[str, Any]
    ) -> Plan | None:
        """The last shot's plan for another budget; what earlier shots removed is worth nothing, and goes first."""
        given = {name: asked[name] for name in ("of", "layout", "align", "protect")}
        return select(graph, scores, keep=asked["keep"], **self._options(_read(model, graph, self.kinds), given))

    def _options(self, groups: Sequence[Group], asked: Mapping[str, Any]) -> dict[str, Any]:
        """What the settings say of `select`, and what was asked."""
        return {
            **{name: value for name, value in asked.items() if name != "keep"},
            "selection": self.selection,
            "kinds": list(dict.fromkeys(group.kind for group in groups)),
            "groups": [group.name for group in groups],
            "floor": self.floor,
            "spread": self.spread,
        }

    def sparsify(
        self,
        model: nn.Module,
        graph: Graph,
        data: Data,
        *,
        keep: float,
        of: str | Cost = "blocks",
        protect: Sequence[str] = (),
        seed: int = 42,
        progress: Progress,
    ) -> Pattern:
        """Makes single matrices sparse in place, with what stays updated; gives what stays of them.

        `n:m` decides by itself how much stays; otherwise it is the share `keep` of the parameters in blocks or of the model.
        """
        *_, (_, pattern) = self.patterns(model, graph, data, keep=keep, of=of, protect=protect, seed=seed, progress=progress)
        return pattern

    def patterns(
        self,
        model: nn.Module,
        graph: Graph,
        data: Data,
        *,
        keep: float,
        of: str | Cost = "blocks",
        protect: Sequence[str] = (),
        seed: int = 42,
        progress: Progress,
    ) -> Iterator[tuple[int, Pattern]]:
        """The number of every shot, when it is done, and what stays."""
        if of not in ("blocks", "model"):
            name = of.name if isinstance(of, Cost) else of
            raise UsageError(
                f"of={name} was asked; parts of single matrices are counted in parameters. Use of=blocks or of=model."
            )
        damping, damping_gradients = self.damped
        asked = Sparsity(
            kind=self.mode,
            shots=self.shots,
            damping=damping,
            damping_gradients=damping_gradients,
            update=self.compensation is not None,
            ladders=self.ladders,
            max_correlate=self.max_correlate,
            floor=self.floor if isinstance(self.floor, int) else 1,
            alike=self.selection == "local",
            correction=self.correction,
        )
        if self.physical:
            check_gatherable(model, [layer.path for layer in matrices(model, graph, protect)])
        remove = round((1 - keep) * cost_of(graph, of)({}))

        def collect(layers: Sequence[Layer], shot: int) -> None:
            self.collect(model, graph, layers, data, shot=shot, seed=seed, progress=progress)

        return impose(model, graph, data, asked, remove=remove, protect=protect, collect=collect, progress=progress)

    def make_up(
        self, model: nn.Module, graph: Graph, plan: Plan, data: Data, progress: Progress, *, shot: int | None = None
    ) -> None:
        """Updates the weights that stay for what a shot (none: the last one) removed, or reads what was noted of it."""
        shot = shot or self.shots
        if not self.updates or progress.noted(f"shot-{shot}/{SUPERSEDED}"):
            return
        losing = reading(model, graph, plan)
        layers = matrices(model, graph) if self.correction else [loss.layer for loss in losing]
        if progress.noted(f"shot-{shot}/made-up"):
            for layer in layers:
                layer.write(progress.need(f"shot-{shot}/weights/{layer.path}")["matrix"])
        else:
            if self.compensation:
                dense = self.compensation.inputs == "dense"
                known = (lambda path: _moments(progress, shot, path)) if dense else lambda path: None
                compensate(model, graph, plan, data, self.compensation, known=known, damping_gradients=self.damped[1])
            if self.correction:
                keep = {layer.path: Stays.whole(layer).elements for layer in layers}
                for loss in losing:
                    keep[loss.layer.path][:, loss.columns] = False
                with masked(model, plan, graph):
                    correct(layers, keep, model, data, self.correction, last=shot == self.shots, seed=shot)
            for layer in layers:
                progress.put(f"shot-{shot}/weights/{layer.path}", {"matrix": layer.matrix().to(layer.weight.dtype)})
            progress.note(f"shot-{shot}/made-up")
        progress.drop(f"shot-{shot}/moments")
        if shot > 1:
            progress.supersede(shot - 1, by=f"shot-{shot}/made-up")
            progress.drop(f"shot-{shot - 1}/weights")

    def _scores(
        self,
        model: nn.Module,
        graph: Graph,
        groups: Sequence[Group],
        plan: Plan,
        data: Data,
        *,
        share: float,
        chosen: Callable[[Mapping[str, Tensor]], Plan],
        shot: int,
        seed: int,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """What each unit costs after those that go before it; nothing for those that went.

        A `share` of every group is priced in any case, and whatever is `chosen`.
        """
        if stored := progress.get(f"shot-{shot}/scores"):
            return stored
        found = {layer.path: layer for group in groups for layer, _ in readers(model, graph, group)}
        with masked(model, plan, graph):
            self.collect(model, graph, list(found.values()), data, shot=shot, seed=seed, progress=progress)
        pricing = Pricing(
            model,
            graph,
            groups,
            {group.name: sorted(set(range(group.units)) - set(plan.groups[group.name].keep)) for group in groups},
            lambda path: _moments(progress, shot, path),
            self.damped,
            chosen,
            max(share, self.trials.share if self.trials else 0),
            says=f"ladders, shot {shot}",
        )
        scores = pricing.scores()
        if self.trials:
            scores = pricing.scores(self._prices(pricing, plan, data, scores, shot=shot, progress=progress))
        tell_clipped(pricing.kept)
        progress.put(f"shot-{shot}/scores", scores)
        if self.compensation is None or self.compensation.inputs == "pruned":
            progress.drop(f"shot-{shot}/moments")
        return scores

    def _prices(
        self, pricing: Pricing, plan: Plan, data: Data, scores: Mapping[str, Tensor], *, shot: int, progress: Progress
    ) -> dict[str, float]:
        """What multiplies the losses of each group, found by trial."""
        assert self.trials
        model, graph = pricing.model, pricing.graph

        def update(alone: Plan) -> None:
            if self.compensation:
                made = self.compensation.model_copy(update={"inputs": "dense"})
                compensate(model, graph, alone, data, made, known=pricing.moments, damping_gradients=self.damped[1])

        if (noted := progress.facts(f"shot-{shot}/trials")) is None:
            counts = pricing.went(scores)
            noted = tried(
                model, graph, pricing.groups, pricing.ladders, data, self.trials, plan=plan, counts=counts, update=update
            )
            progress.note(f"shot-{shot}/trials", **noted)
        return noted

    def collect(
        self, model: nn.Module, graph: Graph, layers: Sequence[Layer], data: Data, *, shot: int, seed: int, progress: Progress
    ) -> None:
        """Notes the moments of some layers, of the network as the shots before left it, once for every shot."""
        if progress.noted(f"shot-{shot}/collected"):
            return
        columns = {layer.path: layer.columns for layer in layers}
        thin: dict[str, tuple[int, int]] = {}

        def sink(path: str, moments: Moments) -> None:
            if moments.positions < columns[path] and self.fisher != "identity":
                thin[path] = (moments.positions, columns[path])
            progress.put(f"shot-{shot}/moments/{path}", moments.tensors())

        collect_curvature(
            model,
            data.batches,
            graph,
            list(columns),
            sink,
            fisher=self.fisher,
            draws=self.draws,
            terms=self.terms,
            seed=seed + shot,
            objective=data.objective,
            spill=progress.folder(f"shot-{shot}/entering"),
        )
        progress.drop(f"shot-{shot}/entering")
        progress.note(f"shot-{shot}/collected")
        _warn(thin)


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
    return Moments.of(progress.need(f"shot-{shot}/moments/{path}"))


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
