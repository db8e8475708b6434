"""A plan that somebody made: read from a file, or blocks that are named. Nothing is scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import model_validator
from torch import Tensor, nn

from resect.errors import UsageError
from resect.files.progress import Progress
from resect.files.reading import read_text
from resect.graph import DEPTH, VOCABULARY, Graph
from resect.methods.method import Method, Units
from resect.plan import Align, Cost, Kept, Plan, keep_all, places
from resect.statistics import Data


class ByHand(Method):
    """Settings of a plan that is given; with a file and blocks, what both take goes."""

    file: str | None = None
    """A plan.json, as a dry run writes it; groups that it does not name stay whole."""
    drop_blocks: tuple[Units, ...] = ()
    """Numbers of blocks that go, from 0."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.file is None and not self.drop_blocks:
            raise ValueError("a plan by hand is a file (file=plan.json) or blocks (drop_blocks=[2, 3]). Name one.")
        return self

    def check(self) -> None:
        """Refuses a file that is missing, or no plan."""
        self._read()

    @property
    def removes(self) -> tuple[str, ...]:
        """The kinds of units that go."""
        kinds = [kept.kind for kept in self._read().groups.values() if kept.removed]
        return tuple(dict.fromkeys([*kinds, *(["blocks"] if self.drop_blocks else [])]))

    @property
    def sizes(self) -> str:
        """What says how much goes, in the place of a budget."""
        return "a plan by hand"

    @property
    def exact(self) -> bool:
        """No kind can be left out."""
        return True

    @property
    def ranks(self) -> bool:
        """It has no order."""
        return False

    @property
    def needs_data(self) -> bool:
        """Whether weights are updated; nothing else looks at text."""
        return self.compensation is not None

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
        """The plan as it was given, and no scores. Raises `UsageError` where the network has no such groups."""
        given = self._read() & self._without_blocks(graph)
        for name, kept in given.groups.items():
            self._check(graph, name, kept, protect)
        if layout == "uniform":
            _check_uniform(graph, given)
        return given.model_copy(update={"notes": {}}), {}

    def _read(self) -> Plan:
        if self.file is None:
            return Plan()
        text = read_text(Path(self.file).expanduser(), what="the plan", error=UsageError)
        try:
            return Plan.from_json(text)
        except UsageError as problem:
            raise UsageError(f"{self.file}: {problem}") from problem

    def _without_blocks(self, graph: Graph) -> Plan:
        """The plan that takes out the blocks that are named."""
        offered = {group.layer: group for group in graph.of_kind("blocks")}
        for number in self.drop_blocks:
            if number not in offered:
                which = ", ".join(map(str, sorted(layer for layer in offered if layer is not None))) or "none"
                raise UsageError(
                    f"Block {number} was to go; of the {graph.blocks.count} blocks, numbered from 0, these can: {which}."
                )
        if len(set(self.drop_blocks)) == graph.blocks.count:
            raise UsageError(f"All {graph.blocks.count} blocks were to go; one has to stay.")
        named = [offered[number] for number in self.drop_blocks]
        plan = keep_all(named)
        return Plan(groups={name: kept.model_copy(update={"keep": ()}) for name, kept in plan.groups.items()})

    def _check(self, graph: Graph, name: str, kept: Kept, protect: Sequence[str]) -> None:
        group = graph.group(name)
        if (group.kind, group.units) != (kept.kind, kept.units):
            raise UsageError(
                f"The plan is for another network: {name} has {kept.units} {kept.kind} in it, {group.units} {group.kind} here."
            )
        if not kept.removed:
            return
        if kept.kind == VOCABULARY:
            raise UsageError(
                "The plan takes rows of the vocabulary out, and the tokenizer has to follow. Name the text whose tokens stay "
                "instead (--vocabulary FILE)."
            )
        if name in protect:
            raise UsageError(f"{name} is protected, and the plan takes units out of it. Ask for one of the two.")
        if len(kept.keep) < graph.least(group):
            raise UsageError(f"The plan leaves {len(kept.keep)} {kept.kind} of {name}, which needs {graph.least(group)}.")


def _check_uniform(graph: Graph, plan: Plan) -> None:
    """Refuses a plan with other sizes in some blocks than at the same place of others."""
    whole = keep_all(graph.of_kind(*{kept.kind for kept in plan.groups.values()}))
    complete = {**whole.groups, **plan.groups}
    widths = [kind for kind in dict.fromkeys(kept.kind for kept in plan.groups.values()) if kind not in DEPTH]
    for kind in widths:
        for place, groups in places(graph, kind).items():
            sizes = {len(complete[group.name].keep) for group in groups}
            if len(sizes) > 1:
                numbers = ", ".join(map(str, sorted(sizes)))
                raise UsageError(
                    f"The plan keeps {numbers} {kind} at {place}, other numbers in some blocks than in others, and "
                    "layout=uniform gives all the same. Use layout=per-layer."
                )
