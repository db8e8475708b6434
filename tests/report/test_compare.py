"""Runs side by side: the same things are compared, and only those."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from resect.cli import app
from resect.errors import CheckpointError, DataError, UsageError
from resect.recipe import compare
from resect.report import EvaluationReport, Measured, RunReport, comparison, comparison_html, comparison_tables
from resect.report.compare import front
from resect.report.results import TaskFlips, TextAgreement
from tests.report.made import full_run, recovered
from tests.report.test_figures import accuracy, perplexity, timings
from tests.report.test_pages import Page


def a_run(parameters: int, value: float, *, prefill: float | None = None, **changes: Any) -> RunReport:
    """A run of which little was measured; the dense model has 1000 parameters and a perplexity of 20."""
    report = full_run()
    for model, size, found in ((report.dense, 1000, 20.0), (report.pruned, parameters, value)):
        model.parameters, model.perplexities, model.timings = size, [perplexity(found)], None
        model.timings = timings(prefill, 20) if prefill else None
    report.machine = {"processor": "one", "cores": 2}
    return report.model_copy(update=changes)


def test_the_front_is_what_brute_force_finds() -> None:
    generator = random.Random(0)
    for _ in range(50):
        points = [(float(generator.randint(0, 5)), float(generator.randint(0, 5))) for _ in range(8)]
        dominated = {
            here
            for here, (x, y) in enumerate(points)
            for a, b in points
            if (a < x and b <= y) or (a <= x and b < y)
        }
        found = front(points)
        assert set(found) == set(range(8)) - dominated
        assert [points[place] for place in found] == sorted(points[place] for place in found)


def test_the_dense_model_appears_once_and_models_that_are_beaten_are_not_on_the_line() -> None:
    found = comparison({"big": a_run(900, 25), "bad": a_run(850, 60), "small": a_run(800, 30)})
    assert [one.figures.name for one in found.candidates] == ["demo (dense)", "big", "bad", "small"]
    assert [one.dense for one in found.candidates] == [True, False, False, False]
    by_size = next(one for one in found.fronts if one.size == "parameters")
    assert [found.candidates[place].figures.name for place in by_size.front] == ["small", "big", "demo (dense)"]
    assert {one.size for one in found.fronts} == {"parameters", "macs"}  # nothing was timed


def test_accuracy_is_better_where_it_is_higher() -> None:
    models = [
        Measured(name=name, parameters=size, tasks=[accuracy("piqa", a), accuracy("boolq", b)])
        for name, size, a, b in (("a", 10, 0.8, 0.6), ("b", 8, 0.7, 0.8), ("c", 6, 0.5, 0.5))
    ]
    (one,) = comparison({"x.json": EvaluationReport(models=models)}).fronts
    assert (one.quality, one.better) == ("mean of 2 tasks", "higher")
    assert one.qualities == pytest.approx([0.7, 0.75, 0.5])
    assert one.front == [2, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "cd" * 32}, r"perplexity demo @128 was measured differently in a \(digest ababab.*and b \(digest cdcdcd"),
        ({"tokens": 900}, "tokens 900"),
        ({"bos": True}, "begin-of-text True"),
        ({"window": 64}, "No quality is measured in all of them"),
        ({"text": "c4"}, "No quality is measured in all of them .*perplexity c4 @128"),
    ],
)
def test_what_was_measured_differently_is_refused(change: dict[str, Any], said: str) -> None:
    other = a_run(800, 30)
    for model in other.models:
        model.perplexities = [model.perplexities[0].model_copy(update=change)]
    with pytest.raises(UsageError, match=said):
        comparison({"a": a_run(900, 25), "b": other})


def test_names_without_end_are_cut_in_errors() -> None:
    one, other = a_run(900, 21.0), a_run(800, 22.0)
    for model in other.models:
        model.perplexities = [found.model_copy(update={"text": "x" * 20_000}) for found in model.perplexities]
    with pytest.raises(UsageError, match="No quality is measured") as caught:
        comparison({"a": one, "b": other})
    assert len(str(caught.value)) < 1200


def test_a_vocabulary_that_respells_the_text_is_refused_and_one_that_does_not_is_not() -> None:
    from resect.report.results import Respelled, VocabularyCut

    for missing in (0, 3):
        cut = a_run(800, 30)
        text = Respelled(text="demo", tokens=1024, missing=missing, pruned_tokens=1024)
        cut.vocabulary = VocabularyCut(
            source=["demo"], rows=9, kept=8, base=1, needed=8, tokens=9, missing=0, texts=[text]
        )
        cut.pruned.perplexities[0].digest = "ef" * 32  # other numbers for the same tokens
        if missing:
            with pytest.raises(UsageError, match="spells demo with other tokens"):
                comparison({"a": a_run(900, 25), "b": cut})
        else:
            assert len(comparison({"a": a_run(900, 25), "b": cut}).candidates) == 3


def test_times_of_two_machines_are_marked_and_not_drawn() -> None:
    there = {"processor": "two", "cores": 64}
    found = comparison({"a": a_run(900, 25, prefill=2), "b": a_run(800, 30, prefill=1, machine=there)})
    assert {one.size for one in found.fronts} == {"parameters", "macs"}
    assert [one.machine for one in found.candidates] == ["A", "A", "B"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_tables(found))
    assert "Timed on machine B (two, 64 cores): b." in console.export_text()
    alike = comparison({"a": a_run(900, 25, prefill=2), "b": a_run(800, 30, prefill=1)})
    assert {one.size for one in alike.fronts} == {"parameters", "macs", "seconds"}
    assert not comparison_html(alike).count("machine B")


def test_the_page_says_how_close_models_stay_to_the_dense_one() -> None:
    run = a_run(900, 25)
    run.pruned.agreements = [TextAgreement(text="demo", window=128, kl=0.25, same_top=0.75, tokens=127)]
    run.pruned.flips = [TaskFlips(task="piqa", changed=0.125, lost=0.1, gained=0.025)]
    cells = Page(comparison_html(comparison({"a": run, "b": a_run(800, 30)}))).cells
    for name, value in (("KL divergence demo @128, nats", "0.2500"), ("answers changed, piqa", "12.5")):
        place = cells.index(name)
        assert cells[place : place + 4] == [name, "-", value, "-"]


def test_the_page_has_a_picture_for_every_front() -> None:
    found = comparison({"big": a_run(900, 25), "small": a_run(800, 30)})
    page = Page(comparison_html(found))
    assert len(page.charts) == len(found.fronts) == 2
    names = [trace.get("name") for trace in page.charts[0]["traces"]]
    assert names == [None, "demo (dense)", "big", "small"]
    assert page.charts[0]["traces"][0]["x"] == [800, 900, 1000]
    assert page.cells.count("900") >= 2


def test_runs_are_read_from_directories_and_files(tmp_path: Path) -> None:
    for name, report in (("a", a_run(900, 25)), ("b", a_run(800, 30))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report.to_json())
    page, runs = tmp_path / "compare.html", [str(tmp_path / "a"), str(tmp_path / "b" / "report.json")]
    result = CliRunner().invoke(app, ["compare", *runs, "-o", str(page), "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["kind"], len(found["candidates"]), len(found["fronts"])) == ("comparison", 3, 2)
    assert "2 models side by side" in page.read_text()
    assert "beside it has the same figures" not in page.read_text()  # there is no such file
    CliRunner().invoke(app, ["compare", runs[0], "-o", str(page)])
    assert "2 models side by side" in page.read_text()  # one of them the dense one
    shutil.copy(page, tmp_path / "a" / "report.html")
    with pytest.raises(CheckpointError, match="and to read it"):
        compare(runs, tmp_path / "a" / "report.html")  # the page of a run that is read
    (tmp_path / "r.json").write_text(recovered().to_json())
    (tmp_path / "x.json").write_text("{}")
    for run, error, said in (
        ("r.json", UsageError, "resect evaluate DENSE"),
        ("x.json", UsageError, "not the report of a run"),
        ("missing", DataError, "cannot be read: No such file or directory. Name a run directory"),
    ):
        with pytest.raises(error, match=said):
            compare([runs[0], str(tmp_path / run)])
    with pytest.raises(UsageError, match="twice"):
        compare([runs[0], runs[0]])
    with pytest.raises(UsageError, match="not measured to the end"):
        comparison({"a": a_run(900, 25), "b": a_run(800, 30, status="saved")})
