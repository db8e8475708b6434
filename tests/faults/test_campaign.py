"""A few faults of every sort in a few runs, and a few files damaged; all of them are `make faults`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults import injection
from tests.faults.machine import World, machine_of
from tests.faults.readers import TARGETS, Readers
from tests.faults.runs import RUNS
from tests.faults.trials import Trial
from tests.faults.values import examples, write_counts


@pytest.fixture(scope="module", autouse=True)
def _shims() -> Iterator[None]:
    """Replaced functions do nothing without an active shim; they are put back all the same."""
    injection.install()
    yield
    injection.uninstall()


@pytest.mark.parametrize("name", ["run: llm-surgeon, resumed", "inspect: a picture"])
def test_some_faults_in(name: str, tmp_path: Path) -> None:
    for verdicts in Trial(RUNS[name], tmp_path / "work", most=2).all():
        assert verdicts.tried >= 2
        assert not verdicts.wrong


GIVEN = (
    "config.json",
    "index of shards",
    "tokenizer.json",
    "chat template",
    "text",
    "task",
    "recipe",
)


def test_some_damage_to_some_files(tmp_path: Path) -> None:
    readers = Readers(tmp_path / "work", made=False)
    for target in TARGETS:
        if target.name in GIVEN:
            damage = readers.damaged(target, count=2, seed=11)
            assert damage.tried >= 2
            assert not damage.wrong, target.name


def test_a_run_directory_in_the_hands_of_chance(tmp_path: Path) -> None:
    machine = machine_of(World(tmp_path))
    run_state_machine_as_test(machine, settings=settings(examples(2), stateful_step_count=4))
    write_counts()
