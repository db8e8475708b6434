"""LLM Surgeon on single matrices: rows and columns as in the paper, elements, and n of m neighbours; shot after shot.

What goes is zero and stays zero; what stays is updated jointly. Rows and columns can be taken out physically afterwards, by
layers that gather what they read and scatter what they put out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.errors import UsageError
from resect.files.progress import Progress
from resect.graph import Graph
from resect.plan import Lines, Matrix, Pattern, lowest, rows_and_columns
from resect.recovery import Correction, correct
from resect.saliency import column_losses, element_losses, line_ladders, pattern_losses, reach, row_losses
from resect.statistics import Curvature, Data, Layer, Moments, layer_of, tell_clipped
from resect.surgery import without_elements, without_elements_in_chunks, without_rows_and_columns

Collect = Callable[[Sequence[Layer], int], None]
"""Notes the moments of layers for a shot."""
UNEVEN = 2.4
"""How many times the common share is likely to go of one side of one matrix, at most."""


@dataclass
class Stays:
    """What stays of a matrix, its bias aside: rows, columns, or elements; True stays."""

    rows: Tensor
    columns: Tensor
    elements: Tensor

    @classmethod
    def whole(cls, layer: Layer) -> Stays:
        """Everything."""
        ones = torch.ones(layer.rows, layer.inner_columns, dtype=torch.bool)
        return cls(ones[:, 0], ones[0], ones)

    def lines(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The numbers of rows and columns that stay, the column of a bias included."""
        columns = self.columns
        if layer.bias is not None:
            columns = torch.cat([columns, torch.ones(1, dtype=torch.bool)])
        return self.rows.nonzero().flatten(), columns.nonzero().flatten()


@dataclass(frozen=True)
class Sparsity:
    """What is asked of matrices."""

    kind: str
    """`rows-columns`, `unstructured`, or `n:m`."""
    shots: int
    damping: float
    damping_gradients: float
    update: bool
    ladders: bool
    """Whether a row or column is priced after those before it, and not by itself; without updates each is by itself."""
    max_correlate: int | None
    """Elements that are updated jointly; None for all of a matrix."""
    floor: int
    alike: bool
    """Whether every matrix loses the same share; otherwise one threshold decides for all."""
    correction: Correction | None

    @property
    def neighbours(self) -> tuple[int, int] | None:
        """n and m."""
        keep, colon, of = self.kind.partition(":")
        return (int(keep), int(of)) if colon else None


def matrices(model: nn.Module, graph: Graph, protect: Sequence[str] = ()) -> list[Layer]:
    """The layers inside blocks that are one matrix each; without blocks, all such layers but the last.

    Those that hold parameters of groups named in `protect` are left out.
    """
    names = [name.removesuffix(".weight") for name in graph.parameters if name.endswith(".weight")]
    layers = [layer for layer in (layer_of(model, name) for name in names) if layer]
    inside = [layer for layer in layers if graph.blocks.layer_of(f"{layer.path}.weight") is not None]
    spared = {member.parameter for name in protect for member in graph.group(name).members}
    return [layer for layer in inside or layers[:-1] if f"{layer.path}.weight" not in spared]


def impose(
    model: nn.Module,
    graph: Graph,
    data: Data,
    asked: Sparsity,
    *,
    remove: int,
    protect: Sequence[str] = (),
    collect: Collect,
    progress: Progress,
) -> Iterator[tuple[int, Pattern]]:
    """Makes a network sparse in place, in shots; gives what stays after each. `remove` counts the parameters that become zero.

    Layers of the groups in `protect` are left as they are.
    """
    layers = matrices(model, graph, protect)
    if not layers:
        spared = f" outside of the {len(protect)} groups that are protected" if protect else ""
        raise UsageError(f"Nothing to cut: the network has no linear layer or ungrouped convolution{spared}.")
    if asked.neighbours:
        _check_divides(layers, *asked.neighbours)
    else:
        _check_enough(layers, asked, remove)
    stays = {layer.path: Stays.whole(layer) for layer in layers}
    last = max((shot for shot in range(1, asked.shots + 1) if progress.noted(f"shot-{shot}/imposed")), default=1)
    for shot in range(last, asked.shots + 1):
        if not progress.noted(f"shot-{shot}/imposed"):
            collect(layers, shot)
            step = _lines if asked.kind == "rows-columns" else _elements
            step(layers, stays, asked, remove * shot // asked.shots, shot=shot, progress=progress)
            if asked.correction:
                kept = {path: found.elements for path, found in stays.items()}
                correct(layers, kept, model, data, asked.correction, last=shot == asked.shots, seed=shot)
            for layer in layers:
                progress.put(f"shot-{shot}/layers/{layer.path}", {"matrix": layer.matrix(), **vars(stays[layer.path])})
            progress.note(f"shot-{shot}/imposed")
            for done in (f"shot-{shot}/moments", f"shot-{shot}/losses", f"shot-{shot - 1}"):
                progress.drop(done)
        else:
            for layer in layers:
                stored = progress.need(f"shot-{shot}/layers/{layer.path}")
                layer.write(stored.pop("matrix"))
                stays[layer.path] = Stays(**stored)
        yield shot, Pattern(kind=asked.kind, layers={layer.path: _matrix(stays[layer.path], asked) for layer in layers})


def lines_kept(model: nn.Module, pattern: Pattern) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The rows and columns that stay of every layer that loses some; of a convolution, whole input channels."""
    found = {}
    for path, matrix in pattern.layers.items():
        layer = layer_of(model, path)
        assert layer is not None
        rows = None if matrix.rows is None else torch.tensor(matrix.rows, dtype=torch.long)
        columns = None if matrix.columns is None else layer.inputs_of(torch.tensor(matrix.columns, dtype=torch.long))
        if rows is not None or columns is not None:
            found[path] = (rows, columns)
    return found


def _lines(
    layers: Sequence[Layer], stays: dict[str, Stays], asked: Sparsity, remove: int, *, shot: int, progress: Progress
) -> None:
    """Rows and columns, over all matrices or of each by itself."""
    chosen = _lines_to_go(layers, stays, asked, remove, shot=shot, progress=progress)
    for layer in tqdm(layers, desc=f"updates, shot {shot}", leave=False, delay=2):
        rows, columns = stays[layer.path].lines(layer)
        gone_rows, gone_columns = chosen[layer.path]
        stays[layer.path] = Stays(~gone_rows, ~gone_columns, ~gone_rows[:, None] & ~gone_columns)
        matrix = torch.zeros(layer.rows, layer.columns, dtype=torch.float64)
        if asked.update:
            weight, curvature = _part(layer, rows, columns, asked, shot, progress)
            gone = torch.isin(rows, gone_rows.nonzero().flatten()), torch.isin(columns, gone_columns.nonzero().flatten())
            at = rows[:, None], columns
            matrix[at] = without_rows_and_columns(weight, curvature, *(side.nonzero().flatten() for side in gone))
        else:
            kept = stays[layer.path].lines(layer)
            at = kept[0][:, None], kept[1]
            matrix[at] = layer.matrix()[at]
        layer.write(matrix)


def _lines_to_go(
    layers: Sequence[Layer], stays: Mapping[str, Stays], asked: Sparsity, remove: int, *, shot: int, progress: Progress
) -> dict[str, Lines]:
    """The rows and columns that are gone after a shot.

    Ladders reach as far as what is chosen by them, and lines below cost no less than the last on them.
    """
    before = {path: (~found.rows, ~found.columns) for path, found in stays.items()}
    zeros = sum(int((~found.elements).sum()) for found in stays.values())
    share = (remove - zeros) / sum(found.elements.numel() for found in stays.values())
    steps = {path: [reach(len(side), UNEVEN * share * len(side)) for side in sides] for path, sides in before.items()}
    losses, shares, short = {}, {}, list(layers)
    while short:
        for layer in tqdm(short, desc=f"losses, shot {shot}", leave=False, delay=2):
            name = f"shot-{shot}/lines/{layer.path}"
            found = progress.get(name)
            if not found or any(known < enough for known, enough in zip(found["steps"].tolist(), steps[layer.path], strict=True)):
                found = _line_losses(layer, stays[layer.path], asked, steps[layer.path], shot, progress)
                progress.put(name, found)
            losses[layer.path], shares[layer.path] = (found["rows"], found["columns"]), float(found["kept"])
            steps[layer.path] = found["steps"].tolist()
        chosen = _chosen(losses, remove=remove, asked=asked)
        short = []
        for layer in layers:
            went = [int((now & ~then).sum()) for now, then in zip(chosen[layer.path], before[layer.path], strict=True)]
            further = [2 * many if many > known else known for many, known in zip(went, steps[layer.path], strict=True)]
            if further != steps[layer.path]:
                short.append(layer)
                steps[layer.path] = further
    tell_clipped(shares)
    return chosen


def _chosen(losses: Mapping[str, tuple[Tensor, Tensor]], *, remove: int, asked: Sparsity) -> dict[str, Lines]:
    """The rows and columns that go, over all matrices or of each by itself."""
    if not asked.alike:
        return rows_and_columns(losses, remove=remove, floor=asked.floor)
    sizes = {path: len(rows) * len(columns) for path, (rows, columns) in losses.items()}
    found = dict[str, Lines]()
    for path, sides in losses.items():
        found |= rows_and_columns({path: sides}, remove=remove * sizes[path] // sum(sizes.values()), floor=asked.floor)
    return found


def _line_losses(
    layer: Layer, stays: Stays, asked: Sparsity, steps: list[int], shot: int, progress: Progress
) -> dict[str, Tensor]:
    """What the rows and columns of a matrix cost, nothing for those that went, and how far that is known."""
    rows, columns = stays.lines(layer)
    weight, curvature = _part(layer, rows, columns, asked, shot, progress)
    inner = columns[columns < layer.inner_columns]
    if asked.ladders and asked.update:
        of_rows, of_columns = line_ladders(weight, curvature, inner=len(inner), steps=steps)
    else:
        of_rows, of_columns = (find(weight, curvature, update=asked.update) for find in (row_losses, column_losses))
        steps = [layer.rows, layer.inner_columns]
    sides = weight.new_zeros(layer.rows), weight.new_zeros(layer.inner_columns)
    sides[0][rows], sides[1][inner] = of_rows, of_columns[: len(inner)]
    return {"rows": sides[0], "columns": sides[1], "kept": torch.tensor(curvature.kept), "steps": torch.tensor(steps)}


def _elements(
    layers: Sequence[Layer], stays: dict[str, Stays], asked: Sparsity, remove: int, *, shot: int, progress: Progress
) -> None:
    """Elements, or groups of neighbours, over all matrices or of each by itself."""
    names = [f"shot-{shot}/losses/{layer.path}" for layer in layers]
    shares = {}
    for layer, name in zip(tqdm(layers, desc=f"losses, shot {shot}", leave=False, delay=2), names, strict=True):
        weight, curvature = _part(layer, *Stays.whole(layer).lines(layer), asked, shot, progress)
        elements = stays[layer.path].elements
        losses = element_losses(weight, curvature, update=asked.update)[:, : elements.shape[1]].masked_fill(~elements, 0)
        found = {"elements": losses.float()}
        if asked.neighbours:
            summed, goes = pattern_losses(losses, *asked.neighbours)
            found = {"groups": summed.float(), "goes": goes}
        progress.put(name, found)
        shares[layer.path] = curvature.kept
    tell_clipped(shares)
    key = "groups" if asked.neighbours else "elements"

    def stored() -> Iterator[Tensor]:
        return (progress.need(name)[key] for name in names)

    count = _groups(layers, *asked.neighbours) * shot // asked.shots if asked.neighbours else remove
    common, size = None if asked.alike else lowest(stored, count), sum(layer.rows * layer.inner_columns for layer in layers)
    for layer, name in zip(tqdm(layers, desc=f"updates, shot {shot}", leave=False, delay=2), names, strict=True):
        found = progress.need(name)
        own = count * layer.rows * layer.inner_columns // size
        gone = found[key] <= (_lowest_of(found[key], own) if common is None else common)
        if asked.neighbours:
            gone = gone.repeat_interleave(asked.neighbours[1], dim=1) & found["goes"]
        gone |= ~stays[layer.path].elements
        stays[layer.path] = Stays((~gone).any(1), (~gone).any(0), ~gone)
        _zero(layer, gone, asked, shot, progress)


def _lowest_of(losses: Tensor, count: int) -> float:
    return lowest(lambda: [losses], count)


def _zero(layer: Layer, gone: Tensor, asked: Sparsity, shot: int, progress: Progress) -> None:
    weight, curvature = _part(layer, *Stays.whole(layer).lines(layer), asked, shot, progress)
    whole = torch.zeros_like(weight, dtype=torch.bool)
    whole[:, : gone.shape[1]] = gone
    if not asked.update:
        layer.write(weight.masked_fill(whole, 0))
    elif asked.max_correlate is None:
        layer.write(without_elements(weight, curvature, whole))
    else:
        layer.write(without_elements_in_chunks(weight, curvature, whole, max_correlate=asked.max_correlate))


def _part(
    layer: Layer, rows: Tensor, columns: Tensor, asked: Sparsity, shot: int, progress: Progress
) -> tuple[Tensor, Curvature]:
    """A matrix and its curvature, cut to some rows and columns."""
    stored = progress.need(f"shot-{shot}/moments/{layer.path}")
    found = Moments.of(stored).part(rows, columns)
    curvature = found.curvature(layer.path, damping=asked.damping, damping_gradients=asked.damping_gradients)
    return layer.matrix()[rows][:, columns], curvature


def _matrix(stays: Stays, asked: Sparsity) -> Matrix:
    rows, columns = stays.elements.shape
    lines = {"rows": stays.rows, "columns": stays.columns} if asked.kind == "rows-columns" else {}
    kept = {name: tuple(line.nonzero().flatten().tolist()) for name, line in lines.items() if not line.all()}
    return Matrix(shape=(rows, columns), zeros=int((~stays.elements).sum()), **kept)


def _groups(layers: Sequence[Layer], keep: int, of: int) -> int:
    return sum(layer.rows * layer.inner_columns // of for layer in layers)


def _check_enough(layers: Sequence[Layer], asked: Sparsity, remove: int) -> None:
    """Refuses a budget out of reach before the long part."""
    if asked.kind == "rows-columns":
        zero = {layer.path: (torch.zeros(layer.rows), torch.zeros(layer.inner_columns)) for layer in layers}
        _chosen(zero, remove=remove, asked=asked)
    elif remove > (most := sum(layer.rows * layer.inner_columns for layer in layers)):
        raise UsageError(f"{remove:,} parameters were to go; the layers that may be cut have only {most:,}. Let more stay.")


def _check_divides(layers: Sequence[Layer], keep: int, of: int) -> None:
    if keep >= of:
        raise UsageError(f"{keep}:{of} was asked; of {of} neighbours fewer than {of} stay.")
    for layer in layers:
        if layer.inner_columns % of:
            raise UsageError(
                f"{keep}:{of} was asked; {layer.path} has {layer.inner_columns} inputs, which do not divide into groups of {of}."
            )
