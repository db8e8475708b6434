"""Words of a command line as values."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from resect.errors import UsageError


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {place: value for place, value in flags.items() if value is not None}


def nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted place as nested mappings."""
    values: dict[str, Any] = {}
    for place, value in flags.items():
        *sections, key = place.split(".")
        inside = values
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[key] = value
    return values


def numbers(text: str, *, flag: str) -> list[int]:
    """The whole numbers of "128,2048"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r} was given; it is one number or several: 128,2048.") from None


def shares(text: str, *, flag: str) -> list[float]:
    """The numbers of "0.25,0.5"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r} was given; it is one number or several: 0.25,0.5.") from None


def by_kind(text: str, *, flag: str) -> dict[str, int]:
    """The numbers of "channels=1024,heads=2"."""
    found: dict[str, int] = {}
    for part in text.split(","):
        kind, equals, number = part.partition("=")
        if not equals or not number.strip().isdecimal() or kind.strip() in found:
            raise UsageError(
                f"{flag} {text!r} was given; it is a number for each kind of unit: channels=1024,heads=2."
            )
        found[kind.strip()] = int(number)
    return found


def number_or_by_kind(text: str, *, flag: str) -> int | dict[str, int]:
    """The number of "64", or the numbers of "heads=4,channels=64"."""
    return int(text) if text.strip().isdecimal() else by_kind(text, flag=flag)


def version_of_resect() -> str:
    """The installed version."""
    try:
        return importlib.metadata.version("resect")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
