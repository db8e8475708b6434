"""Reports full of what strangers could have written: nothing of it becomes HTML, a link, another line of YAML, or a fault."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from resect.checkpoint.card import About, front_matter
from resect.errors import DataError, ResectError
from resect.explain import code, inline
from resect.recipe import compare
from resect.report import (
    Knowledge,
    RunReport,
    comparison,
    comparison_html,
    knowledge_html,
    knowledge_markdown,
    knowledge_png,
    run_html,
    run_markdown,
)
from resect.report.bench import _line
from tests.report.made import full_run, knowledge
from tests.report.test_compare import a_run

NASTY = (
    '<script>window.ran=1</script></script><!--<img src=x onerror="window.ran=1"> -->]]>\u2028'
    "[go](javascript:window.ran=1) ![x](http://e.vil/x.png) `|` \"'><a href='javascript:window.ran=1'>go</a> {{7*7}} \x1b[2J "
    "&lt;b&gt; $\\frac$"
)


def nasty_run() -> RunReport:
    """A run in which every name and text is hostile."""
    report = full_run()
    report.recipe = report.recipe | {"model": NASTY, "method": NASTY}
    report.prompts = [NASTY]
    for model in report.models:
        model.generations = [NASTY + "\n```\n# heading\n---\n" for _ in model.generations] or [NASTY]
    report.withheld = {"heads": NASTY}
    report.frozen = [NASTY]
    report.versions = {NASTY: NASTY}
    report.machine = report.machine | {"processor": NASTY}
    report.knowledge = nasty_knowledge().model_dump(mode="json")
    if report.calibration is not None:
        report.calibration = report.calibration | {"source": [NASTY], NASTY: NASTY}
    return report


def nasty_knowledge() -> Knowledge:
    found = knowledge()
    for group in found.groups:
        group.name = f"{group.layer}.{NASTY}{group.kind}"
    return found.model_copy(update={"model": NASTY, "protected": [found.groups[0].name], "versions": {NASTY: NASTY}})


PAGES = {
    "run": lambda: run_html(nasty_run()),
    "analysis": lambda: knowledge_html(nasty_knowledge()),
    "comparison": lambda: comparison_html(comparison({NASTY: a_run(900, 25), NASTY + "2": nasty_run()})),
}


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found = list[tuple[str, dict[str, str | None]]]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", PAGES)
def test_texts_are_text_in_a_page(name: str) -> None:
    page = PAGES[name]()
    assert "window.ran" in page
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 3  # the charts, the library, and the page's own
    assert not [tag for tag, _ in tags if tag in ("img", "iframe", "object")]
    assert all(not key.startswith("on") for _, attributes in tags for key in attributes)
    assert all((attributes.get("href") or "#").startswith(("#", "data:,")) for _, attributes in tags)
    embedded = re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)
    assert embedded
    for text in _texts(json.loads(embedded[1])):
        assert set(re.findall(r"<[^>]*>?", text)) <= {"<b>", "</b>", "<br>", "<sup>", "</sup>"}


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inside for text in _texts(one)]


@pytest.mark.parametrize("text", [run_markdown(nasty_run()), knowledge_markdown(nasty_knowledge()), _line([NASTY, NASTY])])
def test_texts_are_text_in_markdown(text: str) -> None:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in text
    assert "<img" not in text
    assert "<a " not in text
    assert not re.search(r"(?<!\\)\]\((?!analysis\.png)", text)
    assert "\x1b" not in text
    assert not re.search(r"^# heading|^---$", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows


def test_a_picture_reads_no_formulas() -> None:
    assert knowledge_png(nasty_knowledge(), dpi=20).startswith(b"\x89PNG")


def test_a_cell_stays_a_cell() -> None:
    assert inline("a | b\n# c <b>") == "a \\| b # c &lt;b>"
    assert inline("[a](b) [a][b] [a]: b &amp; &") == "[a\\](b) [a\\][b] [a\\]: b &amp;amp; &"
    assert code("a`\n```b") == "`a' '''b`"


def test_the_card_of_a_strangers_run(tmp_path: Path) -> None:
    recipe = {"model": f"---\nlicense: evil\n{NASTY}", "method": "a`b", "layout": "\n# x", "keep": 0.5, "of": "<b>"}
    (tmp_path / "report.json").write_text(json.dumps({"recipe": recipe, "calibration": {"source": [NASTY]}}))
    about = About.of(tmp_path)
    lines = about.lines()
    assert len(lines) == 4
    assert not any("\n" in line or "\x1b" in line for line in lines)
    front = front_matter(about, **{"extra": f'--- "{NASTY}\n---\n: '})
    (said,) = yaml.safe_load_all(front.removeprefix("---\n").removesuffix("---"))
    assert set(said) == {"library_name", "pipeline_tag", "tags", "extra"}
    several: list[Any] = [[], "x", {"recipe": {"model": "m", "keep": "much", "method": 3}}, {"recipe": 3}, {"models": [3]}]
    for odd in several:
        (tmp_path / "report.json").write_text(json.dumps(odd))
        assert About.of(tmp_path).lines() == []
        assert yaml.safe_load(front_matter(About.of(tmp_path)).strip("-"))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 99999,
        '{"kind": "run", "schema_version": NaN}',
        '{"kind": ["run"]}',
        '{"kind": "run", "models": ' + "9" * 9999 + "}",
        '{"kind": "run"}',
        "\x00",
        '{"kind": "evaluation", "models": []}',
    ],
)
def test_reports_of_strangers_are_refused(tmp_path: Path, text: str) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ResectError) as refused:
        compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert len(str(refused.value)) < 2000


def test_every_part_of_a_report_may_be_missing_or_wrong(tmp_path: Path) -> None:
    report = json.loads(a_run(900, 25).to_json())
    good = tmp_path / "good.json"
    good.write_text(json.dumps(report))
    file = tmp_path / "other.json"
    wrong: list[Any] = [None, [], {}, "x", -1, 1e308, [None]]
    for key in report:
        for value in wrong:
            file.write_text(json.dumps(report | {key: value}))
            with suppress(ResectError):
                compare([str(good), str(file)], tmp_path / "page.html")
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read: it is not UTF-8"):
        compare([str(good), str(file)])
