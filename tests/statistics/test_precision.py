"""Computing in bfloat16, and what is said where a processor has no instructions for it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from resect.errors import EmulatedPrecision
from resect.statistics import computing, precision, tell_emulated


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_processor_that_emulates_bfloat16_is_named(dtype: torch.dtype, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    layer = nn.Linear(4, 4, dtype=dtype)
    with pytest.warns(EmulatedPrecision, match="does not multiply in bfloat16.*settings.bf16=false"):
        tell_emulated(layer, bf16=bf16)
    with computing(layer, bf16=bf16):
        assert layer(torch.ones(1, 4, dtype=dtype)).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "bf16", "device", "able"), [
    (torch.float32, False, "cpu", False), (torch.float32, True, "cpu", True), (torch.bfloat16, False, "meta", False),
])  # fmt: skip
def test_nothing_is_said_where_nothing_is_emulated(
    dtype: torch.dtype, bf16: bool, device: str, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: able)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_emulated(nn.Linear(4, 4, dtype=dtype, device=device), bf16=bf16)
