"""Rules for operators that few networks have: volumes and sound, graphs of nodes, recommenders, weights made of others.

They are registered where those of `resect.graph.rules` are, by importing this file.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resect.graph.atoms import Atom, below, freeze, fresh, length
from resect.graph.rules import (
    Axes,
    Call,
    _dims,
    _image_axis,
    _input,
    _positions,
    _sum_over,
    _zero_on,
    freeze_all,
    op_rule,
)

# -- weights made of other weights -------------------------------------------------------------------------------------


@op_rule("aten._weight_norm_interface")
def weight_norm(call: Call) -> list[Axes]:
    """Rows of `v`, each over its own length, times `g`; positions that are zero when they are masked add nothing to a length."""
    axes, scale, dim = _input(call), call.axes_of(call.args[1]), call.arg(2, "dim", 0)
    call.link(axes[dim], scale[dim])
    zero = call.zeros.along(call.args[0], axes)
    for place, axis in enumerate(axes):
        if place != dim:
            freeze([leaf for leaf in below(axis) if leaf not in zero], f"a length over it is taken at {call.site}")
    norms = [axes[dim] if place == dim else () for place in range(len(axes))]
    return [axes, norms]


@op_rule("aten._trilinear")
def trilinear(call: Call) -> list[Axes]:
    """Three tensors with new axes of one position each, multiplied, and summed over some axes."""
    new, summed = call.args[3:6], call.args[6]
    rank = call.args[0].ndim + len(new[0])
    given = [_unsqueezed(call.axes_of(tensor), places) for tensor, places in zip(call.args[:3], new, strict=True)]
    result: Axes = [()] * rank
    for place in range(rank):
        axes = [one[place] for one in given if one[place]]
        result[place] = axes[0] if axes else ()
        for other in axes[1:]:
            call.link(result[place], other)
    for place in summed:
        zero = frozenset[Atom]().union(*(call.zeros.along(tensor, call.axes_of(tensor)) for tensor in call.args[:3]))
        _sum_over(call, result[place], result[place], zero)
    call.contractions.append((call.where, tuple(result)))
    return [[axis for place, axis in enumerate(result) if place not in summed]]


def _unsqueezed(axes: Axes, places: Sequence[int]) -> Axes:
    for place in sorted(places):
        axes.insert(place, ())
    return axes


# -- look-ups ----------------------------------------------------------------------------------------------------------


@op_rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[Axes]:
    """Rows of a table looked up by number and reduced bag by bag: the columns follow, each by itself."""
    rows, columns = _input(call)
    reason = f"rows are looked up by number at {call.site}"
    freeze(rows, reason)
    for tensor in call.tensors()[1:]:
        for axis in call.axes_of(tensor):
            freeze(axis, reason)
    first = fresh(call.outputs[0].shape[0], reason)
    rest = [
        [first, columns] if output.ndim == 2 else _frozen(output, reason)  # the numbers of the largest
        for output in call.outputs[1:]
    ]
    return [[first, columns], *rest]


@op_rule("aten.scatter_reduce", "aten.index_reduce")
def scatter_reduce(call: Call) -> list[Axes]:
    """Values reduced at numbered positions of one axis, which stays whole; the other axes pairwise."""
    axes, dim = _input(call), call.arg(1, "dim")
    dim %= len(axes)
    reason = f"positions are looked up at {call.site}"
    whole = call.name == "aten.index_reduce"  # its index is a list of numbers, not one for every value
    freeze(axes[dim], reason)
    source = call.arg(3, "source") if whole else call.arg(3, "src")
    for tensor in (call.arg(2, "index"), source):
        given = call.axes_of(tensor)
        if whole and len(given) != len(axes):
            freeze(given[0], reason)
            continue
        freeze(given[dim], reason)
        _link_others(call, axes, given, dim)
    return [axes]


@op_rule("aten.segment_reduce")
def segment_reduce(call: Call) -> list[Axes]:
    """Runs of positions of one axis reduced to one each; the other axes pass."""
    axes, dim = _input(call), call.kwargs.get("axis", 0)
    reason = f"positions are reduced in runs at {call.site}"
    freeze(axes[dim], reason)
    axes[dim] = fresh(call.outputs[0].shape[dim], reason)
    return [axes]


@op_rule("aten.masked_select")
def masked_select(call: Call) -> list[Axes]:
    """As many single positions as the data says."""
    reason = f"positions are looked up at {call.site}"
    axes = [axis for tensor in call.tensors() for axis in call.axes_of(tensor)]
    call.when_read(lambda: freeze_all(axes, reason))
    return [_frozen(call.outputs[0], reason)]


def _link_others(call: Call, axes: Axes, given: Axes, dim: int) -> None:
    """Links all axes but one pairwise."""
    for place, (axis, other) in enumerate(zip(axes, given, strict=True)):
        if place != dim:
            call.link(axis, other)


def _frozen(output: Tensor, reason: str) -> Axes:
    return [fresh(size, reason) for size in output.shape]


# -- positions of sound, images and volumes ----------------------------------------------------------------------------


@op_rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler")
def grid_sample(call: Call) -> list[Axes]:
    """Positions looked up at places of a grid [batch, *positions, coordinates]: channels pass."""
    axes, grid, shape = _input(call), call.axes_of(call.args[1]), call.outputs[0].shape
    call.link(axes[0], grid[0])
    for axis in (*axes[2:], *grid[1:]):
        freeze(axis, f"positions of an image at {call.site}")
    return [[axes[0], axes[1], *(_image_axis(call, size) for size in shape[2:])]]


@op_rule("aten.affine_grid_generator")
def affine_grid(call: Call) -> list[Axes]:
    """A grid made from a matrix for each image."""
    batch, *matrix = _input(call)
    reason = f"positions of an image at {call.site}"
    for axis in matrix:
        freeze(axis, reason)
    return [[batch, *[fresh(size, reason) for size in call.outputs[0].shape[1:]]]]


@op_rule("aten.max_unpool2d", "aten.max_unpool3d")
def unpool(call: Call) -> list[Axes]:
    """Values put back where a pooling found them; channels, and their numbers of positions, pairwise."""
    axes, shape = _input(call), call.outputs[0].shape
    spatial = int(call.name[-2])
    for axis, other in zip(axes[:-spatial], call.axes_of(call.args[1])[:-spatial], strict=True):
        call.link(axis, other)
    for axis in axes[-spatial:]:
        freeze(axis, f"positions of an image at {call.site}")
    return [[*axes[:-spatial], *(_image_axis(call, size) for size in shape[-spatial:])]]


@op_rule("aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c")
def fourier(call: Call) -> list[Axes]:
    """A Fourier transform over some axes, which stay whole; the others pass."""
    axes, reason = _input(call), f"a Fourier transform at {call.site}"
    for dim in _dims(call, call.arg(1, "dim"), len(axes)):
        freeze(axes[dim], reason)
        axes[dim] = _positions(call, axes[dim], call.outputs[0].shape[dim])
    return [axes]


@op_rule("aten.unfold_backward")
def overlap_add(call: Call) -> list[Axes]:
    """Overlapping windows [.., windows, .., window] summed where they lie on one axis, which stays whole."""
    axes, dim = _input(call), call.arg(2, "dim")
    reason = f"a window of positions at {call.site}"
    window = axes.pop()
    freeze(window, reason)
    dim %= len(axes)
    freeze(axes[dim], reason)
    axes[dim] = _positions(call, axes[dim], call.outputs[0].shape[dim])
    return [axes]


@op_rule("aten.as_strided", "aten.as_strided_copy")
def as_strided(call: Call) -> list[Axes]:
    """Memory under other strides: an axis passes that has kept its size and stride and that no other axis moves along."""
    axes, given, output = _input(call), call.args[0], call.outputs[0]
    strides = call.strides or given.stride()
    sizes, reason = [length(axis) for axis in axes], f"memory is seen under other strides at {call.site}"
    offset = int(output.storage_offset() - (output.storage_offset() if call.strides else given.storage_offset()))
    passing: dict[int, int] = {}
    for place, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        same = [other for other in range(output.ndim) if (output.shape[other], output.stride()[other]) == (size, stride)]
        if size > 1 and len(same) == 1 and _alone(output, same[0], offset):
            passing[same[0]] = place
    for place, axis in enumerate(axes):
        if place not in passing.values():
            freeze(axis, reason)
    return [
        [axes[passing[place]] if place in passing else _image_axis(call, size) for place, size in enumerate(output.shape)]
    ]


def _alone(output: Tensor, place: int, offset: int) -> bool:
    """Whether moving along the other axes of a tensor never changes the position along one of them."""
    size, stride = output.shape[place], output.stride()[place]
    whole = size * stride
    others = [
        (many, step)
        for other, (many, step) in enumerate(zip(output.shape, output.stride(), strict=True))
        if other != place and many > 1
    ]
    inner = [(many, step) for many, step in others if step % whole]
    reach = offset % whole + sum((many - 1) * step for many, step in inner)
    return stride > 0 and reach < stride


# -- vectors -----------------------------------------------------------------------------------------------------------


@op_rule("aten.vdot")
def vdot(call: Call) -> list[Axes]:
    """A sum of products of two vectors."""
    (left,), (right,) = call.axes_of(call.args[0]), call.axes_of(call.args[1])
    _sum_over(call, left, right, _zero_on(call, 0, 0) | _zero_on(call, 1, 0))
    call.contractions.append((call.where, (left,)))
    return [[]]
