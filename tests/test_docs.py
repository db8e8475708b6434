"""The Python examples of README.md and docs/ run as printed.

The blocks of one page share their names and run from top to bottom in an empty directory.
A block marked ``python no-run`` is shown only.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if page.exists()]
BLOCK = re.compile(r"^```python[ \t]*(?P<options>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__example__"}
    for line, code in examples(page.read_text(encoding="utf-8")):
        # blank lines in front, so that a traceback points at the line of the page
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_examples_are_found_with_their_line_and_no_run_is_respected() -> None:
    page = "Text\n```python\na = 1\n```\n```python no-run\nb = 1\n```\n```bash\nls\n```\n```python\nc = 1\n```\n"
    assert examples(page) == [(2, "a = 1\n"), (11, "c = 1\n")]


def examples(markdown: str) -> list[tuple[int, str]]:
    """The blocks to run: (lines of the page above the code, code)."""
    return [
        (markdown.count("\n", 0, block.start("code")), block["code"])
        for block in BLOCK.finditer(markdown)
        if "no-run" not in block["options"].split()
    ]
