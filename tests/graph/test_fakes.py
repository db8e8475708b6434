"""Operators on fake tensors put out the same the second time, when they are not worked out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resect.graph import fakes

Program = Callable[[Tensor], Any]
PROGRAMS: dict[str, Program] = {
    "sum of two": lambda x: x + x,
    "number, integer and truth": lambda x: [torch.full((2,), 1), torch.full((2,), 1.0), torch.full((2,), True)],
    "product": lambda x: torch.nn.functional.linear(x, x[0]),
    "reductions": lambda x: [x.sum(), x.mean(-1), x.amax(0, keepdim=True), x.max(-1), x.argmax(-1)],
    "views": lambda x: [x.view(6, 4), x.transpose(0, 2), x[:, 1:], x[..., 2], x.expand(5, 2, 3, 4), x.unbind(0)],
    "pieces": lambda x: x.split([1, 3], -1),
    "made": lambda x: [torch.arange(5), torch.zeros(2, 3, dtype=torch.int8), x.new_ones(7), torch.empty_like(x.mT)],
    "types": lambda x: [x.half(), x.to(torch.int64), x > 0, (x > 0).sum()],
    "written in place": lambda x: [x.add_(1), x[:, 0].zero_(), x.masked_fill_(x > 0, 0.0)],
    "shape changed in place": lambda x: [x.t_() if x.ndim < 3 else x.unsqueeze_(0), x.squeeze_(0)],
    "a constant": lambda x: [x * torch.tensor(2.0), torch.tensor(3).item(), -x],
    "complex": lambda x: torch.view_as_complex(x.view(2, 3, 2, 2)).conj().imag,
    "scattered": lambda x: x.scatter(0, torch.zeros(1, 3, 4, dtype=torch.long), 1.0),
    "nothing to see": lambda x: [x[:0], torch.empty(0)],
}


class Remembering(TorchDispatchMode):
    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return fakes.operate(func, args, kwargs or {}, self._mode)


@pytest.fixture(autouse=True)
def _nothing_noted() -> Iterator[None]:
    fakes._RESULTS.clear()
    yield
    fakes._RESULTS.clear()


def described(mode: FakeTensorMode, program: Program, *, remembering: bool) -> list[Any]:
    """All that there is to know of what a program puts out, and which of it shares memory with what it was given."""
    with mode, torch.no_grad():
        x = torch.empty(2, 3, 4)
        if remembering:
            with Remembering(mode):
                result = program(x)
        else:
            result = program(x)
    found: list[Any] = []
    for value in torch.utils._pytree.tree_leaves([result, x]):
        if not isinstance(value, Tensor):
            found.append(value)
            continue
        assert type(value) is FakeTensor
        shared = value.untyped_storage()._cdata == x.untyped_storage()._cdata
        shape = (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device)
        found.append((*shape, shared, value is x, value.is_neg(), value.requires_grad, value.constant is not None))
    return found


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_is_made_anew_is_what_was_worked_out(program: Program) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    expected = described(mode, program, remembering=False)
    assert described(mode, program, remembering=True) == expected
    assert described(mode, program, remembering=True) == expected
    assert described(FakeTensorMode(allow_non_fake_inputs=True), program, remembering=True) == expected
    assert fakes._RESULTS


def test_operators_are_not_worked_out_twice() -> None:
    mode, counted = FakeTensorMode(), []

    def multiply(*args: Any) -> Any:
        counted.append(args)
        return torch.ops.aten.mul.Tensor(*args)

    multiply._schema = torch.ops.aten.mul.Tensor._schema  # type: ignore[attr-defined]
    with mode:
        x, y = torch.empty(3, 1), torch.empty(4)
        results = [fakes.operate(multiply, (x, y), {}, mode) for _ in range(3)]
        fakes.operate(multiply, (y, x), {}, mode)
    assert [tuple(result.shape) for result in results] == [(3, 4)] * 3
    assert len({result.untyped_storage()._cdata for result in results}) == 3
    assert len(counted) == 2


def test_the_default_type_counts() -> None:
    mode = FakeTensorMode()
    with mode, Remembering(mode):
        assert torch.full((2,), 1.0).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.full((2,), 1.0).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_shape_that_does_not_fit_is_an_error_every_time() -> None:
    mode = FakeTensorMode()
    with mode:
        x = torch.empty(3, 2)
    for _ in range(2):
        with mode, Remembering(mode), pytest.raises(RuntimeError):
            x @ x


def test_no_more_is_noted_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "MOST", 3)
    mode = FakeTensorMode()
    with mode, Remembering(mode):
        for size in range(2, 12):
            assert torch.zeros(size).shape == (size,)
            assert len(fakes._RESULTS) <= 3
