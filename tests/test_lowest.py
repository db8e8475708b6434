"""What pyproject.toml requires: all that is imported, each with the lower bound that `make test-lowest` installs."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.lowest import PYPROJECT, lowest, requirements

SOURCES = PYPROJECT.parent / "src" / "resect"
EXTRAS = ["eval", "llama-cpp", "onnx", "quant"]
PARTS = {"pydantic_core"}  # of which pydantic requires one release


def test_every_requirement_has_a_lower_bound() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for requirement in requirements():
        assert lowest(requirement).startswith(requirement.partition(">=")[0] + "==")
    assert len(requirements(extras)) > len(requirements(EXTRAS)) > len(requirements()) > 15


def test_the_extra_of_a_package_is_no_part_of_its_constraint() -> None:
    assert lowest("lm-eval[hf]>=0.4.13") == "lm-eval==0.4.13"


@pytest.mark.parametrize("requirement", ["torch", "torch>2", "torch>=2,<3", "torch>=2.*", "torch>="])
def test_a_requirement_without_a_plain_lower_bound_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match=r"has no plain lower bound"):
        lowest(requirement)


def test_every_package_that_is_imported_is_required() -> None:
    required = {_normal(lowest(requirement).partition("==")[0]) for requirement in requirements(EXTRAS)}
    distributions = packages_distributions()
    imported = {name for path in SOURCES.glob("**/*.py") for name in _imported(path)}
    assert {"torch", "transformers", "numpy", "yaml"} <= imported
    missing = {
        name
        for name in imported - sys.stdlib_module_names - {"resect"} - PARTS
        if not required & {_normal(owner) for owner in distributions.get(name, [name])}
    }
    assert not missing


def _imported(path: Path) -> Iterator[str]:
    """The outermost packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
