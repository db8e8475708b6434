"""Sizes that remember whose they are: what a network computes from the size of one axis decides the size of another.

`x.reshape(batch, tokens, 3, heads, channels // heads)` takes a size off one tensor and gives it to another. Operators see
plain numbers; here the numbers keep the axis they come from until they are used, and both axes are cut together.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, wraps
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from resect.graph.atoms import Axis, Misaligned, below, factor, freeze, join, leaves, length, narrow

VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
LIKE = (Tensor.view_as, Tensor.reshape_as)
LEAVING = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""Functions that hand values to code of Python."""
FILLING = {
    torch.full: (1, "fill_value"),
    torch.full_like: (1, "fill_value"),
    torch.fill: (1, "value"),
    Tensor.fill_: (1, "value"),
    Tensor.new_full: (2, "fill_value"),
    Tensor.new_tensor: (1, "data"),
    torch.scalar_tensor: (0, "s"),
    torch.as_tensor: (0, "data"),
    torch.tensor: (0, "data"),
}
"""Functions that make tensors of values, and where these stand."""
Cached = type(cache(len))
"""The class of what `functools.cache` and `lru_cache` make of functions."""
BUILT_IN = {*sys.stdlib_module_names, "torch", "resect"}
COMPUTED = "its size is a number that the network computes with"


class Size(int):
    """The number of positions of an axis, or a whole part of it: the size divided by `parts`."""

    axis: Axis
    parts: int

    def __new__(cls, value: int, axis: Axis, parts: int = 1) -> Size:
        """The number with what it remembers."""
        size = super().__new__(cls, value)
        size.axis, size.parts = axis, parts
        return size

    def __floordiv__(self, other: Any) -> Any:
        """A part of a size remembers it too."""
        result = int(self) // other
        exact = isinstance(other, int) and not isinstance(other, Size) and other > 0 and int(self) % other == 0
        return Size(result, self.axis, self.parts * int(other)) if exact else result

    def __truediv__(self, other: Any) -> Any:
        return self._number() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._number()

    def __pow__(self, other: Any, modulus: None = None) -> Any:  # type: ignore[override]
        return self._number() ** other

    def __float__(self) -> float:
        return float(self._number())

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def _number(self) -> int:
        """The plain number: what is computed from it changes with the size, so the axis is kept whole."""
        if self.axis:
            freeze(self.axis, COMPUTED)
        return int(self)


@contextmanager
def uncached() -> Iterator[None]:
    """Functions that remember what they gave for numbers compute anew for sizes, while the context lasts.

    einops keeps the lengths of axes by shape: what it worked out for one layer would come back for another one as wide, with
    the axis of the first, and the layers would be cut together. Reached are `functools.lru_cache` and `cache` on functions
    of modules, but those of Python and torch.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in BUILT_IN or not isinstance(module, ModuleType):
            continue
        space = vars(module)
        replaced += [(space, key, value) for key, value in list(space.items()) if type(value) is Cached]
    try:
        for space, key, value in replaced:
            space[key] = _computed_for_sizes(value)
        yield
    finally:
        for space, key, value in replaced:
            space[key] = value


def _computed_for_sizes(function: Any) -> Callable[..., Any]:
    """A cached function that computes where it is given sizes."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        sizes = any(isinstance(leaf, Size) for leaf in tree_leaves((args, kwargs)))
        return (function.__wrapped__ if sizes else function)(*args, **kwargs)

    return call


class Sizes(TorchFunctionMode):
    """Hands out sizes that remember their axis, and unites the axes of what is made with them.

    `running` is the function of torch that the network called last and that is not done; `leaves` is called with tensors
    whose values go to code that no operator shows, `spares` with those that are put over their own length, and the axis of
    the lengths.
    """

    def __init__(
        self,
        axes_of: Callable[[Tensor], Sequence[Axis] | None],
        leaves: Callable[[Tensor], None],
        spares: Callable[[Tensor, int], None],
    ) -> None:
        super().__init__()
        self._axes_of = axes_of
        self._leaves = leaves
        self._spares = spares
        self.running = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one function."""
        kwargs = kwargs or {}
        before, self.running = self.running, _name(func, args, kwargs)
        try:
            if func in LEAVING:
                self._leaves(args[0])
            if self.running == "_weight_norm":
                self._spares(args[0], args[2] if len(args) > 2 else kwargs.get("dim", 0))
            for value in _filling(func, args, kwargs):
                value._number()
            result = func(*args, **kwargs)
        finally:
            self.running = before
        if func is Tensor.size or getattr(func, "__self__", None) is Tensor.shape:
            return self._remembered(args[0], result, args[1] if len(args) > 1 else kwargs.get("dim"))
        if func in VIEWS:
            given = args[1:] or tuple(kwargs.values())
            self._viewed(result, given[0] if given and isinstance(given[0], Sequence) else given)
        elif func in LIKE:
            self._viewed(result, self._remembered(args[1], args[1].size(), None))
        elif func is multi_head_attention_forward and args[5] is not None:
            self._attended(args[0], args[5])
        elif func is scaled_dot_product_attention and kwargs.get("scale") is None:
            self._scaled(args[0] if args else kwargs["query"])
        return result

    def _remembered(self, tensor: Tensor, found: Any, dim: int | None) -> Any:
        axes = self._axes_of(tensor)
        if axes is None:
            return found
        if dim is not None:
            return Size(found, axes[dim])
        return torch.Size([Size(size, axis) for size, axis in zip(found, axes, strict=True)])

    def _viewed(self, result: Tensor, shape: Sequence[Any]) -> None:
        axes = self._axes_of(result)
        if axes is None or len(axes) != len(shape):
            return
        for place, size in enumerate(shape):
            if isinstance(size, Size) and size.axis and not _is_part(size, axes[place]):
                _unite(size.axis, _whole(axes, place, size.parts))

    def _scaled(self, query: Tensor) -> None:
        """Attention divides by the root of the width of a head, where it is not told another number."""
        for axis in (self._axes_of(query) or [()])[-1:]:
            freeze([leaf for leaf in below(axis) if "inside a head" not in leaf.marks], COMPUTED)

    def _attended(self, query: Tensor, projection: Tensor) -> None:
        """Torch's own attention takes the width of all heads from the width of what comes in."""
        stream, inner = self._axes_of(query), self._axes_of(projection)
        if stream is not None and inner is not None:
            _unite(stream[-1], narrow(inner[0], 0, length(stream[-1])))


def _filling(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Size]:
    """The sizes that a function puts into a tensor as values."""
    if func not in FILLING:
        return []
    place, name = FILLING[func]
    given = args[place] if place < len(args) else kwargs.get(name)
    return [value for value in torch.utils._pytree.tree_leaves(given) if isinstance(value, Size)]


def _name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The name of a function; one that counts for itself how many classes there are is no `one_hot` whose size is known."""
    name: str = getattr(func, "__name__", "")
    classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    return "" if name == "one_hot" and classes < 0 else name


def _is_part(size: Size, axis: Axis) -> bool:
    """Whether an axis has the coordinates of a size already, in some order, or all but those that count its parts."""
    rest = Counter(leaves(size.axis))
    rest.subtract(leaves(axis))
    left = prod(leaf.size**count for leaf, count in rest.items() if count > 0)
    return left == size.parts and all(count >= 0 for count in rest.values())


def _whole(axes: Sequence[Axis], place: int, parts: int) -> Axis:
    """The axis that a part belongs to: with the axis beside it that counts the parts; empty if none does."""
    if parts == 1:
        return axes[place]
    for start in range(place - 1, -1, -1):  # the parts may be counted by several axes: 3 * heads
        counting = tuple(atom for axis in axes[start:place] for atom in axis)
        if length(counting) == parts:
            return (*counting, *axes[place])
    before, after = (axes[other] if 0 <= other < len(axes) else () for other in (place - 1, place + 1))
    if length(after) == parts:
        return (*axes[place], *after)
    if before and length(before) % parts == 0:
        with suppress(Misaligned):
            return (*factor(before, length(before) // parts)[1], *axes[place])
    return ()


def _unite(left: Axis, right: Axis) -> None:
    if leaves(left) == leaves(right):
        return
    try:
        join(left, right)
    except Misaligned:
        freeze((*left, *right), "one decides the size of the other, and they cannot be matched")
