"""`resect bench`, and budgets on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from resect.cli import app
from resect.evaluation import LatencyTable
from resect.plan import Plan
from resect.recipe import Recipe


def resect_(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def benched(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run with everything: its JSON object, and its directory."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    shape = ["--batch", "1,2", "--length", "8", "--decode", 2, "--repeats", 2]
    result = resect_("bench", dense, *shape, "--table", "-o", folder, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), folder


def test_bench_times_every_batch_and_length(benched: tuple[dict[str, Any], Path]) -> None:
    report, folder = benched
    assert (report["kind"], report["schema_version"]) == ("bench", 1)
    work = [(row["phase"], row["batch"], row["length"]) for row in report["rows"]]
    assert work == [("prefill", 1, 8), ("decode", 1, 8), ("prefill", 2, 8), ("decode", 2, 8)]
    assert all(len(row["seconds"]["values"]) == 2 for row in report["rows"])
    (model,) = report["models"]
    assert model["file_bytes"] == (Path(model["name"]) / "model.safetensors").stat().st_size
    assert json.loads((folder / "bench.json").read_text()) == report
    assert "prefill 2x8" in (folder / "bench.md").read_text()


def test_tables_serve_a_budget(benched: tuple[dict[str, Any], Path], dense: Path, tmp_path: Path) -> None:
    """All of the seconds may stay: nothing goes, and the report says what was measured."""
    _, folder = benched
    table = LatencyTable.from_json((folder / "prefill.json").read_text())
    assert (table.where, LatencyTable.from_json((folder / "decode.json").read_text()).where) == ("prefill:1x8", "decode:1x8")
    assert table.machine["cores"] >= 1
    options = ["--budget", "latency:1@prefill:1x8", "--latency-table", folder / "prefill.json", "--set", "settings.criterion=l2"]
    result = resect_("prune", dense, "-o", tmp_path / "out", *options, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "budget latency:1@prefill:1x8" in " ".join(result.stdout.split())
    assert "measured in turns" in " ".join(result.stdout.split())
    assert LatencyTable.from_json((tmp_path / "out" / "latency.json").read_text()) == table
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["budget"]["predicted"] == 1
    assert not Plan.from_json((tmp_path / "out" / "plan.json").read_text()).removed()


def test_budgets_of_bytes(dense: Path, tmp_path: Path) -> None:
    options = ["--budget", "bytes:0.8", "--set", "settings.criterion=l2", "--dry-run", "--json"]
    result = resect_("prune", dense, "-o", tmp_path / "out", *options)
    report = json.loads(result.stdout)
    assert report["budget"]["cost"] <= 0.8 * report["budget"]["dense"]
    assert report["budget"]["cost"] == 4 * report["models"][1]["parameters"]
    assert report["recipe"]["budget"] == "bytes:0.8"
    assert Recipe.from_mapping(report["recipe"]).budget == "bytes:0.8"
    assert f"{report['budget']['cost']:,.0f} of" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "{dense}", "-o", "x", "--budget", "latncy:0.7"], "Did you mean 'latency'?"),
        (["prune", "{dense}", "-o", "x", "--budget", "bytes:0.7", "--keep", "0.5"], "keep=0.5 of blocks as well"),
        (["bench", "{dense}", "--length", "90"], "it has 80 positions"),
        (["bench", "{dense}", "--table"], "-o DIR"),
        (["bench", "{dense}", "--batch", "0", "--length", "8"], "batches=0"),
        (["bench", "{dense}", "--batch", "two"], "--batch 'two'"),
    ],
)
def test_what_cannot_be_meant(words: list[str], said: str, dense: Path) -> None:
    result = resect_(*(word.format(dense=dense) for word in words))
    assert result.exit_code == 2, result.stderr
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
