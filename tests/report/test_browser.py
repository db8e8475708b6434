"""The pages in a real browser: Chromium without a window, where there is one; else these tests say so and are skipped."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resect.report import comparison, comparison_html, recovery_html, run_html
from tests.report.made import full_run, recovered
from tests.report.test_compare import a_run
from tests.report.test_hostile import PAGES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
MISSING = "no Chromium is installed" if CHROMIUM is None else "the Python package playwright is not installed"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason=f"{MISSING}; pages are not looked at in a browser"
)


class Tab:
    """A page in the browser, and everything that it complained about."""

    def __init__(self, browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page, self.complaints, self.requests = self.context.new_page(), list[str](), list[str]()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def drawn(self) -> int:
        """Scrolls to every chart; how many of them have been drawn then."""
        charts = self.page.locator("[role=img]").all()
        for chart in charts:
            chart.scroll_into_view_if_needed()
            chart.locator(".main-svg").first.wait_for(state="attached")
        return len(charts)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    alone = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=alone)
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pages") / "report.html"
    file.write_text(run_html(full_run()), encoding="utf-8")
    return file


def test_a_report_opens_whole_and_quiet(browser: Any, file: Path) -> None:
    tab = Tab(browser, file)
    assert tab.drawn() == 8
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [file.as_uri()]
    page = tab.page
    assert page.get_by_role("main").get_by_role("heading", name="demo, pruned").count() == 1
    assert page.get_by_role("navigation").get_by_role("link", name="What every layer keeps").count() == 1
    table = page.get_by_role("table", name="Everything that was measured")
    row = table.get_by_role("row", name="perplexity demo @128").get_by_role("cell")
    assert row.all_inner_texts() == ["20.00", "30.00", "+50.0\u00a0%"]
    assert page.get_by_role("img", name="1,024 to 1,124 of 1,536 channels stay").count() == 1
    tab.context.close()


def test_it_follows_the_theme_and_is_worked_by_keys(browser: Any, file: Path) -> None:
    tab = Tab(browser, file, scheme="dark")
    page = tab.page
    page.get_by_role("img").first.locator(".main-svg").first.wait_for(state="attached")

    def look() -> tuple[str, str]:
        return page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, document.querySelector('.chart .bars path').style.fill]"
        )

    dark = look()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.keyboard.press("Enter")
    light = look()
    assert all(before != now for before, now in zip(dark, light, strict=True))  # the page, and the bars in it
    assert page.get_by_role("button", name="Dark theme", pressed=False).count() == 1
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("table", name="Units that stay, by layer").is_visible()
    assert tab.complaints == []
    tab.context.close()


@pytest.mark.parametrize("name", ["run", "recovery", "comparison"])
def test_it_fits_a_phone(browser: Any, file: Path, tmp_path: Path, name: str) -> None:
    pages = {
        "recovery": lambda: recovery_html(recovered()),
        "comparison": lambda: comparison_html(comparison({"a": a_run(900, 25), "b": a_run(800, 30)})),
    }
    if name in pages:
        file = tmp_path / "page.html"
        file.write_text(pages[name](), encoding="utf-8")
    tab = Tab(browser, file, width=360)
    assert tab.drawn() > 1
    for part in tab.page.locator("summary").all():
        part.click()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
    assert tab.complaints == []
    tab.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_no_script_of_a_stranger_runs(browser: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGES[name](), encoding="utf-8")
    tab = Tab(browser, file)
    assert tab.drawn() > 0
    for part in tab.page.locator("summary").all():
        part.click()
    for chart in tab.page.locator(".main-svg").all():
        chart.hover(force=True)
    assert tab.page.evaluate("window.ran") is None
    assert tab.page.evaluate("document.querySelectorAll('main a, img, iframe, .main-svg a').length") == 0
    assert [url for url in tab.requests if not url.startswith("data:")] == [file.as_uri()]
    assert tab.complaints == []
    tab.context.close()


def test_a_script_that_got_into_a_page_would_not_run(browser: Any, file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    injected = '<script>window.ran=1</script><img src=x onerror="window.ran=1"><main id="content"'
    page.write_text(file.read_text(encoding="utf-8").replace('<main id="content"', injected), encoding="utf-8")
    tab = Tab(browser, page)
    assert tab.drawn() == 8
    assert tab.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)
    tab.context.close()
