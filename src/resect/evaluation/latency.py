"""How long a model takes: reading a prompt, and writing tokens one by one with a KV cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from resect.errors import UsageError
from resect.evaluation.mode import evaluating


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
    """Wall-clock figures of one model, batch size 1."""

    prefill_seconds: Spread
    """Seconds for a prompt of `prompt` tokens."""
    decode_tokens_per_second: Spread
    """Tokens per second over the `decode` tokens after it."""
    prompt: int
    decode: int
    device: str
    dtype: str
    threads: int


def latency(model: PreTrainedModel, *, prompt: int = 512, decode: int = 32, repeats: int = 5) -> Latency:
    """The latency of one model; to compare models, measure them together with `latencies`."""
    return latencies({"model": model}, prompt=prompt, decode=decode, repeats=repeats)["model"]


def latencies(
    models: Mapping[str, PreTrainedModel], *, prompt: int = 512, decode: int = 32, repeats: int = 5
) -> dict[str, Latency]:
    """The latency of several models, measured in turns, so that a busy machine is busy for all of them.

    Each model warms up once, then runs `repeats` rounds: a prompt of `prompt` random tokens, then `decode` greedy
    tokens with the KV cache. The models are handed back as they were. Raises `UsageError` when a model has fewer
    positions than that.
    """
    if min(prompt, decode, repeats) < 1:
        raise UsageError(f"Asked for prompt {prompt}, decode {decode}, repeats {repeats}; each must be at least 1.")
    for name, model in models.items():
        _check_positions(name, model, prompt + decode)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with (
        ExitStack() as stack,
        tqdm(total=len(models) * (repeats + 1), desc="latency", leave=False, disable=None) as bar,
    ):
        for model in models.values():
            stack.enter_context(evaluating(model))
        for turn in range(repeats + 1):
            for name, model in models.items():
                times = _round(model, prompt, decode)
                if turn:  # the first is the warm-up
                    measured[name].append(times)
                bar.update()
    return {name: _figures(model, measured[name], prompt, decode) for name, model in models.items()}


def _check_positions(name: str, model: PreTrainedModel, needed: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < needed:
        raise UsageError(
            f"Asked to time {name} over {needed} tokens; it has {positions} positions. Ask for fewer tokens."
        )


def _round(model: PreTrainedModel, prompt: int, decode: int) -> tuple[float, float]:
    """Seconds of one prefill, and of the decoding after it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, prompt), generator=generator).to(model.device)
    start = _now(model.device)
    output = model(input_ids=tokens, use_cache=True)
    read = _now(model.device)
    for _ in range(decode):
        output = model(input_ids=_next(output.logits), past_key_values=output.past_key_values, use_cache=True)
    return read - start, _now(model.device) - read


def _next(logits: Tensor) -> Tensor:
    """The likeliest next token [1, 1]."""
    return logits[:, -1:].argmax(-1)


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _figures(model: PreTrainedModel, times: list[tuple[float, float]], prompt: int, decode: int) -> Latency:
    read, written = zip(*times, strict=True)
    speeds = tuple(decode / seconds for seconds in written)
    dtype = str(model.dtype).removeprefix("torch.")
    return Latency(Spread(read), Spread(speeds), prompt, decode, str(model.device), dtype, torch.get_num_threads())
