"""How commands end that have no result: never without a word, never with a traceback; and what reaches a terminal."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
import torch
import typer
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from resect.cli import app, main
from resect.cli.answer import Answer, answering
from resect.cli.terminal import Guarded, console_on
from resect.errors import UNPRINTABLE, DataError, ResectWarning, UsageError, printable, shown

HOSTILE = "\x1b]0;title\x07\x1b[2J a\rb \x9b31m \u202egnp.exe\u2028 \x7f :x: [bold]no[/bold] \ud83d"


ON_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes. Error code 12"
DENIED = PermissionError(13, "Permission denied", "/x/y")


def ended(work: Callable[[Answer], None], *words: str) -> tuple[int, str, str]:
    """The exit code, what stood on stdout and on stderr."""
    program = typer.Typer()

    @program.command()
    def command(json: bool = False) -> None:
        with answering(as_json=json) as answer:
            work(answer)

    result = CliRunner().invoke(program, list(words))
    return result.exit_code, result.stdout, result.stderr


def raising(problem: BaseException) -> Callable[[Answer], None]:
    def work(answer: Answer) -> None:
        raise problem

    return work


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (UsageError("no"), 2, "error: no"),
        (DataError("no"), 1, "error: no"),
        (KeyboardInterrupt(), 130, "interrupted: Stopped"),
        (typer.Abort(), 130, "interrupted: Stopped"),
        (EOFError(), 1, "error: Something that was being read ended too early"),
        (SystemExit(3), 1, "error: A library ended the program (exit code 3)"),
        (BrokenPipeError(), 141, "error: What reads the output has gone"),
        (GeneratorExit(), 1, "error: This is a fault of resect's: GeneratorExit"),
        (TypeError("a" * 9999), 1, "error: This is a fault of resect's: TypeError: aaa"),
        (MemoryError(), 1, "error: Asked to carry out the command; memory ran out."),
        (RuntimeError(ON_CPU), 1, "268.4 MB"),
        (RuntimeError("can't start new thread"), 1, "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), 1, "2.50 GiB more were asked for"),
        (DENIED, 1, "error: Asked to carry out the command; '/x/y': Permission denied."),
        (OSError("connection lost"), 1, "connection lost."),
    ],
)  # fmt: skip
def test_no_command_ends_without_a_word(
    problem: BaseException, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    problem.add_note("Nothing was written.")
    found, stdout, stderr = ended(raising(problem))
    assert (found, stdout) == (code, "")
    assert said in stderr
    assert "Nothing was written." in stderr
    assert "Traceback" not in stderr
    assert len(stderr) < 800
    kept = list(tmp_path.iterdir())
    for file in kept:
        assert str(file) in stderr
        assert file.read_text(encoding="utf-8").startswith("Traceback")
    assert len(kept) == ("How it came" in stderr)


def test_an_error_is_one_object_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    code, stdout, stderr = ended(raising(ValueError(HOSTILE)), "--json")
    assert code == 1
    said = json.loads(stdout)["error"]
    assert said["type"] == "Fault"
    assert "test_answer.py, line" in said["message"]  # where the file cannot be written
    assert not UNPRINTABLE.search(stdout + stderr)


def speaking(answer: Answer) -> None:
    """Puts hostile text wherever a command puts text."""
    answer.announce(HOSTILE)
    warnings.warn(ResectWarning(HOSTILE), stacklevel=1)
    warnings.warn(HOSTILE, stacklevel=1)
    print(HOSTILE)
    table = Table(title=Text(HOSTILE))
    table.add_column(Text(HOSTILE))
    table.add_row(Text(HOSTILE))
    answer.give(json.dumps({"a": HOSTILE}), table, Text(HOSTILE))


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_control_characters_reach_no_terminal(words: list[str]) -> None:
    code, stdout, stderr = ended(speaking, *words)
    assert code == 0
    assert not UNPRINTABLE.search(stdout + stderr)
    assert stderr.count("\\x1b[2J") == 4
    assert "\\x9b31m" in stderr
    assert ":x: [bold]no[/bold]" in stderr
    if words:
        assert json.loads(stdout)["a"] == HOSTILE
    else:
        assert ":x:" in re.sub(r"\s", "", stdout)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_and_colours_of_libraries_stay() -> None:
    out = Terminal()
    stream = Guarded(out)
    for text in ("\r 50%|##", "\x1b[A", "\x1b[31mred\x1b[0m \x1b[2J a\rb\n"):
        stream.write(text)
    assert out.getvalue() == "\r 50%|##\x1b[A\x1b[31mred\x1b[0m \\x1b[2J a\\x0db\n"


def test_colours_of_ours_stay() -> None:
    out = Terminal()
    console_on(out).print(Text("a\x1bb", style="bold"), ":x:")
    assert "a\\x1bb" in out.getvalue()
    assert ":x:" in out.getvalue()


def test_a_model_that_names_itself_with_commands(dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in dense.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": HOSTILE}))
    result = CliRunner().invoke(app, ["inspect", str(model)])
    assert result.exit_code == 1
    assert "\\x1b[2J" in result.stderr
    assert not UNPRINTABLE.search(result.stdout + result.stderr)


def test_values_are_shown_as_far_as_anyone_reads() -> None:
    short = {"a": [1, 2.5, (3,), ()], "b": None, "c": {"d": "e"}}
    assert shown(short) == repr(short)
    several: list[object] = ["x"] * 9
    for _ in range(60):
        several = [several] * 9
    assert len(shown(several)) < 300
    assert shown(10**9000) == "a number of 29,898 bits"
    assert len(shown("x" * 10**6)) < 300
    assert printable("a\tb\nc\r\x1b\x85") == "a\tb\nc\\x0d\\x1b\\x85"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, TextIO | None], None]:
    """Puts a stream in the place of one of the process's own."""

    def put(name: str, stream: TextIO | None) -> None:
        monkeypatch.setattr(sys, name, stream)

    return put


def ends(work: Callable[[Answer], None]) -> int:
    """The exit code of a command whose streams are those of this process."""
    try:
        with answering(as_json=False) as answer:
            work(answer)
    except typer.Exit as ending:
        return ending.exit_code
    return 0


def test_closed_streams_lead_nowhere(streams: Callable[[str, TextIO | None], None]) -> None:
    for name in ("stdin", "stdout", "stderr"):
        streams(name, None)
    assert ends(speaking_plainly) == 0
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


def speaking_plainly(answer: Answer) -> None:
    answer.announce("begin")
    print("a library")
    answer.give("{}", Text("done"))


class Refusing(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, problem: OSError) -> None:
        super().__init__()
        self.problem = problem

    def write(self, text: str) -> int:
        """Fails."""
        raise self.problem


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError()])
def test_a_log_that_cannot_be_written_ends_no_work(
    problem: OSError, streams: Callable[[str, TextIO | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    streams("stderr", Refusing(problem))
    assert ends(speaking_plainly) == 0
    assert capsys.readouterr().out.strip() == "done"


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot be printed: No space left"),
        (BrokenPipeError(), 141, "has gone"),
    ],
)
def test_a_result_that_cannot_be_printed_is_told(
    problem: OSError,
    code: int,
    said: str,
    streams: Callable[[str, TextIO | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    streams("stdout", Refusing(problem))
    assert ends(speaking_plainly) == code
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device without room here")
def test_help_that_cannot_be_printed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["resect", "--help"])
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    assert "stdout cannot be written: No space left" in capsys.readouterr().err
