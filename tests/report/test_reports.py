"""Reports as JSON, Markdown and tables, from facts made up."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from resect.checkpoint import skeleton
from resect.errors import NumericsError
from resect.graph import trace
from resect.report import (
    EvaluationReport,
    Measured,
    RunReport,
    comparison_table,
    inspection,
    inspection_tables,
    run_markdown,
    run_report,
    run_tables,
)
from tests.models import FAMILIES
from tests.report.test_figures import perplexity, timings

RECIPE: dict[str, Any] = {
    "model": "demo",
    "keep": 0.8,
    "of": "blocks",
    "method": "llm-pruner",
    "layout": "uniform",
    "seed": 7,
    "device": "cpu",
    "dtype": "float32",
    "settings": {"criterion": "element2", "share": None},
}


def pruning(**changes: Any) -> dict[str, Any]:
    groups = [
        {"name": f"{layer}.{kind}", "kind": kind, "layer": layer, "units": units, "kept": kept}
        for layer in range(4)
        for kind, units, kept in (("channels", 1536, 1024 + 100 * (layer > 2)), ("heads", 3, 3))
    ]
    facts = {
        "parameters": {"dense": 1000, "pruned": 830},
        "block_parameters": {"dense": 800, "pruned": 640},
        "macs": {"dense": 5_000_000, "pruned": 4_000_000, "tokens": 64},
        "groups": groups,
        "frozen": ["a constant in model.rotary_emb"],
        "withheld": {},
        "calibration": {"source": ["demo"], "samples": 48, "length": 128, "digest": "cd" * 32},
        "cut_equals_mask": {"difference": 1e-6, "allowed": 1e-4},
    }
    return {**facts, **changes}


def complete(**changes: Any) -> RunReport:
    dense = Measured(name="dense", parameters=0, perplexities=[perplexity(20)], timings=timings(1, 20), generations=["Paris."])
    pruned = dense.model_copy(update={"perplexities": [perplexity(30)], "generations": ["a | b\nc"]})
    report = run_report(RECIPE, pruning(**changes), dense=dense, pruned=pruned)
    report.prompts = ["The capital of [bold]France[/bold] is"]
    report.status = "complete"
    report.saved = {"model_type": "mistral", "layout": "uniform", "relabelled_from": "llama"}
    report.reload_difference, report.seconds, report.peak_memory_bytes = 0.0, {"load": 1.25}, 2**30
    return report


def text_of(renderable: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_json_comes_back() -> None:
    report = complete()
    assert RunReport.model_validate_json(report.to_json()) == report
    values = json.loads(report.to_json())
    assert (values["kind"], values["schema_version"]) == ("run", 1)
    assert [(model["name"], model["parameters"]) for model in values["models"]] == [("dense", 1000), ("pruned", 830)]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_figures_that_are_not_finite_are_never_written(value: float) -> None:
    report = complete()
    report.pruned.perplexities[0].value = value
    with pytest.raises(NumericsError, match=rf"models\.1\.perplexities\.0\.value is {value}"):
        report.to_json()


def test_markdown_says_what_it_takes_to_judge() -> None:
    text = run_markdown(complete())
    for part in (
        "# demo: 80 % of block parameters kept (llm-pruner, element2, uniform layout)",
        "80.00 % of block parameters, 83.00 % of parameters, 80.00 % of multiply-accumulates",
        "| perplexity demo @128 (1,016 tokens) | 20.00 | 30.00 | +50.0 % |",
        "Seed 7.",
        "`abababababab`",
        "relabelled from `llama`",
        "0-2       ███████████░░░░░ 1,024 of 1,536",
        "> a | b\n> c",
        '"digest": "cdcdcd',
        "* a constant in model.rotary_emb",
        "| load | 1.2 |",
        "1.00 GiB",
    ):
        assert part in text, part


def test_markdown_of_less() -> None:
    report = run_report(RECIPE, pruning(calibration=None, withheld={"heads": "60 does not divide"}), dense=None)
    text = run_markdown(report)
    assert "A dry run" in text
    assert "Nothing was evaluated." in text
    assert "* heads: 60 does not divide" in text
    assert "looks at weights only" in text


def test_shares_instead_of_a_budget() -> None:
    report = complete()
    report.recipe = {**RECIPE, "settings": {"criterion": "element1", "share": 0.25}}
    assert "share 0.25 of every chosen group removed" in run_markdown(report)


def test_tables_fit_100_columns_and_print_what_models_write_as_it_is() -> None:
    text = text_of(run_tables(complete(withheld={"heads": "no configuration " * 12})))
    assert max(map(len, text.splitlines())) <= 100
    for part in ("830", "-17.0 %", "+50.0 %", "0-2", "1,024 of 1,536", "Paris.", "[bold]France[/bold]", "stay whole"):
        assert part in text, part


def test_comparison_has_a_row_per_model() -> None:
    models = [
        Measured(name=name, parameters=count, file_bytes=4 * count, perplexities=[perplexity(9)], generations=["x"])
        for name, count in (("demo", 1000), ("runs/demo", 800))
    ]
    text = text_of(comparison_table(EvaluationReport(models=models, prompts=["Say"])))
    for part in ("demo", "runs/demo", "1,000", "3.200 kB", "9.000", "Prompt: Say"):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_inspection_folds_layers_and_prices_units(family: str, tmp_path: Any) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    graph = trace(skeleton(tmp_path))
    found = inspection(graph, model="tiny", architecture=family)
    assert found.parameters == graph.parameter_count()
    channels = next(row for row in found.units if row.kind == "channels")
    assert (channels.layers, channels.groups) == ("0-2", 3)
    share = next(row for row in found.shares if row.kind == "channels")
    gone = {group.name: group.units for group in graph.of_kind("channels")}
    assert share.parameters == graph.parameter_count() - graph.parameter_count(gone)
    assert share.parameters >= 3 * channels.units * channels.unit_parameters
    assert share.of_model == share.parameters / found.parameters
    assert len(found.frozen) < len(graph.frozen)
    assert len({(row.parameter, row.axis, row.reason) for row in found.frozen}) == len(found.frozen)
    assert max(map(len, text_of(inspection_tables(found)).splitlines())) <= 100
    if family == "bloom":  # ALiBi's slopes are constants, a head has its own
        assert "heads" not in {row.kind for row in found.units}
