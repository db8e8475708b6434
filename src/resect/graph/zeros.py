"""What is zero where a unit is masked: a sum over such positions is the same without them.

Masking puts zeros into the slices of parameters. A product is zero where one of its factors is, a sum where all of its terms
are, and many functions are zero at zero. Whatever cannot be said so is not known to be zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from resect.graph.atoms import Atom, Axis, below

AxesOf = Callable[[Tensor], list[Axis]]

ZERO_AT_ZERO = frozenset(
    f"aten.{name}"
    for name in ("silu", "gelu", "relu", "relu6", "tanh", "hardswish", "leaky_relu", "elu", "neg", "abs", "sqrt", "erf", "sin")
    + ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze", "detach", "alias")
    + ("transpose", "permute", "t", "expand", "repeat", "slice", "narrow", "select", "split", "split_with_sizes", "unbind")
    + ("clone", "_to_copy", "div", "sum", "mean")
)
"""Operators of one tensor, or with another that only scales it, that put out zero along an axis where they take in zero."""

MOVES = frozenset(
    f"aten.{name}"
    for name in ("t", "transpose", "permute", "view", "_unsafe_view", "reshape", "detach", "alias", "clone", "_to_copy")
    + ("unsqueeze", "squeeze", "expand")
)
"""Operators that put out all that they take in, perhaps in another order."""
POWERS = ("aten.pow",)
LOOKED_UP = ("aten.index", "aten.index_select", "aten.gather", "aten.embedding")
"""Operators that pick along some axes; along the others they put out zero where they take in zero."""
NORMS = {"aten.native_layer_norm": 2, "aten._fused_rms_norm": 2, "aten.rms_norm": 2}
"""Normalisations, and where their weight stands, the bias behind it."""
TERMS = ("aten.add", "aten.sub")
FACTORS = ("aten.mul",)
PRODUCTS = ("aten.mm", "aten.bmm")
BIASED = ("aten.addmm", "aten.baddbmm")
LINEAR = ("aten.linear", "aten.convolution")
MORE = ("aten.gt",)
NOTHING = ("aten.zeros", "aten.zeros_like", "aten.new_zeros")


class Zeros:
    """Of every tensor, the coordinates at whose masked units it is zero."""

    def __init__(self) -> None:
        self._known: dict[int, frozenset[Atom]] = {}
        self._everywhere: set[int] = set()
        self._nothing: set[int] = set()
        self._views: dict[int, set[int]] = {}

    def masked(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Notes a parameter: masking puts zeros into it, along every axis."""
        self._everywhere.add(id(tensor))
        self._note(tensor, _once(axes, [atom for axis in axes for atom in axis]))

    def wrote(self, tensor: Tensor) -> None:
        """Notes that a tensor was written into: nothing is known of it and of its other views any more."""
        for view in self._views.pop(memory(tensor), ()):
            self._known.pop(view, None)
            self._everywhere.discard(view)
            self._nothing.discard(view)

    def along(self, tensor: Any, axes: Sequence[Axis]) -> frozenset[Atom]:
        """The leaves at whose masked units a tensor is zero."""
        return _once(axes, self._known.get(id(tensor), ()))

    def along_axis(self, tensor: Tensor, axes: Sequence[Axis], place: int) -> frozenset[Atom]:
        """The leaves of one axis at whose masked units a tensor is zero; a weight is, though the leaf lies under two axes."""
        found = frozenset(below(axes[place]))
        return found if id(tensor) in self._everywhere else found & self.along(tensor, axes)

    def nothing(self, tensor: Tensor) -> bool:
        """Whether a tensor is zero all over."""
        return id(tensor) in self._nothing

    def chosen(self, tensor: Tensor, axes: Sequence[Axis], choice: Axis) -> None:
        """Notes that nothing but what is chosen among the positions of an axis was put into zeros: masked units never are."""
        self._note(tensor, _once(axes, choice))

    def follow(self, name: str, args: Sequence[Any], outputs: Iterable[tuple[Tensor, Sequence[Axis]]], axes_of: AxesOf) -> None:
        """Notes where the results of an operator, given with their axes, are zero."""

        def along(place: int) -> frozenset[Atom]:
            given = args[place]
            return self.along(given, axes_of(given)) if isinstance(given, Tensor) else frozenset()

        def product(place: int) -> frozenset[Atom]:
            left, right = axes_of(args[place]), axes_of(args[place + 1])
            return along(place) & _leaves(left[:-1]) | along(place + 1) & _leaves([*right[:-2], right[-1]])

        found: frozenset[Atom] = frozenset()
        if name in ZERO_AT_ZERO or name in LOOKED_UP or _is_zero_at_zero(name, args):
            found = along(0)
        elif name in NORMS:
            weight, bias = ((*args, None, None)[NORMS[name] + place] for place in (0, 1))
            if isinstance(weight, Tensor):
                found = along(NORMS[name])
            if name == "aten.native_layer_norm" and isinstance(bias, Tensor):
                found &= along(NORMS[name] + 1)
        elif name in FACTORS:
            found = along(0) | along(1)
        elif name == "aten._weight_norm_interface":  # the second result are lengths, of rows that no mask writes into
            found, outputs = along(0) | along(1), [*outputs][:1]
        elif name in TERMS:
            found = along(0) & along(1)
        elif name in PRODUCTS:  # what is summed over is no axis of the result
            found = product(0)
        elif name in BIASED:
            found = along(0) & product(1)
        elif name in LINEAR:  # of a convolution, the channels that it puts out
            weight, bias = axes_of(args[1]), args[2] if len(args) > 2 else None
            own = along(1) & _leaves(weight[1:2] if name == "aten.convolution" and args[6] else weight[:1])
            passed = along(0) & _leaves(axes_of(args[0])[:-1]) if name == "aten.linear" else frozenset()
            found = own | passed if bias is None else own & along(2)
        for tensor, axes in outputs:
            if name in MOVES and id(args[0]) in self._everywhere:
                self._everywhere.add(id(tensor))
            if found:
                self._note(tensor, _once(axes, found))
            if name in NOTHING:
                self._note(tensor, frozenset())
                self._nothing.add(id(tensor))

    def _note(self, tensor: Tensor, found: frozenset[Atom]) -> None:
        self._known[id(tensor)] = found
        self._views.setdefault(memory(tensor), set()).add(id(tensor))


def _is_zero_at_zero(name: str, args: Sequence[Any]) -> bool:
    """Whether a comparison or a power with this number puts out zero where it takes in zero."""
    if name not in (*MORE, *POWERS) or isinstance(args[1], Tensor):
        return False
    return bool(args[1] >= 0 if name in MORE else args[1] > 0)


def memory(tensor: Tensor) -> int:
    """The number of the memory that a tensor and all its views share."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _once(axes: Sequence[Axis], atoms: Collection[Atom]) -> frozenset[Atom]:
    """Those leaves that lie under only one axis, and there only once: of others it would not be clear along which."""
    if not atoms:
        return frozenset()
    occurring = Counter(leaf for axis in axes for leaf in below(axis))
    return frozenset(leaf for leaf in below(atoms) if occurring[leaf] == 1)


def _leaves(axes: Sequence[Axis]) -> frozenset[Atom]:
    return frozenset(leaf for axis in axes for leaf in below(axis))
