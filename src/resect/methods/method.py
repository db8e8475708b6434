"""What every method is: settings that know how to plan, and how to make up for what the plan removes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from resect.files.progress import Progress
from resect.graph import Graph
from resect.methods.compensation import Compensation, compensate
from resect.plan import Align, Cost, Pattern, Plan
from resect.ranges import Numbers
from resect.statistics import Data, computing

Units = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Shot:
    """What a shot left, and the summed scores of what went in it."""

    plan: Plan
    loss: float
    prices: Mapping[str, float] = field(default_factory=dict)
    """What multiplied the scores of each group, where trials found it."""

    @classmethod
    def of(cls, plan: Plan, before: Plan, scores: Mapping[str, Tensor], prices: Mapping[str, float] | None = None) -> Shot:
        """The step from one plan to the next."""
        gone = {name: sorted(set(before.groups[name].keep) - set(kept.keep)) for name, kept in plan.groups.items()}
        loss = sum(float(scores[name][units].double().sum()) for name, units in gone.items() if units)
        return cls(plan, loss, dict(prices or {}))


class Method(Numbers, ABC):
    """Settings of a method."""

    recovery: ClassVar[Mapping[str, Any] | None] = None
    """The section of the recovery that the method ends with, but for the data; None: it ends with the cut."""

    compensation: Compensation | None = None
    """Whether and how layers that read removed units are updated."""
    bf16: bool = False
    """Whether the network computes in bfloat16 where torch.autocast deems it safe; sums stay float32, matrices float64."""

    def check(self) -> None:
        """Refuses, before anything is loaded, files that cannot be read."""

    def computing(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The precision that the network computes in while this lasts."""
        return computing(model, bf16=self.bf16)

    @property
    @abstractmethod
    def removes(self) -> tuple[str, ...]:
        """The kinds of units that may go."""

    @property
    def needs_data(self) -> bool:
        """Whether anything is measured on calibration data."""
        return True

    @property
    def sizes(self) -> str:
        """The setting that says how much goes, in the place of a budget; empty where there is none."""
        return ""

    @property
    def ranks(self) -> bool:
        """Whether it says what goes first."""
        return True

    @property
    def exact(self) -> bool:
        """Whether every kind that it names has to be cut, and none can be left out."""
        return False

    @property
    def coupled(self) -> bool:
        """Whether whole units go, by a plan; parts of single matrices go by `sparsify`."""
        return True

    @property
    def physical(self) -> bool:
        """Whether rows and columns that `sparsify` made zero are taken out."""
        return False

    @property
    def long(self) -> bool:
        """Whether it notes its progress."""
        return False

    @property
    def writes(self) -> bool:
        """Whether planning changes weights."""
        return False

    @abstractmethod
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
        """Which units stay, and the last scores: `{group: [units]}`. Groups that `protect` names stay whole.

        The plan's notes may hold `shots`, a `Shot` each, and `losses` of training steps.
        """

    def again(
        self, model: nn.Module, graph: Graph, scores: Mapping[str, Tensor], *, asked: Mapping[str, Any]
    ) -> Plan | None:
        """The plan for another budget by the last scores; None where what was planned is done already.

        `asked` are the options of `plan`.
        """
        return None

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
        """Makes parts of single matrices zero, in place, and gives what stays. Those of groups in `protect` stay as they are."""
        raise NotImplementedError

    def make_up(self, model: nn.Module, graph: Graph, plan: Plan, data: Data, progress: Progress) -> None:
        """Updates the weights that stay for what the plan removes, if the settings say so."""
        if self.compensation:
            compensate(model, graph, plan, data, self.compensation)
