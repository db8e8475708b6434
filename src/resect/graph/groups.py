"""Coupled groups and what a network costs as a function of how many of their units stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from resect.errors import UsageError, nearest
from resect.graph.atoms import Atom, Axis, Contest, kept_length, length
from resect.graph.blocks import Blocks
from resect.graph.depth import Sublayer

KINDS = ("heads", "channels", "experts", "residual", "sublayers", "blocks", "vocabulary")
DEPTH = ("sublayers", "blocks")
"""Kinds whose units are whole modules; the units of the others are slices of parameters."""


@dataclass(frozen=True)
class Member:
    """One side of a coupled group: the slices of one parameter that belong to it.

    Row ``u`` of ``index`` lists the positions along ``axis`` that unit ``u`` owns: an MLP channel owns one,
    a KV group of heads ``queries * head_dim`` of them, a head in a fused projection several runs of ``head_dim``.
    """

    parameter: str
    axis: int
    index: Tensor  # [units, width], long


@dataclass(frozen=True)
class Rivals:
    """Units that compete in an operator of a module, and the positions each of them has there."""

    contest: Contest
    index: Tensor  # [units, width], long


@dataclass(frozen=True)
class Group:
    """Slices that must go together, for one family of units.

    ``mixed`` names the normalisations whose statistics run over the units: what stays is normalised by itself.
    ``rivals`` are the operators in which the units compete, and where they lie there. ``least`` units must stay, and those
    that the model names by number, with the name, are ``named``.
    """

    name: str
    kind: str
    layer: int | None
    units: int
    members: tuple[Member, ...]
    mixed: tuple[str, ...] = ()
    rivals: tuple[Rivals, ...] = ()
    least: int = 1
    named: Mapping[int, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Frozen:
    """An axis, or a part of one, that is kept whole, and why."""

    parameter: str
    axis: int
    size: int
    reason: str


@dataclass(frozen=True)
class Factor:
    """The length of an axis: `size` positions, of which each unit of a group owns `widths[group]`."""

    size: int
    widths: Mapping[str, int]

    def left(self, removed: Mapping[str, int]) -> int:
        """Positions that stay when so many units of each group are removed."""
        return self.size - sum(width * removed.get(group, 0) for group, width in self.widths.items())


@dataclass(frozen=True)
class Term:
    """A product of axis lengths: the entries of one parameter, or the multiplications of one contraction."""

    factors: tuple[Factor, ...]
    owners: tuple[str, ...] = ()  # the sub-layer and the block that it disappears with
    layer: int | None = None
    batch: int = 0  # power of the batch size
    tokens: int = 0  # power of the sequence length

    def value(self, removed: Mapping[str, int], *, batch: int = 1, tokens: int = 1) -> int:
        """The product when so many units of each group are removed."""
        if any(removed.get(owner, 0) for owner in self.owners):
            return 0
        return prod((f.left(removed) for f in self.factors), start=batch**self.batch * tokens**self.tokens)


@dataclass(frozen=True)
class Operation:
    """One operator of the traced run, where it ran, the axes of what it put out, and the constants it was given.

    For one that takes a run of positions out of an axis, `before` are the positions that it leaves out in front.
    """

    name: str
    where: str
    outputs: tuple[tuple[Axis, ...], ...]
    constants: tuple[float, ...] = ()
    before: Axis = ()


@dataclass(frozen=True)
class Loop:
    """What is done with each of as many rows as the data says.

    `bodies` are the operators of one iteration of each sort, by number; behind the loop, the network goes on at `stop`.
    """

    stop: int
    bodies: tuple[range, ...]


@dataclass(frozen=True)
class Frame:
    """The axes of all that a module takes in and puts out, in the order of their leaves; none for what is not a tensor."""

    entering: list[tuple[Axis, ...]]
    leaving: list[tuple[Axis, ...]]


@dataclass(frozen=True, repr=False)
class Witness:
    """Every operator of the dense run, so that the run of a cut network can be held against it."""

    operations: tuple[Operation, ...]
    example: tuple[tuple[Any, ...], dict[str, Any]]
    groups: Mapping[Atom, str]
    fake: bool = True  # whether fake tensors were enough
    loops: Mapping[int, Loop] = field(default_factory=dict)  # by the number of the operator that took the rows apart
    frames: Mapping[str, tuple[Frame, ...]] = field(default_factory=dict)  # by module, call by call
    lifted: Mapping[tuple[str, int], tuple[Any, ...]] = field(default_factory=dict)
    """What tensors were made of, by the module that made them and how many it had made before."""
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """The example with the values that the caller gave it; None for one that was made up, or has no values."""

    def fits(self, operation: Operation, found: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> bool:
        """Whether an operator puts out the shapes that it must.

        Axes that cannot shrink may be of any length in a network whose sizes depend on the data.
        """
        if self.fake or found == expected:
            return found == expected
        if list(map(len, expected)) != list(map(len, found)):
            return False
        return all(
            size == want or (size != have and want == have)
            for sizes, wants, axes in zip(found, expected, operation.outputs, strict=True)
            for size, want, have in zip(sizes, wants, map(length, axes), strict=True)
        )

    def shapes(self, operation: Operation, kept: Mapping[Atom, int]) -> list[tuple[int, ...]]:
        """The shapes that an operator must put out when leaf atoms shrink to the given sizes."""
        return [tuple(kept_length(axis, kept) for axis in axes) for axes in operation.outputs]


@dataclass(frozen=True)
class Graph:
    """Everything discovery knows of a network: its coupled groups, what is frozen, and what its parts cost."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    blocks: Blocks
    parameters: Mapping[str, Term]
    contractions: tuple[Term, ...]
    witness: Witness
    sublayers: Mapping[str, Sublayer]
    tables: tuple[str, ...] = ()  # parameters in which the numbers of the text are looked up
    spared: frozenset[tuple[str, int]] = frozenset()  # parameters and axes that no mask writes zeros into: nothing over nothing
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """How many units a group may keep besides all, by group, where not every number will do."""
    equal: tuple[tuple[str, ...], ...] = ()
    """Names of groups, of as many units each, that have to keep as many units as each other."""
    _by_name: dict[str, Group] = field(default_factory=dict, repr=False, compare=False)
    _inside: dict[str, list[Group]] = field(default_factory=dict, repr=False, compare=False)
    _homes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._by_name.update({group.name: group for group in self.groups})
        owners = {member.parameter: group.name for group in self.of_kind("sublayers") for member in group.members}
        for group in self.groups:
            homes = {owners.get(member.parameter, "") for member in self.weights(group)}
            if group.name not in self.sublayers and len(homes) == 1 and (home := homes.pop()):
                self._homes[group.name] = home
                self._inside.setdefault(home, []).append(group)

    def constrained(
        self, *, sizes: Mapping[str, tuple[int, ...]] | None = None, equal: Iterable[tuple[str, ...]] = ()
    ) -> Graph:
        """The same graph with more said about how many units its groups may keep."""
        known: dict[str, Any] = {"_by_name": {}, "_inside": {}, "_homes": {}}
        return replace(self, sizes={**self.sizes, **(sizes or {})}, equal=(*self.equal, *equal), **known)

    def group(self, name: str) -> Group:
        """The group of a name; an unknown one is a `UsageError` that names the nearest."""
        if name not in self._by_name:
            raise UsageError(f"The network has no coupled group {name!r}. {nearest(name, self._by_name)}")
        return self._by_name[name]

    def of_kind(self, *kinds: str) -> list[Group]:
        """The groups of some kinds, in the order of the network."""
        return [group for group in self.groups if group.kind in kinds]

    def emptied(self, removed: Mapping[str, int]) -> list[str]:
        """The sub-layers of which no unit stays, so that they go as a whole."""
        return [
            name for name, groups in self._inside.items() if all(removed.get(group.name, 0) == group.units for group in groups)
        ]

    def home(self, group: Group) -> str:
        """The sub-layer that holds all parameters of a group, if one does."""
        return self._homes.get(group.name, "")

    def least(self, group: Group) -> int:
        """How many units of a group must stay; none of one that is alone in its sub-layer."""
        return 0 if self._inside.get(self.home(group)) == [group] else group.least

    def weights(self, group: Group) -> list[Member]:
        """The members that are parameters; the others are buffers."""
        return [member for member in group.members if member.parameter in self.parameters]

    def parameter_count(self, removed: Mapping[str, int] | None = None, *, blocks_only: bool = False) -> int:
        """Parameters that stay, tied ones counted once; of the blocks alone if asked."""
        terms = self.parameters.values()
        gone = self._settled(removed)
        return sum(term.value(gone) for term in terms if term.layer is not None or not blocks_only)

    def macs(self, removed: Mapping[str, int] | None = None, *, batch: int = 1, tokens: int = 64) -> int:
        """Multiply-accumulates of one forward pass over `[batch, tokens]`, attention products included."""
        gone = self._settled(removed)
        return sum(term.value(gone, batch=batch, tokens=tokens) for term in self.contractions)

    def token_macs(self, removed: Mapping[str, int] | None = None, *, batch: int = 1, tokens: int = 64) -> int:
        """Multiply-accumulates of the last token of each of `batch` sequences of `tokens`; the others are cached."""
        gone = self._settled(removed)
        once = (term if term.tokens < 1 else replace(term, tokens=term.tokens - 1) for term in self.contractions)
        return sum(term.value(gone, batch=batch, tokens=tokens) for term in once)

    def parameter_bytes(self, sizes: Mapping[str, int], removed: Mapping[str, int] | None = None) -> int:
        """Bytes that stay, tied parameters counted once; `sizes` are the bytes of one entry, by parameter."""
        gone = self._settled(removed)
        return sum(term.value(gone) * sizes[name] for name, term in self.parameters.items())

    def _settled(self, removed: Mapping[str, int] | None) -> Mapping[str, int]:
        return {**removed, **dict.fromkeys(self.emptied(removed), 1)} if removed else {}
