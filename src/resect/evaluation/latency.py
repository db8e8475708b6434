"""How long a model takes: reading a prompt, and writing tokens one by one with a KV cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from resect.calibration import positions_of
from resect.errors import ModelError, UsageError
from resect.evaluation.mode import evaluating
from resect.evaluation.size import PeakMemory
from resect.ranges import whole
from resect.surroundings import unaffected

Network = Callable[..., Any]
"""A model, or what `torch.compile` makes of its code."""


@dataclass(frozen=True)
class Spread:
    """A quantity measured several times, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values)


@dataclass(frozen=True)
class Latency:
    """Wall-clock figures of one model."""

    prefill_seconds: Spread
    """Seconds for `batch` prompts of `prompt` tokens."""
    decode_tokens_per_second: Spread
    """Tokens per second over the `decode` tokens after each."""
    prompt: int
    decode: int
    device: str
    dtype: str
    threads: int
    batch: int = 1
    compiled: bool = False
    working_bytes: int | None = None
    """What a run needs at most beside the weights; None where the system does not say."""

    @property
    def decode_seconds(self) -> Spread:
        """Seconds for one more token of every sequence."""
        return Spread(tuple(self.batch / speed for speed in self.decode_tokens_per_second.values))


@unaffected()
def latency(model: PreTrainedModel, *, prompt: int = 512, decode: int = 32, repeats: int = 5, batch: int = 1) -> Latency:
    """The latency of one model; to compare models, measure them together with `latencies`."""
    return latencies({"model": model}, prompt=prompt, decode=decode, repeats=repeats, batch=batch)["model"]


@unaffected()
def latencies(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt: int = 512,
    decode: int = 32,
    repeats: int = 5,
    batch: int = 1,
    compile: bool = False,
) -> dict[str, Latency]:
    """The latency of several models, measured in turns, so that a busy machine is busy for all of them.

    Each model warms up once, which shows its memory too, then runs `repeats` rounds: `batch` prompts of `prompt` random tokens,
    then `decode` greedy tokens each with the KV cache. `compile` runs what `torch.compile` makes of the models, which takes a
    round more. They are handed back as they were. Raises `UsageError` when a model has fewer positions than that, `ModelError`
    when one does not compile.
    """
    for place, count in {"batch": batch, "prompt": prompt, "decode": decode, "repeats": repeats}.items():
        whole(place, count)
    for name, model in models.items():
        check_positions(name, model, prompt + decode)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    working: dict[str, int | None] = {}
    with (
        ExitStack() as stack,
        tqdm(total=len(models) * (repeats + 1), desc=f"latency {batch}x{prompt}", leave=False, disable=None) as bar,
    ):
        for model in models.values():
            stack.enter_context(evaluating(model))
        if compile:
            stack.enter_context(torch.compiler.set_stance("default"))
        networks: dict[str, Network] = {
            name: torch.compile(model.forward) if compile else model for name, model in models.items()
        }
        for name, model in models.items():
            if compile:
                with _compiling(name):
                    _round(networks[name], model, prompt, decode, batch)
            with PeakMemory(model.device) as memory:
                _round(networks[name], model, prompt, decode, batch)
            working[name] = memory.grown
            bar.update()
        for _ in range(repeats):
            for name, model in models.items():
                measured[name].append(_round(networks[name], model, prompt, decode, batch))
                bar.update()
    about: dict[str, Any] = {"prompt": prompt, "decode": decode, "batch": batch, "compiled": compile}
    return {
        name: Latency(
            prefill_seconds=Spread(tuple(read for read, _ in measured[name])),
            decode_tokens_per_second=Spread(tuple(batch * decode / written for _, written in measured[name])),
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            working_bytes=working[name],
            **about,
        )
        for name, model in models.items()
    }


def prompts(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Random tokens, always the same ones, [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def next_tokens(logits: Tensor) -> Tensor:
    """The likeliest next token of every sequence, [batch, 1]."""
    return logits[:, -1:].argmax(-1)


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_positions(name: str, model: PreTrainedModel, needed: int) -> None:
    """Raises `UsageError` where a model has fewer positions than it would be timed over."""
    positions = positions_of(model)
    if positions is not None and positions < needed:
        raise UsageError(f"Asked to time {name} over {needed} tokens; it has {positions} positions. Ask for fewer tokens.")


def _round(network: Network, model: PreTrainedModel, prompt: int, decode: int, batch: int) -> tuple[float, float]:
    """Seconds of one prefill, and of the decoding after it."""
    tokens = prompts(model, batch, prompt)
    start = now(model.device)
    output = network(input_ids=tokens, use_cache=True)
    read = now(model.device)
    for _ in range(decode):
        output = network(input_ids=next_tokens(output.logits), past_key_values=output.past_key_values, use_cache=True)
    return read - start, now(model.device) - read


@contextmanager
def _compiling(name: str) -> Iterator[None]:
    """What stops a model's first compiled run is about compiling it."""
    try:
        yield
    except Exception as problem:
        if type(problem).__module__.partition(".")[0] != "torch":
            raise
        said = str(problem).strip().splitlines()[0]
        raise ModelError(f"{name} does not compile: {said}. Measure it without --compile.") from problem
