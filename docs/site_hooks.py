"""What the documentation links to beside docs/ becomes part of the site: results, recipes, examples, the architecture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("ARCHITECTURE.md", "CHANGELOG.md", "benchmarks/results/*.md", "recipes/*.yaml", "examples/*.py")
RUNS = re.compile(r"^```python no-run$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the files beside docs/; results are reached by links and need no place in the navigation."""
    for path in (path for pattern in BESIDE for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
        if name.startswith("benchmarks/"):
            files.get_file_from_path(name).inclusion = type(files.get_file_from_path(name).inclusion).NOT_IN_NAV
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ lead to the same file on the site; what tests read in a fence is not shown."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\(docs/", f"]({up}", markdown) if page.file.generated_by else re.sub(r"\]\(\.\./", "](", markdown)
    return RUNS.sub("```python", markdown)
