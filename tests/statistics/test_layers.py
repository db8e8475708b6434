"""Layers as matrices: what a module computes is its matrix times what its positions take in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from resect.errors import UsageError
from resect.statistics import Layer, layer_of, layers_of
from tests.models import randomise

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(3, 5, 4), (2, 3, 11)),
    "1d stride padding dilation": (nn.Conv1d(3, 5, 3, stride=2, padding=3, dilation=2, bias=False), (2, 3, 11)),
    "1d same": (nn.Conv1d(3, 5, 4, padding="same", dilation=3), (2, 3, 11)),
    "2d": (nn.Conv2d(3, 5, 3), (2, 3, 6, 7)),
    "2d of one place": (nn.Conv2d(3, 5, 1, bias=False), (2, 3, 6, 7)),
    "2d oblong": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 3), dilation=(1, 2)), (2, 3, 9, 8)),
    "2d that skips places": (nn.Conv2d(3, 5, 2, stride=4), (2, 3, 11, 10)),
    "2d valid": (nn.Conv2d(3, 5, 2, padding="valid"), (2, 3, 5, 5)),
    "2d same": (nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 8, 7)),
    "2d reflect": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 7)),
    "2d circular": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 6, 7)),
    "2d replicate": (nn.Conv2d(3, 5, 3, padding=2, stride=2, padding_mode="replicate"), (2, 3, 6, 7)),
    "3d": (nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1)), (2, 2, 5, 6, 3)),
    "2d without a batch": (nn.Conv2d(3, 5, 3, padding=1), (3, 6, 7)),
    "1d without a batch": (nn.Conv1d(3, 5, 3), (3, 9)),
}
LINEARS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), (5, 6)),
    "linear of one sample": (nn.Linear(6, 4), (6,)),
    "square linear": (nn.Linear(6, 6), (5, 6)),
    "transposed": (Conv1D(4, 6), (2, 3, 6)),
    "square transposed": (Conv1D(6, 6), (2, 3, 6)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # uneven padding is what is tested
EVERY = pytest.mark.parametrize("name", [*CONVOLUTIONS, *LINEARS])


def made(name: str) -> tuple[Layer, Tensor]:
    module, shape = (CONVOLUTIONS | LINEARS)[name]
    module = copy.deepcopy(module).double()
    randomise(module, seed=1)
    return layers_of(nn.ModuleDict({"it": module}), ["it"])[0], torch.randn(shape, dtype=torch.float64)


@EVERY
def test_the_matrix_times_the_inputs_is_what_the_module_computes(name: str) -> None:
    layer, given = made(name)
    inputs, matrix, output = layer.inputs(given), layer.matrix(), layer.module(given)
    assert matrix.shape == (layer.rows, layer.columns)
    torch.testing.assert_close(inputs @ matrix.T, layer.outputs(output), rtol=1e-12, atol=1e-12)


@EVERY
def test_outputs_keep_every_number_under_its_row(name: str) -> None:
    """Numbers that say which row they belong to are found in its column."""
    layer, given = made(name)
    output = layer.module(given).detach()
    axis = -1 if name in LINEARS else output.ndim - len(layer.weight.shape[2:]) - 1
    marked = torch.arange(layer.rows).double().view(-1, *[1] * (output.ndim - 1 - axis if axis >= 0 else 0)).expand_as(output)
    found = layer.outputs(marked)
    assert found.shape == (output.numel() // layer.rows, layer.rows)
    assert torch.equal(found, torch.arange(layer.rows).double().expand_as(found))


@EVERY
def test_writing_the_matrix_back_changes_nothing(name: str) -> None:
    layer, _ = made(name)
    before = {key: value.clone() for key, value in layer.module.state_dict().items()}
    layer.write(layer.matrix())
    for key, value in layer.module.state_dict().items():
        assert torch.equal(value, before[key])


@EVERY
def test_another_matrix_is_written_where_it_belongs(name: str) -> None:
    layer, given = made(name)
    other = torch.randn(layer.rows, layer.columns, dtype=torch.float64)
    layer.write(other)
    assert torch.equal(layer.matrix(), other)
    torch.testing.assert_close(layer.inputs(given) @ other.T, layer.outputs(layer.module(given)), rtol=1e-12, atol=1e-12)


@EVERY
def test_the_columns_of_an_input_are_those_that_read_it(name: str) -> None:
    """With an input channel silenced, just its columns and none else change."""
    layer, given = made(name)
    axis = -1 if name in LINEARS else given.ndim - len(layer.weight.shape[2:]) - 1
    units = torch.tensor([[given.shape[axis] - 1, 0]])
    silenced = given.index_fill(axis, units[0], 0.0)
    changed = (layer.inputs(given) != layer.inputs(silenced)).any(0).nonzero().flatten()
    assert changed.tolist() == sorted(layer.columns_of(units).flatten().tolist())


def test_half_precision_is_widened() -> None:
    module = nn.Linear(6, 4).half()
    layer = Layer("it", module)
    assert layer.inputs(torch.randn(3, 6).half()).dtype == torch.float32
    assert layer.outputs(torch.randn(3, 4).half()).dtype == torch.float32
    layer.write(layer.matrix())
    assert module.weight.dtype == torch.float16


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(5, 6), nn.LayerNorm(6), nn.ConvTranspose2d(4, 4, 3), nn.ReLU()],
    ids=repr,
)
def test_a_module_that_is_no_single_matrix_is_refused_by_name(module: Any) -> None:
    model = nn.ModuleDict({"odd": module})
    assert layer_of(model, "odd") is None
    with pytest.raises(UsageError, match=rf"odd is a {type(module).__name__}"):
        layers_of(model, ["odd"])
