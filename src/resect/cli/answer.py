"""What a command says, and where: results on stdout, everything else on stderr, errors without a traceback."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from resect.errors import ResectError, ResectWarning, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERRUPTED = 130
"""The shell's exit code for Ctrl-C."""
WIDTH = 100
"""Columns where the output is no terminal."""


@dataclass
class Answer:
    """Collects what goes to stdout; `announce` speaks on stderr meanwhile."""

    json: str = "{}"
    shown: list[RenderableType] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def announce(self, what: str) -> None:
        """Says on stderr what begins, and how long the command has been running."""
        console(stderr=True).print(f"[dim]{time.monotonic() - self.started:6.0f} s[/dim]  {escape(what)}")

    def give(self, as_json: str, *shown: RenderableType) -> None:
        """The result: a JSON object for machines, and what people see instead."""
        self.json, self.shown = as_json, list(shown)


@contextmanager
def answering(*, as_json: bool) -> Iterator[Answer]:
    """Runs a command's one library call: then prints its result, or its error, and exits 2 for a request that cannot be meant.

    Other errors of ours exit 1, Ctrl-C 130. With `as_json` stdout holds exactly one JSON object, an error too.
    """
    answer, stdout = Answer(), sys.stdout
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():  # whatever libraries print is no result
            warnings.showwarning = _warn
            yield answer
    except ResectError as problem:
        _say_error(problem, as_json=as_json)
        raise typer.Exit(2 if isinstance(problem, UsageError) else 1) from None
    except KeyboardInterrupt as problem:
        _say_error(problem, as_json=as_json)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(json.dumps(json.loads(answer.json), ensure_ascii=False), file=stdout)
    for part in () if as_json else answer.shown:
        console().print(part)


def console(*, stderr: bool = False) -> Console:
    """Where text goes, at least 100 columns wide where it is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours in a line of their own, others as Python shows them."""
    if issubclass(category, ResectWarning):
        console(stderr=True).print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _say_error(problem: BaseException, *, as_json: bool) -> None:
    notes = getattr(problem, "__notes__", [])
    interrupted = isinstance(problem, KeyboardInterrupt)
    kind = "Interrupted" if interrupted else type(problem).__name__
    message = "Stopped by the keyboard." if interrupted else str(problem)
    out = console(stderr=True)
    out.print(f"[bold red]{'interrupted' if interrupted else 'error'}:[/] {escape(message)}", soft_wrap=True)
    for note in notes:
        out.print(escape(note), soft_wrap=True)
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message, "notes": list(notes)}}, ensure_ascii=False))
