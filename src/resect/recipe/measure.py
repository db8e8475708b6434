"""Measuring models the way a recipe asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resect.calibration import digest, evaluation_text, evaluation_tokens
from resect.checkpoint import load, load_tokenizer
from resect.checkpoint.load import find
from resect.errors import DataError, UsageError, nearest
from resect.evaluation import generations, latencies, parameter_count, perplexity
from resect.graph import VOCABULARY
from resect.methods import Result
from resect.recipe.schema import EvaluationSection, Timing
from resect.report import EvaluationReport, Measured, Respelled, TextPerplexity, Timings, machine, versions

Announce = Callable[[str], None]
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

    Each model reads the texts with its own tokenizer. One model is held at a time, all of them if latency is asked for.
    Raises `UsageError`, `DataError`, `ModelError` or `NumericsError`.
    """
    if not names:
        raise UsageError("There is no model to evaluate. Name one or more.")
    stages, where = Stages(announce), device_of(device)
    models: dict[str, PreTrainedModel] = {}
    measured: list[Measured] = []
    for name in dict.fromkeys(names):
        with stages("load", f"load {name}"):
            model = load(name, dtype=dtype_of(dtype), device=where, trust_remote_code=trust_remote_code)
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code) if asked.texts or asked.generations else None
        with stages("evaluate", f"evaluate {name}"):
            texts = read_evaluation_texts(asked, tokenizer)
            measured.append(measure(model, tokenizer, asked, texts=texts, name=name))
        measured[-1].file_bytes = weight_bytes(name)
        if asked.latency:
            models[name] = model
    if asked.latency:
        with stages("latency", "latency, in turns"):
            timings = timed(models, asked.latency)
        for row in measured:
            row.timings = timings[row.name]
    return EvaluationReport(
        models=measured,
        limit=asked.limit,
        prompts=list(asked.generations),
        seconds=stages.seconds,
        versions=versions(),
        machine=machine(),
    )


def read_evaluation_texts(asked: EvaluationSection, tokenizer: Any) -> dict[str, Tensor]:
    """The tokens [n] of every text; `DataError` for one that does not fill the largest window."""
    texts = {text: evaluation_tokens(text, tokenizer, limit=asked.limit) for text in asked.texts}
    largest = max(asked.windows, default=0)
    for text, tokens in texts.items():
        if len(tokens) < largest:
            limited = f" (limited to {asked.limit})" if asked.limit is not None and asked.limit < largest else ""
            raise DataError(
                f"Perplexity was asked for in windows of {largest} tokens; {text!r} gives {len(tokens)}{limited}. "
                "Use a longer text, a smaller window or a higher limit."
            )
    return texts


def same_texts(texts: Mapping[str, Tensor], tokenizer: Any, result: Result) -> tuple[dict[str, Tensor], list[Respelled]]:
    """The same texts in the tokens of a cut vocabulary, and how far their spelling changed.

    A text whose tokens all stay has the same tokens under new numbers, so that perplexities compare; any other is read again,
    to the same place.
    """
    keep = torch.tensor(result.plan.groups[VOCABULARY].keep)
    found, facts = {}, []
    for name, tokens in texts.items():
        missing = ~torch.isin(tokens, keep)
        same = torch.searchsorted(keep, tokens)
        found[name] = _read_again(name, tokens, tokenizer, result.tokenizer) if missing.any() else same
        facts.append(Respelled(text=short(name), tokens=len(tokens), missing=int(missing.sum()), pruned_tokens=len(found[name])))
    return found, facts


def _read_again(name: str, tokens: Tensor, before: Any, after: Any) -> Tensor:
    """A text in the tokens of the tokenizer `after`, as far as its first tokens by `before` reach."""
    text = evaluation_text(name)
    read = [one(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True) for one in (before, after)]
    (_, stop) = read[0]["offset_mapping"][len(tokens) - 1]
    spelled = zip(read[1]["input_ids"], read[1]["offset_mapping"], strict=True)
    return torch.tensor([token for token, (_, end) in spelled if end <= stop])


def measure(
    model: PreTrainedModel, tokenizer: Any, asked: EvaluationSection, *, texts: Mapping[str, Tensor], name: str
) -> Measured:
    """Perplexities and greedy continuations of one model; no latency, which is measured in turns."""
    found = Measured(name=name, parameters=parameter_count(model))
    for text, tokens in texts.items():
        for window in asked.windows:
            value = perplexity(model, tokens, window=window, name=f"{name}: {short(text)} @{window}")
            found.perplexities.append(TextPerplexity.of(value, text=short(text), digest=digest(tokens)))
    if asked.generations:
        found.generations = generations(model, tokenizer, asked.generations, new_tokens=asked.new_tokens, chat=asked.chat)
    return found


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


def dtype_of(name: str) -> torch.dtype:
    """The type of a name."""
    if name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}. {nearest(name, DTYPES)}")
    return DTYPES[name]


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
