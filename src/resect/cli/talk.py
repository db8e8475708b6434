"""A conversation in a terminal, line by line, with one model or two."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from resect.cli.terminal import console_on
from resect.errors import UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from resect.evaluation import Conversation

COMMANDS = "/reset forgets what was said, /exit or Ctrl-D ends."


def talk(conversations: Mapping[str, Conversation], out: TextIO) -> None:
    """Answers every line of stdin by every model in turn until the lines, or the patience, end."""
    console = console_on(out, soft_wrap=True)
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(COMMANDS, style="dim")
    for line in _lines(console if interactive else None):
        if line == "/exit":
            return
        if line == "/reset":
            for conversation in conversations.values():
                conversation.reset()
            console.print("forgotten", style="dim")
        elif line.startswith("/"):
            console.print(f"There is no command {line.split()[0]}: {COMMANDS}", style="yellow", markup=False)
        else:
            for name, conversation in conversations.items():
                _answer(console, name if len(conversations) > 1 else "", conversation, line)


def _lines(console: Console | None) -> Iterator[str]:
    """The lines that are typed, or piped, none of them empty."""
    while True:
        if console:
            console.print("> ", style="bold", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(console: Console, name: str, conversation: Conversation, message: str) -> None:
    if name:
        console.print(f"{name}:", style="bold", markup=False)
    try:
        said = conversation.say(message, lambda text: _stream(console, text))
    except UsageError as problem:
        console.print(str(problem), style="yellow", markup=False)
        return
    console.print()
    console.print(f"{said.tokens} tokens, {said.tokens / said.seconds:.1f} tokens/s", style="dim")


def _stream(console: Console, text: str) -> None:
    console.file.write(printable(text))
    console.file.flush()
