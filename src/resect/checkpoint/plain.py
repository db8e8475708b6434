"""Networks that are no models of transformers: weights, plan and what was cut; the caller builds the dense network again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.checkpoint.example import Inputs, example_of, relative_difference
from resect.checkpoint.record import check_record, record_of
from resect.checkpoint.saved import Jsonable, Saved, describe, write_text
from resect.errors import CheckpointError, UsageError
from resect.explain import telling
from resect.files import read_json, whole_directory
from resect.surgery import inputs_like, outputs_of
from resect.surgery.modeling_resect import resize
from resect.surroundings import unaffected

WEIGHTS = "model.safetensors"
SAMPLES = 1024
"""So many numbers of what the network puts out are kept to check by."""
TOLERANCE = 1e-3
"""How far what is put out may be off on another machine, relative to its spread; sums in half precision are rougher."""
HALF = 5e-2
MOST_VALUES = 65_536
"""So many values of one input are written down at most."""
Network = TypeVar("Network", bound=nn.Module)


def save_plain(
    model: nn.Module,
    target: Path,
    *,
    plan: Jsonable | None,
    overwrite: bool,
    extra_files: Mapping[str, str] | None,
    inputs: Any,
) -> Saved:
    """Weights, plan and record of a network, and what it puts out for inputs like its example, so that loading is checked."""
    record = record_of(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    name = type(model).__name__
    saved = Saved(str(target), "weights", name, None, {}, "no class of transformers", 0.0, count)
    files = {"README.md": _readme(name, count)}
    files |= {"plan.json": plan.to_json()} if plan is not None else {}
    files |= extra_files or {}
    with whole_directory(target, overwrite=overwrite) as partial:
        try:
            save_model(model, str(partial / WEIGHTS))
        except RuntimeError as problem:  # tensors that share a part of their memory
            raise CheckpointError(
                f"{name} cannot be written as safetensors: {problem} Use torch.save(model.state_dict(), file), and later "
                "resect.cut(fresh, plan) and load_state_dict."
            ) from problem
        write_text(partial, "resect.json", describe(saved, record, check=_check_of(model, inputs)))
        for file, text in files.items():
            write_text(partial, file, text)
    return saved


@telling("load the weights")
@unaffected()
def load_into(model: Network, directory: str | Path) -> Network:
    """The dense `model` made what `save` wrote into `directory`, in place: cut to its sizes, with its weights.

    `model` is built by the caller, with the code and the settings of the one that was cut. Where `save` noted what the
    network puts out, that is compared. Raises `CheckpointError` for another network and for files that are damaged, and
    `UsageError` for one that is cut already; the model is of no use then.
    """
    place = Path(directory).expanduser()
    if record_of(model) != record_of(nn.Module()):
        raise UsageError(f"{type(model).__name__} is cut already, and {place} is for a dense one. Build it again.")
    facts = read_json(place / "resect.json", what="what resect noted", error=CheckpointError)
    if not isinstance(facts, dict) or "record" not in facts or not (place / WEIGHTS).is_file():
        raise CheckpointError(f"{place} holds no weights that resect.save wrote. Name such a directory.")
    check_record(facts["record"], str(place / "resect.json"))
    try:
        resize(model, facts["record"])
        _fill(model, place / WEIGHTS)
    except Exception as problem:  # names, sizes and files, each with an error of its own
        raise CheckpointError(
            f"{place} does not fit {type(model).__name__}: {problem} Build the network as it was before the cut."
        ) from problem
    model.resect_earlier = facts["record"]
    _compare(model, facts.get("check"), place)
    return model


def _fill(model: nn.Module, file: Path) -> None:
    """Puts tensors into a network by name; of those that are one, the file has one. Raises `KeyError` for others."""
    stored = load_file(file, device="cpu")
    missing, unexpected = nn.Module.load_state_dict(model, stored, strict=False)  # networks have methods of their own
    tensors = nn.Module.state_dict(model)
    filled = {(tensors[name].data_ptr(), tensors[name].shape) for name in stored if name in tensors}
    missing = [name for name in missing if (tensors[name].data_ptr(), tensors[name].shape) not in filled]
    if missing or unexpected:
        raise KeyError(f"tensors are missing {missing[:3]}, or are none of the network's {unexpected[:3]}")


def _check_of(model: nn.Module, inputs: Any) -> dict[str, Any] | None:
    """What a network puts out for inputs like its example; None where no example can be written down."""
    try:
        example = example_of(model, inputs)
        outputs = outputs_of(model, example)
        drawn = _same(example, inputs_like(example, model, 0))
        stated = _stated(example, all_values=not drawn)
    except Exception:  # nothing says what the network takes in, or it takes nothing that can be written down
        return None
    return {"example": stated, "drawn": drawn, "outputs": _sampled(outputs).tolist(), "half": _half(model)}


def _same(example: Inputs, other: Inputs) -> bool:
    """Whether two examples have the same values."""
    pairs = zip(tree_leaves(example), tree_leaves(other), strict=True)
    return all(torch.equal(one, two) for one, two in pairs if isinstance(one, Tensor))


def _compare(model: nn.Module, check: Any, place: Path) -> None:
    """Runs the example that was written down. Raises `CheckpointError` where something else comes out."""
    if not isinstance(check, dict):
        return
    example: Inputs = _example(check["example"])
    inputs = inputs_like(example, model, 0) if check.get("drawn", True) else example
    found = _sampled(outputs_of(model, inputs))
    difference = relative_difference(found, torch.tensor(check["outputs"], dtype=torch.float64))
    if not difference <= (HALF if check["half"] or _half(model) else TOLERANCE):
        raise CheckpointError(
            f"The network that {place} was loaded into puts out something else than the one that was saved: {difference:.1e} of "
            "its spread. Build it with the settings that it had before the cut."
        )


def _sampled(outputs: Tensor) -> Tensor:
    """Some numbers of a tensor, at even distances, [samples]."""
    flat = outputs.detach().double().cpu().flatten()
    return flat[:: max(1, -(-len(flat) // SAMPLES))]


def _half(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def _stated(value: Any, *, all_values: bool) -> Any:
    """An example as JSON; without the values of numbers that are not whole, where others may stand for them.

    Raises `TypeError` for objects of other types and for more values than `MOST_VALUES`.
    """
    if isinstance(value, Tensor):
        stated = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if all_values or not value.is_floating_point():
            if value.numel() > MOST_VALUES:
                raise TypeError(f"{value.numel()} values are too many")
            stated["values"] = value.flatten().tolist()
        return stated
    if isinstance(value, Mapping):
        return {"items": [[name, _stated(one, all_values=all_values)] for name, one in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_stated(one, all_values=all_values) for one in value]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(f"{value!r} is no JSON")


def _example(stated: Mapping[str, Any]) -> Any:
    """The inverse of `_stated`, with empty tensors for those without values."""
    if "shape" in stated:
        dtype = getattr(torch, stated["dtype"])
        if "values" in stated:
            return torch.tensor(stated["values"], dtype=dtype).reshape(stated["shape"])
        return torch.empty(stated["shape"], dtype=dtype, device="meta")
    if "items" in stated:
        return {name: _example(one) for name, one in stated["items"]}
    if "value" in stated:
        return stated["value"]
    return tuple(map(_example, stated["tuple"])) if "tuple" in stated else list(map(_example, stated["list"]))


def _readme(name: str, count: int) -> str:
    return f"""# {name}, pruned

{count:,} parameters, cut by [resect](https://github.com/resect/resect). Build the dense network as it was before the cut, then:

```python
import resect

model = resect.load_into({name}(...), "this directory")
```
"""
