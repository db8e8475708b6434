"""What pydantic refuses, in our words: the dotted place, what was found there, and the nearest valid name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from resect.errors import nearest

MUST = {
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
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
    return "\n".join(dict.fromkeys(_line(error, kind, at, besides or {}) for error in problem.errors()))


def _line(error: ErrorDetails, kind: type[BaseModel], at: str, besides: Mapping[str, type[BaseModel]]) -> str:
    trail = [part for part in error["loc"] if part != "[key]"]
    place = ".".join(filter(None, [at, *map(str, trail)]))
    given, context = error.get("input"), error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        name, here = str(trail[-1]), _section(kind, trail[:-1])
        below = [".".join([*map(str, trail[:-1]), found]) for found in _below(here, name)]
        below += [f"{section}.{name}" for section, one in besides.items() if len(trail) == 1 and name in one.model_fields]
        hint = f"Did you mean {' or '.join(map(repr, below))}?" if below else nearest(name, list(here.model_fields))
        return f"There is no key {place!r}. {hint}"
    if error["type"] == "missing":
        if isinstance(trail[-1], int):
            return f"{place.rpartition('.')[0]} = {given!r}: it has too few entries."
        return f"{place} is missing. Give it a value."
    if error["type"] == "value_error":  # ours, and a sentence already
        return str(context["error"])
    if error["type"] == "literal_error":
        options = _options(str(context["expected"]))
        hint = nearest(str(given), options)
        if error["loc"][-1] == "[key]":
            return f"There is no key {place!r}. {hint}"
        return f"{place} = {given!r}: there is no such value. {hint}"
    if error["type"] in MUST:
        return f"{place} = {given!r}: {MUST[error['type']].format(**context)}."
    return f"{place} = {given!r}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def _options(expected: str) -> list[str]:
    """The words of "'a', 'b' or 'c'"."""
    return [option.strip(" '") for option in expected.replace(" or ", ",").split(",")]


def _section(kind: type[BaseModel], trail: Sequence[Any]) -> type[BaseModel]:
    """The section at the end of a trail of keys."""
    for part in trail:
        kind = _sections(kind, part)[0]
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
