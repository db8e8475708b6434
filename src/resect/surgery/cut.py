"""Removing what a plan does not keep: the model gets smaller, in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from itertools import count, islice
from math import inf
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from resect.errors import ModelError, UsageError
from resect.graph import VOCABULARY, Atom, Graph, Replay, Silence, kept_length, retrace, trace
from resect.plan import Plan
from resect.surgery.alignment import renumber_alignment
from resect.surgery.attributes import shape_attributes
from resect.surgery.caches import forget
from resect.surgery.modeling_resect import Gathered, Silent, remove, resize, set_attributes, set_tensor
from resect.surgery.positions import changed, kept_positions, removed_blocks, removed_sublayers, take
from resect.surgery.vocabulary import kept_tokens, renumber_tokens
from resect.surroundings import unaffected

MOST_WHOLE = 65_536
"""So many whole numbers of one input are kept with a cut model, to run it by."""


class Record(BaseModel):
    """What surgery did, so that it can be replayed on an empty dense model.

    Shapes of parameters, attributes of modules, stand-ins for removed sub-layers and what is idle without them, how many rows
    and columns of its own a gathered layer keeps (None: all), removed blocks.
    """

    shapes: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, Any]] = {}
    silent: dict[str, dict[str, int]] = {}
    gathered: dict[str, dict[str, int | None]] = {}
    removed: list[str] = []


def name_before(name: str, removed: Collection[str]) -> str:
    """A module or parameter as it was called before some blocks were removed: later ones had higher numbers."""
    for parent in dict.fromkeys(block.rpartition(".")[0] for block in removed):
        head, _, rest = name.removeprefix(parent + ".").partition(".")
        if name.startswith(parent + ".") and head.isdigit():
            left = (number for number in count() if f"{parent}.{number}" not in removed)
            number = next(islice(left, int(head), None))
            return ".".join([parent, str(number), *filter(None, [rest])])
    return name


@unaffected("shapes")
def cut(model: nn.Module, plan: Plan, graph: Graph | None = None) -> nn.Module:
    """The model without the units that the plan removes, in place; parameters, ties and dtypes stay what they were.

    Tokens that stay are numbered anew in their old order where the vocabulary is cut, in the configurations too.
    What was done is kept on the model as `resect_record`. `graph` is the model's own, traced when not given.
    Raises `UsageError` for a plan of another network and `ModelError` when the network's code cannot take the new sizes;
    the model is then unchanged.
    """
    if getattr(model, "resect_record", None):
        raise UsageError("The model is cut already, and a plan counts units of the dense model. Load the dense model again.")
    graph = graph or trace(model)
    record = plan_record(model, plan, graph)
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    positions = kept_positions(graph, plan)
    for name in record.shapes:
        with torch.no_grad():
            set_tensor(model, name, take(tensors.pop(name), positions[name]))
    resize(model, {**record.model_dump(), "shapes": {}})
    forget(model)
    tokens = kept_tokens(graph, plan)
    if tokens is not None:
        renumber_tokens(model, graph.group(VOCABULARY), tokens)
    renumber_alignment(model, plan, graph)
    model.resect_record = record  # type: ignore[assignment]
    model.resect_example = tree_map_only(Tensor, _empty, graph.witness.given or graph.witness.example)
    guard_saving(model)
    return model


def guard_saving(model: nn.Module) -> None:
    """Makes `save_pretrained` of a cut model refuse: its configuration is the dense one's, so that nothing would load.

    Trainers hand the weights over and may go on: they load them into the model that they hold.
    """
    if isinstance(model, PreTrainedModel):
        vars(model)["save_pretrained"] = partial(_save_for_trainers, model)


def _save_for_trainers(model: PreTrainedModel, *args: Any, **keywords: Any) -> Any:
    if "state_dict" not in keywords:
        raise UsageError(
            f"This {type(model).__name__} was cut, and its save_pretrained would write a directory that nothing can load. "
            "Use resect.save(model, directory), which writes what from_pretrained loads."
        )
    return type(model).save_pretrained(model, *args, **keywords)


def _empty(given: Tensor) -> Tensor:
    """The shape and type of a tensor, without its memory; whole numbers keep their values: lengths, classes, edges."""
    if not given.is_floating_point() and type(given) is not FakeTensor and given.numel() <= MOST_WHOLE:
        return given.detach().cpu().clone()
    return torch.empty(tuple(given.shape), dtype=given.dtype, device="meta")


def plan_record(model: nn.Module, plan: Plan, graph: Graph) -> Record:
    """What cutting will do to the model, without doing it. A network that changed itself since it was traced is traced again."""
    try:
        return _record(model, plan, graph)
    except ModelError:
        if Replay(model, graph, {}, {}).run()[0] == inf:
            raise
    return _record(model, plan, retrace(model, graph))


def _check_gathered(model: nn.Module, plan: Plan, graph: Graph) -> None:
    """Refuses groups with slices in layers that keep only some of their own rows and columns: those no longer line up."""
    found: dict[str, str] = {}
    for group, _ in changed(graph, plan):
        for path in dict.fromkeys(member.parameter.rpartition(".")[0] for member in group.members):
            if type(model.get_submodule(path)).__name__ == Gathered.__name__:  # shipped code has a class of its own
                found[group.name] = path
    if found:
        name, path = next(iter(found.items()))
        raise ModelError(
            f"Asked to cut {name}, which has slices in {path}, a layer that is gathered. "
            "Cut the dense model first and gather then, or leave those groups whole.",
            found,
        )


def _record(model: nn.Module, plan: Plan, graph: Graph) -> Record:
    _check_gathered(model, plan, graph)
    blocks = removed_blocks(graph, plan)
    silences = [silence for sublayer in removed_sublayers(graph, plan) for silence in sublayer.silences]
    gone = tuple(f"{path}." for path in (*blocks, *(silence.path for silence in silences)))
    shapes = {
        name: [len(axes[axis]) if axis in axes else size for axis, size in enumerate(graph.shapes[name])]
        for name, axes in kept_positions(graph, plan).items()
    }
    attributes = shape_attributes(model, graph, plan, shapes)
    removed = {group.name: group.units - len(keep) for group, keep in changed(graph, plan)}
    kept = {atom: atom.size - removed.get(name, 0) for atom, name in graph.witness.groups.items()}
    record = Record(
        shapes={name: shape for name, shape in shapes.items() if not name.startswith(gone)},
        attributes={path: values for path, values in attributes.items() if not f"{path}.".startswith(gone)},
        silent={one.path: _stand_in(one, kept) for one in silences},
        removed=blocks,
    )
    if gone:
        _try(model, graph, plan, record, removed)
    return record


def _stand_in(silence: Silence, kept: Mapping[Atom, int]) -> dict[str, int]:
    """What the stand-in of a module puts out, as the record says it: the axis only where it is not the last."""
    along = {} if silence.axis == -1 else {"axis": silence.axis}
    return {"width": kept_length(silence.width, kept), **along, "returns": silence.returns}


def _try(model: nn.Module, graph: Graph, plan: Plan, record: Record, removed: Mapping[str, int]) -> None:
    """Runs the network on fake tensors without its removed blocks and sub-layers; what is left must run as it did."""

    def prepare(model: nn.Module) -> list[nn.Module]:
        set_attributes(model, record.attributes)
        remove(model, record.silent, record.removed)
        return [module for module in model.modules() if isinstance(module, Silent)]

    gone = [*record.silent, *record.removed]
    reached, where, problem = Replay(model, graph, removed, record.shapes).run(prepare, gone=gone)
    if reached < inf:
        units = [*removed_blocks(graph, plan), *(sublayer.name for sublayer in removed_sublayers(graph, plan))]
        near = [name for name in units if where and name.startswith(f"{where}.")]
        raise ModelError(
            f"{type(model).__name__} cannot do without {', '.join(gone[:4])}{', ...' if len(gone) > 4 else ''}: its code in "
            f"{where or 'the model'} does not run as before ({problem}). Leave out blocks and sublayers of this model.",
            near or units,
        )
