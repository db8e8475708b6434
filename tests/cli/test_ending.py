"""Signals end a command as Ctrl-C does."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from resect.cli.answer import answering
from resect.cli.ending import ended_by_signals
from resect.files import whole_directory


@pytest.fixture
def by_default() -> Iterator[None]:
    """Signals as a terminal sends them, also where these tests run under nohup, which ignores one."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("by_default")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cleans_up_and_has_its_code(
    tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, answering(as_json=True), whole_directory(tmp_path / "out"):
        os.kill(os.getpid(), number)
    assert ended.value.exit_code == code
    assert os.listdir(tmp_path) == []
    captured = capsys.readouterr()
    assert f"interrupted: Stopped by {number.name}." in captured.err
    assert json.loads(captured.out)["error"]["type"] == "Interrupted"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_signals_that_others_handle_or_ignore_are_theirs() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_nothing_changes() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with ended_by_signals():
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        except BaseException as problem:
            errors.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
