"""Measuring models the way a recipe asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resect.calibration import (
    HeldOut,
    check_length,
    check_vocabulary,
    digest,
    evaluation_text,
    held_out,
    sections_in_places,
    token_sizes,
)
from resect.checkpoint import load, load_tokenizer, skeleton
from resect.checkpoint.load import find
from resect.errors import DataError, UsageError, nearest
from resect.evaluation import (
    Answers,
    AnyTask,
    Conversation,
    Perplexity,
    agreement,
    check_positions,
    flips,
    generations,
    latencies,
    mean_accuracy,
    paired_interval,
    parameter_count,
    perplexity,
    tasks_named,
)
from resect.explain import telling
from resect.graph import VOCABULARY, Graph
from resect.methods import Result
from resect.plan import Plan
from resect.ranges import amount, seed_of, whole
from resect.recipe.schema import EvaluationSection, Timing
from resect.report import (
    Curve,
    CurvePoint,
    Difference,
    EvaluationReport,
    Measured,
    Respelled,
    TaskAccuracy,
    TaskFlips,
    TextAgreement,
    TextPerplexity,
    Timings,
    machine,
    mean_of,
    versions,
)
from resect.surgery import masked
from resect.surroundings import unaffected

Announce = Callable[[str], None]
CURVE_TOKENS = 2048
"""That each size of a curve is measured on."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Stages:
    """Announces what begins and keeps how long it took."""

    announce: Announce | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, what: str = "") -> Iterator[None]:
        """A stage; `what` says more to people than its name."""
        if self.announce:
            self.announce(what or name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Observed:
    """What was measured of a model, and the single windows and items that intervals are made of."""

    figures: Measured
    perplexities: Mapping[tuple[str, int], Perplexity] = field(default_factory=dict)
    answers: Sequence[Answers] = ()


@telling("evaluate the models")
@unaffected()
def evaluate(
    names: Sequence[str],
    *,
    asked: EvaluationSection,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    announce: Announce | None = None,
) -> EvaluationReport:
    """Several models measured alike, side by side; latencies in turns, so that a busy machine is busy for all.

    Each model reads the texts with its own tokenizer. Differences are taken from the first model: the reference, where one is
    named. One model is held at a time; the reference beside it, and all of them if latency is asked for.
    Raises `UsageError`, `DataError`, `ModelError` or `NumericsError`.
    """
    if not names:
        raise UsageError("There is no model to evaluate. Name one or more.")
    stages, where, tasks = Stages(announce), device_of(device), tasks_named(asked.tasks)
    kept: dict[str, PreTrainedModel] = {}
    read: dict[str, Mapping[str, HeldOut]] = {}
    observed: list[Observed] = []
    names = list(dict.fromkeys([asked.reference, *names] if asked.reference else names))
    for name in names if len(names) > 1 else ():
        check_evaluation(skeleton(name, trust_remote_code=trust_remote_code), None, asked)
    for name in names:
        with stages("load", f"load {name}"):
            needed = asked.texts or asked.generations or asked.tasks
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code) if needed else None
            check = partial(check_evaluation, tokenizer=tokenizer, asked=asked)
            model = load(name, dtype=dtype_of(dtype), device=where, trust_remote_code=trust_remote_code, check=check)
        with stages("evaluate", f"evaluate {name}"):
            read[name] = read_evaluation_texts(asked, tokenizer)
            found = measure(model, tokenizer, asked, texts=read[name], tasks=tasks, name=name)
            found.figures.file_bytes = weight_bytes(name)
        if asked.reference and name != asked.reference:
            with stages("agreement", f"{name} beside {asked.reference}"):
                same_tokens(read[name], read[asked.reference], name, asked.reference)
                beside = kept[asked.reference]
                found.figures.agreements = agreements(model, beside, tokenizer, asked, texts=read[name], name=name)
        observed.append(found)
        if asked.latency or name == asked.reference:
            kept[name] = model
        del model  # before the next is loaded
    if asked.latency:
        with stages("latency", "latency, in turns"):
            timings = timed(kept, asked.latency)
        for one in observed:
            one.figures.timings = timings[one.figures.name]
    return EvaluationReport(
        models=[one.figures for one in observed],
        differences=[difference for one in observed[1:] for difference in compared(one, observed[0])],
        reference=asked.reference,
        limit=asked.limit,
        prompts=list(asked.generations),
        seconds=stages.seconds,
        versions=versions(),
        machine=machine(),
    )


def check_evaluation(model: PreTrainedModel, tokenizer: Any, asked: EvaluationSection) -> None:
    """Refuses tokens and lengths that a model cannot take in, before anything is measured."""
    check_vocabulary(model, tokenizer)
    for window in asked.windows if asked.texts else ():
        check_length(model, window, f"Asked for windows of {window} tokens", instead="Use a smaller window.")
    if asked.generations:
        asking = f"Asked for continuations of {asked.new_tokens} tokens"
        check_length(model, asked.new_tokens + 1, asking, instead="Ask for fewer new tokens.")
    if asked.latency:
        check_positions("the model", model, asked.latency.prompt + asked.latency.decode)


def read_evaluation_texts(asked: EvaluationSection, tokenizer: Any) -> dict[str, HeldOut]:
    """Every text in the tokens of a tokenizer; `DataError` for one that does not fill the largest window."""
    texts = {text: held_out(text, tokenizer, limit=asked.limit) for text in asked.texts}
    largest = max(asked.windows, default=0)
    for text, found in texts.items():
        if len(found.tokens) < largest:
            limited = f" (limited to {asked.limit})" if asked.limit is not None and asked.limit < largest else ""
            raise DataError(
                f"Perplexity was asked for in windows of {largest} tokens; {text!r} gives {len(found.tokens)}{limited}. "
                "Use a longer text, a smaller window or a higher limit."
            )
    return texts


def same_texts(texts: Mapping[str, HeldOut], tokenizer: Any, result: Result) -> tuple[dict[str, HeldOut], list[Respelled]]:
    """The same texts in the tokens of a cut vocabulary, and how far their spelling changed.

    A text whose tokens all stay has the same tokens under new numbers, so that perplexities compare; any other is read again,
    to the same place.
    """
    keep = torch.tensor(result.plan.groups[VOCABULARY].keep)
    found, facts = {}, []
    for name, before in texts.items():
        tokens = before.tokens
        missing = ~torch.isin(tokens, keep)
        same = HeldOut(torch.searchsorted(keep, tokens), before.sizes)
        found[name] = _read_again(name, tokens, tokenizer, result.tokenizer) if missing.any() else same
        pruned_tokens = len(found[name].tokens)
        facts.append(Respelled(text=short(name), tokens=len(tokens), missing=int(missing.sum()), pruned_tokens=pruned_tokens))
    return found, facts


def _read_again(name: str, tokens: Tensor, before: Any, after: Any) -> HeldOut:
    """A text in the tokens of the tokenizer `after`, as far as its first tokens by `before` reach."""
    text = evaluation_text(name)
    stop = _end_of(len(tokens), text, before)
    again: list[int] = []
    for spelled, ends in sections_in_places(text, after):
        again += [token for token, end in zip(spelled, ends, strict=True) if end <= stop]
        if ends and ends[-1] > stop:
            break
    return HeldOut(torch.tensor(again), token_sizes(text, after, len(again)))


def _end_of(count: int, text: str, tokenizer: Any) -> int:
    """The place in a text where its first `count` tokens end."""
    for tokens, ends in sections_in_places(text, tokenizer):
        if count <= len(tokens):
            return ends[count - 1]
        count -= len(tokens)
    raise DataError("The text has fewer tokens than were read of it before; it was changed meanwhile.")


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: EvaluationSection,
    *,
    texts: Mapping[str, HeldOut],
    tasks: Sequence[AnyTask],
    name: str,
) -> Observed:
    """Perplexities, answers and greedy continuations of one model; no latency, which is measured in turns."""
    figures = Measured(name=name, parameters=parameter_count(model))
    bos, perplexities = bos_token(asked, tokenizer), {}
    for text, held in texts.items():
        for window in asked.windows:
            label = f"{name}: {short(text)} @{window}"
            value = perplexity(model, held.tokens, window=window, bos=bos, sizes=held.sizes, name=label)
            perplexities[text, window] = value
            figures.perplexities.append(TextPerplexity.of(value, text=short(text), digest=digest(held.tokens)))
    answers = [task.answered(model, tokenizer, shots=asked.shots, limit=asked.task_limit, name=name) for task in tasks]
    figures.tasks = [TaskAccuracy.of(one) for one in answers]
    if len(answers) > 1:
        figures.task_mean, figures.task_mean_stderr = mean_accuracy(answers)
    if asked.generations:
        figures.generations = generations(model, tokenizer, asked.generations, new_tokens=asked.new_tokens, chat=asked.chat)
    return Observed(figures, perplexities, answers)


def agreements(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: Any,
    asked: EvaluationSection,
    *,
    texts: Mapping[str, HeldOut],
    name: str,
) -> list[TextAgreement]:
    """How far the next-token distributions of a model are from a reference's, on every text in every window."""
    bos, found = bos_token(asked, tokenizer), []
    for text, held in texts.items():
        for window in asked.windows:
            label = f"{name}: agreement {short(text)} @{window}"
            value = agreement(model, reference, held.tokens, window=window, bos=bos, name=label)
            found.append(TextAgreement.of(value, text=short(text)))
    return found


def curve_of(
    model: PreTrainedModel,
    tokenizer: Any,
    graph: Graph,
    plans: Sequence[Plan],
    *,
    asked: EvaluationSection,
    texts: Mapping[str, HeldOut],
) -> Curve:
    """Perplexity with what each plan removes masked, on the first text in windows of the first size: few tokens, many sizes."""
    text, window, points = next(iter(texts)), asked.windows[0], []
    tokens = texts[text].tokens[: max(CURVE_TOKENS, window)]
    for number, plan in enumerate(plans):
        removed = plan.removed()
        with masked(model, plan, graph):
            name = f"size {number + 1} of {len(plans)}"
            found = perplexity(model, tokens, window=window, bos=bos_token(asked, tokenizer), name=name)
        points.append(
            CurvePoint(
                parameters=graph.parameter_count(removed),
                block_parameters=graph.parameter_count(removed, blocks_only=True),
                macs=graph.macs(removed),
                perplexity=found.value,
            )
        )
    return Curve(text=short(text), window=window, tokens=found.tokens, digest=digest(tokens), points=points)


def compared(observed: Observed, first: Observed) -> list[Difference]:
    """Differences from another model, each with its paired interval; the flips are noted among the model's figures.

    Perplexities are paired where their windows hold the same text: other tokens fill other windows.
    """
    pairs = list(zip(observed.answers, first.answers, strict=True))
    observed.figures.flips = [TaskFlips.of(flips(now, before)) for now, before in pairs]
    models = {"model": observed.figures.name, "beside": first.figures.name}
    found = []
    for (text, window), now in observed.perplexities.items():
        before = first.perplexities[text, window]
        if now.window_bytes and now.window_bytes == before.window_bytes:
            interval = paired_interval([a - b for a, b in zip(now.window_nats, before.window_nats, strict=True)])
            found.append(Difference.of(interval, **models, figure=f"perplexity {short(text)} @{window}", kind="ratio"))
    steps = [[float(a) - float(b) for a, b in zip(now.correct, before.correct, strict=True)] for now, before in pairs]
    for one, step in zip(observed.answers, steps, strict=True):
        found.append(Difference.of(paired_interval(step), **models, figure=one.task, kind="points"))
    if len(steps) > 1:
        found.append(Difference.of(paired_interval(*steps), **models, figure=mean_of(len(steps)), kind="points"))
    return found


def bos_token(asked: EvaluationSection, tokenizer: Any) -> int | None:
    """The begin-of-text token that stands before windows, None where none was asked for; `UsageError` if there is none."""
    if not (asked.bos and asked.texts):
        return None
    if tokenizer.bos_token_id is None:
        raise UsageError("A begin-of-text token was asked for before every window; the tokenizer has none. Leave --bos out.")
    return int(tokenizer.bos_token_id)


def same_tokens(ours: Mapping[str, HeldOut], theirs: Mapping[str, HeldOut], name: str, reference: str) -> None:
    """Raises `UsageError` where two models read a text as different tokens."""
    for text in ours:
        if not torch.equal(ours[text].tokens, theirs[text].tokens):
            raise UsageError(
                f"Agreement was asked for between {name} and {reference}; their tokenizers read {text!r} as different tokens. "
                "Leave the reference out: bits per byte and tasks compare."
            )


def timed(models: Mapping[str, PreTrainedModel], asked: Timing) -> dict[str, Timings]:
    """The latency of every model, measured in turns."""
    found = latencies(models, prompt=asked.prompt, decode=asked.decode, repeats=asked.repeats)
    return {name: Timings.of(value) for name, value in found.items()}


def short(text: str) -> str:
    """A text's name: of a file, the last part."""
    return Path(text).name if Path(text).expanduser().is_file() else text


def weight_bytes(name: str) -> int | None:
    """Bytes of a local model's weight files; None for one on the hub."""
    source = find(name)
    place = Path(source.place)
    if source.gguf:
        return (place / source.gguf).stat().st_size
    return sum(path.stat().st_size for path in place.glob("*.safetensors")) if place.is_dir() else None


@telling("load the models")
@unaffected()
def conversations(
    names: Sequence[str],
    *,
    new_tokens: int = 256,
    temperature: float = 0.0,
    system: str = "",
    seed: int = 42,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    announce: Announce = lambda what: None,
) -> dict[str, Conversation]:
    """A conversation with each of some models. `seed` is for answers that are drawn."""
    if len(set(names)) < len(names):
        raise UsageError(f"{names[0]} was named twice; it would answer beside itself. Name another model.")
    new_tokens = whole("new_tokens", new_tokens)
    amount("temperature", temperature)
    seed = seed_of(seed)
    where, found = device_of(device), {}
    for name in names:
        announce(f"load {name}")
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        check = partial(check_vocabulary, tokenizer=tokenizer)
        model = load(name, dtype=dtype_of(dtype), device=where, trust_remote_code=trust_remote_code, check=check)
        found[name] = Conversation(model, tokenizer, new_tokens=new_tokens, temperature=temperature, system=system)
    torch.manual_seed(seed)
    return found


def dtype_of(name: str) -> torch.dtype:
    """The type of a name."""
    if name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}. {nearest(name, DTYPES)}")
    return DTYPES[name]


def storage_asked(name: str) -> torch.dtype | None:
    """The type of a name; None for `auto`."""
    return None if name == "auto" else dtype_of(name)


def device_of(name: str) -> torch.device:
    """The device of a name, if it is there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        said = str(problem).strip().splitlines()[0].rstrip(".")
        raise UsageError(
            f"Asked for the device {name!r}; it cannot be used: {said}. Name cpu, or cuda, cuda:1, mps where there is one."
        ) from problem
    return device
