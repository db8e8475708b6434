"""What a command says, and where: results on stdout, everything else on stderr, errors without a traceback."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

import typer
from rich.markup import escape

from resect.cli.ending import Ended, ended_by_signals
from resect.cli.terminal import console, guarded, json_line
from resect.errors import ResectError, ResectWarning, UsageError, printable
from resect.explain import telling

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERRUPTED = 130
"""The shell's exit code for Ctrl-C."""
BROKEN_PIPE = 141
"""The shell's exit code for a program whose reader has gone."""

LAST_STREAM = 2
"""The number of stderr, the last of the three that every program starts with."""


@dataclass
class Answer:
    """Collects what goes to stdout; `announce` speaks on stderr meanwhile."""

    json: str = "{}"
    shown: list[RenderableType] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def announce(self, what: str) -> None:
        """Says on stderr what begins, and how long the command has been running."""
        with suppress(OSError):  # the work goes on without a log
            console(stderr=True).print(f"[dim]{time.monotonic() - self.started:6.0f} s[/dim]  {escape(what)}", markup=True)

    def give(self, as_json: str, *shown: RenderableType) -> None:
        """The result: a JSON object for machines, and what people see instead."""
        self.json, self.shown = as_json, list(shown)


@dataclass(frozen=True)
class Refusal:
    """How a command ends that has no result."""

    kind: str
    message: str
    code: int = 1
    word: str = "error"
    notes: Sequence[str] = ()


@contextmanager
def answering(*, as_json: bool, doing: str = "carry out the command") -> Iterator[Answer]:
    """Runs a command's one library call: then prints its result, or its error, and exits 2 for a request that cannot be meant.

    Other errors exit 1, Ctrl-C 130, SIGTERM 143, SIGHUP 129, a reader of the output that has gone 141; none ends
    without a line on stderr. What is no error of ours is a fault of resect's, and its traceback is kept in a file.
    With `as_json` stdout holds exactly one JSON object, an error too.
    """
    _open_streams()
    answer, stdout = Answer(), sys.stdout
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not every stream has an encoding
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    quiet = guarded(sys.stderr)
    try:
        # What libraries print is no result.
        with redirect_stdout(quiet), redirect_stderr(quiet), warnings.catch_warnings(), telling(doing), ended_by_signals():
            warnings.showwarning = _warn
            yield answer
        _print(answer, stdout, as_json=as_json)
    except typer.Exit:
        raise
    except BaseException as problem:
        refusal = _refused(problem)
        lost = isinstance(problem, BrokenPipeError | OutputLost)
        _say(refusal, as_json=as_json and not lost)
        if lost:
            close(stdout)
        raise typer.Exit(refusal.code) from None


class OutputLost(ResectError):
    """The result cannot be written to stdout."""


def _open_streams() -> None:
    """What the caller closed leads nowhere, instead of into the next file that is opened."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= LAST_STREAM:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)


def _print(answer: Answer, stdout: TextIO, *, as_json: bool) -> None:
    try:
        if as_json:
            print(json_line(json.dumps(json.loads(answer.json), ensure_ascii=False)), file=stdout)
        for part in () if as_json else answer.shown:
            console().print(part)
        stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as problem:
        said = problem.strerror or str(problem)
        raise OutputLost(
            f"The result is complete, but cannot be printed: {said}. See where stdout goes."
        ) from problem


def _refused(problem: BaseException) -> Refusal:
    """What is said of whatever ended a command."""
    notes = tuple(getattr(problem, "__notes__", ()))
    kind = type(problem).__name__
    match problem:
        case UsageError():
            return Refusal(kind, str(problem), 2, notes=notes)
        case ResectError():
            return Refusal(kind, str(problem), notes=notes)
        case Ended():
            return Refusal("Interrupted", f"Stopped by {problem}.", problem.code, "interrupted", notes)
        case KeyboardInterrupt() | typer.Abort():
            return Refusal("Interrupted", "Stopped by the keyboard.", INTERRUPTED, "interrupted", notes)
        case BrokenPipeError():
            return Refusal(kind, "What reads the output has gone; the rest of it was not written.", BROKEN_PIPE, notes=notes)
        case EOFError():
            message = "Something that was being read ended too early: a file that is empty or cut off, or the input."
            return Refusal(kind, message + _kept(problem), notes=notes)
        case SystemExit():
            return Refusal(kind, f"A library ended the program (exit code {problem.code})." + _kept(problem), notes=notes)
    said = " ".join(str(problem).split())[:300]
    message = f"This is a fault of resect's: {kind}: {said}" if said else f"This is a fault of resect's: {kind}"
    return Refusal("Fault", f"{message.rstrip('.')}. Please report it." + _kept(problem), notes=notes)


def _kept(problem: BaseException) -> str:
    """Where a file says how it came to a fault."""
    text = "".join(traceback.format_exception(problem))
    try:
        descriptor, name = tempfile.mkstemp(prefix="resect-fault-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:  # a full disk, or none
        last = traceback.extract_tb(problem.__traceback__)[-1:]
        return "".join(f" It came up in {frame.filename}, line {frame.lineno}." for frame in last)
    return f" How it came to that is in {name}."


def close(stdout: TextIO) -> None:
    """Lets the interpreter end without another complaint about a pipe that nobody reads."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours in a line of their own, others as Python shows them."""
    with suppress(OSError):
        if issubclass(category, ResectWarning):
            console(stderr=True).print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True, markup=True)
        else:
            sys.stderr.write(printable(warnings.formatwarning(message, category, filename, lineno, line)))


def _say(refusal: Refusal, *, as_json: bool) -> None:
    with suppress(OSError):
        out = console(stderr=True)
        out.print(f"[bold red]{refusal.word}:[/] {escape(refusal.message)}", soft_wrap=True, markup=True)
        for note in refusal.notes:
            out.print(note, soft_wrap=True)
    if not as_json:
        return
    with suppress(OSError):
        said = {"type": refusal.kind, "message": refusal.message, "notes": list(refusal.notes)}
        print(json_line(json.dumps({"error": said}, ensure_ascii=False)), flush=True)
