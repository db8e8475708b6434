"""What reaches a terminal: text of models, files and libraries as characters, never as commands to it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from resect.errors import UNPRINTABLE, printable

WIDTH = 100
"""Columns where the output is no terminal."""
CURSOR_UP = re.compile(r"(\x1b\[A)+")
COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")


class Plain(Console):
    """A console that shows control characters of what it prints."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of text without control characters; those that rich itself makes (`control`) stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Leaves to the caller what rich would end the program for."""
        raise BrokenPipeError


class Guarded:
    """A stream for what libraries print: their text without control characters, their progress bars and colours as they are."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes a text; a carriage return counts at its beginning, moves of the cursor alone.

        A stream that takes no more loses it: nothing ends for what libraries print.
        """
        with suppress(OSError):
            self._write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what was written, as far as that can be done."""
        with suppress(OSError):
            self.stream.flush()

    def _write(self, text: str) -> None:
        if not UNPRINTABLE.search(text) or CURSOR_UP.fullmatch(text):
            self.stream.write(text)
        else:
            first = "\r" if text.startswith("\r") else ""
            self.stream.write(first + self._without_commands(text.removeprefix(first)))

    def _without_commands(self, text: str) -> str:
        if not self.stream.isatty():
            return printable(text)
        parts = COLOURS.split(text)  # every other one is a colour
        return "".join(part if place % 2 else printable(part) for place, part in enumerate(parts))

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guarded(stream: TextIO) -> TextIO:
    """The stream for libraries to print on; itself where it is that already."""
    return stream if isinstance(stream, Guarded) else cast(TextIO, Guarded(stream))


def console(*, stderr: bool = False) -> Console:
    """Where text goes, at least 100 columns wide where it is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return console_on(stream)


def console_on(stream: TextIO, *, soft_wrap: bool = False) -> Console:
    """A console on a stream; it reads no markup and no names of pictures (`:x:`) in what it prints."""
    inner = stream.stream if isinstance(stream, Guarded) else stream
    width = None if inner.isatty() else WIDTH
    return Plain(file=inner, width=width, highlight=False, emoji=False, markup=False, soft_wrap=soft_wrap)


def json_line(text: str) -> str:
    """JSON with characters that terminals obey written as `\\u009b`; it means the same."""
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
