"""Knowledge distribution analysis (LoRAShear, arXiv 2310.18356): what each coupled group is worth, measured by removing it alone.

Paper: groups that cost most when they are pruned are unprunable. The ratios, their mean and the share of groups are ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resect.calibration import check_length, check_vocabulary, digest, evaluation_tokens
from resect.errors import NumericsError, UsageError, nearest
from resect.evaluation import Onward, Perplexity, evaluating, first_block, perplexity, summed_nats, windows_of
from resect.graph import KINDS, VOCABULARY, Graph, Group, trace
from resect.plan import Kept, Plan
from resect.ranges import seed_of, share, whole
from resect.report import GroupKnowledge, Knowledge, Removal, TextPerplexity, machine, versions
from resect.report.knowledge import damage, unprunable
from resect.saliency import score
from resect.statistics import collect, perplexity_of
from resect.surgery import masked
from resect.surgery.adapters import check_merged
from resect.surroundings import unaffected

RATIOS = (0.25, 0.5, 0.75)
ANALYSED = ("heads", "channels", "experts")
CHOICES = {"magnitude": "l2", "random": "random"}
"""Ways to choose the units of a group that go at a ratio, and the criterion that each of them is."""
LIMIT = 2048
"""Tokens of the text that are read."""


@unaffected("changes")
def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text: str | Tensor = "demo",
    kinds: Sequence[str] = ANALYSED,
    ratios: Sequence[float] = RATIOS,
    gamma: float = 0.1,
    units: str = "magnitude",
    window: int = 128,
    limit: int | None = LIMIT,
    seed: int = 42,
    passing: bool = True,
    name: str = "",
) -> Knowledge:
    """What perplexity becomes when parts of one coupled group are removed, for every group of some kinds.

    `text` is held out: the name of a source, or tokens; its first `limit` tokens are read, in windows. Of a group the units of
    the lowest weight magnitude go, or (`units="random"`) random ones. `gamma` is the share of groups that count as unprunable.
    Groups of one block are tested from that block on, with what the block before puts out kept (`passing`): the same figures with
    half the blocks run; where blocks talk otherwise the whole model runs each time. The model is left bit-identical.
    Raises `UsageError`, `DataError` or `NumericsError`.
    """
    check_analysis(kinds=kinds, ratios=ratios, gamma=gamma, units=units, window=window, limit=limit, seed=seed)
    check_merged(model)
    check_text(model, tokenizer=tokenizer, window=window)
    start = time.perf_counter()
    graph = trace(model)
    groups = _offered(graph, kinds)
    source, tokens = _text(text, tokenizer, limit)
    batches = windows_of(model, tokens, window=window)
    with evaluating(model):
        dense = perplexity(model, tokens, window=window, name="dense")
        onward = Onward.of(model, graph, batches) if passing else None
        trial = Trial(model, graph, dense, onward or Onward(model, (), batches))
        tested = _tested(trial, groups, _orders(model, graph, kinds, CHOICES[units], seed), sorted(ratios))
    return Knowledge(
        model=name or type(model).__name__,
        units=units,
        ratios=sorted(ratios),
        gamma=gamma,
        seed=seed,
        dense=TextPerplexity.of(dense, text=source, digest=digest(tokens)),
        groups=tested,
        protected=unprunable(tested, gamma),
        passing=onward is not None,
        seconds=round(time.perf_counter() - start, 3),
        versions=versions(),
        machine=machine(),
    )


@dataclass(frozen=True)
class Trial:
    """Everything that measuring one removal takes."""

    model: PreTrainedModel
    graph: Graph
    dense: Perplexity
    onward: Onward

    def nats(self, group: Group, gone: Sequence[int]) -> float:
        """Mean cross-entropy without some units of a group."""
        keep = tuple(unit for unit in range(group.units) if unit not in set(gone))
        kept = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)
        total = 0.0
        with masked(self.model, Plan(groups={group.name: kept}), self.graph):
            for number, batch in enumerate(self.onward.batches):
                with self.onward.passing(number):
                    total += summed_nats(self.model, batch)
        nats = total / self.dense.tokens
        if not torch.tensor(nats).isfinite():
            raise NumericsError(
                f"Without {len(gone)} of the {group.units} units of {group.name} the logits hold NaN or inf. "
                "Run in a wider type (float32, bfloat16)."
            )
        return nats


def _tested(trial: Trial, groups: Sequence[Group], orders: dict[str, Tensor], ratios: Sequence[float]) -> list[GroupKnowledge]:
    """Every group at every ratio, in the order of the network; walked through from the first block to the last."""
    counts = {group.name: [_count(trial.graph, group, ratio) for ratio in ratios] for group in groups}
    found: dict[str, GroupKnowledge] = {}
    with tqdm(total=sum(len(set(some)) for some in counts.values()), desc="analysis", unit="removal", disable=None) as bar:
        for group in sorted(groups, key=lambda group: first_block(trial.graph, group)):
            trial.onward.advance_to(first_block(trial.graph, group))
            measured: dict[int, float] = {}
            for count in dict.fromkeys(counts[group.name]):
                measured[count] = trial.nats(group, orders[group.name][:count].tolist())
                bar.update()
            removals = [
                Removal(
                    ratio=ratio,
                    removed=count,
                    nats=measured[count],
                    perplexity=perplexity_of(measured[count], f"without {count} of the {group.units} units of {group.name}"),
                )
                for ratio, count in zip(ratios, counts[group.name], strict=True)
            ]
            lost = damage(trial.dense.nats, removals)
            found[group.name] = GroupKnowledge(
                name=group.name, kind=group.kind, layer=group.layer, units=group.units, damage=lost, removals=removals
            )
    return [found[group.name] for group in groups]


def _count(graph: Graph, group: Group, ratio: float) -> int:
    """How many units go at a ratio: rounded, at least one, and as many stay as must."""
    return min(max(1, floor(ratio * group.units + 0.5)), group.units - _least(graph, group))


def _least(graph: Graph, group: Group) -> int:
    return 0 if group.kind in ("sublayers", "blocks") else graph.least(group)


def _orders(model: PreTrainedModel, graph: Graph, kinds: Sequence[str], criterion: str, seed: int) -> dict[str, Tensor]:
    """The units of every group, the first to go first."""
    statistics = collect(model, torch.empty(0, 0, dtype=torch.long), graph, criterion, kinds=list(kinds))
    return {group: values.argsort(stable=True) for group, values in score(graph, statistics, seed=seed).items()}


def _offered(graph: Graph, kinds: Sequence[str]) -> list[Group]:
    groups = [group for group in graph.of_kind(*kinds) if group.units > _least(graph, group)]
    if not groups:
        offered = ", ".join(sorted({group.kind for group in graph.groups} - {VOCABULARY})) or "none"
        raise UsageError(f"Nothing to analyse: {', '.join(kinds)} were asked for, and the network offers {offered}.")
    return groups


def _text(text: str | Tensor, tokenizer: PreTrainedTokenizerBase | None, limit: int | None) -> tuple[str, Tensor]:
    if isinstance(text, Tensor):
        return "tokens given by the caller", text.flatten()[:limit]
    if tokenizer is None:
        raise UsageError(f"Perplexity on {text!r} needs the model's tokenizer. Pass it, or tokens as text.")
    return text, evaluation_tokens(text, tokenizer, limit=limit)


def check_text(model: PreTrainedModel, *, tokenizer: Any, window: int) -> None:
    """Refuses a tokenizer with more tokens than the model has rows, and windows longer than it has positions."""
    check_vocabulary(model, tokenizer)
    asked = f"An analysis was asked for in windows of {window} tokens"
    check_length(model, window, asked, instead="Use a smaller window.")


def check_analysis(
    *, kinds: Sequence[str], ratios: Sequence[float], gamma: float, units: str, window: int, limit: int | None, seed: int
) -> None:
    """Raises `UsageError` for what an analysis cannot be asked for, before anything is loaded."""
    window = whole("window", window, low=2)
    if limit is not None:
        limit = whole("limit", limit, low=2)
    seed = seed_of(seed)
    known = [kind for kind in KINDS if kind != VOCABULARY]
    for word, value, words in [("kind", kind, known) for kind in kinds] + [("choice of units", units, list(CHOICES))]:
        if value not in words:
            raise UsageError(f"There is no {word} {value!r} to analyse. {nearest(value, words)}")
    if not ratios or len(set(ratios)) < len(ratios):
        raise UsageError(f"ratios={list(ratios)} were asked; name one or more, each once.")
    for ratio in ratios:
        share("ratios", ratio)
    share("gamma", gamma, zero=True)
