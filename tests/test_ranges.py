"""Numbers out of range are refused where they come in: in Python, in recipes and on the command line alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import resect
from resect.cli import app
from resect.errors import UsageError
from resect.evaluation import Conversation, generations, latencies, perplexity
from resect.methods import METHODS, method_settings
from resect.plan import Budget, Kept, Pattern, Workload
from resect.ranges import MOST, MOST_SEED
from resect.recipe import bench, conversations, read_recipe
from resect.recipe.schema import Recipe
from tests.models import _llama, random_tokens, tiny_tokenizer

TOKENS = random_tokens(4, 12)
NOT_COUNTS = (0, -1, 2**31, 10**30, 1.5, math.nan, math.inf, True, "3")
NOT_SHARES = (0, -0.5, 1.5, math.nan, math.inf, -math.inf, True, "0.5", 10**400)
NOT_SEEDS = (-1, 2**32, 2**63, 2**64, 10**30, 0.5, math.nan, True, "1", None)


def pruned(**options: Any) -> Any:
    return resect.prune(_llama(num_hidden_layers=1), **{"data": TOKENS, "plan_only": True, **options})


def analysed(**options: Any) -> Any:
    return resect.analyze(_llama(num_hidden_layers=1), text=TOKENS, **{"window": 12, **options})


def measured(**options: Any) -> Any:
    return perplexity(_llama(num_hidden_layers=1), TOKENS, **{"window": 12, **options})


def timed(**options: Any) -> Any:
    return latencies({"one": _llama(num_hidden_layers=1)}, **{"prompt": 4, "decode": 1, "repeats": 1, **options})


def calibrated(**options: Any) -> Any:
    return resect.calibrate("demo", tiny_tokenizer(), **options)


def recovered(**options: Any) -> Any:
    return resect.recover(_llama(num_hidden_layers=1), tiny_tokenizer(), data="demo", **options)


def continued(**options: Any) -> Any:
    return generations(_llama(num_hidden_layers=1), tiny_tokenizer(), ["a"], **options)


def talked(**options: Any) -> Any:
    return Conversation(_llama(num_hidden_layers=1), tiny_tokenizer(), **options)


def benched(**options: Any) -> Any:
    return bench(["not-there"], **options)


CALLS: list[tuple[Callable[..., Any], str, tuple[Any, ...]]] = [
    (pruned, "keep", NOT_SHARES),
    (pruned, "align", NOT_COUNTS),
    (pruned, "samples", NOT_COUNTS),
    (pruned, "length", (*NOT_COUNTS, 1)),
    (pruned, "stops", NOT_COUNTS[1:]),
    (pruned, "seed", NOT_SEEDS),
    (analysed, "gamma", NOT_SHARES[1:]),
    (analysed, "window", (*NOT_COUNTS, 1)),
    (analysed, "limit", (*NOT_COUNTS, 1)),
    (analysed, "seed", NOT_SEEDS),
    (measured, "window", (*NOT_COUNTS, 1)),
    (measured, "bos", (*NOT_COUNTS[1:], 101)),
    (measured, "batch_tokens", NOT_COUNTS),
    *((timed, place, NOT_COUNTS) for place in ("prompt", "decode", "repeats", "batch")),
    (calibrated, "samples", NOT_COUNTS),
    (calibrated, "length", (*NOT_COUNTS, 1)),
    (calibrated, "seed", NOT_SEEDS),
    (recovered, "seed", NOT_SEEDS),
    (continued, "new_tokens", NOT_COUNTS),
    (talked, "new_tokens", NOT_COUNTS),
    (talked, "temperature", (-0.1, math.nan, math.inf, True, "0.5")),
]


@pytest.mark.parametrize(("call", "place", "values"), CALLS, ids=[f"{call.__name__}-{place}" for call, place, _ in CALLS])
def test_arguments(call: Callable[..., Any], place: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=rf"^{place}=.* was given; it is a (whole number|share|finite number)"):
            call(**{place: value})


@pytest.mark.parametrize("value", [0.0, 1.1, math.nan, True])
def test_ratios(value: Any) -> None:
    with pytest.raises(UsageError, match="ratios="):
        analysed(ratios=(0.5, value))


@pytest.mark.parametrize(
    "tokens",
    [TOKENS[0], TOKENS.float(), TOKENS[:0], TOKENS - 200, TOKENS + 100, TOKENS > 5],
    ids=["flat", "float", "none", "negative", "beyond", "bool"],
)
def test_windows_of_tokens(tokens: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="^data "):
        pruned(data=tokens)


@pytest.mark.parametrize(("place", "values"), [("new_tokens", NOT_COUNTS), ("temperature", (math.nan,)), ("seed", NOT_SEEDS)])
def test_conversations_load_nothing_first(place: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{place}="):
            conversations(["not-there"], **{place: value})


@pytest.mark.parametrize("place", ["batches", "lengths", "decode", "repeats"])
def test_benchmarks_load_nothing_first(place: str) -> None:
    for value in NOT_COUNTS:
        with pytest.raises(UsageError, match=f"^{place}="):
            benched(**{place: [value] if place in ("batches", "lengths") else value})


BUDGETS = [
    *(f"latency:{size}" for size in ("nan", "inf", "-inf", "-1", "0", "1.5", "1e400", "1e-400", "", "true")),
    *(f"bytes:{size}" for size in ("-1", "0", "0B", "nan", "-1MB", "nanMB", "infGB", "9" * 400 + "GB", "99999999GB")),
    *("macs:0.5@prefill:0x5", "macs:0.5@prefill:1x99999999999999", "latency:0.5@decode:-1x5", "params:٣"),
]


@pytest.mark.parametrize("text", BUDGETS, ids=range(len(BUDGETS)))
def test_budgets(text: str) -> None:
    with pytest.raises(UsageError):
        Budget.parse(text)
    with pytest.raises(UsageError):
        Recipe.from_mapping({"model": "demo", "budget": text})


def test_budgets_and_workloads_made_in_python() -> None:
    for share in (0.0, -0.5, 1.5, math.nan, math.inf):
        with pytest.raises(UsageError, match="share"):
            Budget("params", share=share)
    for amount in (0, -1, 2**60):
        with pytest.raises(UsageError, match="amount"):
            Budget("bytes", amount=amount)
    for budget in ({"kind": "params"}, {"kind": "params", "share": 0.5, "amount": 5}, {"kind": "param", "share": 0.5}):
        with pytest.raises(UsageError):
            Budget(**budget)
    for count in (0, -1, 2**31):
        with pytest.raises(UsageError, match="whole number"):
            Workload(length=count)


COUNTS = [
    *("align", "calibration.samples", "calibration.length", "vocabulary.align", "evaluation.windows", "evaluation.limit"),
    *("evaluation.task_limit", "evaluation.latency.prompt", "evaluation.latency.decode", "evaluation.latency.repeats"),
    *("evaluation.new_tokens", "recovery.settings.rank", "recovery.settings.batch", "recovery.settings.micro_batch"),
    *("recovery.settings.length", "recovery.settings.held_out", "recovery.settings.evaluations", "recovery.settings.tokens"),
    *("recovery.settings.mixture.rounds", "recovery.settings.mixture.steps", "recovery.settings.mixture.patience"),
]
SIZES = [
    *("keep", "recovery.settings.alpha", "recovery.settings.learning_rate", "recovery.settings.clip"),
    *("recovery.settings.epochs", "recovery.settings.distillation.temperature", "recovery.settings.mixture.instructions_rate"),
]
FROM_ZERO = [
    *("recovery.settings.dropout", "recovery.settings.weight_decay", "recovery.settings.distillation.weight"),
    *("recovery.settings.distillation.hidden", "recovery.settings.mixture.floor", "recovery.settings.mixture.tolerance"),
]
WRONG = {
    **dict.fromkeys(COUNTS, ("0", "-1", "1.5", ".nan", ".inf", "1e400", "true", str(10**30), "9" * 5000)),
    **dict.fromkeys(SIZES, ("0", "-1", ".nan", ".inf", "-.inf", "1e400", "true")),
    **dict.fromkeys(FROM_ZERO, ("-1", ".nan", ".inf", "1e400", "false")),
    **dict.fromkeys(("seed",), ("-1", str(MOST_SEED + 1), str(2**63), "0.5", ".nan", "true", "9" * 5000)),
    **dict.fromkeys(("evaluation.shots", "evaluation.curve"), ("-1", "1.5", ".nan", "true", str(MOST + 1))),
    "vocabulary.keep": ("0", "-1", "1.5", ".nan", "true"),
}
BASE = {"model": "demo", "vocabulary": {"source": "demo"}, "recovery": {"data": "demo", "settings": {}}}


@pytest.mark.parametrize("place", WRONG)
def test_recipes(place: str) -> None:
    for text in WRONG[place]:
        with pytest.raises(UsageError) as problem:
            read_recipe(values=BASE, assignments=[f"{place}={text}"])
        assert place in str(problem.value)
        assert len(str(problem.value)) < 500


NUMBERS = {
    (method, name): field.annotation
    for method, kind in METHODS.items()
    for name, field in kind.model_fields.items()
    if any(part in str(field.annotation) for part in ("int", "float"))
}


@pytest.mark.parametrize(("method", "name"), NUMBERS, ids=[f"{method}-{name}" for method, name in NUMBERS])
def test_settings_of_methods(method: str, name: str) -> None:
    for value in (-1, math.nan, math.inf, True, 10**30 if "int" in str(NUMBERS[method, name]) else -math.inf):
        with pytest.raises(UsageError, match=name):
            method_settings(method, {name: value})


@pytest.mark.parametrize(
    ("method", "section", "name"),
    [
        ("llm-surgeon", "trials", "share"),
        ("llm-surgeon", "trials", "predictions"),
        ("llm-surgeon", "trials", "bounds"),
        ("llm-surgeon", "correction", "learning_rate"),
        ("llm-surgeon", "correction", "share"),
        ("llm-surgeon", "correction", "last_epochs"),
        ("llm-surgeon", "compensation", "damping"),
        ("lorashear", "analysis", "gamma"),
        ("lorashear", "analysis", "windows"),
        ("lorashear", "analysis", "ratios"),
        ("lorashear", "adapter", "rank"),
    ],
)
def test_sections_of_methods(method: str, section: str, name: str) -> None:
    for value in (-1, math.nan, math.inf, True):
        given = [value, value] if name in ("bounds", "ratios") else value
        with pytest.raises(UsageError, match=f"{section}.{name}"):
            method_settings(method, {section: {name: given}})


def test_plans_and_patterns() -> None:
    kept = {"kind": "heads", "layer": 0, "units": 4, "keep": (0, 1)}
    wrong: list[dict[str, Any]] = [{"units": -4, "keep": ()}, {"units": 2.5}, {"units": True}, {"layer": -1}]
    for values in [*wrong, {"keep": (0, True)}, {"keep": (0, 4)}, {"keep": (-1, 0)}, {"keep": (1, 0)}]:
        with pytest.raises(ValueError, match="Kept"):
            Kept.model_validate(kept | values)
    parts = ('"rows": [2]', '"zeros": 5', '"columns": [1, 0]')
    for text in ('"shape": [-1, 2]', *('"shape": [2, 2], ' + part for part in parts)):
        with pytest.raises(UsageError, match="not a pattern"):
            Pattern.from_json(f'{{"layers": {{"a": {{{text}}}}}}}')


FLAGS = [
    *(["prune", "demo", "-o", "x", *flags] for flags in (["--keep", "nan"], ["--keep", "1e400"], ["--keep", "-0.5"])),
    *(["prune", "demo", "-o", "x", *flags] for flags in (["--seed", "-1"], ["--seed", str(2**64)], ["--samples", "0"])),
    *(["prune", "demo", "-o", "x", *flags] for flags in (["--length", "1"], ["--align", "0"], ["--budget", "latency:nan"])),
    *(["recover", "demo", "-o", "x", "--data", "demo", *flags] for flags in (["--epochs", "nan"], ["--tokens", "-5"])),
    *(["evaluate", "demo", *flags] for flags in (["--window", "0"], ["--window", str(10**12)], ["--shots", "-1"])),
    *(["evaluate", "demo", *flags] for flags in (["--limit", "-1"], ["--limit-items", "0"], ["--set", "latency.prompt=.nan"])),
    *(["bench", "demo", *flags] for flags in (["--batch", "0"], ["--length", "-1"], ["--decode", "0"], ["--repeats", "0"])),
    *(["analyze", "not-there", "-o", "x", *flags] for flags in (["--ratios", "nan"], ["--gamma", "nan"], ["--limit", "-1"])),
    *(["analyze", "not-there", "-o", "x", *flags] for flags in (["--window", "1"], ["--seed", "-1"])),
    *(["chat", "not-there", *flags] for flags in (["--temperature", "nan"], ["--temperature", "inf"], ["--max-new-tokens", "0"])),
    ["chat", "not-there", "--seed", "-1"],
]


@pytest.mark.parametrize("arguments", FLAGS, ids=[" ".join((flags[0], *flags[-2:])) for flags in FLAGS])
def test_flags(arguments: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2, found.output
    assert "not-there" not in found.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_numbers_of_other_libraries_count_as_numbers(kind: Callable[[int], Any]) -> None:
    plan = pruned(keep=0.7, align=2, seed=7, plan_only=False).plan
    assert pruned(keep=0.7, align=kind(2), seed=kind(7), plan_only=False).plan == plan
    with pytest.raises(UsageError, match="align="):
        pruned(align=torch.tensor(True))
    with pytest.raises(UsageError, match=r"keep=.*share"):
        pruned(keep=np.True_)


def test_a_budget_is_text_or_a_budget() -> None:
    with pytest.raises(UsageError, match="budget=0.7 was given; it is written like"):
        pruned(budget=0.7)
