"""Surgery records as plain values: read off a model, and two in a row written as one."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch import nn

Record = dict[str, Any]

EMPTY: Record = {"shapes": {}, "attributes": {}, "silent": {}, "removed": []}


def record_of(model: nn.Module) -> Record:
    """Everything that was ever cut from `model`, in the numbering of the model it began as; empty for a dense model.

    A model loaded from a per-layer checkpoint brings the record of its earlier cuts in `config.resect`; a cut since
    then left `model.resect_record`.
    """
    earlier = getattr(getattr(model, "config", None), "resect", None) or EMPTY
    return compose(earlier, _plain(getattr(model, "resect_record", None)))


def compose(first: Record, second: Record) -> Record:
    """One record that does what `first` and then `second` do; `second` is numbered in the model that `first` left."""
    attributes = {name: dict(values) for name, values in first["attributes"].items()}
    for name, values in second["attributes"].items():
        attributes.setdefault(_before(name, first), {}).update(values)
    shapes = {_before(name, first): list(shape) for name, shape in second["shapes"].items()}
    removed = [*first["removed"], *(_before(name, first) for name in second["removed"])]
    silent = {**first.get("silent", {}), **{_before(name, first): dict(values) for name, values in second["silent"].items()}}
    return {"shapes": {**first["shapes"], **shapes}, "attributes": attributes, "silent": silent, "removed": removed}


def _before(name: str, record: Record) -> str:
    """`name` as it was before the record's blocks were removed: later blocks had higher numbers."""
    for parent in {block.rpartition(".")[0] for block in record["removed"]}:
        head, _, rest = name.removeprefix(parent + ".").partition(".")
        if name.startswith(parent + ".") and head.isdigit():
            gone = {block for block in record["removed"] if block.rpartition(".")[0] == parent}
            left = (number for number in itertools.count() if f"{parent}.{number}" not in gone)
            number = next(itertools.islice(left, int(head), None))
            return ".".join([parent, str(number), *filter(None, [rest])])
    return name


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
