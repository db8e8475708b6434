"""The algebra of axes: every axis is an ordered product of atoms, and atoms are merged as operators demand.

An atom is an independent coordinate of some axis: the heads of a projection, the channels inside a head, one of the
three parts of a fused projection. An atom may be refined once it turns out to be composite:

* a *product* — ``view(..., heads, head_dim)`` shows that an axis of ``heads * head_dim`` positions has two coordinates;
* a *sum* — ``split`` shows that an axis consists of segments laid end to end, each an axis of its own.

Two atoms that meet element by element are united (union-find), refined alike where their structures differ.
What cannot be aligned raises `Misaligned`; the caller freezes it. Merging too much only couples more; it is never unsound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


class Misaligned(Exception):
    """Two structures that cannot be refined into each other."""


@dataclass(frozen=True)
class Product:
    """An atom that turned out to be an ordered product, outermost first."""

    factors: tuple[Atom, ...]


@dataclass(frozen=True)
class Sum:
    """An atom that turned out to be segments laid end to end."""

    parts: tuple[Axis, ...]


@dataclass(frozen=True)
class Contest:
    """An operator in which the positions of an axis compete: a softmax over them, or a choice of the largest.

    It is the `turn`-th of its name in one run of its module. What is masked must lose: minus infinity goes in there.
    """

    module: str
    operator: str
    turn: int
    axis: int
    size: int


class Atom:
    """One coordinate of an axis; a node of a union-find forest, refined by its root's definition."""

    __slots__ = ("contests", "definition", "least", "marks", "mixed", "parent", "reason", "size")

    def __init__(self, size: int, reason: str = "") -> None:
        self.size = size
        self.parent: Atom | None = None
        self.definition: Product | Sum | None = None
        self.reason = reason
        self.mixed: dict[str, None] = {}
        self.contests: dict[Contest, None] = {}
        self.least = 1
        self.marks: set[str] = set()


Axis = tuple[Atom, ...]

Form = tuple["int | Form", ...]
"""The structure of an axis without its atoms: for every factor a leaf's number and size, or the forms of its segments."""


def fresh(size: int, reason: str = "") -> Axis:
    """A new axis of one atom (none for size 1), frozen if a reason is given."""
    return () if size == 1 else (Atom(size, reason),)


def root(atom: Atom) -> Atom:
    """The representative of everything this atom was united with."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def leaves(axis: Sequence[Atom]) -> list[Atom]:
    """The roots an axis is a product of, with all product refinements written out."""
    found: list[Atom] = []
    for atom in axis:
        top = root(atom)
        if isinstance(top.definition, Product):
            found.extend(leaves(top.definition.factors))
        elif top.size != 1:
            found.append(top)
    return found


def below(axis: Iterable[Atom]) -> list[Atom]:
    """The leaves under an axis, with all refinements written out, segments too; some may occur more than once."""
    found: list[Atom] = []
    for top in leaves(tuple(axis)):
        parts = top.definition.parts if isinstance(top.definition, Sum) else None
        found += [top] if parts is None else [leaf for part in parts for leaf in below(part)]
    return found


def length(axis: Sequence[Atom]) -> int:
    """How many positions an axis has."""
    return prod(atom.size for atom in axis)


def freeze(axis: Sequence[Atom], reason: str) -> None:
    """Keeps everything under an axis whole; the first reason stays."""
    for atom in axis:
        top = root(atom)
        if not top.reason:
            top.reason = reason
            for part in _below(top):
                freeze(part, reason)


def mark(axis: Sequence[Atom], *, mixed: str = "", label: str = "", contest: Contest | None = None, least: int = 1) -> None:
    """Notes that a statistic in module `mixed` runs over the axis, that its atoms play the role `label`, that their positions
    meet in a `contest`, or that at least so many of them must stay."""
    for atom in axis:
        top = root(atom)
        if label in top.marks:
            continue
        if mixed:
            top.mixed.setdefault(mixed)
        if label:
            top.marks.add(label)
        if contest:
            top.contests.setdefault(contest)
        top.least = max(top.least, least)
        for part in _below(top):
            mark(part, mixed=mixed, label=label, contest=contest, least=least)


def join(left: Sequence[Atom], right: Sequence[Atom]) -> None:
    """Unites two axes position by position, outermost factors first."""
    a_queue, b_queue = leaves(left), leaves(right)
    while a_queue and b_queue:
        a_queue, b_queue = leaves(a_queue[:1]) + a_queue[1:], leaves(b_queue[:1]) + b_queue[1:]
        a, b = a_queue.pop(0), b_queue.pop(0)
        if a is b:
            continue
        if a.size == b.size:
            _unite(a, b)
        elif a.size > b.size:
            outer, inner = factor((a,), b.size)
            join(outer, (b,))
            a_queue = [*inner, *a_queue]
        else:
            outer, inner = factor((b,), a.size)
            join(outer, (a,))
            b_queue = [*inner, *b_queue]
    if a_queue or b_queue:
        raise Misaligned("axes of different length")


def factor(axis: Sequence[Atom], outer: int) -> tuple[Axis, Axis]:
    """Splits an axis into its `outer` outermost positions and the rest: axis = outer * inner."""
    taken: list[Atom] = []
    rest = leaves(axis)
    while outer > 1:
        if not rest:
            raise Misaligned("axis too short")
        top = rest.pop(0)
        if outer % top.size == 0:
            taken.append(top)
            outer //= top.size
        elif top.size % outer == 0:
            left, right = _factor_atom(top, outer)
            return (*taken, *left), (*right, *rest)
        else:
            raise Misaligned(f"{top.size} positions against {outer}")
    return tuple(taken), tuple(rest)


def reshape(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """The axes of a tensor after `view(shape)`; row-major order is kept."""
    rest: Axis = tuple(atom for axis in axes for atom in axis)
    result = []
    for size in shape:
        taken, rest = factor(rest, size)
        result.append(taken)
    return result


def narrow(axis: Sequence[Atom], start: int, stop: int) -> Axis:
    """The axis of `tensor[start:stop]`."""
    if (start, stop) == (0, length(axis)):
        return tuple(axis)
    atoms = leaves(axis)
    top, rest = atoms[0], atoms[1:]
    inner = length(rest)
    if start % inner == 0 and stop % inner == 0:
        return (*_narrow_atom(top, start // inner, stop // inner), *rest)
    index = start // inner
    if index != (stop - 1) // inner:
        raise Misaligned(f"positions {start}:{stop} cross rows of {inner}")
    return (*_narrow_atom(top, index, index + 1), *narrow(rest, start - index * inner, stop - index * inner))


def concatenate(parts: Sequence[Axis]) -> Axis:
    """The axis of `cat`: the given axes end to end."""
    if len(parts) == 1:
        return parts[0]
    atom = Atom(sum(length(part) for part in parts))
    atom.definition = Sum(tuple(parts))
    return (atom,)


def form(axis: Sequence[Atom], seen: dict[Atom, int]) -> Form:
    """The structure of an axis, its leaves numbered in the order in which they are met; `seen` takes their numbers.

    Axes of one form have the same `coordinates`, leaf by leaf.
    """
    parts: list[Form] = []
    for top in leaves(axis):
        if isinstance(top.definition, Sum):
            parts.append(tuple(form(part, seen) for part in top.definition.parts))
        else:
            parts.append((seen.setdefault(top, len(seen)), top.size))
    return tuple(parts)


def coordinates(axis: Sequence[Atom]) -> dict[Atom, Tensor]:
    """For every leaf under an axis, the coordinate of each position: [positions] long, -1 where the leaf is absent.

    A leaf that occurs twice in one product has no single coordinate and is frozen here.
    """
    atoms = leaves(axis)
    total, found = length(axis), {}
    repeat = total
    for position, top in enumerate(atoms):
        repeat //= top.size
        tile = total // (repeat * top.size)
        for leaf, inner in _atom_coordinates(top).items():
            if leaf in found or top in atoms[:position]:
                freeze((leaf,), "one coordinate meets itself inside an axis")
            found[leaf] = inner.repeat_interleave(repeat).repeat(tile)
    return found


def kept_length(axis: Sequence[Atom], kept: Mapping[Atom, int]) -> int:
    """How many positions remain when leaf atoms shrink to the given sizes."""
    total = 1
    for top in leaves(axis):
        if isinstance(top.definition, Sum):
            total *= sum(kept_length(part, kept) for part in top.definition.parts)
        else:
            total *= kept.get(top, top.size)
    return total


def _below(top: Atom) -> Iterator[Sequence[Atom]]:
    if isinstance(top.definition, Product):
        yield top.definition.factors
    elif isinstance(top.definition, Sum):
        yield from top.definition.parts


def _inherit(top: Atom) -> None:
    """Passes what is known of an atom on to its new refinement."""
    for part in _below(top):
        if top.reason:
            freeze(part, top.reason)
        for module in top.mixed:
            mark(part, mixed=module)
        for label in top.marks:
            mark(part, label=label)
        for contest in top.contests:
            mark(part, contest=contest)
        mark(part, least=top.least)


def _define(top: Atom, definition: Product | Sum) -> None:
    top.definition = definition
    _inherit(top)


def _unite(a: Atom, b: Atom) -> None:
    a, b = root(a), root(b)
    if a is b:
        return
    if a.definition is None:
        a, b = b, a
    if b.definition is not None:
        _align(a, b)
        a, b = root(a), root(b)
        if a is b:
            return
    b.parent = a
    a.mixed |= b.mixed
    a.marks |= b.marks
    a.contests |= b.contests
    a.least = max(a.least, b.least)
    if b.reason and not a.reason:
        a.reason = b.reason
    _inherit(a)


def _align(a: Atom, b: Atom) -> None:
    """Makes two refinements of equal length agree."""
    if isinstance(a.definition, Sum) and isinstance(b.definition, Sum):
        _align_sums(a.definition, b.definition)
        return
    if isinstance(a.definition, Sum):
        a, b = b, a
    assert isinstance(a.definition, Product)
    if isinstance(b.definition, Product):
        join(a.definition.factors, b.definition.factors)
        return
    outer, inner = _factor_atom(b, leaves(a.definition.factors)[0].size)
    join(a.definition.factors, (*outer, *inner))


def _align_sums(a: Sum, b: Sum) -> None:
    edges = sorted(set(_edges(a)) | set(_edges(b)))
    for left, right in zip(_pieces(a, edges), _pieces(b, edges), strict=True):
        join(left, right)


def _edges(value: Sum) -> list[int]:
    edges, at = [], 0
    for part in value.parts:
        at += length(part)
        edges.append(at)
    return edges


def _pieces(value: Sum, edges: Sequence[int]) -> list[Axis]:
    pieces, at = [], 0
    for part in value.parts:
        stop = at + length(part)
        inside = [edge - at for edge in edges if at < edge <= stop]
        pieces += [narrow(part, left, right) for left, right in zip([0, *inside], inside, strict=False)]
        at = stop
    return pieces


def _factor_atom(top: Atom, outer: int) -> tuple[Axis, Axis]:
    inner = top.size // outer
    if isinstance(top.definition, Sum):
        heads, tails = [], []
        for part in top.definition.parts:
            if length(part) % inner:
                raise Misaligned(f"a segment of {length(part)} positions against rows of {inner}")
            head, tail = factor(part, length(part) // inner)
            heads.append(head)
            tails.append(tail)
        for tail in tails[1:]:
            join(tails[0], tail)
        left, right = concatenate(heads), tails[0]
        _define(top, Product((*left, *right)))
        return left, right
    left, right = (Atom(outer),), (Atom(inner),)
    _define(top, Product((*left, *right)))
    return left, right


def _narrow_atom(top: Atom, start: int, stop: int) -> Axis:
    if (start, stop) == (0, top.size):
        return (top,)
    if top.definition is None:
        _define(top, Sum(tuple(fresh(size) for size in (start, stop - start, top.size - stop) if size)))
    if isinstance(top.definition, Product):
        return narrow(top.definition.factors, start, stop)
    assert isinstance(top.definition, Sum)
    pieces, at = [], 0
    for part in top.definition.parts:
        left, right = max(start - at, 0), min(stop - at, length(part))
        if left < right:
            pieces.append(narrow(part, left, right))
        at += length(part)
    return concatenate(pieces)


def _atom_coordinates(top: Atom) -> dict[Atom, Tensor]:
    if not isinstance(top.definition, Sum):
        return {top: torch.arange(top.size)}
    found: dict[Atom, Tensor] = {}
    at = 0
    for part in top.definition.parts:
        size = length(part)
        for leaf, inner in coordinates(part).items():
            whole = found.setdefault(leaf, torch.full((top.size,), -1))
            whole[at : at + size] = inner
        at += size
    return found
