"""Surgery records as plain values: read off a model, and two in a row written as one."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from torch import nn

from resect.errors import CheckpointError
from resect.surgery.cut import name_before
from resect.surgery.modeling_resect import MOST_AXES, MOST_RETURNS, MOST_WIDTH

Record = dict[str, Any]

EMPTY: Record = {"shapes": {}, "attributes": {}, "silent": {}, "gathered": {}, "removed": []}


def record_of(model: nn.Module) -> Record:
    """Everything that was ever cut from `model`, in the numbering of the model it began as; empty for a dense model.

    A model loaded from a per-layer checkpoint brings the record of its earlier cuts in `config.resect`; a cut since
    then left `model.resect_record`.
    """
    loaded = getattr(model, "resect_earlier", None)  # of a network that is no model of transformers
    earlier = getattr(getattr(model, "config", None), "resect", None) or loaded or EMPTY
    return compose(earlier, _plain(getattr(model, "resect_record", None)))


def compose(first: Record, second: Record) -> Record:
    """One record that does what `first` and then `second` do; `second` is numbered in the model that `first` left."""
    gone = first["removed"]
    attributes = {name: dict(values) for name, values in first["attributes"].items()}
    for name, values in second["attributes"].items():
        attributes.setdefault(name_before(name, gone), {}).update(values)
    shapes = {name_before(name, gone): list(shape) for name, shape in second["shapes"].items()}
    joined: Record = {"shapes": {**first["shapes"], **shapes}, "attributes": attributes}
    for key in ("silent", "gathered"):
        later = {name_before(name, gone): dict(values) for name, values in second.get(key, {}).items()}
        joined[key] = {**first.get(key, {}), **later}
    return {**joined, "removed": [*gone, *(name_before(name, gone) for name in second["removed"])]}


def _plain(record: Any) -> Record:
    """A record as a dictionary, whichever way it was kept."""
    if record is None:
        return EMPTY
    if hasattr(record, "model_dump"):
        plain = record.model_dump(mode="json")
    elif dataclasses.is_dataclass(record) and not isinstance(record, type):
        plain = dataclasses.asdict(record)
    else:
        plain = dict(record)
    return {key: plain.get(key) or empty for key, empty in EMPTY.items()}


def check_record(value: Any, where: str) -> None:
    """Refuses a record that no surgery wrote, before anything is built from it.

    Raises `CheckpointError` naming `where`: for other types, sizes out of range, names that are no paths of modules, and
    attributes that are private.
    """
    try:
        _Stored.model_validate(value)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(str(part)[:100] for part in ("resect", *first["loc"]))
        raise CheckpointError(f"{where}: the surgery record is damaged at {place}: {first['msg']}.") from problem
    except RecursionError as problem:
        raise CheckpointError(f"{where}: the surgery record is nested too deep.") from problem


Size = Annotated[int, Field(strict=True, ge=0, le=2**31)]
Name = Annotated[str, Field(max_length=500, pattern=r"^[A-Za-z0-9_.]*$")]
Attribute = Annotated[str, Field(max_length=200, pattern=r"^((config\.)?[A-Za-z]|_)[A-Za-z0-9_]*(/[A-Za-z0-9_]+)*$")]
Block = Annotated[str, Field(max_length=500, pattern=r"^[A-Za-z0-9_.]+\.[0-9]{1,5}$")]
Number = Annotated[int, Field(strict=True, ge=-(2**31), le=2**31)] | Annotated[float, Field(allow_inf_nan=False)]


class _Silence(BaseModel, extra="forbid"):
    """What a stand-in puts out: zeros of a width along an axis, in a tuple of so many items."""

    width: Annotated[int, Field(strict=True, ge=1, le=MOST_WIDTH)]
    axis: Annotated[int, Field(strict=True, ge=-MOST_AXES, le=-1)] = -1
    returns: Annotated[int, Field(strict=True, ge=0, le=MOST_RETURNS)]


class _Gathered(BaseModel, extra="forbid"):
    """How many rows and columns a layer keeps; None for all."""

    rows: Size | None
    columns: Size | None


class _Stored(BaseModel, extra="forbid"):
    """A record as `config.json` may hold it."""

    shapes: dict[Name, Annotated[list[Size], Field(max_length=8)]] = {}
    attributes: dict[Name, dict[Attribute, Number | Annotated[list[int], Field(max_length=1000)] | None]] = {}
    silent: dict[Name, _Silence] = {}
    gathered: dict[Name, _Gathered] = {}
    removed: Annotated[list[Block], Field(max_length=10_000)] = []
