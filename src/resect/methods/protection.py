"""Groups that stay whole: named one by one, or found unprunable by an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resect.errors import UsageError
from resect.graph import DEPTH, Graph
from resect.report import Knowledge

Protect = str | Path | Knowledge | Sequence[str | Path | Knowledge]
"""Names of groups; analyses, or the files that hold them (`.json`)."""


def protected(graph: Graph, asked: Protect | None) -> tuple[str, ...]:
    """The names of the groups to be kept whole, in the order of the network.

    With a block or a sub-layer no unit in it can go.
    Raises `UsageError` for names that the network does not have and for analyses of other networks.
    """
    several = [asked] if isinstance(asked, str | Path | Knowledge) else asked or []
    names = {name for one in several for name in _names(graph, one)}
    named = [graph.group(name) for name in sorted(names)]
    whole = {member.parameter for group in named if group.kind in DEPTH for member in group.members}
    within = [group for group in graph.groups if {member.parameter for member in group.members} <= whole]
    names.update(group.name for group in within if group.layer is not None)
    return tuple(group.name for group in graph.groups if group.name in names)


def _names(graph: Graph, one: str | Path | Knowledge) -> Sequence[str]:
    if isinstance(one, str) and not one.endswith(".json"):
        return [one]
    found = one if isinstance(one, Knowledge) else _read(Path(one).expanduser())
    for group in found.groups:
        if graph.group(group.name).units != group.units:
            raise UsageError(
                f"The analysis is of another network: it counts {group.units} units in {group.name}, this network has "
                f"{graph.group(group.name).units}."
            )
    return found.protected


def _read(file: Path) -> Knowledge:
    try:
        return Knowledge.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"The analysis {file} cannot be read: {problem}. `resect analyze` writes one.") from problem
