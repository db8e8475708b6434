"""A network drawn: a tree of its modules and the coupled groups that slice them for a terminal, a directed graph for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text
from rich.tree import Tree

from resect.errors import printable
from resect.report.inspection import FrozenRow, Inspection, MemberRow, UnitRow
from resect.report.layers import spans

COLOURS = ("blue3", "darkorange2", "green4", "red3", "purple3", "deeppink3", "cyan4", "goldenrod3")
"""Of the kinds, in the order in which they occur; names that terminals and Graphviz may both know."""
DOT_COLOURS = ("#2457c5", "#d96b00", "#1b8a3a", "#c4262e", "#7a3db8", "#c7297f", "#0b8a8f", "#b08900")


@dataclass(frozen=True)
class Layers:
    """Blocks in which the same groups are found."""

    numbers: tuple[int, ...]
    rows: tuple[UnitRow, ...]

    def title(self, found: Inspection) -> str:
        """`model.layers 0-29`."""
        return f"{found.block_path} {spans(self.numbers)}"


def folded(found: Inspection) -> list[Layers]:
    """Blocks that have the same rows of groups, folded; in the order of their first."""
    rows: dict[int, list[int]] = {}
    for place, row in enumerate(found.units):
        for layer in _numbers(row.layers):
            rows.setdefault(layer, []).append(place)
    alike: dict[tuple[int, ...], list[int]] = {}
    for layer in range(found.blocks):
        alike.setdefault(tuple(rows.get(layer, ())), []).append(layer)
    return [Layers(tuple(layers), tuple(found.units[place] for place in places)) for places, layers in alike.items()]


def inspection_tree(found: Inspection) -> Tree:
    """Modules, below them the coupled groups that slice them, below these the parameters; what is kept whole is dim."""
    colour = _colours(found, COLOURS)
    tree = Tree(Text(found.architecture, style="bold"), guide_style="dim")
    for row in (row for row in found.units if not row.layers):
        _grow(tree, row, found, colour)
    _grow_frozen(tree, [row for row in found.frozen if not row.layers], found)
    for layers in folded(found):
        branch = tree.add(Text(f"{layers.title(found)}{_times(len(layers.numbers))}", style="bold"))
        for row in layers.rows:
            _grow(branch, row, found, colour)
        _grow_frozen(branch, [row for row in found.frozen if set(_numbers(row.layers)) & set(layers.numbers)], found)
    return tree


def _grow(tree: Tree, row: UnitRow, found: Inspection, colour: dict[str, str]) -> None:
    several = row.groups / max(len(_numbers(row.layers)), 1)
    count = f"{several:g} x " if several > 1 else ""
    text = Text.assemble(
        (row.title, f"bold {colour[row.kind]}"),
        f"  {count}{'each' if row.whole else f'{row.units:,} units'} of {row.unit_parameters:,} parameters, "
        f"{row.of_model:.1%} of the model",
    )
    if row.layers and row.groups > 1:
        text.append(f" in {row.groups:,} groups")
    branch = tree.add(text)
    for line in _parameters(row, found) if not row.whole else ():
        branch.add(Text(line))


def _parameters(row: UnitRow, found: Inspection) -> Iterator[str]:
    """Modules whose parameters a group slices alike, a line for each way of being sliced."""
    alike: dict[tuple[int, int], list[str]] = {}
    for member in row.members:
        alike.setdefault((member.axis, member.positions), []).append(_short(member.parameter, found))
    for (axis, positions), names in alike.items():
        wide = f", {positions} positions a unit" if positions > 1 else ""
        yield f"axis {axis}{wide}: {', '.join(names)}"


def _grow_frozen(tree: Tree, rows: list[FrozenRow], found: Inspection) -> None:
    """What is kept whole, folded over reasons."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        alike.setdefault(row.reason, []).append(f"{_short(row.parameter, found)} (axis {row.axis})")
    for reason, names in alike.items():
        tree.add(Text(f"kept whole: {', '.join(dict.fromkeys(names))}: {reason}", style="dim"))


def _short(parameter: str, found: Inspection) -> str:
    return parameter.removeprefix(f"{found.block_path}.*.").removesuffix(".weight")


def _times(count: int) -> str:
    return f"  ({count} blocks)" if count > 1 else ""


def _colours(found: Inspection, colours: tuple[str, ...]) -> dict[str, str]:
    kinds = dict.fromkeys(row.kind for row in found.units)
    return {kind: colours[place % len(colours)] for place, kind in enumerate(kinds)}


def _numbers(layers: str) -> list[int]:
    """The numbers of 0-3, 5."""
    found: list[int] = []
    for run in filter(None, layers.split(", ")):
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


MADE_BY = "// made by resect inspect"
"""A comment in the first line of every picture."""


def is_picture(file: Path) -> bool:
    """Whether a file is a picture for Graphviz that resect wrote."""
    with file.open("rb") as opened:
        return MADE_BY.encode() in opened.readline(1000)


def inspection_dot(found: Inspection) -> str:
    """A Graphviz digraph: modules as boxes, like blocks folded into one cluster, coupled groups as coloured ovals between them.

    An edge leads from a module that has a group's units along its first axis to the group, and from the group to one that has
    them along another; what is kept whole is grey.
    """
    drawing = Drawing(found)
    return drawing.text()


class Drawing:
    """The lines of one digraph."""

    def __init__(self, found: Inspection) -> None:
        self._found = found
        self._colour = _colours(found, DOT_COLOURS)
        self._edges: list[str] = []

    def text(self) -> str:
        """The whole file."""
        found = self._found
        lines = [f"digraph {_quoted(found.architecture)} {{ {MADE_BY}"]
        lines += ['  rankdir=LR; compound=true; fontname="Helvetica";', '  node [fontname="Helvetica", fontsize=11];']
        lines += ["  edge [arrowsize=0.6];", f"  label={_quoted(f'{found.model}: {found.parameters:,} parameters')};"]
        outside = [row for row in found.units if not row.layers]
        folds = folded(found)
        clusters = {f"b{place}": set(layers.numbers) for place, layers in enumerate(folds)}
        for place, layers in enumerate(folds):
            lines.append(f"  subgraph cluster_{place} {{")
            lines.append(f"    label={_quoted(layers.title(found) + _times(len(layers.numbers)))}; color=grey60; style=rounded;")
            lines += [f"    {line}" for line in self._part(f"b{place}", layers.rows, layers.numbers)]
            lines.append("  }")
        lines += [f"  {line}" for line in self._part("m", outside, ())]
        for number, row in enumerate(outside):
            lines += [f"  {line}" for line in self._group(f"all{number}", row, clusters)]
        return "\n".join([*lines, *(f"  {edge}" for edge in dict.fromkeys(self._edges)), "}", ""])

    def _part(self, scope: str, rows: tuple[UnitRow, ...] | list[UnitRow], numbers: tuple[int, ...]) -> list[str]:
        """The modules of one cluster, or those outside all, and the groups inside it."""
        found, lines = self._found, []
        frozen: dict[str, list[str]] = {}
        for row in found.frozen:
            if set(_numbers(row.layers)) & set(numbers) or not (row.layers or numbers):
                frozen.setdefault(_short(row.parameter, found), []).append(f"axis {row.axis}: {row.reason}")
        names = [_short(m.parameter, found) for row in found.units for m in row.members if _within(m, numbers) and not row.whole]
        for name in dict.fromkeys([*names, *frozen]):
            why = "\n".join(dict.fromkeys(frozen.get(name, ())))
            if name in names:
                look = f"label={_quoted(name)}, tooltip={_quoted(why and f'kept whole: {why}')}"
            else:
                look = f"label={_quoted(name + chr(10) + why)}, color=grey70, fontcolor=grey50"
            lines.append(f"{_quoted(f'{scope}:{name}')} [shape=box, {look}];")
        for number, group in enumerate(rows if numbers else ()):
            lines += self._group(f"{scope}g{number}", group, {scope: set(numbers)})
        return lines

    def _group(self, node: str, row: UnitRow, clusters: Mapping[str, set[int]]) -> list[str]:
        """A group as an oval, with its edges to the modules in some clusters; a whole block is a word alone."""
        colour = self._colour[row.kind]
        count = "each" if row.whole else f"{row.units:,} units"
        label = f"{row.title}\n{count} of {row.unit_parameters:,} parameters\n{row.of_model:.1%} of the model"
        look = f"shape=oval, style=filled, fillcolor={_quoted(colour + '22')}, color={_quoted(colour)}"
        for member in row.members if not row.whole else ():
            inside = set(_numbers(member.layers))
            for scope in (scope for scope, numbers in clusters.items() if inside & numbers) if inside else ("m",):
                ends = (f"{scope}:{_short(member.parameter, self._found)}", node)
                start, stop = ends if member.axis == 0 else ends[::-1]
                self._edges.append(f"{_quoted(start)} -> {_quoted(stop)} [color={_quoted(colour)}];")
        return [f"{_quoted(node)} [{look}, label={_quoted(label)}];"]


def _within(member: MemberRow, numbers: tuple[int, ...]) -> bool:
    """Whether a member lies in blocks of these numbers, or outside all where there are none."""
    here = set(_numbers(member.layers))
    return bool(here & set(numbers)) if numbers else not here


def _quoted(text: str) -> str:
    """A string of the dot language."""
    escaped = printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
