"""Operators on fake tensors, each worked out once.

What an operator puts out on fake tensors depends on the shapes, strides, types and places of what it is given and on
nothing else. Networks repeat themselves, from block to block and from one replay to the next, so results are noted as
plain numbers and made anew from these, in a fifth of the time that working them out again would take.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

MOST = 20_000
"""Results that are noted; then it starts again."""
PLACE = torch.ops.prim.device.default
"""What a fake tensor asks to say on which device it is."""
PLAIN = frozenset(
    (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)
"""Types of what decides a result by its value."""


class _Unknown(Exception):
    """Something that a result may depend on in a way that is not noted."""


@dataclass(frozen=True)
class _Result:
    """A tensor as plain numbers; a view of the first one that was given, or one with memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    is_view: bool

    def made(self, mode: FakeTensorMode, base: Any) -> FakeTensor:
        """The tensor once more."""
        if self.is_view:
            element = torch.empty(0, dtype=self.dtype, device="meta")
            element.set_(base.untyped_storage(), self.offset, self.shape, self.stride)
        else:
            element = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return FakeTensor(mode, element, self.device)


_Noted = tuple[type, tuple[_Result, ...]]
_RESULTS: dict[Any, _Noted | None] = {}


def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    """What an operator puts out under `mode`, with the same memory shared as ever."""
    if func is PLACE and type(args[0]) is FakeTensor:
        return args[0].fake_device
    try:
        key = _key(func, args, kwargs, mode)
    except _Unknown:
        return func(*args, **kwargs)
    if key not in _RESULTS:
        result = func(*args, **kwargs)
        if len(_RESULTS) >= MOST:
            _RESULTS.clear()
        _RESULTS[key] = _noted(func, result, args, unchanged=key == _key(func, args, kwargs, mode))
        return result
    noted = _RESULTS[key]
    if noted is None:
        return func(*args, **kwargs)
    kind, results = noted
    if not results:
        return args[0]
    guard = torch._C._DisableTorchDispatch()  # makes meta tensors, which no mode is to see
    try:
        made = [result.made(mode, args[0] if args else None) for result in results]
    finally:
        del guard
    return made[0] if kind is FakeTensor else kind(made)


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode) -> tuple[Any, ...]:
    """All that the result depends on. Raises `_Unknown` where that is not known."""
    key: list[Any] = [func, torch.get_default_dtype()]
    _describe(args, key, mode)
    for name, value in kwargs.items():
        key.append(name)
        _describe((value,), key, mode)
    return tuple(key)


def _describe(values: Iterable[Any], key: list[Any], mode: FakeTensorMode) -> None:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not mode or value.constant is not None or value.layout != torch.strided:
                raise _Unknown
            if value.dtype.is_complex or value.is_neg():
                raise _Unknown
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif kind in PLAIN:
            key += (kind, value)  # 1, 1.0 and True are equal
        elif kind in (list, tuple):
            key += (kind, len(value))
            _describe(value, key, mode)
        else:
            raise _Unknown


def _noted(func: Any, result: Any, args: Sequence[Any], *, unchanged: bool) -> _Noted | None:
    """A result as plain numbers, none for what was written to; None for one that cannot be made from these."""
    if not unchanged:
        return None
    kind = type(result)
    if func._schema.is_mutable:
        return (kind, ()) if args and result is args[0] else None
    tensors = [result] if kind is FakeTensor else result
    if kind not in (FakeTensor, list, tuple) or not tensors:
        return None
    found = [_plain(tensor, args) for tensor in tensors]
    results = tuple(one for one in found if one is not None)
    return (kind, results) if len(results) == len(found) else None


def _plain(tensor: Any, args: Sequence[Any]) -> _Result | None:
    given = [value for value in torch.utils._pytree.tree_leaves(args) if isinstance(value, Tensor)]
    if type(tensor) is not FakeTensor or any(tensor is value for value in given):
        return None
    if tensor.constant is not None or tensor.requires_grad or tensor.layout != torch.strided:
        return None
    if tensor.dtype.is_complex or tensor.is_neg() or not all(type(size) is int for size in tensor.shape):
        return None
    memory = tensor.untyped_storage()._cdata
    shared = [value for value in given if value.untyped_storage()._cdata == memory]
    if shared and shared[0] is not args[0]:
        return None
    if not shared and tensor.storage_offset():
        return None
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    offset = int(tensor.storage_offset())
    return _Result(shape, stride, offset, tensor.dtype, tensor.fake_device, bool(shared))
