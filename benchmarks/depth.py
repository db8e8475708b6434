"""How the time of a trace grows with depth, on the meta device, and what a cut spends on fitting the network's own code to it.

    python benchmarks/depth.py            # the whole table, a quarter of an hour on two cores

Every figure is of a process of its own; the model is built there before the clock starts, and a model of two blocks is traced
first, which loads what torch loads once. The rows are medians over the repeats. `trace_seconds` is wall clock, `cpu_seconds` the
processor's time in it, which other work on the machine disturbs less. `trace_MiB` is the peak of the process during the trace
less what it held before. `plan_record` is what `resect.cut` does before it touches a weight, `replays` are the runs of the cut
network beside the dense one in it. Through the `cpu_seconds` of one width goes a straight line, a + b * blocks; `off_line` is the
largest distance from it as a share of the measured time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

import torch
from record import apart, environment, peak_memory, reset_peak_memory, write
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import resect
from resect.graph import Graph, Replay
from resect.plan import Kept, Plan
from resect.surgery import plan_record

DEPTHS = (10, 20, 40, 80, 100)


@dataclass(frozen=True)
class Shape:
    """Sizes of one block, as a configuration of transformers."""

    model_type: str
    fields: Mapping[str, Any]
    depths: Sequence[int] = DEPTHS


def llama(hidden: int, heads: int, kv_heads: int, inner: int) -> Shape:
    """Blocks as wide as one of the Llamas'."""
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner}
    return Shape("llama", sizes)


SHAPES = {
    "70B-wide": llama(8192, 64, 8, 28672),
    "7B-wide": llama(4096, 32, 32, 11008),
    "Mixtral-8x7B-wide": Shape("mixtral", {}, (32,)),
    "RecurrentGemma-2B-wide (hybrid)": Shape("recurrent_gemma", {}, (26,)),
}
CUT = ("7B-wide", 40)
"""Where the preparation of a cut is measured too."""


def build(name: str, blocks: int) -> nn.Module:
    """A model of some blocks without weights."""
    config = AutoConfig.for_model(SHAPES[name].model_type, **SHAPES[name].fields, num_hidden_layers=blocks)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def one(name: str, blocks: int) -> dict[str, Any]:
    """What one trace takes in this process, and the preparation of a cut where that is asked for."""
    model = build(name, blocks)
    resect.trace(build(name, 2))
    reset_peak_memory("cpu")
    held = peak_memory("cpu")
    start, worked = time.perf_counter(), time.process_time()
    graph = resect.trace(model)
    row: dict[str, Any] = {"trace_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
    row["trace_MiB"] = 1024 * (peak_memory("cpu") - held)
    row["groups"] = len(graph.groups)
    if (name, blocks) == CUT:
        for layout in ("uniform", "per_layer"):
            row |= {f"{layout}_{key}": value for key, value in preparation(model, graph, layout).items()}
    return row


def preparation(model: nn.Module, graph: Graph, layout: str) -> dict[str, float]:
    """Seconds of `plan_record` and of the replays in it, for heads and channels cut to three quarters or a little less."""
    spent, run = [], Replay.run

    def timed(replay: Replay) -> tuple[float, str, str]:
        start = time.perf_counter()
        found = run(replay)
        spent.append(time.perf_counter() - start)
        return found

    groups = {}
    for group in graph.of_kind("heads", "channels"):
        keep = group.units * 3 // 4 - (group.layer % 4 if layout == "per_layer" else 0)
        groups[group.name] = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=tuple(range(keep)))
    Replay.run = timed  # type: ignore[method-assign]
    start = time.perf_counter()
    plan_record(model, Plan(groups=groups), graph)
    Replay.run = run  # type: ignore[method-assign]
    return {"plan_record_seconds": time.perf_counter() - start, "replays": len(spent), "replay_seconds": sum(spent)}


def measured(name: str, blocks: int, repeats: int) -> dict[str, Any]:
    """The medians over processes of their own."""
    runs = [apart(one, name, blocks) for _ in range(repeats)]
    return {"width": name, "blocks": blocks, **{key: median(run[key] for run in runs) for key in runs[0]}}


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The straight line `a + b * x` through points, by least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of every width that was measured at several depths, the line and how far the times are from it."""
    found = {}
    for name, group in groupby(rows, key=lambda row: row["width"]):
        points = [(row["blocks"], row["cpu_seconds"]) for row in group]
        if len(points) > 2:
            a, b = line(points)
            off = max(abs(a + b * x - y) / y for x, y in points)
            found[f"{name}, cpu_seconds"] = f"{a:.2f} + {b:.4f} * blocks, off_line {off:.1%}"
    return found


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    todo = [(name, blocks) for name, shape in SHAPES.items() for blocks in shape.depths]
    rows = [measured(name, blocks, asked.repeats) for name, blocks in tqdm(todo, unit="depth")]
    write("depth", {"repeats": asked.repeats, **environment(), **lines(rows)}, rows)


if __name__ == "__main__":
    main()
