"""What pydantic refuses, in our words: the dotted place, what was found there, and the nearest valid name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from resect.errors import nearest

LIMITS = {
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
}
"""Words for numbers out of range, by pydantic's names."""


def explain(problem: ValidationError, kind: type[BaseModel], *, at: str = "") -> str:
    """A line for everything that is wrong with the values for a model of `kind`, which stands at the place `at`."""
    return "\n".join(dict.fromkeys(_line(error, kind, at) for error in problem.errors()))


def _line(error: ErrorDetails, kind: type[BaseModel], at: str) -> str:
    trail = [part for part in error["loc"] if part != "[key]"]
    place = ".".join(filter(None, [at, *map(str, trail)]))
    given, context = error.get("input"), error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"There is no key {place!r}. {nearest(str(trail[-1]), _keys(kind, trail[:-1]))}"
    if error["type"] == "missing":
        return f"{place} is missing. Give it a value."
    if error["type"] == "value_error":  # ours, and a sentence already
        return str(context["error"])
    if error["type"] == "literal_error":
        options = _options(str(context["expected"]))
        hint = nearest(str(given), options)
        if error["loc"][-1] == "[key]":
            return f"There is no key {place!r}. {hint}"
        return f"{place} = {given!r}: there is no such value. {hint}"
    if error["type"] in LIMITS:
        return f"{place} = {given!r}: {LIMITS[error['type']].format(**context)}."
    return f"{place} = {given!r}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def _options(expected: str) -> list[str]:
    """The words of "'a', 'b' or 'c'"."""
    return [option.strip(" '") for option in expected.replace(" or ", ",").split(",")]


def _keys(kind: type[BaseModel], trail: Sequence[Any]) -> list[str]:
    """The keys that are valid at the end of a trail of keys."""
    for part in trail:
        annotation = kind.model_fields[part].annotation
        sections = [arg for arg in (annotation, *get_args(annotation)) if isinstance(arg, type)]
        kind = next(arg for arg in sections if issubclass(arg, BaseModel))
    return list(kind.model_fields)
