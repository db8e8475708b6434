"""A run directory is whole or not there, and holds all that is needed to judge and repeat it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import resect.recipe.runs
from resect.checkpoint import load, save
from resect.errors import CheckpointError, DataError, ModelError, NumericsError, UsageError
from resect.evaluation import parameter_count
from resect.files import whole_directory
from resect.plan import Pattern, Plan
from resect.recipe import Recipe, evaluate, evaluation_section, read_recipe, run
from resect.recovery.training import Watch
from tests.models import assert_same_function, random_tokens
from tests.recipe.dense import small_recipe, write_text


@pytest.fixture
def no_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own takes seconds; one test is enough for that."""
    monkeypatch.setattr(resect.recipe.runs, "verify", lambda directory, model: 0.0)


def recipe_of(dense: Path, text: Path, output: Path, **changes: Any) -> Recipe:
    return Recipe.from_mapping(small_recipe(dense, text, output, **changes))


def test_a_run_from_end_to_end(dense: Path, text: Path, tmp_path: Path) -> None:
    evaluation = {
        "texts": str(text),
        "windows": [16, 32],
        "limit": 256,
        "latency": {"prompt": 8, "decode": 4, "repeats": 1},
        "generations": ["The river", "Bread |"],
        "new_tokens": 4,
    }
    said: list[str] = []
    result = run(recipe_of(dense, text, tmp_path / "out", evaluation=evaluation), announce=said.append)
    report = result.report
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "plan.json",
        "recipe.yaml",
        "report.html",
        "report.json",
        "report.md",
        "README.md",
        "config.json",
        "model.safetensors",
        "resect.json",
    }
    readme = (tmp_path / "out" / "README.md").read_text()
    first, after = (model.perplexities[0] for model in (report.dense, report.pruned))
    assert "* Method: `llm-pruner`" in readme
    assert f"| perplexity, {first.text}, windows of 16 | {first.value:.2f} | {after.value:.2f} |" in readme
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_function(stock, result.model, random_tokens())
    assert stock.num_parameters() == report.pruned.parameters < report.dense.parameters
    assert Plan.from_json((tmp_path / "out" / "plan.json").read_text()) == result.plan
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(report.to_json())
    assert report.status == "complete"
    assert report.reload_difference == pytest.approx(0, abs=1e-4)
    assert report.pruned.block_parameters <= 0.7 * report.dense.block_parameters  # type: ignore[operator]
    for model in report.models:
        assert [(p.text, p.window) for p in model.perplexities] == [("river.txt", 16), ("river.txt", 32)]
        assert model.timings is not None
        assert len(model.generations) == 2
    assert report.seconds.keys() >= {
        "load",
        "evaluate dense",
        "prune",
        "prune: plan",
        "save",
        "verify",
        "evaluate pruned",
        "latency",
    }
    assert [words for words in said if "verify" in words]


def test_the_written_recipe_is_the_reproduction(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    first = run(recipe_of(dense, text, tmp_path / "a"))
    again = run(read_recipe(tmp_path / "a" / "recipe.yaml", {"output": str(tmp_path / "b")}))
    assert again.plan == first.plan
    assert first.report.calibration is not None
    assert again.report.calibration == first.report.calibration
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert again.report.pruned.perplexities == first.report.pruned.perplexities


def test_per_layer_runs_say_how_they_load(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    settings = {"blocks": {"heads": [1, 2], "channels": [1, 3]}}
    result = run(recipe_of(dense, text, tmp_path / "out", layout="per-layer", keep=0.8, settings=settings))
    assert result.report.saved is not None
    assert result.report.saved["layout"] == "per-layer"
    assert "resect.load" in (tmp_path / "out" / "report.md").read_text()
    assert_same_function(load(tmp_path / "out"), result.model, random_tokens())


def test_a_dry_run_stops_at_the_plan(dense: Path, text: Path, tmp_path: Path) -> None:
    result = run(recipe_of(dense, text, tmp_path / "out"), dry_run=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "plan.json",
        "recipe.yaml",
        "report.html",
        "report.json",
        "report.md",
        "resect.json",
    }
    assert result.report.status == "planned"
    assert result.report.pruned.parameters < result.report.dense.parameters
    assert_same_function(result.model, load(dense), random_tokens())  # nothing was cut


def test_sizes_on_the_way_lead_from_the_dense_model_to_the_pruned_one(
    dense: Path, text: Path, tmp_path: Path, no_verify: None
) -> None:
    evaluation = {"texts": str(text), "windows": 16, "limit": 256, "curve": 2}
    report = run(recipe_of(dense, text, tmp_path / "out", evaluation=evaluation, settings={"criterion": "l2"})).report
    assert report.curve is not None
    first, *between, last = report.curve.points
    assert len(between) == 2
    assert first.perplexity == pytest.approx(report.dense.perplexities[0].value, rel=1e-6)
    assert last.perplexity == pytest.approx(report.pruned.perplexities[0].value, rel=1e-4)  # cut equals mask
    assert (first.parameters, last.parameters) == (report.dense.parameters, report.pruned.parameters)
    sizes = [point.parameters for point in report.curve.points]
    assert sizes == sorted(set(sizes), reverse=True)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'href="#curve"' in page
    assert f"{sizes[1]:,}" in page


def test_shots_and_scores_are_in_the_report(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    settings = {"criterion": "l2", "iterations": 2}
    evaluation = {"texts": str(text), "windows": 16, "limit": 64, "curve": 1}
    result = run(recipe_of(dense, text, tmp_path / "out", evaluation=evaluation, settings=settings, layout="per-layer"))
    report = result.report
    assert [shot.number for shot in report.shots] == [1, 2]
    assert report.dense.parameters > report.shots[0].parameters > report.shots[1].parameters == report.pruned.parameters
    assert all(shot.loss > 0 for shot in report.shots)
    assert report.curve is not None
    assert [point.parameters for point in report.curve.points[1:]] == [shot.parameters for shot in report.shots]
    assert report.saliency is not None
    counted = {one.kind: (sum(one.kept), sum(one.removed) + one.nothing) for one in report.saliency.histograms}
    for kind in counted:
        sizes = [(kept.removed, len(kept.keep)) for kept in result.plan.groups.values() if kept.kind == kind]
        assert counted[kind] == (sum(stay for _, stay in sizes), sum(gone for gone, _ in sizes))


def test_a_curve_of_a_method_that_changes_weights_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    evaluation = {"texts": str(text), "windows": 16, "limit": 64, "curve": 1}
    with pytest.raises(UsageError, match="Leave evaluation.curve out"):
        run(recipe_of(dense, text, tmp_path / "out", method="llm-surgeon", evaluation=evaluation))


def test_without_evaluation_nothing_is_measured(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    result = run(recipe_of(dense, text, tmp_path / "out", evaluation={}))
    assert not result.report.dense.perplexities
    assert "evaluate dense" not in result.report.seconds


def test_no_output(dense: Path) -> None:
    with pytest.raises(UsageError, match="does not say where"):
        run(Recipe.from_mapping({"model": str(dense)}))


def test_something_else_in_the_way_is_refused_before_any_work(dense: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"thesis\.tex.*overwrite") as caught:
        run(recipe_of(dense, text, tmp_path), announce=said.append)
    assert not said
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("device", ["cudaa", "cuda:99", "meta:x"])
def test_devices_that_are_not_there(device: str, dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=device):
        run(recipe_of(dense, text, tmp_path / "out", device=device))


def test_budgets_out_of_reach_name_the_smallest(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="smallest reachable share is 0."):
        run(recipe_of(dense, text, tmp_path / "out", keep=0.001))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "said"), [("", "holds none"), ("Too short.", "needs 6 different windows of 24")])
def test_text_that_is_empty_or_too_short(words: str, said: str, dense: Path, text: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor.txt"
    poor.write_text(words)
    with pytest.raises(DataError, match=said):
        run(recipe_of(dense, poor, tmp_path / "out", evaluation={}))
    assert not (tmp_path / "out").exists()


def test_evaluation_text_is_looked_at_before_pruning(dense: Path, text: Path, tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", repeats=1)
    evaluation: dict[str, Any] = {"texts": [str(short)], "windows": [64, 80], "limit": 70}
    with pytest.raises(DataError, match=r"windows of 80 tokens.*short\.txt"):
        run(recipe_of(dense, text, tmp_path / "out", evaluation=evaluation))
    with pytest.raises(UsageError, match="windows of 4096 tokens; the model has 80 positions"):
        run(recipe_of(dense, text, tmp_path / "out", evaluation=evaluation | {"windows": [4096]}))


def test_damaged_weights_are_named(dense: Path, text: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in dense.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(recipe_of(damaged, text, tmp_path / "out"))


def test_a_full_disk_leaves_nothing(
    dense: Path, text: Path, tmp_path: Path, no_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("resect.recipe.runs.fill", full)
    output = tmp_path / "out"
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        run(recipe_of(dense, text, output))
    assert "partial" not in str(caught.value)
    assert caught.value.__notes__ == [f"Nothing was written to {output}."]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["prune", "save", "verify"])
def test_an_interruption_before_the_model_is_whole_leaves_what_was_there(
    stage: str, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(resect.recipe.runs, stage, stop)
    output = tmp_path / "out"
    with whole_directory(output) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt) as caught:
        run(recipe_of(dense, text, output), overwrite=True)
    assert caught.value.__notes__ == [f"Nothing was written to {output}."]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in output.iterdir()) == ["old", "resect.json"]


def test_an_interruption_afterwards_leaves_a_whole_model_and_says_so(
    dense: Path, text: Path, tmp_path: Path, no_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def stop(model: Any, *args: Any, name: str, **kwargs: Any) -> Any:
        measured.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(resect.recipe.runs, "measure", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(recipe_of(dense, text, tmp_path / "out", evaluation={"dense": False, "generations": "Bells"}))
    assert measured == ["pruned"]
    assert "whole and verified" in caught.value.__notes__[0]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["status"] == "saved"
    load(tmp_path / "out")


def test_evaluate_measures_models_alike(dense: Path, text: Path, tmp_path: Path) -> None:
    save(load(dense), tmp_path / "copy", tokenizer=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "copy" / name).write_bytes((dense / name).read_bytes())
    asked = evaluation_section(
        {"texts": [str(text)], "windows": [16], "latency": {"prompt": 8, "decode": 2, "repeats": 1}, "generations": ["Bells"]}
    )
    report = evaluate([str(dense), str(tmp_path / "copy"), str(dense)], asked=asked)
    first, second = report.models
    assert first.perplexities == second.perplexities
    assert first.generations == second.generations
    assert first.file_bytes
    assert second.timings is not None


def test_evaluate_refuses_what_is_no_model(tmp_path: Path) -> None:
    asked = evaluation_section({})
    with pytest.raises(UsageError, match="Name one or more"):
        evaluate([], asked=asked)
    with pytest.raises(ModelError, match="nowhere"):
        evaluate(["./nowhere"], asked=asked)
    with pytest.raises(UsageError, match=r"bfloat.*'bfloat16'"):
        evaluate(["./nowhere"], asked=asked, dtype="bfloat")


SURGEON = {"method": "llm-surgeon", "settings": {"shots": 2}}


def test_a_run_of_many_shots_goes_on_where_it_was_cut_short(
    dense: Path, text: Path, tmp_path: Path, no_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(recipe_of(dense, text, tmp_path / "whole", **SURGEON), resume=True)  # as supervisors ask, the first time too
    asked = recipe_of(dense, text, tmp_path / "out", **SURGEON)
    with monkeypatch.context() as patched:

        def stop(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(resect.recipe.runs, "save", stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(asked)
    assert any("--resume" in note for note in stopped.value.__notes__)
    assert (tmp_path / "out.progress").exists()
    with pytest.raises(UsageError, match="what an earlier run has done"):
        run(asked)
    result = run(asked, resume=True)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("out")} == {"out"}
    assert result.plan == whole.plan
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


def test_what_was_refused_leaves_no_progress(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run(recipe_of(dense, text, tmp_path / "out", **{**SURGEON, "keep": 0.001}))
    assert not list(tmp_path.glob("out*"))


def test_a_pattern_is_saved_with_the_zeros(dense: Path, text: Path, tmp_path: Path, no_verify: None) -> None:
    settings = {"mode": "2:4", "shots": 1}
    result = run(recipe_of(dense, text, tmp_path / "out", method="llm-surgeon", settings=settings))
    pattern = Pattern.from_json((tmp_path / "out" / "pattern.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert pattern.kind == "2:4"
    assert sum(matrix.zeros for matrix in pattern.layers.values()) == sum(
        int((stored[f"{name}.weight"] == 0).sum()) for name in pattern.layers
    )
    assert result.report.saved is not None
    assert result.report.saved["layout"] == "uniform"


def test_a_dry_run_writes_the_pattern(dense: Path, text: Path, tmp_path: Path) -> None:
    settings = {"mode": "rows-columns", "shots": 1}
    run(recipe_of(dense, text, tmp_path / "out", method="llm-surgeon", settings=settings), dry_run=True)
    assert Pattern.from_json((tmp_path / "out" / "pattern.json").read_text()).layers


LEARNING = {"length": 16, "batch": 4, "tokens": 256, "held_out": 6, "learning_rate": 3e-3}


def test_lorashear_runs_all_its_stages_and_goes_on_where_it_was_cut_short(
    dense: Path, text: Path, tmp_path: Path, no_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"warmup_steps": 1, "periods": 2, "period_steps": 2, "analysis": {"ratios": [0.5], "windows": 2}}
    mixture = {"rounds": 2, "patience": 2, "tolerance": 0}
    asked = {"method": "lorashear", "layout": "per-layer", "settings": settings}
    asked |= {"recovery": {"data": str(text), "settings": {**LEARNING, "mixture": mixture}}}
    whole = run(recipe_of(dense, text, tmp_path / "whole", **asked))
    report = whole.report
    assert report.status == "complete"
    assert report.protected
    assert report.recovery is not None
    assert report.recovery.dense is not None
    assert report.recovery.held_out_after < report.recovery.held_out_before
    page = (tmp_path / "whole" / "report.md").read_text()
    assert "lorashear, 2 x 2 steps of fading" in page
    assert "## Recovery" in page
    assert "| text 1 |" in page
    assert not (tmp_path / "whole.progress").exists()
    assert parameter_count(whole.model) == report.pruned.parameters
    with monkeypatch.context() as patch:
        patch.setattr("resect.recovery.recovering.rounds", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(recipe_of(dense, text, tmp_path / "again", **asked))
    assert "--resume" in stopped.value.__notes__[-1]
    again = run(recipe_of(dense, text, tmp_path / "again", **asked), resume=True)
    assert_same_weights(whole.model, again.model)


def test_zeros_of_a_pattern_stay_in_a_run_that_ends_with_recovery(
    dense: Path, text: Path, tmp_path: Path, no_verify: None
) -> None:
    asked = {"method": "llm-surgeon", "settings": {"mode": "2:4", "shots": 1}}
    recovery = {"data": str(text), "settings": LEARNING}
    result = run(recipe_of(dense, text, tmp_path / "out", recovery=recovery, **asked))
    pattern = Pattern.from_json((tmp_path / "out" / "pattern.json").read_text())
    for name in pattern.zeroed:
        weight: Any = result.model.get_submodule(name).weight
        assert ((weight.reshape(-1, 4) == 0).sum(1) >= 2).all(), name
    assert result.report.recovery is not None
    assert result.report.recovery.held_out_after < result.report.recovery.held_out_before


def test_a_recovery_after_a_method_that_notes_nothing_goes_on(
    dense: Path, text: Path, tmp_path: Path, no_verify: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"recovery": {"data": str(text), "settings": LEARNING}, "settings": {"criterion": "l2"}}
    whole = run(recipe_of(dense, text, tmp_path / "whole", **asked))
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_evaluate", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe_of(dense, text, tmp_path / "out", **asked))
    result = run(recipe_of(dense, text, tmp_path / "out", **asked), resume=True)
    assert_same_weights(result.model, whole.model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def assert_same_weights(one: Any, other: Any) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name

