"""Loss on text that nothing is learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from resect.errors import NumericsError
from resect.recovery.examples import Example, collate
from resect.recovery.facts import Nats
from resect.statistics import IGNORED, MOST_NATS, computing, token_losses


@torch.no_grad()
def held_out_nats(
    model: nn.Module, held_out: Mapping[str, Sequence[Example]], *, batch: int, padding: int = 0, bf16: bool = False
) -> Nats:
    """Mean cross-entropy of each source's predicted tokens; sums are float64. The model keeps its mode."""
    training = model.training
    model.eval()
    try:
        with computing(model, bf16=bf16):
            return {source: _mean(model, examples, batch, padding, source) for source, examples in held_out.items()}
    finally:
        model.train(training)


def overall(nats: Nats, held_out: Mapping[str, Sequence[Example]]) -> float:
    """The mean over all predicted tokens of all sources."""
    counts = {source: sum(_predicted(example) for example in examples) for source, examples in held_out.items()}
    return sum(nats[source] * count for source, count in counts.items()) / sum(counts.values())


def _mean(model: nn.Module, examples: Sequence[Example], batch: int, padding: int, source: str) -> float:
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(examples), batch):
        given = {name: tensor.to(device) for name, tensor in collate(examples[start : start + batch], padding=padding).items()}
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits
        total += float(token_losses(logits, given["labels"]).double().sum())
    mean = total / sum(map(_predicted, examples))
    if not mean <= MOST_NATS:
        raise NumericsError(
            f"The held-out loss on {source!r} is {mean:g} nats a token, and no float holds its perplexity. Look for weights out "
            "of range, lower settings.learning_rate, or use a wider dtype (float32, bfloat16)."
        )
    return mean


def _predicted(example: Example) -> int:
    return int((example.labels != IGNORED).sum())
