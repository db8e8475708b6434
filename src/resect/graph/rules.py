"""Operator rules: what each aten operator demands of the axes of its inputs, and the axes of its outputs.

A rule takes a `Call` and returns the axes of every tensor it puts out. An operator without a rule freezes every axis
that reaches it. `op_rule` adds rules from user code; it is the only registry in the house.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from resect.graph.atoms import (
    Atom,
    Axis,
    Contest,
    Misaligned,
    Sum,
    below,
    concatenate,
    factor,
    freeze,
    fresh,
    join,
    leaves,
    length,
    mark,
    narrow,
    reshape,
    root,
)
from resect.graph.vocabulary import SHAPE_ONLY, Vocabulary
from resect.graph.zeros import Zeros

Axes = list[Axis]
"""The axes of one tensor, outermost first."""


@dataclass(frozen=True)
class Told:
    """The number of a position of an axis that indexing has just read out of a tensor, to pick that position."""

    numbers: Axis
    value: int


@dataclass
class Call:
    """One operator call under trace: its arguments, its results, and the axes known of each tensor."""

    name: str
    where: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    axes_of: Callable[[Tensor], Axes]
    contractions: list[tuple[str, tuple[Axis, ...]]] = field(default_factory=list)
    numbers: dict[int, Axis] = field(default_factory=dict)
    statistics: dict[str, list[Axis]] = field(default_factory=dict)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    zeros: Zeros = field(default_factory=Zeros)
    chosen: dict[int, Axis] = field(default_factory=dict)  # what was put into zeros by number, by result
    told: Told | None = None
    masks: dict[int, tuple[Axis, int]] = field(default_factory=dict)  # where numbers are that of one position
    contests: dict[Contest, Axis] = field(default_factory=dict)
    function: str = ""  # of torch, as the network called it
    turn: int = 0  # how many operators of this name its module has run before
    strides: tuple[int, ...] = ()  # of the first tensor, before an operator that changes them in place
    effects: list[Callable[[], Any]] = field(default_factory=list)  # demands that hold once a result is read

    @property
    def site(self) -> str:
        """The operator and the module it ran in, for people."""
        return f"{self.name} in {self.where or 'the model'}"

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, lists included."""
        found: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            found.extend(item for item in (value if isinstance(value, list | tuple) else (value,)) if _is_tensor(item))
        return found

    def numbers_of(self, tensor: Any) -> Axis | None:
        """The axis whose positions the values of an integer tensor are, where that is known."""
        return self.numbers.get(id(tensor))

    def singled_out(self) -> tuple[Axis, int] | None:
        """The axis of the numbers that are compared with the number of one of its positions, and that position."""
        numbers, position = self.numbers_of(self.args[0]) if self.args else None, self.arg(1, "other")
        single = self.name == "aten.eq" and numbers is not None and type(position) is int and 0 <= position < length(numbers)
        return (numbers, position) if single and numbers is not None else None

    def put_first(self) -> tuple[Axis, int] | None:
        """The same where numbers of the last position are replaced by that of the first."""
        numbers, mask = self.numbers_of(self.args[0]), self.masks.get(id(self.args[1]))
        if numbers is None or mask is None or self.arg(2, "value") != 0 or isinstance(self.arg(2, "value"), Tensor):
            return None
        return mask if leaves(mask[0]) == leaves(numbers) and mask[1] == length(numbers) - 1 > 0 else None

    def when_read(self, effect: Callable[[], Any]) -> None:
        """Demands something once any operator reads a result: what nothing reads, or only its size, keeps nothing whole."""
        self.effects.append(effect)

    def mix(self, axis: Axis) -> None:
        """Notes that the running module takes a statistic over an axis."""
        where = self.where or "the model"
        mark(axis, mixed=where)
        self.statistics.setdefault(where, []).append(axis)

    def before(self) -> Axis:
        """What an operator that takes a run of positions out of an axis leaves out in front of it."""
        if id(self.outputs[0]) in self.masks:
            numbers, position = self.masks[id(self.outputs[0])]
            return narrow(numbers, 0, position)
        run = run_of_positions(self.name, self.args, self.kwargs)
        if self.name == "aten.eq" or run is None or not run[1]:
            return ()
        dim, start = run
        try:
            return narrow(self.axes_of(self.args[0])[dim], 0, start)
        except Misaligned:  # such a run is frozen
            return ()

    def link(self, left: Axis, right: Axis) -> None:
        """Unites two axes; where they cannot be aligned, both are kept whole."""
        try:
            join(left, right)
        except Misaligned:
            freeze((*left, *right), f"positions that cannot be matched at {self.site}")


NUMBERED = frozenset(
    f"aten.{name}"
    for name in ("view", "_unsafe_view", "reshape", "clone", "detach", "alias", "_to_copy", "unsqueeze", "squeeze", "slice")
    + ("transpose", "permute", "t", "expand", "select", "repeat", "split", "unbind", "flatten", "_reshape_alias")
)
"""Operators whose results hold the same numbers as what they take in."""

LOOKUPS = frozenset(
    f"aten.{name}"
    for name in ("index", "gather", "index_select", "take_along_dim", "scatter", "scatter_", "scatter_add", "scatter_add_")
    + ("index_add", "index_add_")
)
"""Operators that take numbers of positions for what they are."""

JOINED = ("aten.cat", "aten.concatenate")
"""Operators that put numbers of positions side by side."""

CHECKS = ("aten.aminmax", "aten.min", "aten.max")
"""Operators with which `one_hot`, told how many classes there are, only makes sure that no number is beyond them."""

VIEWS = frozenset(
    f"aten.{name}"
    for name in ("view", "reshape", "detach", "alias", "unsqueeze", "squeeze", "slice", "narrow", "select", "split", "unbind")
    + ("transpose", "permute", "t", "expand", "split_with_sizes", "chunk", "flatten", "unflatten", "_reshape_alias")
)
"""Operators that only look at their input in another way: what nothing else takes in is not used."""

Rule = Callable[[Call], list[Axes]]
_RULES: dict[str, Rule] = {}


def op_rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for aten or custom operators by name (`"aten.mm"`, `"mylib.gated"`), replacing any older one.

    The rule gets a `Call` and gives the axes of each output tensor. It must unite (`call.link`) whatever has to be cut
    together and freeze (`resect.graph.freeze`) whatever must stay whole. Wrong rules destroy models: test cut == mask.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            _RULES[name] = rule
        return rule

    return register


def known(name: str) -> bool:
    """Whether there is a rule for operators of a name."""
    return name in _RULES or name.removesuffix("_") in _RULES


def apply(call: Call, overload: Any) -> list[Axes]:
    """The axes of a call's outputs, by its rule; without one everything that reaches it is frozen."""
    _watch_text(call)
    _watch_numbers(call)
    if call.name not in VIEWS:
        for tensor in call.tensors():
            for axis in call.axes_of(tensor):
                mark(axis, label="used")
    rule = _RULES.get(call.name) or _RULES.get(call.name.removesuffix("_"))  # in place, the axes are the same
    if rule is None and _is_pointwise(overload):
        rule = pointwise
    if rule is None:
        return _freeze_all(call, f"no rule for {call.site}")
    try:
        axes = rule(call)
    except Misaligned as problem:
        return _freeze_all(call, f"{problem} at {call.site}")
    if call.name in NUMBERED and (numbers := call.numbers_of(call.args[0])) is not None:
        for output in call.outputs:
            call.numbers[id(output)] = numbers
    for output, found in zip(call.outputs, axes, strict=True):
        assert tuple(output.shape) == tuple(map(length, found)), f"rule of {call.name}: {output.shape} against {found}"
    return axes


def _watch_numbers(call: Call) -> None:
    """What is chosen by number may only be looked up: an operator that computes with the numbers keeps all that they count."""
    if call.name in NUMBERED or call.name in LOOKUPS or call.name in JOINED:
        return
    if call.function == "one_hot" and call.name in CHECKS or call.singled_out():
        return
    if call.name == "aten.masked_fill" and call.put_first():
        return
    for tensor in call.tensors():
        if (numbers := call.numbers_of(tensor)) is not None:
            freeze(numbers, f"numbers of positions are used at {call.site}")


def _watch_text(call: Call) -> None:
    """Follows the numbers of the text through views; what else looks at them, look-ups aside, keeps the vocabulary whole."""
    given = [tensor for tensor in call.tensors() if call.vocabulary.holds(tensor)]
    if not given or call.name in SHAPE_ONLY:
        return
    if call.name in NUMBERED:
        call.vocabulary.follow(*call.outputs)
    elif call.name != "aten.embedding" or call.vocabulary.holds(call.args[0]):
        call.vocabulary.refuse(f"the text's numbers are used at {call.site}")


def run_of_positions(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """The axis that an operator takes a run of positions from, and where the run starts; None for other operators."""
    if name == "aten.eq":
        return 0, args[1]
    if name == "aten.index":
        run = _constant_run(args[1], args[0].shape)
        return run and run[:2]
    steps = args[4] if len(args) > 4 else kwargs.get("step", 1)
    if name not in ("aten.slice", "aten.narrow") or not args[0].ndim or steps != 1:
        return None
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].ndim
    start = args[2] if len(args) > 2 else kwargs.get("start")
    return dim, slice(start, None).indices(args[0].shape[dim])[0]


def _is_pointwise(overload: Any) -> bool:
    """Whether torch says so of an operator, or of its twin that does not work in place."""
    twin = getattr(getattr(torch.ops, overload.namespace), overload.overloadpacket.__name__.removesuffix("_"), None)
    default = getattr(twin, "default", None) or getattr(twin, "Tensor", overload)
    return torch.Tag.pointwise in overload.tags or torch.Tag.pointwise in default.tags


def _freeze_all(call: Call, reason: str) -> list[Axes]:
    for tensor in call.tensors():
        for axis in call.axes_of(tensor):
            freeze(axis, reason)
    return [[fresh(size, reason) for size in output.shape] for output in call.outputs]


def freeze_all(axes: Sequence[Axis], reason: str) -> None:
    """Keeps several axes whole."""
    for axis in axes:
        freeze(axis, reason)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _dims(call: Call, dims: Any, rank: int) -> list[int]:
    """Dimensions as non-negative numbers; none given means all."""
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)] if rank else []


def _input(call: Call) -> Axes:
    return list(call.axes_of(call.args[0]))


# -- element by element ------------------------------------------------------------------------------------------------


@op_rule("aten._to_copy", "aten.clone", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.contiguous")
@op_rule("aten.native_dropout", "aten.dropout", "aten.zeros_like", "aten.ones_like", "aten.full_like")
@op_rule("aten.empty_like", "aten.rand_like", "aten.bernoulli", "aten.copy", "aten.copy_", "aten.fill_")
@op_rule("aten.masked_fill_", "aten.zero_", "aten.nan_to_num", "aten.polar", "aten.complex")
@op_rule("aten.rsub")
@op_rule("aten.hardswish", "aten._prelu_kernel", "aten.log_sigmoid_forward", "aten._conj", "aten.resolve_conj", "aten._neg_view")
def pointwise(call: Call) -> list[Axes]:
    """Every output position depends on the same position of every input, sizes of one broadcast."""
    results = []
    for output in call.outputs:
        axes: Axes = [()] * output.ndim
        for tensor in call.tensors():
            given = call.axes_of(tensor)
            for place, axis in enumerate(given, start=output.ndim - len(given)):
                if place < 0 or not axis:
                    continue
                if length(axes[place]) == 1 and output.shape[place] == length(axis):
                    axes[place] = axis
                elif output.shape[place] == length(axis):
                    call.link(axes[place], axis)
        results.append([axis if length(axis) == size else fresh(size) for axis, size in zip(axes, output.shape, strict=True)])
    return results


@op_rule("aten.eq")
def equal(call: Call) -> list[Axes]:
    """Whether positions are equal; numbers may be compared with that of one position, which then is one by itself."""
    if (single := call.singled_out()) is not None:
        numbers, position = single
        try:
            narrow(numbers, position, position + 1)
            call.masks[id(call.outputs[0])] = single
        except Misaligned:
            freeze(numbers, f"numbers of positions are used at {call.site}")
    return pointwise(call)


@op_rule("aten.masked_fill")
def masked_fill(call: Call) -> list[Axes]:
    """Positions with another value; numbers of the last position may become that of the first, which then has to stay."""
    if (first := call.put_first()) is not None:
        numbers, last = first
        left = narrow(numbers, 0, last)
        narrow(left, 0, 1)
        call.numbers[id(call.outputs[0])] = left
    return pointwise(call)


@op_rule("aten.full", "aten.zeros", "aten.ones", "aten.empty", "aten.scalar_tensor", "aten.new_zeros", "aten.new_ones")
@op_rule("aten.new_full", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided")
def uniform_constant(call: Call) -> list[Axes]:
    """Constants that are the same everywhere follow whatever they meet."""
    return [[fresh(size) for size in output.shape] for output in call.outputs]


@op_rule("aten.arange", "aten.linspace", "aten.rand", "aten.randn", "aten.randint", "aten.eye", "aten.tril_indices")
def positional_constant(call: Call) -> list[Axes]:
    """Constants that differ by position keep whole whatever meets them."""
    return [[fresh(size, f"a constant of {call.site}") for size in output.shape] for output in call.outputs]


# -- views -------------------------------------------------------------------------------------------------------------


@op_rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unflatten", "aten._reshape_alias")
@op_rule("aten.squeeze", "aten.unsqueeze", "aten.unsqueeze_", "aten.squeeze_", "aten.view_copy")
def view(call: Call) -> list[Axes]:
    """The same positions in row-major order under another shape."""
    axes, shape = _input(call), call.outputs[0].shape
    try:
        return [reshape(axes, shape)]
    except Misaligned:
        return [_view_by_parts(call, axes, shape)]


def _view_by_parts(call: Call, axes: Axes, shape: Sequence[int]) -> Axes:
    """Runs of axes that are reshaped by themselves: those that cannot be followed are kept whole, the others pass."""
    found: Axes = []
    given, wanted = list(axes), list(shape)
    while given or wanted:
        taken, sizes = given[:1], wanted[:1]
        while prod(map(length, taken)) != prod(sizes) or (not taken and given) or (not sizes and wanted):
            taken, sizes = (
                (given[: len(taken) + 1], sizes) if prod(map(length, taken)) < prod(sizes) else (taken, wanted[: len(sizes) + 1])
            )
        given, wanted = given[len(taken) :], wanted[len(sizes) :]
        try:
            found += reshape(taken, sizes)
        except Misaligned as problem:
            reason = f"{problem} at {call.site}"
            for axis in taken:
                freeze(axis, reason)
            found += [fresh(size, reason) for size in sizes]
    return found


@op_rule("aten.permute")
def permute(call: Call) -> list[Axes]:
    """Axes in another order."""
    axes = _input(call)
    return [[axes[dim] for dim in call.arg(1, "dims")]]


@op_rule("aten.transpose", "aten.transpose_", "aten.t", "aten.t_", "aten.swapaxes")
def transpose(call: Call) -> list[Axes]:
    """Two axes exchanged; `t` exchanges the only two."""
    axes = _input(call)
    if len(axes) > 1:
        first, second = call.arg(1, "dim0", 0), call.arg(2, "dim1", 1)
        axes[first], axes[second] = axes[second], axes[first]
    return [axes]


@op_rule("aten.expand", "aten.expand_copy", "aten.broadcast_to", "aten.expand_as")
def expand(call: Call) -> list[Axes]:
    """Axes of one position repeated; new ones are independent coordinates."""
    shape = call.outputs[0].shape
    given = [()] * (len(shape) - len(_input(call))) + _input(call)
    return [[axis if length(axis) == size else fresh(size) for axis, size in zip(given, shape, strict=True)]]


@op_rule("aten.repeat")
def repeat(call: Call) -> list[Axes]:
    """Each axis tiled: a new outer coordinate times the old one."""
    repeats = call.arg(1, "repeats")
    given = [()] * (len(repeats) - len(_input(call))) + _input(call)
    return [[(*fresh(times), *axis) for times, axis in zip(repeats, given, strict=True)]]


@op_rule("aten.slice", "aten.narrow", "aten.slice_copy")
def slice_axis(call: Call) -> list[Axes]:
    """A run of positions of one axis; a step of k keeps the outer of (n/k, k)."""
    axes = _input(call)
    dim = call.arg(1, "dim", 0) % len(axes)
    size = length(axes[dim])
    if call.name == "aten.narrow":
        start, stop, step = call.arg(2, "start"), call.arg(2, "start") + call.arg(3, "length"), 1
    else:
        bounds = slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1))
        start, stop, step = bounds.indices(size)
    if step == 1:
        if stop <= start:
            raise Misaligned("an empty slice")
        try:
            axes[dim] = narrow(axes[dim], start, stop)
        except Misaligned as problem:
            reason = f"{problem} at {call.site}"
            freeze(axes[dim], reason)
            axes[dim] = fresh(stop - start, reason)
    elif size % step == 0 and start < step and stop > size - step:
        axes[dim], inner = reshape([axes[dim]], [size // step, step])
        _pick(call, inner, start)
    else:
        raise Misaligned(f"a slice with step {step}")
    return [axes]


@op_rule("aten.select", "aten.select_copy")
def select(call: Call) -> list[Axes]:
    """One fixed position of an axis, which keeps the rest of that axis whole."""
    axes = _input(call)
    dim = call.arg(1, "dim") % len(axes)
    axis, size = axes.pop(dim), call.args[0].shape[dim]
    if call.told is not None and call.told.value == call.arg(2, "index"):
        _look_up(call, axis, call.told.numbers)
    else:
        _pick(call, axis, call.arg(2, "index") % size)
    return [axes]


def _pick(call: Call, axis: Axis, index: int) -> None:
    """One fixed position of an axis: it and what stands on either side are segments of their own."""
    size = length(axis)
    for start, stop in ((0, index), (index + 1, size)):
        if stop - start > 1:
            freeze(narrow(axis, start, stop), f"position {index} is picked at {call.site}")
    if size > 1:
        narrow(axis, index, index + 1)


@op_rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split", "aten.tensor_split")
def split(call: Call) -> list[Axes]:
    """An axis cut into segments end to end; where one number says how long they are, they stay equally long."""
    axes = _input(call)
    dim = call.arg(2, "dim", 0) % len(axes)
    results: list[Axes] = []
    at = 0
    for output in call.outputs:
        stop = at + output.shape[dim]
        results.append([*axes[:dim], _segment(call, axes[dim], at, stop), *axes[dim + 1 :]])
        at = stop
    if isinstance(call.arg(1, "split_size"), int):
        for part in results[1:]:
            if length(part[dim]) == length(results[0][dim]):
                call.link(results[0][dim], part[dim])
    return results


def _segment(call: Call, axis: Axis, start: int, stop: int) -> Axis:
    """A run of positions of an axis, which is kept whole where the run cannot be followed."""
    try:
        return narrow(axis, start, stop)
    except Misaligned as problem:
        reason = f"{problem} at {call.site}"
        freeze(axis, reason)
        return fresh(stop - start, reason)


@op_rule("aten.unbind")
def unbind(call: Call) -> list[Axes]:
    """Every position of an axis as a tensor of its own."""
    axes = _input(call)
    dim = call.arg(1, "dim", 0) % len(axes)
    axis = axes.pop(dim)
    for index in range(len(call.outputs)):
        narrow(axis, index, index + 1)
    return [list(axes) for _ in call.outputs]


@op_rule("aten.glu")
def glu(call: Call) -> list[Axes]:
    """One half of an axis gates the other."""
    axes = _input(call)
    dim = call.arg(1, "dim", -1) % len(axes)
    half = length(axes[dim]) // 2
    left, right = narrow(axes[dim], 0, half), narrow(axes[dim], half, 2 * half)
    call.link(left, right)
    axes[dim] = left
    return [axes]


@op_rule("aten.cat", "aten.concatenate")
def cat(call: Call) -> list[Axes]:
    """Tensors end to end along one axis, the other axes pairwise."""
    tensors = [tensor for tensor in call.args[0] if tensor.numel()]
    dim = call.arg(1, "dim", 0) % tensors[0].ndim
    axes = list(call.axes_of(tensors[0]))
    for tensor in tensors[1:]:
        for place, axis in enumerate(call.axes_of(tensor)):
            if place != dim:
                call.link(axes[place], axis)
    axes[dim] = concatenate([call.axes_of(tensor)[dim] for tensor in tensors])
    _count_together(call, tensors, dim)
    return [axes]


def _count_together(call: Call, tensors: Sequence[Tensor], dim: int) -> None:
    """Numbers of positions of one axis side by side are still that: so many are chosen at a time, and have to stay."""
    numbers = [call.numbers_of(tensor) for tensor in tensors]
    if first := next(filter(None, numbers), None):
        for other in numbers:
            if other is None or leaves(other) != leaves(first):
                for given in filter(None, numbers):
                    freeze(given, f"numbers of different positions meet at {call.site}")
                return
        mark(first, least=min(length(first), sum(tensor.shape[dim] for tensor in tensors)))
        call.numbers[id(call.outputs[0])] = first


@op_rule("aten.stack")
def stack(call: Call) -> list[Axes]:
    """Tensors along a new axis whose positions are the tensors themselves."""
    tensors = list(call.args[0])
    axes = list(call.axes_of(tensors[0]))
    for tensor in tensors[1:]:
        for left, right in zip(axes, call.axes_of(tensor), strict=True):
            call.link(left, right)
    axes.insert(call.arg(1, "dim", 0) % (len(axes) + 1), concatenate([()] * len(tensors)) if len(tensors) > 1 else ())
    return [axes]


@op_rule("aten.view_as_complex")
def view_as_complex(call: Call) -> list[Axes]:
    """Pairs of positions become one number."""
    axes = _input(call)
    _pick(call, axes[-1], 0)
    return [axes[:-1]]


@op_rule("aten.view_as_real")
def view_as_real(call: Call) -> list[Axes]:
    """One number becomes a pair of positions, which stay together."""
    return [[*_input(call), fresh(2, f"a pair at {call.site}")]]


# -- contractions ------------------------------------------------------------------------------------------------------


def _contract(call: Call, first: Tensor, second: Tensor) -> Axes:
    """Batched matrix product: [..., n, k] x [..., k, m] -> [..., n, m]."""
    left, right = call.axes_of(first), call.axes_of(second)
    scores = len(left) > 1 and _on_tokens([left[-2]]) and _on_tokens([right[-1]])
    attention = len(left) > 2 and (scores or _on_tokens([left[-1]]) or _on_tokens([right[-2]]))
    call.link(left[-1], right[-2])
    for a, b in zip(left[:-2], right[:-2], strict=True):
        call.link(a, b)
    pooling = attention and not scores and not _has_heads(left[:-2]) and not _on_tokens([left[-2], right[-1]])
    if attention and not pooling:
        for axis in (*left[:-2], *right[:-2]):
            mark(axis, label="attention")
        mark(right[-1] if _on_tokens([left[-1]]) else left[-1], label="inside a head")
    zero = call.zeros.along_axis(first, left, -1) | call.zeros.along_axis(second, right, -2)
    _sum_over(call, left[-1], right[-2], zero)
    call.contractions.append((call.where, (*left, right[-1])))
    return [*left[:-1], right[-1]]


def _has_heads(axes: Axes) -> bool:
    """Whether products run side by side for something else than the examples of a batch."""
    return any(not leaf.marks & {"batch", "input"} for axis in axes for leaf in below(axis))


def _sum_over(call: Call, left: Axis, right: Axis, zero: Collection[Atom]) -> None:
    """Two axes that are one and are summed over; `zero` are the leaves where a factor is zero at masked units.

    Of the others a masked unit still adds the product of what both sides are there, so they are kept whole.
    """
    call.link(left, right)
    mark(left, label="summed")
    known = {root(leaf) for atom in zero for leaf in below((atom,))}
    for leaf in below(left):
        if leaf not in known and "inside a head" not in leaf.marks:
            freeze((leaf,), f"a product sums over it, and neither side is zero where it is masked, at {call.site}")


def _zero_on(call: Call, argument: int, place: int) -> frozenset[Atom]:
    """The leaves along one axis of an argument where it is zero at masked units."""
    tensor = call.args[argument]
    return call.zeros.along_axis(tensor, call.axes_of(tensor), place)


def _on_tokens(axes: Axes) -> bool:
    """Whether an axis runs over positions of a text or an image, or a part of it does."""
    return any("tokens" in atom.marks or _on_tokens(_parts(atom)) for axis in axes for atom in leaves(axis))


def _parts(atom: Atom) -> Axes:
    return list(atom.definition.parts) if isinstance(atom.definition, Sum) else []


@op_rule("aten.mm", "aten.bmm")
def matmul(call: Call) -> list[Axes]:
    """Matrix product; the contracted axes are one."""
    return [_contract(call, call.args[0], call.args[1])]


@op_rule("aten.addmm", "aten.baddbmm")
def biased_matmul(call: Call) -> list[Axes]:
    """Matrix product plus a bias that broadcasts over it."""
    axes = _contract(call, call.args[1], call.args[2])
    _link_trailing(call, axes, call.axes_of(call.args[0]))
    return [axes]


@op_rule("aten.mv", "aten.dot")
def matvec(call: Call) -> list[Axes]:
    """Matrix or vector times vector."""
    left, right = call.axes_of(call.args[0]), call.axes_of(call.args[1])
    _sum_over(call, left[-1], right[-1], _zero_on(call, 0, -1) | _zero_on(call, 1, -1))
    call.contractions.append((call.where, tuple(left)))
    return [left[:-1]]


@op_rule("aten.linear")
def linear(call: Call) -> list[Axes]:
    """`x @ weight.T + bias`; weight is [out, in]."""
    left, weight = call.axes_of(call.args[0]), call.axes_of(call.args[1])
    _sum_over(call, left[-1], weight[-1], _zero_on(call, 0, -1) | _zero_on(call, 1, -1))
    call.contractions.append((call.where, (*left, weight[0])))
    bias = call.arg(2, "bias")
    if bias is not None:
        call.link(weight[0], call.axes_of(bias)[0])
    return [[*left[:-1], weight[0]]]


def _link_trailing(call: Call, axes: Axes, other: Axes) -> None:
    """Links axes pairwise from the last one, sizes of one broadcasting."""
    for axis, met in zip(reversed(axes), reversed(other), strict=False):
        if length(axis) == length(met):
            call.link(axis, met)


# -- look-ups ----------------------------------------------------------------------------------------------------------


@op_rule("aten.embedding")
def embedding(call: Call) -> list[Axes]:
    """Rows of a table, looked up by number: the columns follow, the rows stay where the numbers are not the text's."""
    rows, columns = call.axes_of(call.args[0])
    if call.vocabulary.holds(call.args[1]):
        call.vocabulary.look_up(rows, call.site)
    else:
        freeze(rows, f"rows are looked up by number at {call.site}")
    return [[*call.axes_of(call.args[1]), columns]]


def _looked_up(call: Call, axis: Axis, index: Tensor) -> None:
    """An axis indexed by data: chosen from, where the numbers are known to be its positions, else kept whole."""
    numbers = call.numbers_of(index)
    if numbers is None:
        freeze(axis, f"positions are looked up at {call.site}")
    else:
        _look_up(call, axis, numbers)


def _look_up(call: Call, axis: Axis, numbers: Axis) -> None:
    """Positions chosen by number. What no number reaches is kept, and so is what has a number beyond the end, an error if met."""
    reached = min(length(axis), length(numbers))
    try:
        for given in (axis, numbers):
            if reached < length(given):
                freeze(narrow(given, reached, length(given)), f"positions are looked up among others at {call.site}")
        axis, numbers = narrow(axis, 0, reached), narrow(numbers, 0, reached)
    except Misaligned:
        freeze((*axis, *numbers), f"positions are looked up at {call.site}")
    call.link(axis, numbers)
    mark(axis, label="chosen")


@op_rule("aten.index_select", "aten.gather", "aten.take_along_dim")
def look_up(call: Call) -> list[Axes]:
    """An axis indexed by data; the others pass."""
    axes, dim, numbers = _input(call), call.arg(1, "dim"), call.arg(2, "index")
    if call.name == "aten.take_along_dim":
        dim, numbers = call.arg(2, "dim"), call.arg(1, "indices")
    if dim is None:
        raise Misaligned("positions of all axes are looked up")
    dim %= max(len(axes), 1)
    reason = f"positions are looked up at {call.site}"
    given = call.axes_of(numbers)
    _looked_up(call, axes[dim], numbers)
    freeze(given[dim] if len(given) == len(axes) else given[-1], reason)
    axes[dim] = fresh(call.outputs[0].shape[dim], reason)
    for place, size in enumerate(call.outputs[0].shape):
        if len(given) == len(axes) and place != dim and length(given[place]) > 1:  # a number for every position
            call.link(axes[place], given[place])
        if length(axes[place]) != size:
            axes[place] = fresh(size, reason)
    return [axes]


@op_rule("aten.index")
def index(call: Call) -> list[Axes]:
    """Advanced indexing: indexed axes keep their order, untouched trailing or leading axes pass."""
    axes, indices, output = _input(call), list(call.args[1]), call.outputs[0]
    reason = f"positions are looked up at {call.site}"
    if any(given is not None and given.dtype in (torch.bool, torch.uint8) for given in indices):
        return [_masked_index(call, axes, indices, reason)]
    indices += [None] * (len(axes) - len(indices))
    run = _constant_run(indices, call.args[0].shape)
    if run is not None:
        place, start, stop = run
        axes[place] = narrow(axes[place], start, stop)
        return [axes]
    indexed = [place for place, given in enumerate(indices) if given is not None]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    passing = [axis for place, axis in enumerate(axes) if place not in indexed]
    for place in indexed:
        _looked_up(call, axes[place], indices[place])
    front = indexed[0] if adjacent else 0
    width = output.ndim - len(passing)
    looked_up = [fresh(size, reason) for size in output.shape[front : front + width]]
    if len(indexed) == 1:
        looked_up = call.axes_of(indices[indexed[0]])
    return [[*passing[:front], *looked_up, *passing[front:]]]


def _masked_index(call: Call, axes: Axes, indices: Sequence[Tensor | None], reason: str) -> Axes:
    """As many positions as the data says, of leading axes that a mask covers: they stay once something reads what comes out."""
    mask, *others = indices
    covered = 0 if mask is None else mask.ndim
    if mask is None or any(other is not None for other in others) or mask.dtype == torch.uint8:
        raise Misaligned("places that a mask says, among others")
    looked_up = [*axes[:covered], *call.axes_of(mask)]
    call.when_read(lambda: freeze_all(looked_up, reason))
    return [fresh(call.outputs[0].shape[0], reason), *axes[covered:]]


def _constant_run(indices: Sequence[Tensor | None], shape: Sequence[int]) -> tuple[int, int, int] | None:
    """The run of positions picked by one index of written-out consecutive numbers: (dim, start, stop)."""
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].ndim != 1:
        return None
    place, index = given[0]
    constant = getattr(index, "constant", None)
    if constant is None:
        return None
    size = shape[place]
    with _disable_current_modes():
        numbers = [number % size for number in constant.tolist()]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return place, numbers[0], numbers[-1] + 1


# -- convolutions and images ------------------------------------------------------------------------------------------


@op_rule("aten.convolution")
def convolution(call: Call) -> list[Axes]:
    """Channels of `groups` groups mixed over a window of positions: weight is [out, in / groups, *window]."""
    axes, weight, groups = _input(call), call.axes_of(call.args[1]), call.arg(8, "groups")
    transposed = call.arg(6, "transposed")
    into, out = (weight[1], weight[0]) if not transposed else (weight[0], weight[1])
    for axis in weight[2:]:
        freeze(axis, f"a window of positions at {call.site}")
    zero = _zero_on(call, 0, 1) | _zero_on(call, 1, 0 if transposed else 1)
    if groups == 1:
        _sum_over(call, axes[1], into, zero)
    elif not transposed:
        outer, inner = factor(axes[1], groups)
        out_outer, _ = factor(out, groups)
        call.link(outer, out_outer)
        _sum_over(call, inner, into, zero)
    else:  # weight is [in, out / groups, *window]
        outer, inner = factor(axes[1], groups)
        into_outer, into_inner = factor(into, groups)
        call.link(outer, into_outer)
        _sum_over(call, inner, into_inner, zero)
        out = (*outer, *out)
    bias = call.arg(2, "bias")
    if bias is not None:
        call.link(out, call.axes_of(bias)[0])
    spread = [_positions(call, axis, size) for axis, size in zip(axes[2:], call.outputs[0].shape[2:], strict=True)]
    call.contractions.append((call.where, (axes[0], out, weight[0] if transposed else weight[1], *weight[2:], *spread)))
    return [[axes[0], out, *spread]]


def _positions(call: Call, axis: Axis, size: int) -> Axis:
    """Positions of an image or a text after an operator that moves them: as many as there are, all kept."""
    if length(axis) == size and _on_tokens([axis]):
        return axis
    freeze(axis, f"positions of an image or a text at {call.site}")
    found = fresh(size, f"positions of an image or a text at {call.site}")
    if _on_tokens([axis]):
        mark(found, label="tokens")
    return found


@op_rule(*[f"aten.{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)])
@op_rule(*[f"aten.{kind}_pool{rank}d" for kind in ("avg", "max", "adaptive_max", "adaptive_avg") for rank in (1, 2, 3)])
@op_rule("aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices")
@op_rule("aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d")
@op_rule(*[f"aten.{name}{rank}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for rank in (1, 2, 3)])
@op_rule("aten.upsample_linear1d", "aten.upsample_bilinear2d", "aten.upsample_trilinear3d", "aten.upsample_bicubic2d")
@op_rule("aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa")
def resample(call: Call) -> list[Axes]:
    """The last one to three axes hold positions, which are moved, padded or pooled and stay; the others pass."""
    axes, shape = _input(call), call.outputs[0].shape
    spatial = len(axes) - int(re.findall(r"(\d)d", call.name)[-1])
    moved = zip(axes[spatial:], shape[spatial:], strict=True)
    result = [*axes[:spatial], *(_positions(call, axis, size) for axis, size in moved)]
    return [list(result) for _ in call.outputs]


@op_rule("aten.fractional_max_pool2d", "aten.fractional_max_pool3d")
def fractional_pool(call: Call) -> list[Axes]:
    """Pooling over windows that start where numbers of every channel say: [batch, channels, spatial]."""
    axes, samples = _input(call), call.axes_of(call.arg(3, "random_samples"))
    _link_trailing(call, axes[: -int(call.name[-2])], samples[:-1])
    return resample(call)


@op_rule("aten.constant_pad_nd", "aten.pad")
def pad(call: Call) -> list[Axes]:
    """Positions before and after those of an axis, which are segments of their own; a negative number takes some away."""
    axes, widths = _input(call), call.arg(1, "pad")
    constant = call.name == "aten.constant_pad_nd" or call.arg(2, "mode", "constant") == "constant"
    for number, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        dim = len(axes) - 1 - number
        size = call.outputs[0].shape[dim]
        if before or after:
            channels = constant and not _on_tokens([axes[dim]]) and any(not leaf.reason for leaf in below(axes[dim]))
            axes[dim] = _padded(call, axes[dim], before, after) if channels else _positions(call, axes[dim], size)
    return [axes]


def _padded(call: Call, axis: Axis, before: int, after: int) -> Axis:
    middle = _segment(call, axis, max(-before, 0), length(axis) - max(-after, 0))
    reason = f"padding at {call.site}"
    sides = [fresh(size, reason) if size > 1 else (Atom(1, reason),) for size in (max(before, 0), max(after, 0))]
    parts = [part for part, size in ((sides[0], before), (middle, 1), (sides[1], after)) if size > 0]
    return concatenate(parts)


@op_rule("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training", "aten._native_batch_norm_legit")
@op_rule("aten.cudnn_batch_norm", "aten.batch_norm")
def batch_norm(call: Call) -> list[Axes]:
    """Every channel by itself, with its weight, bias and running statistics; in training, over all that is there."""
    axes = _input(call)
    for given in call.args[1:5]:
        if isinstance(given, Tensor):
            call.link(axes[1], call.axes_of(given)[0])
    if True in (given for given in call.args[3:6] if isinstance(given, bool)):
        for axis in (axes[0], *axes[2:]):
            call.mix(axis)
    return [axes, *[[axes[1]] if output.numel() else [fresh(size) for size in output.shape] for output in call.outputs[1:]]]


@op_rule("aten.native_group_norm")
def group_norm(call: Call) -> list[Axes]:
    """Statistics over the channels of each group and all positions: groups are independent, their channels are not."""
    axes, groups = _input(call), call.arg(6, "group")
    outer, inner = factor(axes[1], groups)
    if groups == 1:
        call.mix(inner)
    else:
        freeze(inner, f"a statistic of each group at {call.site}")
    for given in call.args[1:3]:
        if isinstance(given, Tensor):
            call.link(axes[1], call.axes_of(given)[0])
    return [axes, *[[axes[0], outer] for _ in call.outputs[1:]]]


@op_rule("aten.pixel_shuffle", "aten.col2im")
def fold(call: Call) -> list[Axes]:
    """Channels that hold a window of positions each, spread out over the image."""
    axes, shape = _input(call), call.outputs[0].shape
    channels, window = factor(axes[1], shape[1])
    freeze(window, f"a window of positions at {call.site}")
    for axis in axes[2:]:
        freeze(axis, f"positions of an image at {call.site}")
    return [[axes[0], channels, *(_image_axis(call, size) for size in shape[2:])]]


@op_rule("aten.pixel_unshuffle", "aten.im2col")
def unfold(call: Call) -> list[Axes]:
    """Windows of positions gathered into channels, which keep them together."""
    axes, shape = _input(call), call.outputs[0].shape
    for axis in axes[2:]:
        freeze(axis, f"positions of an image at {call.site}")
    window = fresh(shape[1] // length(axes[1]), f"a window of positions at {call.site}")
    return [[axes[0], (*axes[1], *window), *(_image_axis(call, size) for size in shape[2:])]]


def _image_axis(call: Call, size: int) -> Axis:
    axis = fresh(size, f"positions of an image at {call.site}")
    mark(axis, label="tokens")
    return axis


@op_rule("aten.unfold")
def windows(call: Call) -> list[Axes]:
    """Overlapping runs of positions of one axis, which is kept whole, along a new last axis."""
    axes, dim, output = _input(call), call.arg(1, "dimension"), call.outputs[0]
    dim %= len(axes)
    freeze(axes[dim], f"a window of positions at {call.site}")
    axes[dim] = _image_axis(call, output.shape[dim])
    return [[*axes, _image_axis(call, output.shape[-1])]]


@op_rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(call: Call) -> list[Axes]:
    """Channels of `groups` groups, in turn."""
    axes = _input(call)
    outer, inner = factor(axes[1], call.arg(1, "groups"))
    axes[1] = (*inner, *outer)
    return [axes]


@op_rule("aten.linalg_solve_triangular", "aten.triangular_solve")
def solve(call: Call) -> list[Axes]:
    """Batches of equations: what indexes an equation is kept, the batch passes."""
    first, second = call.axes_of(call.args[0]), call.axes_of(call.args[1])
    matrix, given = (second, first) if call.name == "aten.triangular_solve" else (first, second)
    if tuple(map(length, matrix[:-2])) != tuple(map(length, given[:-2])):
        raise Misaligned("equations of different batches")
    unknown = given[-2] if call.kwargs.get("left", True) else given[-1]
    freeze_all([*matrix[-2:], unknown], f"a system of equations at {call.site}")
    for a, b in zip(matrix[:-2], given[:-2], strict=True):
        call.link(a, b)
    return [given, matrix][: len(call.outputs)]


@op_rule("aten.linalg_inv_ex")
def inverse(call: Call) -> list[Axes]:
    """Inverse matrices, which stay whole, and whether there are any; the batch passes."""
    axes = _input(call)
    freeze_all(axes[-2:], f"a system of equations at {call.site}")
    return [axes, axes[:-2]][: len(call.outputs)]


# -- statistics over an axis -------------------------------------------------------------------------------------------


@op_rule("aten.mean", "aten.var_mean", "aten.var", "aten.std", "aten.linalg_vector_norm", "aten.norm")
def statistic(call: Call) -> list[Axes]:
    """A statistic over an axis that a cut would take over what stays: noted, not frozen.

    Positions that are zero where they are masked add nothing to a length.
    """
    axes = _input(call)
    is_length = call.name in ("aten.linalg_vector_norm", "aten.norm")
    zero = call.zeros.along(call.args[0], axes) if is_length and _is_order(call.arg(1, "ord", 2)) else frozenset()

    def note(axis: Axis) -> None:
        if not zero.issuperset(below(axis)):
            call.mix(axis)
        mark(axis, label="summed")

    dims = call.arg(2 if is_length else 1, "dim")
    if isinstance(dims, bool):  # whether to correct a variance over all axes
        dims = None
    return _reduce(call, axes, dims, note if is_length else call.mix)


def _is_order(order: Any) -> bool:
    """Whether zeros add nothing to a length of this order."""
    return order is None or order == "fro" or (isinstance(order, int | float) and order > 0)


@op_rule("aten.sum")
def total(call: Call) -> list[Axes]:
    """A sum over an axis, which is kept whole but for units that add zero where they are masked."""
    axes, reason = _input(call), f"reduced over at {call.site}"
    zero = frozenset[Atom]().union(*(_zero_on(call, 0, place) for place in range(len(axes))))

    def note(axis: Axis) -> None:
        known = {root(leaf) for atom in zero for leaf in below((atom,))}
        freeze([leaf for leaf in below(axis) if leaf not in known], reason)
        mark(axis, label="summed")

    return _reduce(call, axes, call.arg(1, "dim"), note)


@op_rule("aten.amin", "aten.min", "aten.argmin", "aten.prod", "aten.any", "aten.all", "aten.logsumexp")
def reduction(call: Call) -> list[Axes]:
    """A reduction that zeroed positions would still take part in: the axis is kept whole."""
    if len(call.tensors()) > 1:  # the smaller or larger one of two, position by position
        return pointwise(call)
    reason = f"reduced over at {call.site}"
    return _reduce(call, _input(call), call.arg(1, "dim"), lambda axis: freeze(axis, reason))


def _reduce(call: Call, axes: Axes, dims: Any, note: Callable[[Axis], None]) -> list[Axes]:
    gone = _dims(call, dims, len(axes))
    over = [axes[dim] for dim in gone]

    def note_all() -> None:
        for axis in over:
            note(axis)

    call.when_read(note_all)
    keep = call.outputs[0].ndim == len(axes)
    left: Sequence[Axis] = [() if place in gone else axis for place, axis in enumerate(axes) if keep or place not in gone]
    return [list(left) for _ in call.outputs]


def _contest(call: Call, axis: Axis, dim: int, least: int = 1) -> None:
    contest = Contest(call.where, call.name, call.turn, dim, length(axis))
    call.contests[contest] = axis
    mark(axis, contest=contest, least=least)


@op_rule("aten._softmax", "aten.softmax", "aten._safe_softmax")
def softmax(call: Call) -> list[Axes]:
    """Positions that compete: what is removed must lose."""
    axes = _input(call)
    dim = call.arg(1, "dim") % len(axes)
    if call.args[0].ndim > 2 and _is_input(axes[dim]):
        mark(axes[dim], label="tokens")
    _contest(call, axes[dim], dim)
    return [axes]


def _is_input(axis: Axis) -> bool:
    """Whether an axis is one of the network's input."""
    found = below(axis)
    return bool(found) and all("input" in leaf.marks for leaf in found)


@op_rule("aten.topk")
def topk(call: Call) -> list[Axes]:
    """The largest positions, and their numbers: as many must stay as are chosen."""
    axes = _input(call)
    dim = call.arg(2, "dim", -1) % len(axes)
    axis = axes[dim]
    if call.arg(3, "largest", True):
        _contest(call, axis, dim, least=call.arg(1, "k"))
    else:  # what is masked would win
        freeze(axis, f"the smallest positions are chosen at {call.site}")
    call.numbers[id(call.outputs[1])] = axis
    axes[dim] = fresh(call.outputs[0].shape[dim], f"chosen at {call.site}")
    return [list(axes), list(axes)]


@op_rule("aten.max", "aten.amax", "aten.argmax")
def largest(call: Call) -> list[Axes]:
    """The largest position of an axis, or its number: a choice of one."""
    if len(call.tensors()) > 1:
        return reduction(call)
    axes, dims = _input(call), _dims(call, call.arg(1, "dim"), call.args[0].ndim)
    if len(dims) != 1 or not call.args[0].is_floating_point():
        return reduction(call)
    _contest(call, axes[dims[0]], dims[0])
    if call.name != "aten.amax":
        call.numbers[id(call.outputs[-1])] = axes[dims[0]]
    return _reduce(call, axes, dims, lambda axis: None)


@op_rule("aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.scatter_add_")
def scatter(call: Call) -> list[Axes]:
    """Values put at numbered positions of one axis; the other axes pairwise.

    Along that axis every value stays: masked ones have numbers too, and would still be put somewhere.
    """
    axes, dim, index = _input(call), call.arg(1, "dim"), call.arg(2, "index")
    dim %= len(axes)
    nothing = call.zeros.nothing(call.args[0])
    _looked_up(call, axes[dim], index)
    for tensor in call.tensors()[1:]:
        for place, axis in enumerate(call.axes_of(tensor)):
            if place == dim:
                freeze(axis, f"positions are looked up at {call.site}")
            else:
                call.link(axes[place], axis)
    if nothing and (numbers := call.numbers_of(index)) is not None:
        call.chosen[id(call.outputs[0])] = numbers
    return [axes]


@op_rule("aten.index_add", "aten.index_add_")
def index_add(call: Call) -> list[Axes]:
    """Values added at numbered positions of one axis; the other axes pairwise."""
    axes, dim, given = _input(call), call.arg(1, "dim"), call.axes_of(call.arg(3, "source"))
    dim %= len(axes)
    _looked_up(call, axes[dim], call.arg(2, "index"))
    freeze(given[dim], f"positions are looked up at {call.site}")
    for place, axis in enumerate(given):
        if place != dim:
            call.link(axes[place], axis)
    return [axes]


@op_rule("aten.nonzero")
def nonzero(call: Call) -> list[Axes]:
    """The numbers of the positions that are not zero, as many as the data says; masked units must not be among them."""
    axes, output = _input(call), call.outputs[0]
    reason = f"as many as the data says at {call.site}"
    zero = call.zeros.along(call.args[0], axes) if len(axes) == 1 else frozenset()
    for axis in axes:
        freeze([leaf for leaf in below(axis) if leaf not in zero], reason)
    if len(axes) == 1:
        call.numbers[id(output)] = axes[0]
    return [[fresh(size, reason) for size in output.shape]]


@op_rule("aten.index_put", "aten._unsafe_index_put")
def index_put(call: Call) -> list[Axes]:
    """Values put at places that data names, along leading axes, which are kept whole; the others pairwise."""
    axes, values = _input(call), call.axes_of(call.args[2])
    covered = 0
    for index in call.args[1]:
        if index is None:
            raise Misaligned("places along axes that are not the leading ones")
        covered += index.ndim if index.dtype == torch.bool else 1
    places = [axis for index in call.args[1] for axis in call.axes_of(index)]
    for axis in (*axes[:covered], *places):
        freeze(axis, f"positions are looked up at {call.site}")
    _link_trailing(call, axes[covered:], values)
    return [axes]


@op_rule("aten.masked_scatter", "aten.masked_scatter_")
def masked_scatter(call: Call) -> list[Axes]:
    """Rows of a source put at masked places: where the mask is the same along the last axis, that axis is one in both."""
    axes, mask, source = _input(call), call.args[1], call.args[2]
    same = mask.ndim == len(axes) and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    if not same or source.shape[-1:] != call.args[0].shape[-1:]:
        raise Misaligned("single positions are put elsewhere")
    given = call.axes_of(source)
    call.link(axes[-1], given[-1])
    if mask.shape[-1] > 1:
        call.link(axes[-1], call.axes_of(mask)[-1])
    for axis in (*axes[:-1], *given[:-1]):
        freeze(axis, f"positions are looked up at {call.site}")
    return [axes]


@op_rule("aten._log_softmax", "aten.cumsum", "aten.cumprod", "aten.flip", "aten.roll", "aten.sort", "aten.tril", "aten.triu")
def ordered(call: Call) -> list[Axes]:
    """Operators in which every position of an axis sees the others: that axis is kept whole."""
    axes, reason = _input(call), f"positions see each other at {call.site}"
    if call.name in ("aten.tril", "aten.triu"):
        touched = [len(axes) - 2, len(axes) - 1]
    elif call.name == "aten.roll":
        touched = _dims(call, call.arg(2, "dims"), len(axes))
    else:
        touched = _dims(call, call.arg(1, "dim", -1), len(axes))
    for dim in touched:
        freeze(axes[dim], reason)
    return [
        [axis if length(axis) == size else fresh(size, reason) for axis, size in zip(axes, output.shape, strict=True)]
        for output in call.outputs
    ]


@op_rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def layer_norm(call: Call) -> list[Axes]:
    """Normalisation over the trailing axes, with weight and bias along them."""
    axes = _input(call)
    shape = call.arg(1, "normalized_shape")
    for axis in axes[-len(shape) :]:
        call.mix(axis)
    for given in call.args[2:4]:
        if isinstance(given, Tensor):
            for axis, other in zip(axes[-len(shape) :], call.axes_of(given), strict=True):
                call.link(axis, other)
    rest = [*axes[: -len(shape)], *([()] * len(shape))]
    return [axes, *[[axis for axis, _ in zip(rest, output.shape, strict=False)] for output in call.outputs[1:]]]
