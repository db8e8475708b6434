"""Numbers that someone gave, checked where they come in: in settings by pydantic, in calls of functions one by one.

A number that cannot be meant is refused by the name of its place, its value and the range it may have: NaN, infinity, booleans,
fractions of what is counted, and counts that no machine can hold.
"""

from __future__ import annotations

from math import isfinite
from operator import index
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from resect.errors import UsageError, shown

MOST = 2**31 - 1
"""The largest count: of windows, tokens in one, steps, rounds."""
MOST_SEED = 2**32 - 1
"""The largest seed; numpy, which the Trainer seeds too, takes no larger one."""
MOST_TOKENS = 2**53
"""The most tokens or bytes in all; whole numbers up to here are exact as floats, too."""


def whole(place: str, value: Any, *, low: int = 1, high: int = MOST) -> int:
    """`value` as a whole number from `low` to `high`; raises `UsageError` with the `place` for anything else."""
    try:
        number = None if _is_truth(value) else index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise UsageError(f"{place}={shown(value)} was given; it is a whole number from {low} to {high}.")
    return number


def seed_of(value: Any, place: str = "seed") -> int:
    """A seed; raises `UsageError` for what is none."""
    return whole(place, value, low=0, high=MOST_SEED)


def share(place: str, value: Any, *, zero: bool = False) -> float:
    """`value` as a share in (0, 1], or [0, 1] where it may be `zero`; raises `UsageError` for anything else."""
    number = _real(value)
    if number is None or not (0 < number <= 1 or zero and number == 0):
        raise UsageError(f"{place}={shown(value)} was given; it is a share and lies in {'[' if zero else '('}0, 1].")
    return number


def amount(place: str, value: Any, *, low: float = 0.0) -> float:
    """`value` as a finite number of at least `low`; raises `UsageError` for anything else."""
    number = _real(value)
    if number is None or number < low:
        raise UsageError(f"{place}={shown(value)} was given; it is a finite number of at least {low:g}.")
    return number


def _is_truth(value: Any) -> bool:
    """Whether a value is true or false, of Python, numpy or torch."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _real(value: Any) -> float | None:
    """A finite float, None for anything else."""
    if _is_truth(value) or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if isfinite(number) else None


class Numbers(BaseModel):
    """Settings whose numbers are finite, are no booleans, and count no more than `MOST` unless a field says how many."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _leaves(cls.model_fields[info.field_name or ""].annotation)
        if kinds & {int, float} and not kinds & {bool, Any} and any(isinstance(one, bool) for one in _parts(value)):
            raise PydanticCustomError("no_number", "it must be a number, not true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        free = any(hasattr(one, "le") for one in field.metadata) or Any in _leaves(field.annotation)
        if not free and any(type(one) is int and abs(one) > MOST for one in _parts(value)):
            raise PydanticCustomError("less_than_equal", "", {"le": MOST})
        return value


def _leaves(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    inner = get_args(annotation)
    return {kind for one in inner for kind in _leaves(one)} if inner else {annotation} if _hashable(annotation) else set()


def _hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


def _parts(value: Any) -> list[Any]:
    """A value, or all values in its lists and mappings."""
    if isinstance(value, dict):
        return [part for one in value.values() for part in _parts(one)]
    if isinstance(value, list | tuple):
        return [part for one in value for part in _parts(one)]
    return [value]
