"""The files that hold a directory's weights, looked at before a weight is read: which, and what their headers say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from resect.checkpoint.configuration import Fields, is_plain_name, read_configuration
from resect.errors import CheckpointError
from resect.files import reading

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED = 3
"""So many tensors are named in a message; the others are counted."""
PACKED = 8
"""The most weights that quantised checkpoints keep in one element of what they store."""
SPARE = 2**26
"""Elements that may be made up before what is missing is named: 256 MiB of float32."""

COMPUTED = re.compile(
    r"(\.masked_bias|attn(\.attention)?\.(bias|causal_mask|embed_positions)|rotary(_emb)?\.(inv_freq|cos_cached|sin_cached)"
    r"|\.position_ids)$"
)
"""What older versions of transformers kept beside the weights: masks and tables that models compute."""
WEIGHT = re.compile(r"(weight|bias|_proj|A_log)$")
NUMBERS = re.compile(r"^(B?F\d|FP\d)")
"""The types of safetensors that a weight can have as it is; whole numbers are codes, and what they mean stands elsewhere."""

Shapes = Mapping[str, tuple[int, ...]]


def in_order(names: Iterable[Any]) -> list[Any]:
    """Names sorted with their numbers as numbers."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))])


def listed(names: Sequence[str], *, most: int = NAMED) -> str:
    """The first of some names, and how many more there are."""
    first = ", ".join(name[:200] for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"


def weight_files(directory: Path, fields: Fields) -> list[Path]:
    """The .safetensors files that the weights of a directory are read from, all of them beside its config.json.

    Raises `CheckpointError` for an index that names anything else, and for files that are missing.
    """
    first = fields.get("transformers_weights")
    names = [str(first)] if first else [SINGLE, INDEX]
    if any(path.name.startswith("shard-") for path in directory.glob("shard-*-model-*.safetensors")):
        raise CheckpointError(
            f"{directory} holds a distributed checkpoint (shard-...-model-...). Save the model whole first."
        )
    for name in names:
        file = directory / name
        if file.is_file():
            return indexed_files(file) if name.endswith(".json") else [file]
    raise CheckpointError(f"{directory} has no file named {' or '.join(names)}, so there are no weights to read.")


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names. Raises `CheckpointError` for any that is no .safetensors file beside it, or damaged."""
    files = {name: index.parent / name for name in check_index(index)}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise CheckpointError(f"The index {index} names {listed(missing)}, which are not there. Get the whole checkpoint.")
    for file in files.values():
        _check_link(file)
    for name, tensors in check_index(index).items():
        stored = shapes_in([files[name]])
        if absent := sorted(tensors - stored.keys()):
            raise CheckpointError(f"The index {index} says that {name} holds {listed(absent)}; it does not.")
    return list(files.values())


def check_index(index: Path) -> dict[str, set[str]]:
    """The names of the files in an index, ascending, each with its tensors. Raises `CheckpointError` for other names."""
    places = read_configuration(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"The index {index} has no `weight_map` of tensors and files.")
    found = dict[str, set[str]]()
    for tensor, name in places.items():
        if not is_plain_name(name):
            raise CheckpointError(
                f"The index {index} says that {tensor[:200]} is in {str(name)[:200]!r}; "
                "only .safetensors files beside it are read."
            )
        found.setdefault(name, set()).add(tensor)
    return dict(sorted(found.items()))


def _check_link(file: Path) -> None:
    """Refuses a shard that is a link out of its directory, but into the blobs of the hub's cache."""
    with reading(f"the file {file}"):
        target = file.resolve(strict=True)
    folder = target.parent
    in_cache = folder.name == "blobs" and folder.parent.name.startswith("models--")
    if folder != file.parent.resolve() and not in_cache:
        raise CheckpointError(f"The file {file} is a link to {target}; only files beside the index are read.")


def shapes_in(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in some files, from their headers.

    Raises `CheckpointError` for a file that is damaged, and for a tensor that is in two of them.
    """
    found, owners = dict[str, tuple[int, ...]](), dict[str, Path]()
    for file in files:
        with reading(f"the weights {file}"):
            file.open("rb").close()  # of a file that may not be read, safetensors says that there is none
        with reading(f"the weights {file}"), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in owners:
                    raise CheckpointError(f"{name[:200]} is in {owners[name]} and in {file.name}. Which is meant?")
                found[name], owners[name] = tuple(opened.get_slice(name).get_shape()), file
    return found


def check_types(files: Sequence[Path]) -> None:
    """Refuses weights that are stored as whole numbers, truth values or complex ones; for files without `quantization_config`."""
    for file in files:
        with reading(f"the weights {file}"), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                kind = str(part.get_dtype())
                if WEIGHT.search(name) and len(part.get_shape()) < 4 and not NUMBERS.match(kind):
                    raise CheckpointError(
                        f"{file} holds {name[:200]} as {kind}, and no `quantization_config` in config.json says what these "
                        "codes mean. Get a copy that is not quantised."
                    )


def computed(names: Iterable[str], shapes: Shapes) -> list[str]:
    """Those of some stored tensors that no model learns: `COMPUTED` names, and no vector or matrix that could be a weight."""
    found = [name for name in names if COMPUTED.search(name)]
    return [name for name in found if not name.endswith(".bias") or len(shapes.get(name, ())) == 4]


def conversion_errors(error: BaseException) -> str:
    """What transformers could not make of some tensors, which its error leaves to a report that is never shown; "" if nothing."""
    trace = error.__traceback__
    while trace is not None:
        report = getattr(trace.tb_frame.f_locals.get("loading_info"), "conversion_errors", None)
        if report:
            first = [f"{name[:200]}: {' '.join(str(said).split())[:300]}" for name, said in report.items()]
            return listed(first, most=1)
        trace = trace.tb_next
    return ""


def check_room(empty: nn.Module, shapes: Shapes, asked: str, *, packed: bool) -> None:
    """Refuses a model that is far larger than its weights, before any memory is taken.

    `empty` is the model on the meta device, `packed` whether one stored element may hold several weights.
    """
    stored = sum(math.prod(shape) for shape in shapes.values()) * (PACKED if packed else 1)
    parameters = {id(one): one.numel() for one in empty.parameters()}
    needed = sum(parameters.values())
    if needed > stored + SPARE:
        names = [name for name, one in empty.named_parameters() if shapes.get(name) != tuple(one.shape)]
        raise CheckpointError(
            f"Asked for the model {asked!r}; its configuration describes {needed:,} parameters, its files hold {stored:,}: "
            f"{listed(names)} are missing or of another size."
        )
    computed = sum(one.numel() for one in empty.buffers())
    if computed > 8 * stored + SPARE:
        raise CheckpointError(
            f"Asked for the model {asked!r}; its configuration wants tables of {computed:,} numbers beside {stored:,} "
            "weights. Look at its numbers of positions."
        )


def check_complete(model: Any, report: Mapping[str, Any], asked: str, *, ignored: Sequence[str] = ()) -> None:
    """Raises `CheckpointError` unless the loader found exactly the model's tensors, in their sizes.

    `report` is what the loader says. What the library itself calls superfluous is no longer in it; `ignored` names the
    heads that were told of.
    """
    if problems := report.get("error_msgs"):
        raise CheckpointError(f"Asked for the model {asked!r}; it cannot be loaded: {str(problems[0])[:300]}")
    what = f"Asked for the model {asked!r}; its weights do not fit {type(model).__name__}"
    if sizes := in_order(report["mismatched_keys"]):
        shown = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in sizes]
        raise CheckpointError(f"{what}: {len(sizes)} tensors are of another size ({listed(shown)}).")
    if missing := in_order(report["missing_keys"]):
        raise CheckpointError(
            f"{what}: {len(missing)} tensors are missing ({listed(missing)}), and would be made up. "
            "Get the whole checkpoint, or the class that it was saved from."
        )
    if unexpected := in_order(set(report["unexpected_keys"]) - set(ignored)):
        raise CheckpointError(
            f"{what}: {len(unexpected)} tensors have no place in it ({listed(unexpected)}), and would be left out. "
            "Does config.json belong to these weights?"
        )
