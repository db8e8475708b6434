"""What one shot of LLM Surgeon costs: its parts in seconds, beside what it is made of, and its peak memory.

    python benchmarks/surgeon_cost.py --model demo

Everything runs in one process. *forward and backward* is a bare pass over the same tokens with gradients of activations alone,
which is what the shot needs; *with weights* is one with gradients of all weights, as in training; *cholesky* is one
factorisation in float64 of each factor of every layer that reads heads or channels. *collect*, *ladders* and *update* are the
parts of the shot, which removes a fifth. Memory is the process's peak since a reset, less what it held before; *needed* is what
one block cannot do without: its factors in float32, its weights, and what its batches take in and hand back.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from record import environment, peak_memory, reset_peak_memory, write
from torch import Tensor, nn

import resect
from resect.calibration import calibrate
from resect.checkpoint import Progress
from resect.graph import Graph
from resect.methods import LLMSurgeon
from resect.statistics import Data, Layer, readers, token_loss

KINDS = ("heads", "channels")


def bare(model: nn.Module, batches: list[Tensor], *, weights: bool = False) -> None:
    """Forward and backward, through activations alone or with gradients of weights."""
    model.requires_grad_(weights)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, given, output: output.requires_grad_())
    for batch in batches:
        token_loss(model, batch).backward()
    handle.remove()
    model.requires_grad_(False)
    model.zero_grad()


def factorised(layers: list[Layer]) -> None:
    """One factorisation for each factor."""
    for layer in layers:
        for size in (layer.columns, layer.rows):
            torch.linalg.cholesky(torch.eye(size, dtype=torch.float64))


def measured(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and the GiB that it needed on top."""
    gc.collect()
    reset_peak_memory("cpu")
    held = peak_memory("cpu")
    start = time.perf_counter()
    found = run()
    return found, time.perf_counter() - start, peak_memory("cpu") - held


def one_block(graph: Graph, layers: list[Layer], model: nn.Module, tokens: Tensor) -> float:
    """GiB of a block's factors and weights, and of what all batches hand on between two blocks."""
    inside = [layer for layer in layers if graph.blocks.layer_of(f"{layer.path}.weight") == 0]
    factors = sum(layer.columns**2 + layer.rows**2 for layer in inside)
    weights = sum(p.numel() for name, p in model.named_parameters() if graph.blocks.layer_of(name) == 0)
    return 4 * (factors + weights + tokens.numel() * int(model.config.hidden_size)) / 2**30


def one_shot(model: nn.Module, graph: Graph, layers: list[Layer], tokens: Tensor, method: LLMSurgeon) -> dict[str, Any]:
    """A shot that removes a fifth, part by part; the network is as before afterwards."""
    data, dense = Data(tokens.split(1)), {name: value.clone() for name, value in model.state_dict().items()}
    _, base, activations = measured(lambda: bare(model, list(tokens.split(1))))
    _, trained, _ = measured(lambda: bare(model, list(tokens.split(1)), weights=True))
    _, cholesky, _ = measured(lambda: factorised(layers))
    with tempfile.TemporaryDirectory() as folder:
        progress = Progress(folder, [])
        gather = lambda: method.collect(model, graph, layers, data, shot=1, seed=0, progress=progress)  # noqa: E731
        _, collect, memory = measured(gather)
        steps = method.shots_of(model, graph, data, {"keep": 0.8, "layout": "per-layer"}, progress=progress)
        (_, plan, _), ladders, ladder_memory = measured(lambda: next(steps))
        _, update, update_memory = measured(lambda: method.make_up(model, graph, plan, data, progress))
    model.load_state_dict(dense)
    return {
        "tokens": tokens.numel(),
        "computed in": "bfloat16" if method.bf16 else "float32",
        "forward and backward": base,
        "with weights": trained,
        "cholesky": cholesky,
        "collect": collect,
        "ladders": ladders,
        "update": update,
        "shot over forward, backward, cholesky": (collect + ladders + update) / (base + cholesky),
        "shot over forward, backward with weights, cholesky": (collect + ladders + update) / (trained + cholesky),
        "collect over forward, backward": collect / base,
        "forward and backward GiB": activations,
        "collect GiB": memory,
        "ladders GiB": ladder_memory,
        "update GiB": update_memory,
        "needed GiB": one_block(graph, layers, model, tokens),
        "all factors GiB": 4 * sum(layer.columns**2 + layer.rows**2 for layer in layers) / 2**30,
    }


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", nargs="+", default=["demo"])
    parser.add_argument("--samples", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--length", type=int, default=512)
    asked = parser.parse_args()
    tokenizer = resect.load_tokenizer(asked.model)
    model = resect.load(asked.model)
    graph = resect.trace(model)
    found = {layer.path: layer for group in graph.of_kind(*KINDS) for layer, _ in readers(model, graph, group)}
    layers = list(found.values())
    rows = []
    for samples in asked.samples:
        tokens = calibrate(asked.calibration, tokenizer, samples=samples, length=asked.length).tokens
        for method in (LLMSurgeon(shots=1), LLMSurgeon(shots=1, bf16=True)):
            with method.computing(model):
                rows.append(one_shot(model, graph, layers, tokens, method))
            print(rows[-1], flush=True)
    write("surgeon_cost", {"asked": vars(asked), **environment()}, rows)


if __name__ == "__main__":
    main()
