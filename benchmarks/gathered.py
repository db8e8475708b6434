"""A layer with only some of its rows and columns against the dense layer, and against an ordinary layer with as many weights.

    python benchmarks/gathered.py            # the whole table, ten minutes on a busy core

All three run in one process, on one thread, in turns, so that what else the machine does touches all of them. `kept` is the
share of the weights that was asked for, `weights` the one that stays; `out_of` says what goes: rows, columns, or as large a share
of both. Numbers are rounded to multiples of 16, which matrix products are written for, or, for the last, to odd ones, as a
threshold on losses would leave them. Each time is the median over the turns, with half the distance between its quartiles, as a
share of it, beside it. `speedup` is the median of dense over
gathered within a turn, `low` and `high` are the quartiles of that; `possible` is the same for the ordinary layer, which reads no
index and writes no zeros. A row says *faster* or *slower* where three quarters of the turns agree, else *even*.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median, quantiles
from typing import Any

import torch
from record import environment, write
from torch import Tensor, nn
from tqdm import tqdm

from resect.surgery import gather

SHAPES = {
    "SmolLM2-135M": ((576, 576), (1536, 576), (576, 1536)),
    "7B": ((4096, 4096), (11008, 4096)),
}
TOKENS = (1, 16, 512)
KEPT = (0.9, 0.7, 0.5)
SIDES = {"rows": (1.0, 0.0), "columns": (0.0, 1.0), "both": (0.5, 0.5), "both, odd": (0.5, 0.5)}
"""What is taken out: the powers of the kept share that rows and columns keep."""
MOST = 400
"""Turns after which the smallest layers have been timed often enough."""


def left_of(size: int, share: float, sides: str) -> int:
    """How many of some rows or columns stay."""
    if share == 1:
        return size
    return round(size * share) | 1 if sides.endswith("odd") else 16 * round(size * share / 16)


def layers(rows: int, columns: int, kept: float, sides: str) -> list[nn.Module]:
    """The dense layer, the gathered one and an ordinary one of the gathered one's inner size, without biases."""
    shares = [kept**power for power in SIDES[sides]]
    left = [left_of(size, share, sides) for size, share in zip((rows, columns), shares, strict=True)]
    numbers = [torch.randperm(size)[:count] for size, count in zip((rows, columns), left, strict=True)]
    dense = nn.Linear(columns, rows, bias=False)
    model = gather(nn.Sequential(dense), {"0": (numbers[0], numbers[1])})
    return [dense, model.get_submodule("0"), nn.Linear(left[1], left[0], bias=False)]


def turns(modules: Sequence[nn.Module], inputs: Sequence[Tensor], seconds: float, least: int) -> list[tuple[float, ...]]:
    """Seconds that each module takes, turn by turn, for about so long in all."""
    found: list[tuple[float, ...]] = []
    for module, given in zip(modules, inputs, strict=True):
        module(given)
    end = time.perf_counter() + seconds
    while len(found) < least or (time.perf_counter() < end and len(found) < MOST):
        found.append(tuple(_timed(module, given) for module, given in zip(modules, inputs, strict=True)))
    return found


def _timed(module: nn.Module, given: Tensor) -> float:
    start = time.perf_counter()
    module(given)
    return time.perf_counter() - start


def row(shape: tuple[int, int], tokens: int, kept: float, sides: str, seconds: float, least: int) -> dict[str, Any]:
    """One line of the table."""
    modules = layers(*shape, kept, sides)
    given = torch.randn(1, tokens, shape[1])
    inner: int = modules[2].in_features  # type: ignore[assignment]
    taken = turns(modules, [given, given, torch.randn(1, tokens, inner)], seconds, least)
    weights = modules[2].get_parameter("weight").numel() / (shape[0] * shape[1])
    found: dict[str, Any] = {"weights": f"{weights:.3f}", "turns": len(taken)}
    for name, times in zip(("dense", "gathered", "ordinary"), zip(*taken, strict=True), strict=True):
        low, middle, high = quantiles(times, n=4)
        found |= {f"{name}_us": 1e6 * middle, f"{name}_spread": f"{(high - low) / 2 / middle:.0%}"}
    low, middle, high = quantiles([dense / gathered for dense, gathered, _ in taken], n=4)
    found |= {"speedup": middle, "low": low, "high": high, "possible": median(dense / small for dense, _, small in taken)}
    return found | {"verdict": "faster" if low > 1 else "slower" if high < 1 else "even"}


def cases() -> Iterator[tuple[str, tuple[int, int], int, float, str]]:
    """What is measured: model, shape, tokens, share kept, sides."""
    for model, shapes in SHAPES.items():
        for shape in shapes:
            for tokens in TOKENS:
                yield from ((model, shape, tokens, kept, sides) for kept in KEPT for sides in SIDES)


def verdicts(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Where gathering is not faster than the dense layer, and how much of what is possible it reaches."""
    slow = [one for one in rows if one["verdict"] != "faster"]
    reached = median(one["speedup"] / one["possible"] for one in rows)
    found = {
        "faster than dense": f"{len(rows) - len(slow)} of {len(rows)} rows",
        "median of speedup over possible": f"{reached:.2f}",
    }
    for (layer, tokens), group in groupby(slow, key=lambda one: (one["layer"], one["tokens"])):
        cells = [f"{one['kept']} of {one['out_of']} {one['speedup']:.2f}x ({one['verdict']})" for one in group]
        found[f"not faster, {layer}, tokens {tokens}"] = "; ".join(cells)
    return found


@torch.inference_mode()
def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.7, help="for each row")
    parser.add_argument("--turns", type=int, default=5, help="at least, for each row")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    rows = []
    for model, shape, tokens, kept, sides in tqdm(list(cases()), unit="row"):
        about = {"model": model, "layer": f"{shape[0]}x{shape[1]}", "tokens": tokens, "kept": kept, "out_of": sides}
        rows.append(about | row(shape, tokens, kept, sides, asked.seconds, asked.turns))
    write("gathered", {"asked": vars(asked), "dtype": "float32", **environment(), **verdicts(rows)}, rows)


if __name__ == "__main__":
    main()
