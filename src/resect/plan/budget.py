"""Budgets: what a plan may spend, and of what. A cost is a function of the units removed; a budget is a share of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nextafter

from resect.errors import UsageError, nearest
from resect.graph import Graph
from resect.ranges import MOST_TOKENS, share, whole

OF = ("blocks", "model", "macs")
BUDGETS = ("params", "model", "macs", "bytes", "latency")
PHASES = ("prefill", "decode")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
COUNTS = {"k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
"""Multiples of parameters and multiply-accumulates, as models are named: 7B."""
HOW = (
    "A budget is written KIND:SHARE or KIND:AMOUNT, like macs:0.7, latency:0.7@prefill, "
    "latency:0.7@decode:1x512, model:1.5B, params:250k or bytes:200MB."
)


@dataclass(frozen=True)
class Workload:
    """What a network has to do: read `batch` prompts of `length` tokens, or write the next tokens after them."""

    phase: str = "prefill"
    batch: int = 1
    length: int = 512

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise UsageError(f"There is no phase {self.phase!r}. {nearest(self.phase, PHASES)}")
        whole("batch", self.batch)
        whole("length", self.length)

    def __str__(self) -> str:
        return f"{self.phase}:{self.batch}x{self.length}"

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Reads `prefill`, `decode`, `prefill:1x512`; a `UsageError` says what is wrong."""
        phase, colon, shape = text.partition(":")
        if phase not in PHASES:
            raise UsageError(f"There is no phase {phase!r}. {nearest(phase, PHASES)}")
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if colon and not found:
            raise UsageError(f"{text!r} was given; batch and length are written BATCHxTOKENS, like {phase}:1x512.")
        return cls(phase, int(found[1]), int(found[2])) if found else cls(phase)


@dataclass(frozen=True)
class Cost:
    """What a budget counts, as a function of the units removed by group.

    Where units of a group do not all save the same, `stops` gives the numbers of them, by the group's name, at which it is worth
    stopping: there is none that keeps more and costs no more.
    """

    name: str
    value: Callable[[Mapping[str, int]], int | float]
    stops: Callable[[str], Sequence[int]] | None = None
    unit: str = ""

    def __call__(self, removed: Mapping[str, int]) -> int | float:
        """The cost when so many units of each group are removed."""
        return self.value(removed)


@dataclass(frozen=True)
class Budget:
    """What may stay of a cost: a share, or an amount; where it depends on the work, of which.

    Amounts are bytes, parameters (`params`: those in blocks), or multiply-accumulates.
    """

    kind: str
    share: float | None = None
    amount: int | None = None
    workload: Workload | None = None

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise UsageError(f"There is no budget of {self.kind!r}. {nearest(self.kind, BUDGETS)} {HOW}")
        if (self.share is None) == (self.amount is None):
            raise UsageError(f"A budget of {self.kind} has a share or an amount. {HOW}")
        if self.share is not None:
            share(f"the share of {self.kind}", self.share)
        if self.amount is not None and self.kind == "latency":
            raise UsageError(f"A budget of latency is a share of the dense network's time. {HOW}")
        if self.amount is not None:
            whole(f"the amount of {self.kind}", self.amount, high=MOST_TOKENS)

    def __str__(self) -> str:
        unit = "B" if self.kind == "bytes" else ""
        size = f"{self.amount}{unit}" if self.share is None else f"{self.share:g}"
        return f"{self.kind}:{size}" + (f"@{self.workload}" if self.workload else "")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `KIND:SHARE[@WHERE]`; a `UsageError` says what is wrong and names the nearest kind."""
        kind, colon, rest = text.partition(":")
        size, at, where = rest.partition("@")
        if kind not in BUDGETS:
            raise UsageError(f"There is no budget of {kind!r}. {nearest(kind, BUDGETS)} {HOW}")
        if not colon or not size:
            raise UsageError(f"The budget {text!r} does not say how much stays. {HOW}")
        if at and kind not in ("macs", "latency"):
            raise UsageError(f"The budget {text!r} was given; {kind} do not depend on the text. Leave @{where} out.")
        workload = Workload.parse(where) if at else Workload() if kind == "latency" else None
        amount = _amount(kind, size)
        return cls(kind, None if amount is not None else _share(size, text), amount, workload)

    def keep(self, dense: int | float) -> float:
        """The share of the dense cost that stays."""
        if self.share is not None:
            return self.share
        assert self.amount is not None
        part = min(1.0, self.amount / dense)
        return part if part * dense >= min(self.amount, dense) else nextafter(part, inf)


def cost_of(graph: Graph, of: str | Cost, *, tokens: int = 64) -> Cost:
    """What a budget counts: parameters in `blocks`, those of the `model`, `macs` on so many tokens, or a cost as it is."""
    if isinstance(of, Cost):
        return of
    if of == "blocks" and not graph.parameter_count(blocks_only=True):
        raise UsageError("keep was asked of the parameters in blocks, and the network has none. Use of=model.")
    if of == "macs":
        return Cost(of, lambda removed: graph.macs(removed, tokens=tokens))
    return Cost(of, lambda removed: graph.parameter_count(removed, blocks_only=of == "blocks"))


def macs_cost(graph: Graph, workload: Workload) -> Cost:
    """Multiply-accumulates of a prompt, or of the token after it."""
    return Cost(f"macs@{workload}", lambda removed: macs_of(graph, workload, removed))


def macs_of(graph: Graph, workload: Workload, removed: Mapping[str, int] | None = None) -> int:
    """Multiply-accumulates of a prompt, or of the token after it, when so many units of each group are removed."""
    if workload.phase == "prefill":
        return graph.macs(removed, batch=workload.batch, tokens=workload.length)
    return graph.token_macs(removed, batch=workload.batch, tokens=workload.length + 1)


def bytes_cost(graph: Graph, sizes: Mapping[str, int]) -> Cost:
    """Bytes of all parameters, tied ones counted once; `sizes` are those of one entry, by parameter."""
    return Cost("bytes", lambda removed: graph.parameter_bytes(sizes, removed), unit="bytes")


def _amount(kind: str, size: str) -> int | None:
    """The bytes of `200MB`, the parameters of `1.5B` or `250000`; None for a plain share."""
    found = re.fullmatch(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([A-Za-z]*)", size)
    if not found or kind == "latency":
        return None
    if not found[2] and (kind == "bytes" or "." in size or int(size) <= 1):
        return None
    units = UNITS if kind == "bytes" else COUNTS | {"": 1}
    if found[2] not in units:
        raise UsageError(f"There is no unit {found[2]!r} of {kind}. {nearest(found[2], list(units))}")
    return int(min(float(found[1]) * units[found[2]], 2.0 * MOST_TOKENS))


def _share(size: str, text: str) -> float:
    try:
        part = float(size)
    except ValueError:
        raise UsageError(f"The budget {text!r} was given; {size!r} is no number. {HOW}") from None
    if not 0 < part <= 1:
        raise UsageError(f"The budget {text!r} was given; {size} is the share that stays and lies in (0, 1].")
    return part
