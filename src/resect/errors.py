"""The errors that resect raises: each says what was asked, what was found, and what to do. And its warnings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

SHOWN = 200
"""Characters of a value that a message shows."""
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey or misplace rather than print: C0 but line break and tab, DEL, C1, separators of lines and
paragraphs, overrides of direction, and halves of surrogate pairs."""
_HALF = re.compile("[\ud800-\udfff]")


class ResectError(Exception):
    """Anything a user can cause; the command line prints it without a traceback."""


class UsageError(ResectError, ValueError):
    """A request that cannot be met: unknown names, shares outside (0, 1], budgets out of reach."""


class ModelError(ResectError):
    """A model that cannot be traced, cut or loaded.

    `groups` names coupled groups without which it may work: those around the code that did not take their new sizes.
    """

    def __init__(self, message: str, groups: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.groups = tuple(groups)


class DataError(ResectError):
    """Text that is missing, empty or too short."""


class NumericsError(ResectError):
    """NaN or infinity where a number was expected; the message names the tensor."""


class CheckpointError(ResectError):
    """A directory that cannot be read or written."""


class OutOfMemory(ResectError):
    """Memory ran out; the message says during what, how much was asked for, and what needs less."""


class ResectWarning(UserWarning):
    """Something that a user should know; the command line prints it as a line of its own."""


class FewPositions(ResectWarning):
    """Calibration data shows a layer fewer positions than it has inputs."""


class DampingRaised(ResectWarning):
    """A factor of curvature could not be inverted with the damping that was asked for."""


class DamagedProgress(ResectWarning):
    """Something that an earlier run noted does not match its digest, and is made anew."""


class OtherMachine(ResectWarning):
    """Something was measured on another machine than this one."""


class OtherLayout(ResectWarning):
    """A uniform layout was asked for, and what is written needs code of its own."""


class EmulatedPrecision(ResectWarning):
    """What is computed in has no instructions on this processor, and takes far longer than float32."""


class SecondTermClipped(ResectWarning):
    """The second Kronecker term of a curvature took more from the first than can be, and was clipped."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known word, or lists them all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."


def shown(value: object, limit: int = SHOWN) -> str:
    """The `repr` of a value, cut after `limit` characters; of values without end only so much is ever looked at."""
    text = ""
    for part in _written(value):
        text += part
        if len(text) > limit:
            return f"{text[:limit]}..."
    return text


def printable(text: str) -> str:
    """A text as a terminal may have it: control characters and the like stand as `\\x1b` or `\\u202e`."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1] if found[0] != "\r" else "\\x0d", text)


def no_text(text: str) -> str:
    """What makes a text none that can be written or tokenised, in words: NUL, or half of a surrogate pair; "" for a good one."""
    if "\0" in text:
        return f"the character NUL at {text.index(chr(0)) + 1:,}"
    found = None if text.isascii() else _HALF.search(text)
    return f"half of a character, {ascii(found[0])[1:-1]}, at {found.start() + 1:,}" if found else ""


def _written(value: object) -> Iterator[str]:
    """The `repr` of a value piece by piece."""
    if isinstance(value, str | bytes):
        yield repr(value) if len(value) <= 2 * SHOWN else repr(value[: 2 * SHOWN])
    elif isinstance(value, int) and value.bit_length() > 4 * SHOWN:  # Python refuses to write out thousands of digits
        yield f"a number of {value.bit_length():,} bits"
    elif type(value) is list:
        yield from _enclosed("[", ([part] for part in value), "]")
    elif type(value) is tuple:
        yield from _enclosed("(", ([part] for part in value), ",)" if len(value) == 1 else ")")
    elif type(value) is dict:
        yield from _enclosed("{", (list(pair) for pair in value.items()), "}")
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        yield f"a {type(value).__name__} of {len(value):,} entries"
    else:
        yield _safe_repr(value)


def _enclosed(first: str, entries: Iterable[list[object]], last: str) -> Iterator[str]:
    """Entries between brackets; of two parts, a key and its value."""
    yield first
    for number, entry in enumerate(entries):
        yield ", " if number else ""
        yield from _written(entry[0])
        if len(entry) == 2:
            yield ": "
            yield from _written(entry[1])
    yield last


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # a stranger's object
        return f"a {type(value).__name__}"
