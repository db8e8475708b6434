"""Surgery records as plain values: read off a model, and two in a row written as one."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from resect.surgery.cut import name_before

Record = dict[str, Any]

EMPTY: Record = {"shapes": {}, "attributes": {}, "silent": {}, "gathered": {}, "removed": []}


def record_of(model: nn.Module) -> Record:
    """Everything that was ever cut from `model`, in the numbering of the model it began as; empty for a dense model.

    A model loaded from a per-layer checkpoint brings the record of its earlier cuts in `config.resect`; a cut since
    then left `model.resect_record`.
    """
    earlier = getattr(getattr(model, "config", None), "resect", None) or EMPTY
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
