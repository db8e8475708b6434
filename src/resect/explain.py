"""What others refuse, in our words: pydantic, with the dotted place and the nearest valid name; and the operating system.

Beside that, what strangers wrote, as Markdown may hold it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from resect.errors import CheckpointError, OutOfMemory, ResectError, UsageError, nearest, printable, shown
from resect.files.reading import plain_json

Model = TypeVar("Model", bound=BaseModel)

LINES = 8
"""Faults named of one value; the others are counted."""

TYPES = re.compile(r"int|float|bool|str|constrained-\w+|function-\w+\[.*\]|(dict|mapping|list|tuple)\[.*\]|Mapping", re.DOTALL)
"""What pydantic puts in a place for the type, among several, that it read a value as."""
MUST = {
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
    "finite_number": "it must be a finite number",
    "too_long": "it must have at most {max_length} entries",
    "too_short": "it must have at least {min_length} entries",
}
"""Words for numbers out of range and lists that are none, by pydantic's names."""


def explain(
    problem: ValidationError, kind: type[BaseModel], *, at: str = "", besides: Mapping[str, type[BaseModel]] | None = None
) -> str:
    """A line for everything that is wrong with the values for a model of `kind`, which stands at the place `at`.

    `besides` are sections that the values decide about, where names may have been meant to stand.
    """
    found = _nearest_reading(problem.errors(include_url=False))
    lines = list(dict.fromkeys(_line(error, kind, at, besides or {}) for error in found[:LINES]))
    more = [f"{len(found) - LINES} more faults of this kind were found."] if len(found) > LINES else []
    return "\n".join([*lines, *more])


def from_json(kind: type[Model], text: str, what: str) -> Model:
    """A value of `kind` from its JSON; `UsageError` that says where it is not `what`, as in "This is not a plan"."""
    try:
        plain_json(text)  # for NaN, which pydantic takes
        return kind.model_validate_json(text)
    except ValidationError as problem:
        raise UsageError(f"This is not {what}: {explain(problem, kind)}") from problem
    except ValueError as problem:
        raise UsageError(f"This is not {what}: {shown(str(problem))[1:-1]}.") from problem


@contextmanager
def telling(doing: str) -> Iterator[None]:
    """What the machine cannot do becomes an error of ours that says during what: `doing`, as in "prune the model".

    Memory that runs out is `OutOfMemory`, what the operating system refuses a `CheckpointError`; causes and notes are kept.
    Stands around public calls, also as a decorator.
    """
    try:
        yield
    except (ResectError, BrokenPipeError):
        raise
    except (MemoryError, RuntimeError) as problem:
        if not is_of_memory(problem):
            raise
        raise _with_notes(OutOfMemory(_memory_message(doing, problem)), problem) from problem
    except OSError as problem:
        raise _with_notes(CheckpointError(f"Asked to {doing}; {_refusal(problem)}."), problem) from problem


def _with_notes(error: ResectError, problem: BaseException) -> ResectError:
    for note in getattr(problem, "__notes__", []):
        error.add_note(note)
    return error


_ALLOCATORS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "Cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
)
"""What allocators say: torch's on CPUs and on GPUs, the operating system, C++; and Python, without room for a stack."""
_ASKED_FOR = re.compile(r"tried to allocate (\d+ bytes|[\d.]+ ?[KMGT]?i?B)", re.IGNORECASE)


def is_of_memory(problem: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(problem, MemoryError) or any(words in str(problem) for words in _ALLOCATORS)


def _memory_message(doing: str, problem: Exception) -> str:
    found = _ASKED_FOR.search(str(problem))
    much = f", where {_in_units(found[1])} more were asked for" if found else ""
    return (
        f"Asked to {doing}; memory ran out{much}. A narrower type (--dtype bfloat16), a shorter --length, fewer --samples "
        "or a smaller batch need less; other programs on this machine may hold what is missing."
    )


def _in_units(size: str) -> str:
    """`262144000 bytes` as `262.1 MB`; other sizes as they stand."""
    if not size.endswith("bytes"):
        return size
    value, units = float(size.removesuffix(" bytes")), iter(["bytes", "kB", "MB", "GB"])
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}"


def _refusal(problem: OSError) -> str:
    """What the operating system says, and of which file."""
    said = (problem.strerror or str(problem) or type(problem).__name__).rstrip(".")
    places = [shown(place) for place in (problem.filename, problem.filename2) if place is not None]
    return f"{' and '.join(places)}: {said}" if places else said


def _nearest_reading(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Of a value that may be of several types, the faults of the type that it comes nearest to."""
    faults = [error for error in errors if not error["type"].endswith("_type")]

    def is_another_reading(error: ErrorDetails) -> bool:
        place = _trail(error)
        return error["type"].endswith("_type") and any(_trail(one)[: len(place)] == place for one in faults)

    return [error for error in errors if not is_another_reading(error)]


def _trail(error: ErrorDetails) -> list[Any]:
    """The keys that lead to a fault, without pydantic's names of types."""
    return [part for part in error["loc"] if part != "[key]" and not TYPES.fullmatch(str(part))]


def _line(error: ErrorDetails, kind: type[BaseModel], at: str, besides: Mapping[str, type[BaseModel]]) -> str:
    trail = _trail(error)
    place = ".".join(filter(None, [at, *map(str, trail)]))
    given, context = error.get("input"), error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        name, here = str(trail[-1]), _section(kind, trail[:-1])
        below = [".".join([*map(str, trail[:-1]), found]) for found in _below(here, name)]
        below += [f"{section}.{name}" for section, one in besides.items() if len(trail) == 1 and name in one.model_fields]
        hint = f"Did you mean {' or '.join(map(repr, below))}?" if below else nearest(name, list(here.model_fields))
        return f"There is no key {shown(place)}. {hint}"
    if error["type"] == "missing":
        if isinstance(trail[-1], int):
            return f"{place.rpartition('.')[0]} = {shown(given)}: it has too few entries."
        return f"{place} is missing. Give it a value."
    if error["type"] == "value_error":  # ours, and a sentence already
        return str(context["error"])
    if error["type"] == "no_number":
        return f"{place} = {shown(given)}: {error['msg']}."
    if error["type"] == "literal_error":
        options = _options(str(context["expected"]))
        hint = nearest(shown(given).strip("'\""), options)
        if error["loc"][-1] == "[key]":
            return f"There is no key {shown(place)}. {hint}"
        return f"{place} = {shown(given)}: there is no such value. {hint}"
    if error["type"] in MUST:
        return f"{place} = {shown(given)}: {MUST[error['type']].format(**context)}."
    return f"{place} = {shown(given)}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def _options(expected: str) -> list[str]:
    """The words of "'a', 'b' or 'c'"."""
    return [option.strip(" '") for option in expected.replace(" or ", ",").split(",")]


def _section(kind: type[BaseModel], trail: Sequence[Any]) -> type[BaseModel]:
    """The section at the end of a trail of keys."""
    for part in trail:
        below = _sections(kind, part) if part in kind.model_fields else []
        kind = below[0] if below else kind
    return kind


def _sections(kind: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The sections that may stand under a key."""
    annotation = kind.model_fields[key].annotation
    types = [arg for arg in (annotation, *get_args(annotation)) if isinstance(arg, type)]
    return [arg for arg in types if issubclass(arg, BaseModel)]


def _below(kind: type[BaseModel], name: str) -> list[str]:
    """Where a key stands in the sections of a section, as dotted places."""
    inner = [(key, one) for key in kind.model_fields for one in _sections(kind, key)]
    return [f"{key}.{name}" for key, one in inner if name in one.model_fields]


def sizes_asked(settings: Mapping[str, Any]) -> str:
    """What a method's settings say about how much goes; empty where a budget says it."""
    share, widths = settings.get("share"), settings.get("widths")
    if isinstance(share, Mapping):
        return ", ".join(f"{100 * part:g} % of {kind}" for kind, part in share.items()) + " removed from every group"
    if share is not None:
        return f"share {share:g} of every chosen group removed"
    if widths:
        return ", ".join(f"{width:,} {kind}" for kind, width in widths.items()) + " kept in every group"
    plan = [f"the plan {settings['file']}"] if settings.get("file") else []
    numbers = settings.get("drop_blocks") or ()
    blocks = [f"block{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} removed"] if numbers else []
    return ", ".join([*plan, *blocks])


def inline(text: str) -> str:
    """Text on one line that does not end a table cell, and holds no HTML, links or pictures."""
    return plain_text(" ".join(text.split())).replace("|", "\\|")


def plain_text(text: str) -> str:
    """Text in Markdown of which nothing becomes HTML, a link or a picture; control characters are shown."""
    without = re.sub(r"&(?=#?\w+;)", "&amp;", printable(text)).replace("<", "&lt;")
    return re.sub(r"\](?=[(:\[])", "\\]", without)


def code(text: object) -> str:
    """Text between backticks, on one line, which nothing in it can end."""
    return f"`{printable(' '.join(str(text).split())).replace('`', chr(39))}`"
