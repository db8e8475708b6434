"""The decision as a value: which units stay, numbered as in the dense model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from resect.errors import UsageError
from resect.explain import from_json
from resect.ranges import MOST

Count = Annotated[int, Field(strict=True, ge=0, le=MOST)]
"""A whole number of units, or the number of one; true is none."""


class Kept(BaseModel):
    """The units of one coupled group that stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    layer: Count | None
    units: Count
    keep: tuple[Count, ...]

    @field_validator("keep")
    @classmethod
    def _sorted(cls, keep: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(set(keep)) != list(keep):
            raise ValueError("unit numbers must be unique and ascending")
        return keep

    @model_validator(mode="after")
    def _within(self) -> Kept:
        if self.keep and not (self.keep[0] >= 0 and self.keep[-1] < self.units):
            raise ValueError(f"units are numbered 0 to {self.units - 1}")
        return self

    @property
    def removed(self) -> int:
        """How many units go."""
        return self.units - len(self.keep)


class Plan(BaseModel):
    """Which units of which coupled groups stay; a group that is not named stays whole.

    Plain JSON, numbered as in the dense model. `a & b` keeps what both keep, so shots compose by intersection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    groups: Mapping[str, Kept] = {}
    notes: Mapping[str, Any] = {}

    def removed(self) -> dict[str, int]:
        """Units removed by group, groups that stay whole left out."""
        return {name: kept.removed for name, kept in self.groups.items() if kept.removed}

    def of_layer(self, layer: int | None) -> Plan:
        """The part of the plan that is about one block."""
        return Plan(groups={name: kept for name, kept in self.groups.items() if kept.layer == layer})

    def is_uniform(self) -> bool:
        """Whether every layer keeps as many units of each kind, and whole blocks aside, none stands out."""
        sizes: dict[str, set[int]] = {}
        for kept in self.groups.values():
            if kept.kind not in ("sublayers", "blocks"):
                sizes.setdefault(kept.kind, set()).add(len(kept.keep))
        return all(len(found) == 1 for found in sizes.values())

    def __and__(self, other: Plan) -> Plan:
        """What both plans keep."""
        groups = dict(self.groups)
        for name, kept in other.groups.items():
            mine = groups.get(name)
            if mine and mine.units != kept.units:
                raise UsageError(
                    f"These plans are for different networks: {name} has {mine.units} units in one, {kept.units} in the other."
                )
            both = sorted(set(kept.keep) & set(mine.keep)) if mine else kept.keep
            groups[name] = kept.model_copy(update={"keep": tuple(both)})
        return Plan(groups=groups, notes={**self.notes, **other.notes})

    def to_json(self) -> str:
        """The plan as JSON, one line per group."""
        lines = ",\n".join(f"  {json.dumps(name)}: {kept.model_dump_json()}" for name, kept in self.groups.items())
        notes = self.model_dump_json(include={"notes"})[1:-1]
        return f'{{"version": 1, {notes}, "groups": {{\n{lines}\n}}}}\n'

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads `to_json`; a malformed plan is a `UsageError` that says where."""
        return from_json(cls, text, "a plan")


def keep_all(groups: Iterable[Any]) -> Plan:
    """The plan that removes nothing from the given groups."""
    return Plan(groups={g.name: Kept(kind=g.kind, layer=g.layer, units=g.units, keep=tuple(range(g.units))) for g in groups})
