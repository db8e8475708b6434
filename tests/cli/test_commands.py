"""The command line: results on stdout, everything else on stderr, errors that say what to do."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import resect.recipe.runs
from resect.cli import app
from resect.plan import Plan

Command = Callable[..., Result]


@pytest.fixture
def resect_(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command in this process; the check in a process of its own is left to one test."""
    monkeypatch.setattr(resect.recipe.runs, "verify", lambda directory, model: 0.0)

    def call(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    return call


@pytest.fixture
def flags(text: Path) -> list[object]:
    """Calibration on the small text."""
    return ["--data", text, "--samples", 6, "--length", 24]


def damaged(dense: Path, folder: Path, *, leave: str = "") -> Path:
    """A copy of the model, without one file."""
    folder.mkdir()
    for file in dense.iterdir():
        if file.name != leave:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_inspect(resect_: Command, dense: Path) -> None:
    result = resect_("inspect", dense)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"heads +0-2 ", result.stdout)
    assert re.search(r"vocabulary +all +1 +101 ", result.stdout)
    assert "model.layers 0-2  (3 blocks)" in result.stdout
    assert "rotary" in result.stdout
    assert "heads + channels" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_inspect_draws_for_graphviz(resect_: Command, dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.dot"
    result = resect_("inspect", dense, "--dot", file, "--json")
    assert json.loads(result.stdout)["kind"] == "inspection"
    assert file.read_text().startswith('digraph "LlamaForCausalLM" {')
    assert resect_("inspect", dense, "--dot", file).exit_code == 0  # its own kind is replaced
    file.write_text("digraph mine {}")
    assert_refused(resect_("inspect", dense, "--dot", file), 1, "another kind")
    assert_refused(resect_("inspect", dense, "--dot", file / "picture.dot"), 1, "Asked to write")
    assert file.read_text() == "digraph mine {}"


def test_inspect_reads_no_weights(resect_: Command, dense: Path, tmp_path: Path) -> None:
    hollow = damaged(dense, tmp_path / "hollow")
    (hollow / "model.safetensors").write_bytes(b"not a tensor in here")
    found = json.loads(resect_("inspect", hollow, "--json").stdout)
    assert (found["kind"], found["schema_version"], found["blocks"]) == ("inspection", 1, 3)
    kinds = {"heads", "channels", "residual", "sublayers", "blocks", "vocabulary"}
    assert {row["kind"] for row in found["units"]} == kinds


def test_prune_writes_a_run(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    result = resect_("prune", dense, "-o", tmp_path / "out", "--keep", 0.7, *flags)
    assert result.exit_code == 0, result.stderr
    assert "70 % of block parameters kept" in " ".join(result.stdout.split())
    assert "channels" in result.stdout
    assert "save to" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_json_is_one_object_and_nothing_else(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    result = resect_("prune", dense, "-o", tmp_path / "out", *flags, "--json", "--set", "settings.criterion=l2")
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["settings"]["criterion"] == "l2"
    assert report["calibration"] is None  # weights alone


def test_dry_run_stops_at_the_plan(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    result = resect_("prune", dense, "-o", tmp_path / "out", *flags, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "planned" in result.stdout
    assert not (tmp_path / "out" / "config.json").exists()
    assert Plan.from_json((tmp_path / "out" / "plan.json").read_text()).removed()


def test_flags_lie_over_the_recipe(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {dense}\nkeep: 0.5\nseed: 3\nsettings: {{criterion: random}}\n")
    result = resect_("prune", "--recipe", file, "-o", tmp_path / "out", "--keep", 0.9, "--dry-run", "--json")
    recipe = json.loads(result.stdout)["recipe"]
    assert (recipe["keep"], recipe["seed"], recipe["settings"]["criterion"]) == (0.9, 3, "random")


def test_run_repeats_what_prune_wrote(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    assert resect_("prune", dense, "-o", tmp_path / "a", *flags).exit_code == 0
    again = resect_("run", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b")
    assert again.exit_code == 0, again.stderr
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_prune_resumes(
    resect_: Command, dense: Path, flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["prune", dense, "--method", "llm-surgeon", "--set", "settings.shots=2", *flags, "-o", tmp_path / "out"]

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(resect.recipe.runs, "save", stop)
        result = resect_(*asked)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    result = resect_(*asked, "--resume")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.mark.filterwarnings("always")
def test_what_a_user_should_know_is_a_line_of_its_own(resect_: Command, dense: Path, text: Path, tmp_path: Path) -> None:
    asked = ["--method", "llm-surgeon", "--set", "settings.shots=1", "--data", text, "--samples", 1, "--length", 8]
    result = resect_("prune", dense, *asked, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "rank 8 at most" in line]
    assert line.startswith("note: ")
    assert "FewPositions" not in result.stderr


def test_evaluate_puts_models_side_by_side(resect_: Command, dense: Path, text: Path) -> None:
    words = ["evaluate", dense, "--text", text, "--window", "16,32", "--limit", 256, "--prompt", "Bells"]
    shown = resect_(*words)
    assert shown.exit_code == 0, shown.stderr
    assert "river.txt" in shown.stdout
    assert "Bells" in shown.stdout
    found = json.loads(resect_(*words, "--json", "--latency", "--set", "latency={prompt: 8, decode: 2, repeats: 1}").stdout)
    (model,) = found["models"]
    assert [p["window"] for p in model["perplexities"]] == [16, 32]
    assert model["timings"]["prompt"] == 8
    assert model["file_bytes"] > 0


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """A task of eight items."""
    file = tmp_path / "rivers.jsonl"
    rows = [{"query": f"{i}: The river ran", "choices": ["low", "a very long way", "up"], "gold": i % 3} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_evaluate_beside_the_dense_model(resect_: Command, dense: Path, text: Path, items: Path, tmp_path: Path) -> None:
    assert resect_("prune", dense, "-o", tmp_path / "small", "--keep", 0.6, "--set", "settings.criterion=l2").exit_code == 0
    words = ["evaluate", tmp_path / "small", "--beside", dense, "--text", text, "--window", 16, "--limit", 200, "--bos"]
    words += ["--tasks", items, "--limit-items", 6, "--shots", 1]
    shown = resect_(*words)
    assert shown.exit_code == 0, shown.stderr
    said = " ".join(shown.stdout.split())
    for part in (
        "begin-of-text stands before each",
        "bits per byte river.txt @16",
        "rivers, acc (6 items)",
        "1 solved example before",
        "KL divergence river.txt @16, nats",
        "same likeliest token",
        "answers changed, rivers",
        "95% of a paired",
    ):
        assert part in said
    found = json.loads(resect_(*words, "--json").stdout)
    first, small = found["models"]
    assert (first["name"], small["name"], found["reference"]) == (str(dense), str(tmp_path / "small"), str(dense))
    assert first["agreements"] == first["flips"] == []
    (agreement,), (flips,), (task,) = small["agreements"], small["flips"], small["tasks"]
    assert agreement["kl"] > 0
    assert (agreement["tokens"], agreement["bos"]) == (192, True)
    assert (task["items"], task["shots"], flips["task"]) == (6, 1, "rivers")
    ratio, points = found["differences"]
    values = [model["perplexities"][0]["value"] for model in (first, small)]
    assert ratio["value"] == pytest.approx(values[1] / values[0] - 1)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert points["value"] == pytest.approx(task["accuracy"] - first["tasks"][0]["accuracy"])
    assert small["perplexities"][0]["bits_per_byte"] == pytest.approx(math.log2(values[1]))  # a byte a token


def test_prune_reports_tasks_and_agreement(resect_: Command, dense: Path, text: Path, items: Path, tmp_path: Path) -> None:
    more = {"texts": text, "windows": 16, "limit": 200, "tasks": items, "reference": dense}
    words = [word for key, value in more.items() for word in ("--set", f"evaluation.{key}={value}")]
    result = resect_("prune", dense, "-o", tmp_path / "out", "--set", "settings.criterion=l2", *words)
    assert result.exit_code == 0, result.stderr
    assert "answers changed, rivers" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["figure"] for one in report["differences"]] == ["perplexity river.txt @16", "rivers"]
    assert report["models"][1]["agreements"][0]["kl"] > 0
    assert "| rivers, acc (8 items) |" in (tmp_path / "out" / "report.md").read_text()


# Bad input: a clear error, nothing lost.


def test_tasks_that_cannot_be_answered(resect_: Command, dense: Path, text: Path, tmp_path: Path) -> None:
    assert_refused(resect_("evaluate", dense, "--tasks", "demo:piqua"), 2, "no task 'piqua'", "Did you mean 'piqa'?")
    assert_refused(resect_("evaluate", dense, "--tasks", tmp_path / "none.jsonl"), 1, "There is no file")
    short = resect_("evaluate", dense, "--text", text, "--window", 64, "--limit", 40)
    assert_refused(short, 1, "windows of 64 tokens", "gives 40 (limited to 40)")
    words = ["--set", "evaluation.tasks=demo:piqua", "--set", "settings.criterion=l2"]
    refused = resect_("prune", dense, "-o", tmp_path / "out", *words)
    assert_refused(refused, 2, "Did you mean 'piqa'?", "Nothing was written")
    assert not (tmp_path / "out").exists()


def assert_refused(result: Result, code: int, *said: str) -> None:
    """The error and no traceback on stderr, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr
    for part in said:
        assert part in result.stderr


def test_unknown_model(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    for command in (["inspect"], ["prune", "-o", tmp_path / "out", *flags], ["evaluate", "--text", "demo"]):
        assert_refused(resect_(*command, f"{dense}x"), 1, "no such file or directory", f"Did you mean '{dense}'?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "llm-prunner"], ["method = 'llm-prunner'", "Did you mean 'llm-pruner'?"]),
        (["--layout", "unifrom"], ["Did you mean 'uniform'?"]),
        (["--of", "block"], ["Did you mean 'blocks'?"]),
        (["--dtype", "float"], ["dtype = 'float'"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--keep", "0"], ["keep = 0.0", "more than 0"]),
        (["--keep", "1.01"], ["keep = 1.01", "at most 1"]),
        (["--keep", "0.0001"], ["the smallest reachable share is"]),
        (["--set", "settings.criterium=l2"], ["no key 'settings.criterium'", "'criterion'"]),
        (["--set", "settings.criterion=elment2"], ["settings.criterion = 'elment2'", "'element2'"]),
        (["--set", "calibration.sampels=4"], ["no key 'calibration.sampels'", "'samples'"]),
        (["--set", "keep"], ["place=value"]),
        (["--recipe", "nowhere.yaml"], ["There is no recipe 'nowhere.yaml'"]),
    ],
)
def test_requests_that_cannot_be_meant(
    words: list[str], said: list[str], resect_: Command, dense: Path, flags: list[object], tmp_path: Path
) -> None:
    assert_refused(resect_("prune", dense, "-o", tmp_path / "out", *flags, *words), 2, *said)
    assert not list(tmp_path.iterdir())


def test_windows_that_are_no_numbers(resect_: Command, dense: Path, text: Path) -> None:
    assert_refused(resect_("evaluate", dense, "--text", text, "--window", "128;2048"), 2, "128;2048")


def test_prune_needs_a_model_and_a_place(resect_: Command, dense: Path) -> None:
    assert_refused(resect_("prune", "-o", "x"), 2, "model is missing")
    assert_refused(resect_("prune", dense), 2, "where to write", "-o DIRECTORY")


@pytest.mark.parametrize(("words", "said"), [("", "holds none"), ("Too short.", "needs 6 different windows of 24")])
def test_empty_or_short_text(words: str, said: str, resect_: Command, dense: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor.txt"
    poor.write_text(words)
    result = resect_("prune", dense, "-o", tmp_path / "out", "--data", poor, "--samples", 6, "--length", 24)
    assert_refused(result, 1, said, "Nothing was written")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    broken = damaged(dense, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][1, 1] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert_refused(resect_("prune", broken, "-o", tmp_path / "out", *flags), 1, "model.embed_tokens.weight", "NaN or inf")


def test_a_directory_that_holds_something_else(resect_: Command, dense: Path, flags: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    assert_refused(resect_("prune", dense, "-o", output, *flags), 1, "thesis.tex", "--overwrite")
    assert (output / "thesis.tex").read_text() == "mine"
    assert_refused(resect_("prune", dense, "-o", output, *flags, "--overwrite"), 1, "did not write: thesis.tex")
    assert (output / "thesis.tex").read_text() == "mine"
    (output / "thesis.tex").unlink()
    for more in ((), ("--overwrite",)):
        assert resect_("prune", dense, "-o", output, *flags, *more).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_pickles_are_refused(resect_: Command, dense: Path, tmp_path: Path) -> None:
    pickled = damaged(dense, tmp_path / "pickled", leave="model.safetensors")
    torch.save({}, pickled / "pytorch_model.bin")
    assert_refused(resect_("prune", pickled, "-o", tmp_path / "out"), 1, "pickled (pytorch_model.bin)", "safetensors")
    assert_refused(resect_("prune", pickled / "pytorch_model.bin", "-o", tmp_path / "out"), 1, "pickled")


def test_code_beside_a_model_is_not_run(resect_: Command, dense: Path, tmp_path: Path) -> None:
    foreign = damaged(dense, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert_refused(resect_("inspect", foreign), 1, "trust_remote_code")
    assert not (tmp_path / "ran").exists()


def test_errors_are_json_too(resect_: Command, dense: Path, tmp_path: Path) -> None:
    result = resect_("prune", dense, "-o", tmp_path / "out", "--layout", "unifrom", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UsageError"
    assert "Did you mean 'uniform'?" in error["message"]


@pytest.mark.parametrize("stage", ["prune", "save"])
def test_ctrl_c_says_what_there_is(
    stage: str, resect_: Command, dense: Path, flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(resect.recipe.runs, stage, stop)
    result = resect_("prune", dense, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 130
    assert f"Nothing was written to {tmp_path / 'out'}." in result.stderr
    assert not list(tmp_path.iterdir())


# In a process of its own.


def shell(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from resect.cli import app; app(prog_name='resect')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_a_plan_in_a_process_of_its_own(dense: Path, flags: list[object], tmp_path: Path) -> None:
    result = shell("prune", dense, "-o", "out", *flags, "--dry-run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["status"] == "planned"
    assert (tmp_path / "out" / "plan.json").is_file()


def test_help_needs_no_torch() -> None:
    code = "import sys, resect.cli; print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["", "inspect", "prune", "run", "evaluate"])
def test_help_names_every_flag(command: str, resect_: Command) -> None:
    result = resect_(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    flags = {
        "": ["--version", "inspect", "prune", "run", "evaluate"],
        "inspect": ["--dot", "--json", "--trust-remote-code"],
        "prune": ["--method", "--keep", "--of", "--data", "--samples", "--length", "--layout", "--align", "--recipe", "--set"]
        + ["--seed", "--device", "--dtype", "--dry-run", "--overwrite", "--trust-remote-code", "--json", "-o"],
        "run": ["--set", "--overwrite", "--dry-run", "--json", "-o"],
        "evaluate": ["--text", "--window", "--latency", "--limit", "--json", "--tasks", "--shots", "--limit-items"]
        + ["--bos", "--beside"],
    }
    for flag in flags[command]:
        assert flag in result.stdout


def test_version(resect_: Command) -> None:
    assert resect_("--version").stdout.startswith("resect ")


def test_prune_cuts_the_vocabulary_alone(resect_: Command, dense: Path, text: Path, tmp_path: Path) -> None:
    result = resect_(
        "prune", dense, "-o", tmp_path / "out", "--keep", 1, "--vocabulary", text, "--set", "vocabulary.align=1",
        "--set", f"evaluation.texts={text}", "--set", "evaluation.windows=[16]",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "44 of 101 rows of the vocabulary kept, all else whole" in said
    assert "Vocabulary: 44 of 101 rows stay, 57 went" in said
    assert "river.txt: 0 of" in said
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer) == 44
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["vocabulary"]["texts"] == [{"text": "river.txt", "tokens": 3104, "missing": 0, "pruned_tokens": 3104}]
    before, after = (model["perplexities"][0]["tokens"] for model in report["models"])
    assert before == after


def test_prune_cuts_the_vocabulary_with_the_rest(
    resect_: Command, dense: Path, text: Path, flags: list[object], tmp_path: Path
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("The river ran low that summer.")
    evaluation = ["--set", f"evaluation.texts={text}", "--set", "evaluation.windows=16"]
    asked = ["--vocabulary", few, "--set", "vocabulary.align=8", *evaluation]
    result = resect_("prune", dense, "-o", tmp_path / "out", "--keep", 0.7, *flags, *asked, "--json")
    report = json.loads(result.stdout)
    assert report["vocabulary"]["kept"] == 24
    (respelled,) = report["vocabulary"]["texts"]
    assert respelled["missing"] > 0
    removed = Plan.from_json((tmp_path / "out" / "plan.json").read_text()).removed()
    assert removed["vocabulary"] == 77
    assert any("channels" in name for name in removed)
    assert resect_("run", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "again", "--dry-run").exit_code == 0
    plans = [(tmp_path / name / "plan.json").read_text() for name in ("out", "again")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--vocabulary", "no-such-file.txt"], 1, "no-such-file.txt"),
        (["--set", "vocabulary.keep=0.5"], 2, "vocabulary.source is missing"),
        (["--vocabulary", "TEXT", "--set", "vocabulary.keep=3", "--set", "vocabulary.align=1"], 2, "4 are needed"),
        (["--vocabulary", "TEXT", "--set", "vocabulary.aligned=3"], 2, "align"),
    ],
)
def test_vocabularies_that_cannot_be_cut(
    resect_: Command, dense: Path, text: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    given = [str(text) if word == "TEXT" else word for word in words]
    result = resect_("prune", dense, "-o", tmp_path / "out", "--keep", 1, *given)
    assert result.exit_code == code, result.stderr
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


class TestExactSizes:
    """Sizes by kind, plans and blocks by number, instead of a budget."""

    def test_units_and_then_the_same_plan_from_its_file(
        self, resect_: Command, dense: Path, flags: list[object], tmp_path: Path
    ) -> None:
        first = resect_("prune", dense, "-o", tmp_path / "a", "--units", "heads=1,channels=12", *flags)
        assert first.exit_code == 0, first.stderr
        assert "1 heads, 12 channels kept in every group" in first.stdout
        fields = json.loads((tmp_path / "a" / "config.json").read_text())
        assert (fields["num_key_value_heads"], fields["intermediate_size"]) == (1, 12)
        second = resect_("prune", dense, "-o", tmp_path / "b", "--plan", tmp_path / "a" / "plan.json", "--json")
        assert second.exit_code == 0, second.stderr
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert "by-hand, the plan" in second.stderr
        assert json.loads(second.stdout)["calibration"] is None

    def test_blocks_by_number(self, resect_: Command, dense: Path, tmp_path: Path) -> None:
        result = resect_("prune", dense, "-o", tmp_path / "a", "--drop-blocks", "0,2")
        assert result.exit_code == 0, result.stderr
        assert json.loads((tmp_path / "a" / "config.json").read_text())["num_hidden_layers"] == 1
        assert "blocks 0, 2 removed (by-hand, no scores" in result.stdout
        assert "the plan was given" in result.stdout

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--units", "heads"], "a number for each kind"),
            (["--units", "heads=1", "--keep", "0.5"], "the setting widths decides"),
            (["--drop-blocks", "a"], "one number or several"),
            (["--plan", "nowhere.json"], "The plan nowhere.json cannot be read"),
            (["--align", "heads=x"], "a number for each kind"),
            (["--align", "head=2"], "Did you mean 'heads'?"),
            (["--drop-blocks", "0", "--method", "llm-pruner"], "settings.drop_blocks"),
        ],
    )
    def test_what_cannot_be_meant(
        self, resect_: Command, dense: Path, tmp_path: Path, words: list[str], said: str
    ) -> None:
        result = resect_("prune", dense, "-o", tmp_path / "a", *words)
        assert result.exit_code == 2
        assert said in result.stderr
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("flags", "expected"), [([], "bfloat16"), (["--store-dtype", "float32"], "float32")])
def test_weights_are_stored_as_they_were(
    resect_: Command, dense: Path, tmp_path: Path, flags: list[str], expected: str
) -> None:
    half, out = damaged(dense, tmp_path / "half"), tmp_path / "out"
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    model.to(torch.bfloat16).save_pretrained(half)
    result = resect_("prune", half, "-o", out, "--set", "settings.criterion=l2", *flags)
    assert result.exit_code == 0, result.output
    assert {str(tensor.dtype) for tensor in load_file(out / "model.safetensors").values()} == {f"torch.{expected}"}
    assert json.loads((out / "config.json").read_text())["dtype"] == expected
