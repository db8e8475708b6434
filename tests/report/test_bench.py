"""The table of timings, from facts made up."""

from __future__ import annotations

import pytest
import torch

import resect
from resect.evaluation import Latency, Spread
from resect.plan import select
from resect.recipe.bench import bench_rows, described
from resect.report import BenchReport, BenchRow, bench_markdown, bench_table
from tests.models import FAMILIES
from tests.report.test_reports import text_of


def timed(scale: float, batch: int) -> Latency:
    read, written = Spread((0.4 * scale, 0.2 * scale)), Spread((batch * 10 / scale, batch * 20 / scale))
    about = {"prompt": 16, "decode": 4, "device": "cpu", "dtype": "float32", "threads": 2}
    return Latency(read, written, batch=batch, working_bytes=1000, **about)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report() -> BenchReport:
    """A tiny dense model that takes 0.4 and 0.2 seconds, and one cut to half its blocks that takes 0.8 as long."""
    models = {"dense": FAMILIES["llama"](), "half": FAMILIES["llama"]()}
    graph = resect.trace(models["dense"])
    scores = {group.name: torch.arange(group.units).double() + 1 for group in graph.groups}
    resect.cut(models["half"], select(graph, scores, keep=0.5, layout="uniform"), graph)
    graphs = {name: resect.trace(model) for name, model in models.items()}
    benched = {name: described(name, models[name], graphs[name], file_bytes=5000) for name in models}
    rows = bench_rows({"dense": timed(1, 2), "half": timed(0.8, 2)}, benched, graphs)
    about = {"decode": 4, "repeats": 2, "compiled": False, "device": "cpu", "dtype": "float32", "machine": {"threads": 2}}
    return BenchReport(models=list(benched.values()), rows=rows, **about)  # type: ignore[arg-type]


def row(report: BenchReport, model: str, phase: str) -> BenchRow:
    return next(one for one in report.rows if (one.model, one.phase) == (model, phase))


def test_the_ideal_is_work_in_prefill_and_bytes_in_decoding(report: BenchReport) -> None:
    dense, half = FAMILIES["llama"](), report.models[1]
    assert report.models[0].parameters == sum(p.numel() for p in dense.parameters())
    read, written = row(report, "half", "prefill"), row(report, "half", "decode")
    assert (read.speedup, written.speedup) == pytest.approx((1.25, 1.25))
    assert read.macs == resect.trace(dense).macs(batch=2, tokens=16) / read.ideal
    table = dense.get_parameter("model.embed_tokens.weight")
    assert report.models[0].read_bytes == 4 * (report.models[0].parameters - table.numel())  # looked up, not read
    assert written.ideal == report.models[0].read_bytes / half.read_bytes
    assert half.weight_bytes == 4 * half.parameters


def test_a_tied_table_is_read(report: BenchReport) -> None:
    model = FAMILIES["llama_tied"]()
    found = described("tied", model, resect.trace(model), file_bytes=1)
    assert found.read_bytes == found.weight_bytes == 4 * found.parameters


def test_times_and_memory(report: BenchReport) -> None:
    found = row(report, "dense", "decode")
    assert (found.seconds.low, found.seconds.median, found.seconds.high) == pytest.approx((0.05, 0.075, 0.1))
    assert found.tokens_per_second == pytest.approx(2 / 0.075)
    assert row(report, "dense", "prefill").tokens_per_second == pytest.approx(2 * 16 / 0.3)
    assert found.memory_bytes == report.models[0].weight_bytes + 1000
    assert (found.speedup, found.ideal) == (1, 1)


def test_rows_below_the_ideal_are_marked(report: BenchReport) -> None:
    read = row(report, "half", "prefill")
    assert read.reached < 0.9
    fast = report.model_copy(update={"rows": [one.model_copy(update={"speedup": one.ideal}) for one in report.rows]})
    for text in (text_of(bench_table(report)), bench_markdown(report)):
        assert f"{100 * read.reached:.0f} %*" in text
        assert "1.25x" in text
        assert "1.25-1.25" in text
        assert "prefill 2x16" in text
        assert "2 threads" in text
    assert "100 %*" not in text_of(bench_table(fast))
    assert BenchReport.model_validate_json(report.to_json()) == report
