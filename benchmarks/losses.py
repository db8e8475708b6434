"""Losses of training, a few rows of logits at a time, against torch's functions on all of them: seconds and peak memory.

    python benchmarks/losses.py

Forwards and backwards from logits in bfloat16, alone and with a teacher, both ways in turns in one process on one thread. Seconds
are medians; `speedup` is the median of plain over ours within a turn. Memory is the peak above that of the logits, MiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from record import environment, peak, seconds, write
from torch import Tensor

from resect.recovery import Distillation
from resect.statistics import divergence, token_losses

VOCABULARIES = {"SmolLM2": 49_152, "Llama-3": 128_256}
ASKED = Distillation()


def plain(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """The same losses with torch's functions."""
    chosen = logits.float()[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(chosen, labels[:, 1:].flatten(), reduction="none")
    if teacher is None:
        return losses
    said = divergence(chosen, teacher.float()[:, :-1].flatten(0, 1), temperature=ASKED.temperature)
    return (1 - ASKED.weight) * losses + ASKED.weight * said


def ours(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """A few rows at a time."""
    return token_losses(logits, labels, teacher=teacher, weight=ASKED.weight, temperature=ASKED.temperature)


def gradient(losses: Callable[..., Tensor], logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """Of the summed losses with respect to the logits."""
    logits = logits.detach().requires_grad_()
    losses(logits, labels, teacher).sum().backward()
    assert logits.grad is not None
    return logits.grad


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    rows = []
    for name, vocabulary in VOCABULARIES.items():
        shape = (asked.sequences, asked.length)
        labels = torch.randint(0, vocabulary, shape).to(asked.device)
        logits, theirs = (torch.randn(*shape, vocabulary, dtype=torch.bfloat16, device=asked.device) for _ in range(2))
        for teacher in (None, theirs):
            ways = [partial(gradient, losses, logits, labels, teacher) for losses in (plain, ours)]
            difference = float(torch.sub(*(way().float() for way in ways)).abs().max())
            turns = [[seconds(way) for way in ways] for _ in range(asked.repeats)]
            idle, *peaks = [1024 * peak(asked.device, run) for run in (lambda: None, *ways)]
            rows.append(
                {
                    "vocabulary": f"{name}, {vocabulary:,}",
                    "teacher": "yes" if teacher is not None else "no",
                    "plain_seconds": median(a for a, _ in turns),
                    "seconds": median(b for _, b in turns),
                    "speedup": median(a / b for a, b in turns),
                    "plain_MiB": peaks[0] - idle,
                    "MiB": peaks[1] - idle,
                    "largest difference of gradients": difference,
                }
            )
            print(rows[-1], flush=True)
    write("losses", {"asked": vars(asked), **environment()}, rows)


if __name__ == "__main__":
    main()
