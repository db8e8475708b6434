"""Latency: the right work, in turns, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from resect.errors import ModelError, UsageError
from resect.evaluation import PeakMemory, Spread, latencies, latency
from tests.models import FAMILIES, assert_untouched, snapshot


def test_measures_prompts_and_tokens() -> None:
    model = FAMILIES["llama"]()
    found = latency(model, prompt=20, decode=4, repeats=3)
    assert (found.prompt, found.decode, found.device, found.dtype) == (20, 4, "cpu", "float32")
    assert found.threads == torch.get_num_threads()
    for spread in (found.prefill_seconds, found.decode_tokens_per_second):
        assert len(spread.values) == 3
        assert 0 < spread.low <= spread.median <= spread.high


def test_models_take_turns() -> None:
    """Every round visits every model; a decode step sees one token and the cache of all before it."""
    calls: list[tuple[str, int, int]] = []
    models = {name: FAMILIES[name]() for name in ("llama", "gpt2")}
    for name, model in models.items():

        def note(module: object, args: object, kwargs: dict[str, object], name: str = name) -> None:
            tokens, cache = kwargs["input_ids"], kwargs.get("past_key_values")
            assert isinstance(tokens, torch.Tensor)
            calls.append((name, tokens.shape[1], cache.get_seq_length() if cache else 0))  # type: ignore[attr-defined]

        model.register_forward_pre_hook(note, with_kwargs=True)
    latencies(models, prompt=6, decode=3, repeats=2)
    once = [[(name, 6, 0), (name, 1, 6), (name, 1, 7), (name, 1, 8)] for name in models]
    assert calls == 3 * (once[0] + once[1])


def test_batches_run_together() -> None:
    shapes: list[tuple[int, ...]] = []
    model = FAMILIES["llama"]()
    model.register_forward_pre_hook(lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    found = latency(model, prompt=6, decode=2, repeats=1, batch=3)
    assert shapes == 2 * [(3, 6), (3, 1), (3, 1)]
    assert found.batch == 3
    assert found.decode_seconds.median == pytest.approx(3 / found.decode_tokens_per_second.median)


def test_compiled_models_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.compile` gives is what is timed; what stops it is told in our words."""
    ran: list[object] = []

    def compiled(forward: Callable[..., object]) -> Callable[..., object]:
        def run(**given: object) -> object:
            ran.append(forward)
            return forward(**given)

        return run

    model = FAMILIES["llama"]()
    monkeypatch.setattr(torch, "compile", compiled)
    assert latencies({"m": model}, prompt=6, decode=2, repeats=1, compile=True)["m"].compiled
    assert ran == 9 * [model.forward]  # compiling, warming up, a round

    def broken(forward: object) -> Callable[..., object]:
        def fail(**given: object) -> object:
            raise torch._dynamo.exc.Unsupported("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ModelError, match="m does not compile: .*no compiler"):
        latencies({"m": model}, prompt=6, decode=2, repeats=1, compile=True)


def test_memory_is_what_a_run_adds() -> None:
    """The largest resident set over the one before, freed again or not."""
    held = torch.zeros(2**22)
    with PeakMemory(torch.device("cpu")) as memory:
        held = held + torch.ones(2**25).sum()  # 128 MiB for a while
    if memory.grown is None:
        pytest.skip("this system does not say how much memory a process holds")
    assert 120 * 2**20 < memory.grown < 256 * 2**20


def test_the_models_are_handed_back_as_they_were() -> None:
    models = {name: FAMILIES[name]().train() for name in ("mistral", "bloom")}
    before = {name: snapshot(model) for name, model in models.items()}
    latencies(models, prompt=5, decode=2, repeats=1)
    for name, model in models.items():
        assert_untouched(model, before[name])


def test_spread() -> None:
    spread = Spread((3.0, 1.0, 2.0, 10.0))
    assert (spread.median, spread.low, spread.high) == (2.5, 1.0, 10.0)


def test_impossible_requests() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match="over 90 tokens; it has 80 positions"):
        latency(model, prompt=80, decode=10)
    with pytest.raises(UsageError, match="repeats=0"):
        latency(model, prompt=8, decode=1, repeats=0)
