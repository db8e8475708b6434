"""What every format says of itself, and what it is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from resect.checkpoint.card import About
from resect.errors import UsageError, nearest


@dataclass(frozen=True)
class Asked:
    """A model and how it is to be written."""

    model: PreTrainedModel
    tokenizer: Any
    quantize: str
    about: About = field(default_factory=About)


@dataclass(frozen=True)
class Limits:
    """How far a reader may be off torch with the same weights, nats, besides what its rounding does to this model."""

    difference: float | None
    """The largest difference of log-probabilities; None where only the divergence counts."""
    divergence: float
    """The mean Kullback-Leibler divergence."""


@dataclass(frozen=True)
class Format:
    """One format: how it is written, who reads it, and how far that reader's log-probabilities may be off.

    `write` puts the artefact at a path and gives facts about it. `stored` is the model with its weights as precise as the
    artefact holds them, so that what differs then is the reader.
    """

    name: str
    consumer: str
    """Who reads it, as `consume` knows it."""
    suffix: str
    """Of a single file; empty for a directory."""
    quantisations: tuple[str, ...]
    """The first is the default."""
    write: Callable[[Asked, Path], dict[str, Any]]
    check: Callable[[Asked], None]
    """Raises `UsageError`, before anything is written, for a model that the format cannot take."""
    limits: Callable[[Asked], Limits]
    stored: Callable[[Asked], PreTrainedModel] = lambda asked: asked.model
    rounding: Callable[[Asked, PreTrainedModel], AbstractContextManager[None]] = lambda asked, model: nullcontext()
    """While it lasts, a model rounds what goes into its matrix products as the reader does."""
    writers: Mapping[str, str] = field(default_factory=dict)
    """Packages that write it, by the module that shows that they are there."""
    readers: Mapping[str, str] = field(default_factory=dict)
    """Packages that read it back."""
    magic: bytes = b""
    """What a single file begins with."""
    extra: str = ""
    """The extra of this package that brings them."""


def quantisation(form: Format, asked: str | None) -> str:
    """The quantisation that was asked for, or the format's default."""
    if asked is None:
        return form.quantisations[0]
    if asked.lower() not in form.quantisations:
        others = "" if form.name == "gguf" else " Other types: --format gguf has the most."
        raise UsageError(
            f"Asked to write {form.name} with quantize={asked!r}. {nearest(asked.lower(), form.quantisations)}{others}"
        )
    return asked.lower()


def require(packages: Mapping[str, str], extra: str, what: str, alternative: str = "") -> None:
    """Raises `UsageError`, naming the extra, if one of the packages is not installed."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"{what} needs {' and '.join(missing)}: pip install 'resect[{extra}]'. {alternative}".strip())
