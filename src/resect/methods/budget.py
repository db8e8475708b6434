"""Budgets that methods are given as a share of a cost: of weights, of work, or of seconds that this machine measures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from resect.errors import OtherMachine, UsageError
from resect.evaluation import DECODED, LatencyTable, entry_bytes, latencies, latency_table, paired_ratio
from resect.files.progress import Progress
from resect.graph import Graph
from resect.methods.method import Method
from resect.plan import Budget, Cost, Plan, Workload, bytes_cost, cost_of, macs_cost
from resect.report import machine
from resect.surgery import cut

TOLERANCE = 0.02
"""How far the measured share may be from the one that was asked, relative to it, before the budget is corrected."""
TURNS = 3
"""Plans that are measured at most."""
REPEATS, MOST_REPEATS = 7, 28
"""Rounds of each measurement: so many at first, and again as long as the share is not known within `TOLERANCE`, to a limit."""
PLAIN = {"params": "blocks", "model": "model", "macs": "macs"}
Measure = Callable[[Plan], Mapping[str, float]]
"""Seconds of a plan as a share of the dense network's: `measured`, and what it lies between, `low` and `high`."""


@dataclass(frozen=True)
class Spending:
    """A budget in the words of `resect.plan.select`: the share `keep` of the cost `of`."""

    keep: float
    of: str | Cost
    asked: Budget | None = None
    table: LatencyTable | None = None


def check_budget(budget: Budget | None, *, keep: float, of: str, method: Method | None = None) -> None:
    """Raises `UsageError` where two budgets were asked for, or one that a method cannot be given."""
    if budget is None:
        return
    if (keep, of) != (0.8, "blocks"):
        raise UsageError(f"The budget {budget} was asked for, and keep={keep:g} of {of} as well. Leave one of them out.")
    if method is not None and method.sizes:
        raise UsageError(
            f"The budget {budget} was asked for, and {method.sizes} decides what goes. Leave one of them out."
        )
    if method is not None and not method.coupled and budget.kind not in ("params", "model"):
        raise UsageError(f"The budget {budget} was asked for; parts of single matrices are counted in params or model.")


def check_sizes_once(method: Method, *, keep: float, of: str) -> None:
    """Raises `UsageError` where a setting says how much goes, and `keep` as well."""
    if method.sizes and keep < 1 and (keep, of) != (0.8, "blocks"):
        raise UsageError(
            f"keep={keep:g} of {of} was asked for, and {method.sizes} decides what goes. Leave one of them out."
        )


def spending(
    model: nn.Module,
    graph: Graph,
    budget: Budget | None,
    *,
    keep: float,
    of: str,
    kinds: Sequence[str],
    table: LatencyTable | str | Path | None,
    progress: Progress,
) -> Spending:
    """What is to be spent; for a latency budget the table is read, or taken from the progress, or measured."""
    if budget is None:
        return Spending(keep, of)
    if budget.kind == "latency":
        assert budget.workload is not None
        found = _table(model, graph, budget.workload, kinds=kinds, table=table, progress=progress)
        return Spending(budget.keep(1.0), found.cost(graph), budget, found)
    if budget.kind == "bytes":
        cost = bytes_cost(graph, entry_bytes(model))
        return Spending(budget.keep(cost({})), cost, budget)
    of_cost = macs_cost(graph, budget.workload) if budget.workload else PLAIN[budget.kind]
    return Spending(budget.keep(cost_of(graph, of_cost)({})), of_cost, budget)


def settle(
    plan: Plan,
    again: Callable[[float], Plan | None],
    cost: Cost,
    measure: Measure,
    *,
    keep: float,
) -> tuple[Plan, list[dict[str, float]]]:
    """The plan whose measured share is nearest to `keep`, and what every plan that was tried gave.

    Where the whole network keeps another share than the table says, and what was measured leaves no doubt, the next plan is given
    that much more or less of the table's seconds. `again` makes it, or says None.
    """
    tried: list[tuple[Plan, dict[str, float]]] = []
    while True:
        predicted = float(cost(plan.removed())) / float(cost({}))
        tried.append((plan, {"predicted": predicted, **measure(plan)}))
        facts = tried[-1][1]
        measured = facts["measured"]
        unsure = facts.get("low", measured) <= keep <= facts.get("high", measured)
        if abs(measured / keep - 1) <= TOLERANCE or unsure or len(tried) == TURNS:
            break
        other = again(min(1.0, keep * predicted / measured))
        if other is None or other.removed() in [known.removed() for known, _ in tried]:
            break
        plan = other
    best, _ = min(tried, key=lambda one: abs(one[1]["measured"] - keep))
    return best, [facts for _, facts in tried]


def settled(
    method: Method,
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    scores: Mapping[str, Tensor],
    asked: Mapping[str, Any],
    spent: Spending,
) -> tuple[Plan, dict[str, Any] | None]:
    """A method's plan, corrected until the cut network is as fast as was asked, and what was predicted and measured."""
    if spent.asked is None:
        return plan, None
    facts: dict[str, Any] = {"asked": str(spent.asked), "keep": spent.keep}
    cost = cost_of(graph, spent.of)
    if spent.table is not None:

        def again(keep: float) -> Plan | None:
            try:
                return method.again(model, graph, scores, asked={**asked, "keep": keep})
            except UsageError:  # out of reach
                return None

        workload = spent.table.workload
        plan, tried = settle(plan, again, cost, lambda one: timed_share(model, graph, one, workload), keep=spent.keep)
        nearest = min(tried, key=lambda one: abs(one["measured"] - spent.keep))
        facts |= {**nearest, "tried": [{key: one[key] for key in ("predicted", "measured")} for one in tried]}
    share = float(cost(plan.removed())) / float(cost({}))
    return plan, {**facts, "predicted": share, "cost": cost(plan.removed()), "dense": cost({})}


def timed_share(model: nn.Module, graph: Graph, plan: Plan, workload: Workload) -> dict[str, float]:
    """Seconds of the network cut by a plan as a share of the dense one's, measured in turns."""
    assert isinstance(model, PreTrainedModel)
    other = cut(deepcopy(model), plan, graph)
    assert isinstance(other, PreTrainedModel)
    decode = 2 * DECODED if workload.phase == "decode" else 1
    seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
    while True:
        found = latencies(
            {"dense": model, "pruned": other}, prompt=workload.length, decode=decode, repeats=REPEATS, batch=workload.batch
        )
        for name, one in found.items():
            seconds[name] += (one.decode_seconds if workload.phase == "decode" else one.prefill_seconds).values
        ratio = paired_ratio(seconds["pruned"], seconds["dense"])
        assert ratio.low is not None
        assert ratio.high is not None
        if ratio.high - ratio.low <= 2 * TOLERANCE * ratio.value or len(seconds["dense"]) >= MOST_REPEATS:
            break
    medians = {"seconds": median(seconds["pruned"]), "dense_seconds": median(seconds["dense"])}
    return {"measured": ratio.value, "low": ratio.low, "high": ratio.high, **medians}


def _table(
    model: nn.Module,
    graph: Graph,
    workload: Workload,
    *,
    kinds: Sequence[str],
    table: LatencyTable | str | Path | None,
    progress: Progress,
) -> LatencyTable:
    if not isinstance(model, PreTrainedModel) or not getattr(model.config.get_text_config(), "vocab_size", None):
        raise UsageError(f"A latency budget is for language models; {type(model).__name__} takes no tokens. Use macs or params.")
    noted = progress.facts("latency-table")
    if table is not None:
        found = table if isinstance(table, LatencyTable) else read_table(table)
        _check(found, model, workload)
    elif noted is not None:
        return LatencyTable.from_json(noted["table"])
    else:
        found = latency_table(model, graph, workload, kinds=kinds, machine=machine())
    progress.note("latency-table", table=found.to_json())
    return found


def read_table(file: str | Path) -> LatencyTable:
    """A table from a file."""
    try:
        return LatencyTable.from_json(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"The latency table {file} cannot be read: {problem}. `resect bench --table` writes one.") from problem


def _check(table: LatencyTable, model: PreTrainedModel, workload: Workload) -> None:
    """Refuses a table of other work, another device or another dtype; warns of another machine."""
    here = {"work": str(workload), "device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    there = {"work": table.where, "device": table.device, "dtype": table.dtype}
    for what in here:
        if here[what] != there[what]:
            raise UsageError(
                f"The latency table was measured for {what} {there[what]}; the run is for {here[what]}. Measure another table."
            )
    now = machine()
    differing = [key for key in ("processor", "threads", "accelerators") if table.machine.get(key, now[key]) != now[key]]
    if differing:
        said = f"The latency table was measured with other {', '.join(differing)} than there are here."
        warnings.warn(OtherMachine(said), stacklevel=4)
