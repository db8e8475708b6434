"""The tiny model and its text, once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.dense import write_dense, write_text


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "river.txt")
