"""A recovery from directory to directory: whole or not there, resumed, with adapter, pattern and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import resect.recipe.recovery
from resect.checkpoint import load, load_tokenizer, save
from resect.cli import app
from resect.errors import CheckpointError, UsageError
from resect.graph import trace
from resect.plan import Pattern, keep_all
from resect.plan.pattern import Matrix
from resect.recipe import read_recovery_recipe, run_recovery
from resect.recovery.training import Watch
from tests.models import assert_same_function, random_tokens

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {"length": 16, "batch": 4, "tokens": 384, "evaluations": 3, "held_out": 6, "learning_rate": 3e-3}


@pytest.fixture
def no_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own takes seconds; one test is enough for that."""
    monkeypatch.setattr(resect.recipe.recovery, "verify", lambda directory, model: 0.0)


def values(model: Path, text: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "output": str(output), "data": str(text), "settings": {**SMALL, **changes}}


def test_a_recovery_from_end_to_end(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [f"--set=settings.{name}={value}" for name, value in SMALL.items()]
    words = ["recover", str(dense), "-o", str(out), "--data", str(text), "--seed", "3", "--json", *flags]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert (report["kind"], report["recipe"]["seed"]) == ("recovery", 3)
    assert report["facts"]["held_out_after"] < report["facts"]["held_out_before"]
    assert report["reload_difference"] < 1e-4
    assert "| step | loss | held-out loss |" in (out / "report.md").read_text()
    card = (out / "README.md").read_text()
    assert f"* Base model: `{dense}`\n* Recovered: on 384 tokens (rank 8) of {text}\n" in card
    assert "| held-out perplexity | before | after |" in card
    assert 'id="chart-training-0"' in (out / "report.html").read_text()
    assert {path.name for path in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "out.progress").exists()
    again = read_recovery_recipe(out / "recipe.yaml")
    assert again.settings.rank == 8
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == load(dense).num_parameters()


def test_a_recovery_that_helps_nothing_says_so(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    flags = [f"--set=settings.{name}={value}" for name, value in {**SMALL, "learning_rate": 1e-30}.items()]
    answer = CliRunner().invoke(app, ["recover", str(dense), "-o", str(tmp_path / "out"), "--data", str(text), *flags])
    assert answer.exit_code == 0, answer.stderr
    assert answer.stderr.count("note: The held-out loss did not fall") == 1


def test_killed_and_resumed_gives_the_same_file(
    dense: Path, text: Path, tmp_path: Path, no_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [read_recovery_recipe(None, values(dense, text, tmp_path / name)) for name in ("a", "b")]
    run_recovery(recipes[0], resume=True)  # as supervisors ask, the first time too
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_evaluate", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as stopped:
            run_recovery(recipes[1])
    assert "--resume" in stopped.value.__notes__[-1]
    assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match="earlier run"):
        run_recovery(recipes[1])
    run_recovery(recipes[1], resume=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_patterns_come_along_and_their_zeros_stay(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    model, path = load(dense), "model.layers.1.mlp.up_proj"
    weight: Any = model.get_submodule(path).weight
    with torch.no_grad():
        weight[torch.rand(weight.shape) < 0.5] = 0
    zeros = weight == 0
    pattern = Pattern(kind="unstructured", layers={path: Matrix(shape=tuple(weight.shape), zeros=int(zeros.sum()))})
    save(model, tmp_path / "sparse", tokenizer=load_tokenizer(dense), extra_files={"pattern.json": pattern.to_json()})
    found = run_recovery(read_recovery_recipe(None, values(tmp_path / "sparse", text, tmp_path / "out")))
    recovered: Any = load(tmp_path / "out").get_submodule(path).weight
    assert torch.equal(recovered == 0, zeros)
    assert not torch.equal(recovered, weight)
    assert found.report.zeros_kept == int(zeros.sum())
    assert (tmp_path / "out" / "pattern.json").read_text() == pattern.to_json()


def test_per_layer_models_stay_per_layer(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    words = ["prune", str(dense), "-o", str(tmp_path / "pruned"), "--keep", "0.8", "--layout", "per-layer"]
    words += ["--set", "settings.criterion=l2", "--set", "settings.blocks={heads: [1, 2], channels: [1, 3]}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resect.recipe.runs.verify", lambda directory, model: 0.0)
        assert CliRunner().invoke(app, words).exit_code == 0
    found = run_recovery(read_recovery_recipe(None, values(tmp_path / "pruned", text, tmp_path / "out")))
    assert found.report.saved is not None
    assert found.report.saved["layout"] == "per-layer"
    assert_same_function(load(tmp_path / "out"), found.model, random_tokens())


def test_the_papers_settings() -> None:
    recipe = read_recovery_recipe(RECIPES / "recover-alpaca.yaml")
    settings = recipe.settings
    assert (settings.rank, settings.alpha, settings.dropout, settings.rate) == (8, 16, 0.05, 1e-4)
    assert (settings.batch, settings.epochs, settings.warmup, settings.schedule) == (64, 2, 100, "linear")
    assert (settings.length, settings.held_out, recipe.data) == (256, 2000, ("alpaca",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"rnak": 3}}, "no key 'settings.rnak'.*'rank'"),
        ({"settings": {"mixture": {"kind": "dynamc"}}}, "settings.mixture.kind = 'dynamc'.*'dynamic'"),
        ({"settings": {"report_to": "tensorbord"}}, "'tensorbord'.*'tensorboard'"),
        ({"data": []}, "data"),
        ({"settings": {"mixture": {"kind": "dynamic"}}}, "no teacher is named"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_recovery_recipe(None, {"model": "demo", "data": "demo", **changes})


@pytest.mark.parametrize(
    ("name", "text_of", "says"),
    [
        ("plan.json", lambda plan: plan.replace('"keep":[0,', '"keep":[', 1), "not of these weights: it keeps"),
        ("plan.json", lambda plan: plan[: len(plan) // 2], "not a plan"),
        ("plan.json", lambda plan: "\udcff", "cannot be read"),
        ("pattern.json", lambda plan: "[]", "not a pattern"),
        ("pattern.json", lambda plan: '{"layers": {"model.no": {"shape": [2, 2]}}}', "not of these weights: 'model.no'"),
        ("pattern.json", lambda plan: '{"layers": {"lm_head": {"shape": [2, 2]}}}', "not of these weights: 'lm_head'"),
    ],
)
def test_a_plan_or_pattern_that_is_not_of_these_weights_is_refused(
    dense: Path, text: Path, tmp_path: Path, name: str, text_of: Callable[[str], str], says: str
) -> None:
    plan = keep_all(trace(load(dense)).groups).to_json()
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    (model / name).write_text(text_of(plan), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=says):
        run_recovery(read_recovery_recipe(None, values(model, text, tmp_path / "out")))
    assert not (tmp_path / "out").exists()
