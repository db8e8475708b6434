"""Rows and columns of single layers really taken out: what is left multiplies fewer numbers, at the same outer sizes.

A row or a column of one matrix sits on axes that other layers share, so removing it shrinks no axis of the network. A
`Gathered` layer holds only what is left and knows which of its inputs it reads and which of its outputs it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from resect.errors import ModelError, UsageError
from resect.surgery.cut import Record, guard_saving, name_before
from resect.surgery.modeling_resect import CONVOLUTIONS, Gathered, outer_sizes, put
from resect.surroundings import unaffected

Kept = tuple[Tensor | None, Tensor | None]
"""Rows and columns that stay, by number; None where all do."""
PLAIN = (nn.Linear, Conv1D, *CONVOLUTIONS)
"""What can be gathered: a subclass may do something else with its weight."""
READERS = (nn.TransformerEncoderLayer,)
"""Modules of torch that hand the weights of layers in them to an operator of their own."""


@unaffected("changes")
def gather(model: nn.Module, kept: Mapping[str, Kept]) -> nn.Module:
    """The model with only some rows and columns of the layers at some paths left, in place; everything else stays.

    It computes what it would with zeros in all other rows and columns, and in the bias of those rows. Rows are outputs,
    columns inputs: channels, for a convolution. A layer of which all stay is left as it is. Other cuts come first; what
    was done is noted in the model's `resect_record`. Code around a layer must call it: what reads the weight by itself finds
    the small one.
    Raises `ModelError` for layers that cannot be gathered and `UsageError` for numbers that they do not have; the model is then
    unchanged.
    """
    slots = _slots(model)
    chosen = {path: _checked(model, path, *numbers, slots=slots) for path, numbers in kept.items()}
    chosen = {path: numbers for path, numbers in chosen.items() if any(one is not None for one in numbers)}
    record = Record.model_validate(getattr(model, "resect_record", None) or {}, from_attributes=True)
    gathered = dict(record.gathered)
    for path, (rows, columns) in chosen.items():
        put(model, path, Gathered(model.get_submodule(path), rows, columns))
        counts = {"rows": _count(rows), "columns": _count(columns)}
        gathered[name_before(path, record.removed)] = counts
    if chosen:
        model.resect_record = record.model_copy(update={"gathered": gathered})  # type: ignore[assignment]
        guard_saving(model)
    return model


def check_gatherable(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises the `ModelError` with which `gather` would refuse one of some layers, whatever is to stay of them."""
    slots = _slots(model)
    try:
        for path in paths:
            _checked(model, path, None, None, slots=slots)
    except ModelError as problem:
        problem.add_note("With gather=false, rows and columns stay in place as zeros.")
        raise


@torch.no_grad()
def dense_tensors(layer: Gathered) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the dense layer that computes the same: zeros where nothing is left."""
    outer = {1 - layer.input_axis: (layer.rows, layer.outer_rows), layer.input_axis: (layer.columns, layer.outer_columns)}
    weight = _scattered(layer.weight, outer)
    return weight, None if layer.bias is None else _scattered(layer.bias, {0: (layer.rows, layer.outer_rows)})


def _scattered(tensor: Tensor, outer: Mapping[int, tuple[Tensor | None, int]]) -> Tensor:
    """A tensor with zeros at the positions that its axes lack."""
    for axis, (index, size) in outer.items():
        if index is not None:
            shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
            tensor = tensor.new_zeros(shape).index_copy(axis, index, tensor)
    return tensor.clone()


def _checked(model: nn.Module, path: str, rows: Tensor | None, columns: Tensor | None, *, slots: Mapping[int, list[str]]) -> Kept:
    """The numbers of what stays, ascending and beside the weight; None where all do."""
    module = _layer(model, path)
    for name, parameter in module.named_parameters():
        if also := [slot for slot in slots[id(parameter)] if slot != f"{path}.{name}"]:
            raise ModelError(f"Asked to gather {path}, whose {name} is tied to {also[0]}. Untie it, or leave {path} whole.")
    outer_rows, outer_columns, _ = outer_sizes(module)
    device = next(module.parameters()).device
    kept_rows = _numbers(rows, outer_rows, f"rows of {path}", device)
    return kept_rows, _numbers(columns, outer_columns, f"columns of {path}", device)


def _slots(model: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter, those included under which it will be tied when the model is loaded."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    partners: dict[str, list[str]] = {}
    for target, source in tied.items():
        partners.setdefault(target, []).append(source)
        partners.setdefault(source, []).append(target)
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).extend([name, *partners.get(name, [])])
    return found


def _layer(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, if it multiplies by its weight and nothing else looks at that."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"Asked to gather {path!r}, which {type(model).__name__} has not. Name one of its layers.") from None
    if problem := next(_problems(model, path, module), ""):
        raise ModelError(f"Asked to gather {path!r}, but {problem}. Leave it out.")
    return module


def _problems(model: nn.Module, path: str, module: nn.Module) -> Iterator[str]:
    """Why a module cannot be gathered, if there is a reason."""
    if not path:
        yield "that is the model itself"
    if isinstance(module, Gathered):
        yield "it is gathered already"
    try:
        outer_sizes(module)
    except ValueError as error:
        yield f"{error}"
    if type(module) not in PLAIN or "forward" in vars(module):
        yield f"{type(module).__name__} there may compute in a way of its own"
    if {*module._parameters} - {"weight", "bias"} or module._buffers or module._modules:
        yield f"{type(module).__name__} there holds more than a weight and a bias"
    around = [model.get_submodule(path[:end]) for end, letter in enumerate(path) if letter == "."]
    if reader := next((one for one in (model, *around) if isinstance(one, READERS)), None):
        yield f"{type(reader).__name__} around it reads its weight without calling it"


def _numbers(kept: Tensor | None, size: int, what: str, device: torch.device) -> Tensor | None:
    """Numbers out of `size`, ascending: [kept] int64; None for all of them."""
    if kept is None:
        return None
    if kept.dim() != 1 or kept.is_floating_point() or kept.is_complex() or kept.dtype == torch.bool:
        raise UsageError(
            f"Asked to keep {what} by a {kept.dtype} of shape {tuple(kept.shape)}. Give their numbers, in one dimension."
        )
    numbers = kept.to(torch.int64).sort().values
    if len(numbers) and not 0 <= int(numbers[0]) <= int(numbers[-1]) < size:
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise UsageError(f"Asked to keep number {int(wrong)} of the {what}; there are {size}. Count from 0 to {size - 1}.")
    if (repeated := numbers[1:][numbers.diff() == 0]).numel():
        raise UsageError(f"Asked to keep number {int(repeated[0])} of the {what} more than once. Name each once.")
    return None if len(numbers) == size else numbers.to(device)


def _count(numbers: Tensor | None) -> int | None:
    return None if numbers is None else len(numbers)
