"""One call from a dense model to a smaller one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from resect.calibration import calibrate, check_vocabulary, check_windows
from resect.checkpoint import cut_tokenizer, expressible_sizes, inexpressible
from resect.errors import UsageError, nearest, shown
from resect.evaluation import LatencyTable
from resect.explain import explain, sizes_asked, telling
from resect.files import temporary_folder
from resect.files.progress import Progress, digest
from resect.graph import VOCABULARY, Graph, trace
from resect.methods.budget import Spending, check_budget, check_sizes_once, settled, spending
from resect.methods.by_hand import ByHand
from resect.methods.llm_pruner import LLMPruner
from resect.methods.llm_surgeon import LLMSurgeon
from resect.methods.lorashear import LoRAShear
from resect.methods.method import Method, Shot
from resect.methods.protection import Protect, protected
from resect.methods.sparsity import lines_kept
from resect.methods.vocabulary import Vocabulary
from resect.plan import LAYOUTS, Align, Budget, Pattern, Plan, aligned, keep_all, part_of
from resect.ranges import seed_of, share, whole
from resect.statistics import BATCH_TOKENS, Data, tell_emulated
from resect.surgery import cut_and_check, embedding_table, equal_sizes, gather_and_check
from resect.surgery.adapters import check_merged
from resect.surroundings import unaffected

Watch = Callable[[nn.Module, Graph, Sequence[Plan]], None]
"""Takes the dense model, its graph, and plans from the one that keeps all to the final one."""
METHODS: dict[str, type[Method]] = {
    "llm-pruner": LLMPruner,
    "llm-surgeon": LLMSurgeon,
    "lorashear": LoRAShear,
    "by-hand": ByHand,
}
"""Methods by name; each is a pydantic model of its settings with a `plan` method."""


@dataclass
class Result:
    """What pruning gives: the smaller model, the decision, and what was measured on the way."""

    model: nn.Module
    plan: Plan
    report: dict[str, Any]
    scores: dict[str, Tensor] = field(default_factory=dict)
    graph: Graph | None = None
    tokenizer: Any = None
    """The one given, without the tokens whose rows went."""
    pattern: Pattern | None = None
    """What stays of single matrices, where whole units were not what went."""
    latency_table: LatencyTable | None = None
    """What widths cost on this machine, where the budget was one of seconds."""


@telling("prune the model")
@unaffected("changes")
def prune(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    method: str = "llm-pruner",
    keep: float = 0.8,
    of: str = "blocks",
    budget: str | Budget | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    layout: str = "uniform",
    align: Align = 1,
    data: str | Sequence[str] | Tensor | Data | None = None,
    samples: int = 128,
    length: int = 128,
    seed: int = 42,
    settings: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
    protect: Protect | None = None,
    plan_only: bool = False,
    inputs: Any = None,
    progress: str | Path | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    stops: int = 0,
) -> Result:
    """Prunes a model in place and checks that the cut model computes what the masked one does.

    `keep` is the share of `of` (`blocks`, `model` parameters or `macs`) that stays; `budget` says it in other words, like
    `"latency:0.7@prefill:1x512"` or `"bytes:200MB"` (`resect.plan.Budget`). For one of seconds, what widths cost is measured on
    this machine, unless a `latency_table` says it, and the plan is measured against the dense model. `layout="uniform"` gives
    every layer the same sizes, among those a stock configuration can express; `"per-layer"` lets them differ. `data` is a
    calibration source, or token windows [sequences, length]; none means text sampled from the model itself. `settings` are the
    method's own.
    `vocabulary` names the text whose tokens stay: other rows of embedding and head go besides what `keep` says, and the result
    has the tokenizer that fits. `keep=1` then cuts nothing else. `protect` names groups that stay whole, or the file of an
    analysis that found them; the others meet the budget. `plan_only` stops before the cut.
    A network that takes no tokens is traced with `inputs` and calibrated with `Data`: batches, and what is predicted from them.
    `progress` is a directory in which long methods note what is done; with `resume`, what is found there is not done again,
    and the result is the same to the bit. Remove it when the result is safe.
    `watch` is shown the dense model, its graph and plans from keeping all to the final one, before anything is cut: those of the
    shots, or else of `stops` stops on the way. Only methods that leave the weights alone can be watched.
    Raises `UsageError`, `DataError`, `ModelError` or `NumericsError`.
    """
    chosen = method_settings(method, settings)
    if layout not in LAYOUTS:
        raise UsageError(f"There is no layout {layout!r}. {nearest(layout, LAYOUTS)}")
    keep = share("keep", keep)
    multiples = aligned(align)
    align = multiples if isinstance(align, Mapping) else whole("align", align)
    samples = whole("samples", samples)
    length = whole("length", length, low=2)
    stops = whole("stops", stops, low=0)
    seed = seed_of(seed)
    if watch is not None and (chosen.writes or chosen.compensation is not None or not chosen.coupled):
        raise UsageError(
            f"Perplexity over sizes was asked for; it is measured with masks on the dense model, and {method} changes weights "
            "with these settings. Leave evaluation.curve out."
        )
    if watch is not None and not chosen.ranks:
        raise UsageError(
            "Perplexity over sizes was asked for, and a plan by hand does not say what goes first. Leave evaluation.curve out."
        )
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    if not isinstance(budget, Budget | None):
        raise UsageError(
            f"budget={shown(budget)} was given; it is written like 'macs:0.7', or a resect.plan.Budget."
        )
    check_budget(budget, keep=keep, of=of, method=chosen)
    check_sizes_once(chosen, keep=keep, of=of)
    check_merged(model)
    check_vocabulary(model, tokenizer)
    scored = vocabulary is None or keep < 1 or bool(chosen.sizes)
    if chosen.needs_data and scored:
        _check_data(model, tokenizer, data, length)
    if chosen.needs_data:
        tell_emulated(model, bf16=chosen.bf16)
    seconds: dict[str, float] = {}
    with _timed(seconds, "trace"):
        graph = trace(model, inputs)
    spared = protected(graph, protect)
    if vocabulary is not None and VOCABULARY in {graph.group(name).kind for name in spared}:
        raise UsageError("The vocabulary is protected, and was to be cut to what a text needs. Ask for one of the two.")
    trimmed = Plan()
    if vocabulary is not None:
        with _timed(seconds, "vocabulary"):
            trimmed = vocabulary.plan(graph, tokenizer)
    plan = Plan()
    scores: dict[str, Tensor] = {}
    pattern: Pattern | None = None
    provenance: dict[str, Any] | None = None
    withheld: dict[str, str] = {}
    spent, facts = Spending(keep, of, budget), None
    if scored:
        if chosen.coupled:
            with _timed(seconds, "trace"):
                chosen, graph, withheld = _deployable(chosen, model, graph, layout)
        given = Data(())
        if chosen.needs_data:
            with _timed(seconds, "calibration"):
                given, provenance = _data(data, tokenizer, model, samples=samples, length=length, seed=seed)
        rest = {"layout": layout, "align": align, "protect": spared, "seed": seed}
        claim = [method, chosen.model_dump(mode="json"), {"keep": keep, "of": of, **rest}, provenance]
        claim += [str(budget)] if budget else []
        if chosen.long:
            claim += [_fingerprint(list(given.batches)), _fingerprint(list(model.state_dict().values()))]
        with _noted(progress if chosen.long else None, claim, resume) as notes, _undone(model, undo=plan_only and chosen.writes):
            with _timed(seconds, "budget"):
                priced = {"kinds": chosen.removes, "table": latency_table, "progress": notes}
                spent = spending(model, graph, budget, keep=keep, of=of, **priced)  # type: ignore[arg-type]
            if chosen.coupled:
                asked: dict[str, Any] = {"keep": spent.keep, "of": spent.of, **rest}
                with _timed(seconds, "plan"), chosen.computing(model):
                    plan, scores = chosen.plan(model, graph, given, **asked, progress=notes)
                with _timed(seconds, "budget"):
                    plan, facts = settled(chosen, model, graph, plan, scores, asked, spent)
                if watch is not None:
                    with _timed(seconds, "curve"):
                        watch(model, graph, _way(plan, scores, stops))
                if not plan_only:
                    with _timed(seconds, "compensate"), chosen.computing(model):
                        chosen.make_up(model, graph, plan, given, notes)
                plan &= keep_all([graph.group(name) for name in spared if graph.group(name).kind in chosen.removes])
            else:
                with _timed(seconds, "plan"), chosen.computing(model):
                    shared: dict[str, Any] = {"keep": spent.keep, "of": spent.of, "protect": spared, "seed": seed}
                    pattern = chosen.sparsify(model, graph, given, **shared, progress=notes)
    shots = plan.notes.get("shots", [])
    told = {name: plan.notes[name] for name in ("losses", "knowledge") if name in plan.notes}
    said: dict[str, Any] = {"keep": keep, "of": of}
    if budget or chosen.sizes:
        said = {"budget": str(budget)} if budget else {"sizes": sizes_asked(chosen.model_dump(mode="json"))}
    plan = plan.model_copy(update={"notes": {"method": method, **said, "layout": layout, "seed": seed}})
    plan &= trimmed
    if scored and chosen.coupled:
        _check_layout(model, graph, plan, layout)
    report = _report(graph, plan) | {
        "method": method,
        "settings": chosen.model_dump(mode="json"),
        "calibration": provenance,
        "withheld": withheld,
        "protected": list(dict.fromkeys([*spared, *(told["knowledge"].protected if "knowledge" in told else ())])),
        "vocabulary": trimmed.notes.get(VOCABULARY),
        "budget": facts,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        **told,
        "shots": [
            _sizes(graph, shot.plan) | {"number": number, "loss": shot.loss, "prices": shot.prices}
            for number, shot in enumerate(shots, 1)
        ],
    }
    if vocabulary is not None and not plan_only:
        with _timed(seconds, "tokenizer"):
            tokenizer = cut_tokenizer(tokenizer, trimmed.groups[VOCABULARY].keep)
    if not plan_only:
        with _timed(seconds, "cut"):
            report["cut_equals_mask"] = cut_and_check(model, plan, graph, seed=seed)
            if pattern and chosen.physical:
                gathered = gather_and_check(model, lines_kept(model, pattern), graph, seed=seed)
                report["cut_equals_mask"] = max(report["cut_equals_mask"], gathered, key=lambda found: found["difference"])
    if pattern is not None:
        report |= _pattern_report(model, graph, pattern)
    return Result(model, plan, report, scores, graph, tokenizer, pattern, spent.table)


def method_settings(method: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The validated settings of a method; unknown names are `UsageError`s that name the nearest valid one."""
    if method not in METHODS:
        raise UsageError(f"There is no method {method!r}. {nearest(method, METHODS)}")
    try:
        return METHODS[method].model_validate(dict(settings or {}))
    except ValidationError as problem:
        raise UsageError(explain(problem, METHODS[method])) from problem


def _deployable(chosen: Method, model: nn.Module, graph: Graph, layout: str) -> tuple[Method, Graph, dict[str, str]]:
    """Leaves out, from a uniform layout, what no stock configuration of the family can express smaller.

    Gives the method without the kinds that are left out, the graph with the sizes that its groups may keep and those that
    one number of the code makes equal, and why anything stays whole.
    """
    asked = [kind for kind in chosen.removes if graph.of_kind(kind)]
    if layout != "uniform" or not isinstance(model, PreTrainedModel):
        return chosen, graph.constrained(equal=equal_sizes(model, graph, asked)), {}
    found = expressible_sizes(model, graph, asked)
    withheld = {kind: why for kind, why in found.withheld.items() if kind in asked}
    left = tuple(kind for kind in asked if kind not in withheld)
    reasons = "; ".join(f"{kind}: {why}" for kind, why in withheld.items())
    if asked and not left:
        raise UsageError(
            f"layout=uniform asks for a stock configuration, and none can express this cut ({reasons}). Use layout=per-layer."
        )
    if withheld and chosen.exact:
        raise UsageError(
            f"Sizes of {', '.join(asked)} were asked for in layout=uniform, and no stock configuration "
            f"says them ({reasons}). Use layout=per-layer."
        )
    chosen = chosen.model_copy(update={"kinds": left}) if withheld else chosen
    return chosen, graph.constrained(sizes=found.sizes, equal=found.equal), dict(found.withheld)


def _check_layout(model: nn.Module, graph: Graph, plan: Plan, layout: str) -> None:
    """Refuses a plan for the uniform layout that no stock configuration expresses, before anything is cut."""
    if layout != "uniform" or not isinstance(model, PreTrainedModel) or not plan.removed():
        return
    if reason := inexpressible(model, graph, plan):
        raise UsageError(
            f"layout=uniform asks for a stock configuration, and none can express the sizes that were chosen ({reason}). "
            "Let other kinds be cut, ask for another share, or use layout=per-layer."
        )


def _data(
    data: str | Sequence[str] | Tensor | Data | None, tokenizer: Any, model: nn.Module, *, samples: int, length: int, seed: int
) -> tuple[Data, dict[str, Any]]:
    if isinstance(data, Data):
        return data, {"source": "batches given by the caller", "samples": len(data.batches)}
    if isinstance(data, Tensor):
        return _windows(data), {"source": "tokens given by the caller", "samples": data.shape[0], "length": data.shape[1]}
    calibration = calibrate(data, tokenizer, samples=samples, length=length, seed=seed, model=model)
    return _windows(calibration.tokens), dict(calibration.provenance)


def _check_data(model: nn.Module, tokenizer: Any, data: Any, length: int) -> None:
    """Refuses data that cannot be read, and windows that the model cannot take in, before anything is read or traced."""
    if isinstance(data, Tensor):
        _check_tokens(data, model)
        check_windows(model, data.shape[1])
    elif not isinstance(data, Data):
        if tokenizer is None and data is not None:
            raise UsageError(f"Calibration on {data!r} needs the model's tokenizer. Pass it, or token windows as data.")
        check_windows(model, length)


def _check_tokens(tokens: Tensor, model: nn.Module) -> None:
    """Refuses what are no windows of the model's tokens."""
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise UsageError(
            f"data of shape {list(tokens.shape)} and type {tokens.dtype} was given; windows of tokens are whole numbers "
            "[sequences, length]."
        )
    table = embedding_table(model)
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or table is not None and high >= len(table):
        rows = "they count from 0" if table is None else f"the model has {len(table)} rows for them"
        raise UsageError(f"data holds tokens from {low} to {high}; {rows}. Use the model's own tokenizer.")


def _windows(tokens: Tensor) -> Data:
    """Windows [sequences, length], a few at a time."""
    return Data(tokens.split(max(1, BATCH_TOKENS // max(tokens.shape[1], 1))))


def _fingerprint(values: Any) -> str:
    """A number that tells batches, or weights, apart."""
    return digest(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


@contextmanager
def _noted(directory: str | Path | None, asked: Any, resume: bool) -> Iterator[Progress]:
    """Where progress is noted: the directory given, or a temporary one."""
    if directory is not None:
        yield Progress(directory, asked, resume=resume)
        return
    with temporary_folder("for what a method notes") as temporary:
        yield Progress(temporary, asked, temporary=True)


@contextmanager
def _undone(model: nn.Module, *, undo: bool) -> Iterator[None]:
    """Gives a model its weights back afterwards, if asked."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()} if undo else {}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                model.get_parameter(name).copy_(tensor)


def _way(plan: Plan, scores: Mapping[str, Tensor], stops: int) -> list[Plan]:
    """Plans from the one that keeps all to the final one: those of the shots, or `stops` between."""
    shots: Sequence[Shot] = plan.notes.get("shots", [])
    if len(shots) > 1:
        return [part_of(plan, scores, 0.0), *(shot.plan for shot in shots)]
    return [part_of(plan, scores, stop / (stops + 1)) for stop in range(stops + 2)]


def _sizes(graph: Graph, plan: Plan) -> dict[str, int]:
    """Parameters and multiply-accumulates that a plan leaves, by formula."""
    removed = plan.removed()
    return {
        "parameters": graph.parameter_count(removed),
        "block_parameters": graph.parameter_count(removed, blocks_only=True),
        "macs": graph.macs(removed),
    }


def _report(graph: Graph, plan: Plan) -> dict[str, Any]:
    """Sizes before and after, by formula, and what every layer keeps."""
    removed = plan.removed()
    return {
        "parameters": {"dense": graph.parameter_count(), "pruned": graph.parameter_count(removed)},
        "block_parameters": {
            "dense": graph.parameter_count(blocks_only=True),
            "pruned": graph.parameter_count(removed, blocks_only=True),
        },
        "macs": {"dense": graph.macs(), "pruned": graph.macs(removed), "tokens": 64},
        "groups": [
            {"name": name, "kind": kept.kind, "layer": kept.layer, "units": kept.units, "kept": len(kept.keep)}
            for name, kept in plan.groups.items()
        ],
        "frozen": sorted({f"{item.reason}" for item in graph.frozen}),
    }


def _pattern_report(model: nn.Module, graph: Graph, pattern: Pattern) -> dict[str, Any]:
    """Sizes where parts of single matrices went: parameters that were made zero, and what is left."""
    zeros = sum(matrix.zeros for matrix in pattern.layers.values())
    left = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = sum(count for name, count in left.items() if graph.blocks.layer_of(name) is not None)
    return {
        "zeros": zeros,
        "pattern": pattern.kind,
        "parameters": {"dense": graph.parameter_count(), "pruned": sum(left.values())},
        "block_parameters": {"dense": graph.parameter_count(blocks_only=True), "pruned": blocks},
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
