"""Numbers as text, and from first to last."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from resect.report.figures import brief, figures, metric, whole
from resect.report.results import Difference, Measured, Measurements, TaskAccuracy, TextPerplexity, Timings


def perplexity(value: float, *, window: int = 128, tokens: int = 1016) -> TextPerplexity:
    return TextPerplexity(
        text="demo", window=window, value=value, nats=math.log(value), tokens=tokens, windows=8, dropped=0, digest="ab" * 32
    )


def timings(prefill: float, decode: float) -> Timings:
    def spread(value: float) -> Measurements:
        return Measurements(median=value, low=value, high=value, values=[value])

    return Timings(
        prompt=512,
        decode=32,
        prefill_seconds=spread(prefill),
        decode_tokens_per_second=spread(decode),
        device="cpu",
        dtype="float32",
        threads=2,
    )


def test_a_row_per_quantity_that_anyone_has() -> None:
    dense = Measured(name="dense", parameters=1000, macs=2000, macs_tokens=64, perplexities=[perplexity(20)])
    pruned = Measured(name="pruned", parameters=800, perplexities=[perplexity(25)], timings=timings(0.5, 30))
    rows = {row.name: row for row in figures([dense, pruned])}
    assert list(rows) == [
        "parameters",
        "MACs, 1 x 64 tokens",
        "perplexity demo @128 (1,016 tokens)",
        "prefill 1 x 512, seconds",
        "decode 32, tokens/s",
    ]
    assert rows["parameters"].texts() == ["1,000", "800"]
    assert rows["parameters"].change() == "-20.0 %"
    assert rows["MACs, 1 x 64 tokens"].texts() == ["2.000 k", "-"]
    assert rows["MACs, 1 x 64 tokens"].change() == ""
    assert rows["perplexity demo @128 (1,016 tokens)"].change() == "+25.0 %"


def test_speed_is_a_factor_in_both_directions() -> None:
    models = [Measured(name=name, parameters=1, timings=timings(*t)) for name, t in (("a", (1.0, 20)), ("b", (0.8, 25)))]
    changes = [row.change() for row in figures(models) if row.kind == "speed"]
    assert changes == ["1.25x as fast", "1.25x as fast"]


def test_texts_tokenised_differently_are_marked() -> None:
    models = [Measured(name="a", parameters=1, perplexities=[perplexity(9)])]
    models += [Measured(name="b", parameters=1, perplexities=[perplexity(9, tokens=900)])]
    assert "tokenised differently" in figures(models)[1].name


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.01234"), (0.5, "0.5000"), (21.8212, "21.82"), (508.53, "508.5"), (34830.2, "34,830"), (math.inf, "inf")],
)
def test_four_digits(value: float, text: str) -> None:
    assert brief(value) == text


def test_large_numbers() -> None:
    assert whole(134515008) == "134,515,008"
    assert metric(8_748_000_000) == "8.748 G"
    assert metric(12) == "12 "


def accuracy(task: str, share: float) -> TaskAccuracy:
    return TaskAccuracy(task=task, metric="acc", accuracy=share, stderr=0.034, items=200, shots=0, acc=share)


def difference(figure: str, value: float, low: float | None, high: float | None, *, ratio: bool = False) -> Difference:
    kind: Literal["ratio", "points"] = "ratio" if ratio else "points"
    return Difference(
        model="b", beside="a", figure=figure, kind=kind, value=value, low=low, high=high, level=0.95, resamples=100, seed=0
    )


def test_accuracies_have_errors_and_differences_intervals() -> None:
    models = [
        Measured(name=name, parameters=1, perplexities=[perplexity(value)], tasks=[accuracy("piqa", a), accuracy("boolq", b)],
                 task_mean=(a + b) / 2, task_mean_stderr=0.024)
        for name, value, a, b in (("a", 20, 0.645, 0.39), ("b", 30, 0.6, 0.4))
    ]  # fmt: skip
    known = [
        difference("perplexity demo @128", 0.5, 0.4, 0.6, ratio=True),
        difference("piqa", -0.045, -0.1, 0.01),
        difference("mean of 2 tasks", -0.0175, None, None),
    ]
    rows = {row.name: row for row in figures(models, known)}
    assert rows["piqa, acc (200 items)"].texts() == ["64.5 ± 3.4", "60.0 ± 3.4"]
    assert rows["piqa, acc (200 items)"].change() == "-4.5 [-10.0, +1.0]"
    assert rows["perplexity demo @128 (1,016 tokens)"].change() == "+50.0 % [+40.0, +60.0]"
    assert rows["mean of 2 tasks"].texts() == ["51.8 ± 2.4", "50.0 ± 2.4"]
    assert rows["mean of 2 tasks"].change() == "-1.8"
