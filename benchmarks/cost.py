"""What estimation costs: its time against a bare forward and backward pass over the same tokens, and its peak memory.

    python benchmarks/cost.py --model demo

Everything runs in one process, bare and estimation in turn. Memory is the process's (or the accelerator's) peak since a reset:
`activations` is what a forward and backward pass adds that throws every weight's gradient away the moment it is there; the last
column is the peak of the estimation less those activations, as a multiple of the weights.
"""

from __future__ import annotations

import argparse
from statistics import median

from record import environment, peak, seconds, write
from torch import Tensor, nn

import resect
from resect.calibration import calibrate
from resect.statistics import collect, token_loss

KINDS = ("heads", "channels")


def bare(model: nn.Module, tokens: Tensor, rows: int) -> None:
    """Forward and backward over all tokens, gradients of all weights accumulated."""
    model.requires_grad_(True)
    for batch in tokens.split(rows):
        token_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)


def activations_only(model: nn.Module, tokens: Tensor, rows: int, wanted: set[str]) -> None:
    """The same for the wanted weights alone, each gradient thrown away the moment it is there."""
    drops = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            drops.append(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))
    for batch in tokens.split(rows):
        token_loss(model, batch).backward()
    for drop in drops:
        drop.remove()


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--criteria", nargs="*", default=["vector", "element1", "element2", "mix"])
    asked = parser.parse_args()
    tokenizer = resect.load_tokenizer(asked.model)
    model = resect.load(asked.model).to(asked.device)
    graph = resect.trace(model)
    tokens = calibrate(asked.calibration, tokenizer, samples=asked.samples, length=asked.length).tokens.to(asked.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    wanted = {member.parameter for group in graph.of_kind(*KINDS) for member in group.members}
    rows = []
    for criterion in asked.criteria:
        batch = 1 if criterion in ("element2", "mix") else 1024 // asked.length
        estimate = lambda criterion=criterion: collect(model, tokens, graph, criterion, kinds=KINDS)  # noqa: E731
        base = lambda batch=batch: bare(model, tokens, batch)  # noqa: E731
        base(), estimate()
        pairs = [(seconds(base), seconds(estimate)) for _ in range(asked.repeats)]
        idle = peak(asked.device, lambda: None)
        activations = peak(asked.device, lambda batch=batch: activations_only(model, tokens, batch, wanted)) - idle
        needed = peak(asked.device, estimate)
        rows.append(
            {
                "criterion": criterion,
                "sequences_a_batch": batch,
                "bare_seconds": median(a for a, _ in pairs),
                "estimation_seconds": median(b for _, b in pairs),
                "time_ratio": median(b / a for a, b in pairs),
                "weights_GiB": weights,
                "idle_GiB": idle,
                "activations_GiB": activations,
                "peak_GiB": needed,
                "peak_less_activations_over_weights": (needed - activations - idle + weights) / weights,
            }
        )
        print(rows[-1], flush=True)
    write("cost", {"asked": vars(asked), **environment()}, rows)


if __name__ == "__main__":
    main()
