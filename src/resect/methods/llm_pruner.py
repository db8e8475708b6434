"""LLM-Pruner (Ma, Fang, Wang; arXiv 2305.11627): coupled groups, gradient saliency, remove the least.

Paper: equal shares over hand-picked blocks, query heads without grouping. Here: any network, grouped heads, and selection by
estimated loss per parameter over the whole network besides, because units of different size should compete fairly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resect.files.progress import Progress
from resect.graph import Graph
from resect.methods.method import Method, Shot, Units
from resect.plan import Align, Cost, Plan, keep_all, select, select_share, select_widths, spent_first
from resect.saliency import score
from resect.statistics import BATCH_TOKENS, CRITERIA, Data, collect, expert_activations
from resect.surgery import masked

KINDS = {"block-wise": ("heads", "channels"), "channel-wise": ("residual",), "layer-wise": ("blocks",)}
"""What each of the paper's modes removes (section 4.1)."""

REAP = "reap"
"""The criterion that looks at what experts put out; it scores nothing else."""
Share = Annotated[float, Field(ge=0, lt=1)]
Width = Literal["heads", "channels", "experts", "residual"]
"""Kinds of units that groups have several of."""


class LLMPruner(Method):
    """Settings of the method; every default is explained in docs/methods.md."""

    criterion: Literal["vector", "element1", "element2", "mix", "l1", "l2", "random", "reap"] = "element2"
    reduction: Literal["sum", "mean", "max", "prod", "last"] = "sum"
    granularity: Literal["block-wise", "channel-wise", "layer-wise"] = "block-wise"
    kinds: tuple[Literal["heads", "channels", "experts", "residual", "sublayers", "blocks"], ...] | None = None
    selection: Literal["global", "local"] = "global"
    blocks: dict[Literal["heads", "channels", "experts", "sublayers", "blocks"], tuple[int, int]] | None = None
    share: Share | Mapping[Width, Share] | None = None
    widths: Mapping[Width, Units] | None = None
    iterations: int = Field(default=1, ge=1)
    floor: Units | dict[Literal["heads", "channels", "experts", "residual"], Units] = 1
    spread: float | None = Field(default=1.2, ge=1)

    @model_validator(mode="after")
    def _once(self) -> Self:
        if self.share is not None and self.widths is not None:
            raise ValueError("share and widths were given; both say how much goes. Leave one of them out.")
        if self.kinds and self.exact and set(self.kinds) != set(self._by_kind):
            named, sized = ", ".join(self.kinds), ", ".join(self._by_kind)
            raise ValueError(f"kinds names {named}, and the sizes are of {sized}. Leave kinds out.")
        others = {*(self.kinds or ()), *self._by_kind} - {"experts"}
        if self.criterion == REAP and others:
            raise ValueError(f"criterion = reap scores experts, and {', '.join(sorted(others))} were named. Leave them out.")
        return self

    @property
    def removes(self) -> tuple[str, ...]:
        """The kinds of units that may go."""
        if self.criterion == REAP:
            return ("experts",)
        return self.kinds or tuple(self._by_kind) or KINDS[self.granularity]

    @property
    def sizes(self) -> str:
        """The setting that says how much goes, in the place of a budget."""
        return "the setting widths" if self.widths is not None else "the setting share" if self.share is not None else ""

    @property
    def exact(self) -> bool:
        """Whether sizes were asked for by kind."""
        return bool(self._by_kind)

    @property
    def _by_kind(self) -> Mapping[Width, float]:
        """The sizes that were asked for by kind."""
        return self.widths or (self.share if isinstance(self.share, Mapping) else {})

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at gradients, or weights are updated."""
        return not self._weights_only or self.compensation is not None

    @property
    def _weights_only(self) -> bool:
        return self.criterion != REAP and CRITERIA[self.criterion].weights_only

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
        progress: Progress | None = None,
    ) -> tuple[Plan, dict[str, Tensor]]:
        """Which units stay, and the last scores: `{group: [units]}`. The model is left as it was."""
        tokens = torch.empty(0, 0, dtype=torch.long) if self._weights_only else data.tokens()
        kinds = self._offered(graph)
        options = {**self._options(graph), "of": of, "layout": layout, "align": align, "protect": protect}
        equal = {group.name: torch.zeros(group.units) for group in graph.of_kind(*kinds)}
        self._selected(graph, equal, keep=keep, done=1.0, **options)  # what cannot be met is refused before the long part
        plan = keep_all(graph.of_kind(*kinds))
        scores: dict[str, Tensor] = {}
        shots: list[Shot] = []
        for step in range(1, self.iterations + 1):
            done = step / self.iterations
            with masked(model, plan, graph):
                scores = self._scores(model, tokens, graph, kinds, seed)
            scores = {name: spent_first(values, plan, name) for name, values in scores.items()}
            before = plan
            plan = self._selected(graph, scores, keep=keep, done=done, **options)
            shots.append(Shot.of(plan, before, scores))
        return plan.model_copy(update={"notes": {"shots": shots}}), scores

    def _scores(
        self, model: nn.Module, tokens: Tensor, graph: Graph, kinds: Sequence[str], seed: int
    ) -> dict[str, Tensor]:
        if self.criterion == REAP:
            found = expert_activations(model, tokens, graph, batch_tokens=BATCH_TOKENS)
            return {name: one.means for name, one in found.items()}
        statistics = collect(model, tokens, graph, self.criterion, kinds=kinds)
        return score(graph, statistics, reduction=self.reduction, seed=seed)

    def _selected(
        self, graph: Graph, scores: Mapping[str, Tensor], *, keep: float, done: float, **options: Any
    ) -> Plan:
        """The plan after the share `done` of the way."""
        bounds = {"protect": options["protect"], "ranges": self._ranges}
        if self.widths is not None:
            widths = {str(kind): width for kind, width in self.widths.items()}
            return select_widths(graph, scores, widths=widths, done=done, **bounds)
        if isinstance(self.share, Mapping):
            shares = {str(kind): part * done for kind, part in self.share.items()}
            return select_share(graph, scores, share=shares, **bounds)
        if self.share is not None:
            return select_share(graph, scores, share=self.share * done, kinds=options["kinds"], **bounds)
        return select(graph, scores, keep=1 - (1 - keep) * done, **options)

    def again(
        self, model: nn.Module, graph: Graph, scores: Mapping[str, Tensor], *, asked: Mapping[str, Any]
    ) -> Plan | None:
        """The plan for another budget by the last scores."""
        given = {name: asked[name] for name in ("keep", "of", "layout", "align", "protect")}
        return None if self.sizes else select(graph, scores, **given, **self._options(graph))

    @property
    def _ranges(self) -> dict[str, tuple[int, int]] | None:
        return {str(kind): span for kind, span in (self.blocks or {}).items()} or None

    def _offered(self, graph: Graph) -> list[str]:
        return [kind for kind in self.removes if graph.of_kind(kind)] or list(self.removes)

    def _options(self, graph: Graph) -> dict[str, Any]:
        """What the settings say of `select`."""
        return {
            "selection": self.selection,
            "kinds": self._offered(graph),
            "ranges": self._ranges,
            "floor": self.floor,
            "spread": self.spread,
        }
