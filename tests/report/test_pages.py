"""Pages say what the other forms of a report say, in one file, and nothing that was not measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import plotly.graph_objects as graph_objects
import pytest

from resect.report import (
    Measured,
    RunReport,
    charts,
    knowledge_html,
    recovery_html,
    recovery_markdown,
    run_html,
    run_markdown,
    run_report,
)
from resect.report.charts import thinned
from resect.report.parts import Chart, Table
from resect.report.recovery import facts_losses
from resect.report.sections import headline, tiles
from tests.report.made import full_run, knowledge, recovered
from tests.report.test_reports import RECIPE, pruning

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


class Page(HTMLParser):
    """What tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.cells, self.headings, self.ids = text, list[str](), list[str](), list[str]()
        self.links, self.sources, self.captions, self.tables = list[str](), list[str](), 0, 0
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values["href"] or ""] if tag == "a" else []
        self.sources += [values["src"] or ""] if "src" in values else []
        self.captions += tag == "caption"
        self.tables += tag == "table"
        if tag in ("th", "td"):
            self.cells.append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self._inside):
            self.cells[-1] += data
        if {"h1", "h2", "h3"} & set(self._inside):
            self.headings[-1] += data

    @property
    def charts(self) -> list[dict[str, Any]]:
        """The charts, as the page's script reads them."""
        found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', self.text, re.DOTALL)
        return json.loads(found.group(1)) if found else []


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(run_html(full_run()))


def numbers(text: str) -> set[str]:
    return {found.lstrip("+-") for found in NUMBER.findall(text)}


def test_every_part_is_there_once_and_can_be_reached(page: Page) -> None:
    parts = ["headline", "figures", "kept", "curve", "scores", "knowledge"]
    parts += ["training", "generations", "frozen", "recipe", "provenance"]
    assert [link for link in page.links if link != "#content"] == [f"#{part}" for part in parts]
    assert len(page.ids) == len(set(page.ids))
    assert set(parts) < set(page.ids)
    assert page.headings[0] == "demo, pruned"
    assert page.tables == page.captions
    names = ["kept", "curve", "shots", "scores", "spread", "prices", "knowledge", "losses"]
    assert [chart["name"] for chart in page.charts] == names


def test_nothing_is_fetched_and_what_models_write_is_only_text(page: Page) -> None:
    assert not page.sources
    assert all(link.startswith("#") for link in page.links)
    assert "default-src 'none'" in page.text
    assert "Say &lt;/script&gt;&lt;b&gt;bold&lt;/b&gt; &amp; go" in page.text
    assert "<b>bold" not in page.text
    assert len(page.text.encode()) < 6e6


def test_numbers_of_the_page_are_those_of_the_other_forms(page: Page) -> None:
    report = full_run()
    known = numbers(run_markdown(report)) | numbers(report.to_json())
    for table in _tables(report):
        assert numbers(" ".join(cell for row in table.rows for cell in row)) <= known, table.caption
    cells = [cell.replace("\u00a0", " ") for cell in page.cells]
    for row in headline(report).rows:
        places = [place for place, cell in enumerate(cells) if cell == row[0]]
        assert row in [cells[place : place + 4] for place in places]
    markdown = run_markdown(report)
    for tile in tiles(report):
        assert all(text in markdown for text in (tile.name, tile.before, tile.after, tile.change.removesuffix(" points")))


def _tables(report: RunReport) -> Iterator[Table]:
    from resect.report import sections

    yield sections.headline(report)
    for made in (sections.scores(report), sections.curve(report), sections.shots(report), sections.prices(report)):
        assert made is not None
        yield made
    yield sections.seconds(report.seconds)
    yield sections.made_with(report)


def test_prices_are_drawn_of_the_first_shot_and_the_last() -> None:
    report = full_run()
    report.shots.insert(1, report.shots[0].model_copy(update={"number": 7}))
    report.shots[2].number = 12
    chart = charts.prices(report)
    assert chart is not None
    assert [trace["name"] for trace in chart.traces] == [f"{kind}, shot {n}" for n in (1, 12) for kind in ("channels", "heads")]
    assert [(list(trace["x"]), list(trace["y"])) for trace in chart.traces[1:3]] == [
        ([0, 1, 2, 3], [0.75, 1.0, 1.25, 1.5]),
        ([0, 1, 2, 3], [0.75, 1.25, 1.75, 2.25]),
    ]
    assert chart.table.header == ["group", "shot 1", "shot 7", "shot 12"]
    assert chart.table.rows[-1] == ["3.heads", "1.50", "1.50", "2.25"]
    report.shots = report.shots[:1]
    chart = charts.prices(report)
    assert chart is not None
    assert [trace["name"] for trace in chart.traces] == ["channels", "heads"]
    report.shots = [report.shots[0].model_copy(update={"prices": {}})]
    assert charts.prices(report) is None


def test_a_report_that_was_read_back_gives_the_same_page() -> None:
    report = full_run()
    assert run_html(RunReport.model_validate_json(report.to_json())) == run_html(report)


def test_charts_are_what_plotly_understands(page: Page) -> None:
    for chart in page.charts:
        text = re.sub(r"var\(--\w+\)(/[\d.]+)?", "#123456", json.dumps(chart))
        spec = json.loads(text)
        graph_objects.Figure(data=spec["traces"], layout=spec["layout"])  # raises for what is not one of its properties
    with pytest.raises(ValueError, match="colr"):
        graph_objects.Figure(data=[{"type": "bar", "marker": {"colr": "red"}}])


def test_colours_of_charts_are_named_in_the_style(page: Page) -> None:
    named = set(re.findall(r"var\((--\w+)\)", json.dumps(page.charts)))
    style = page.text[page.text.index("<style>") : page.text.index("</style>")]
    assert named
    for theme in (style[: style.index("@media")], style[style.index('[data-theme="dark"] {') :]):
        assert named <= set(re.findall(r"(--\w+):", theme))


def test_what_is_missing_leaves_no_empty_part() -> None:
    bare = run_report(RECIPE, pruning(calibration=None, frozen=[]), dense=None)
    page = Page(run_html(bare))
    assert [link for link in page.links if link != "#content"] == ["#headline", "#figures", "#kept", "#recipe", "#provenance"]
    assert page.headings[:2] == ["demo, planned", "Headline"]
    whole = run_report(RECIPE, pruning(groups=[]), dense=Measured(name="dense", parameters=0))
    assert "#kept" not in Page(run_html(whole)).links


def test_the_page_of_a_recovery_has_the_figures_of_its_markdown() -> None:
    report = recovered()
    page, markdown = Page(recovery_html(report)), recovery_markdown(report)
    assert [chart["name"] for chart in page.charts] == ["training-0", "rounds"]
    cells = {cell.replace("\u00a0", " ") for cell in page.cells}
    for row in facts_losses(report.facts).rows:
        assert set(row) <= cells
        assert f"| {' | '.join(row)} |" in markdown
    assert "-39.3 %" in page.text  # exp(2.5) / exp(3.0) - 1 of 20.09 and 12.18
    assert "| 30 | 2.7000 | 2.7500 |" in markdown
    assert markdown.startswith("# small: recovered on 999 tokens (rank 8, measured beside dense)\n")
    assert "| round | weighted | a.txt | b |" in markdown


def test_sources_lose_their_directories_where_that_leaves_them_apart() -> None:
    facts = recovered().facts
    counts = facts.sources[0]
    assert facts.names == {"texts/a.txt": "a.txt", "b": "b"}
    facts.sources.append(counts.model_copy(update={"source": "a.txt"}))
    assert facts.names == {"texts/a.txt": "texts/a.txt", "b": "b", "a.txt": "a.txt"}


def test_the_page_of_an_analysis_lists_every_group() -> None:
    found = knowledge()
    page = Page(knowledge_html(found))
    for group in found.groups:
        assert page.cells.count(group.name) == 2  # beside the picture, and in the list
    (chart,) = page.charts
    assert sum(shape["type"] == "rect" for shape in chart["layout"]["shapes"]) == 1  # the protected block
    assert [trace["x"] for trace in chart["traces"]] == [[0, 1, 2]] * 4


def test_training_curves_are_averaged_to_few_points() -> None:
    points = [(step, float(step)) for step in range(1, 1002)]
    few = thinned(points, 200)
    assert len(few) <= 200
    assert few[0] == (6, 3.5)
    assert list(few[-1]) == pytest.approx([1001, sum(range(997, 1002)) / 5])
    assert thinned([], 10) == []


def test_bars_of_a_layer_add_up() -> None:
    from resect.report.charts import kept

    chart = kept(full_run())
    assert isinstance(chart, Chart)
    stay, gone = chart.traces[0]["y"], chart.traces[1]["y"]
    assert stay == pytest.approx([100 * 1024 / 1536] * 3 + [100 * 1124 / 1536])
    assert [a + b for a, b in zip(stay, gone, strict=True)] == pytest.approx([100] * 4)
