"""Perplexity the way the field reports it: one long text cut into windows that do not overlap."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from resect.errors import DataError, NumericsError, UsageError
from resect.evaluation.mode import evaluating

LOGITS = 2**27
"""Logits that a batch may give, if `batch_tokens` is not set: 512 MiB of float32."""
CHUNK = 2**24
"""Logits turned into probabilities at a time: 64 MiB of float32, and as much again."""
IGNORED = -100


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text; never print `value` without `window` and the text's name."""

    value: float
    """exp(`nats`)."""
    nats: float
    """Mean cross-entropy, nats per predicted token."""
    tokens: int
    """Tokens predicted: one less than its length in every window."""
    window: int
    """Tokens a window."""
    windows: int
    dropped: int
    """Tokens at the end that fill no window."""


def perplexity(
    model: PreTrainedModel, tokens: Tensor, *, window: int, batch_tokens: int | None = None, name: str = "perplexity"
) -> Perplexity:
    """Perplexity of `model` on `tokens` (one text, tokenised whole; any shape), in windows that do not overlap.

    No token is added to a window, and its first is not predicted (arXiv 2305.11627 evaluates so, with windows of 128).
    Windows run together in batches of about `batch_tokens`. Log-probabilities are float32, their sum float64. The
    model is handed back as it was. `name` labels the progress bar. Raises `DataError` for a text shorter than a window
    and `NumericsError` for logits that are not finite.
    """
    flat = tokens.reshape(-1)
    _check(model, flat, window)
    windows = flat[: len(flat) // window * window].view(-1, window)  # [N, window]
    batch_tokens = batch_tokens or LOGITS // model.config.get_text_config().vocab_size
    step = max(1, batch_tokens // window)
    total = torch.zeros((), dtype=torch.float64)
    with evaluating(model), tqdm(total=len(windows), desc=name, unit="window", leave=False, disable=None) as bar:
        for first, batch in zip(itertools.count(step=step), windows.split(step), strict=False):
            total += _nats(model, batch.to(model.device)).cpu()
            if not total.isfinite():
                raise NumericsError(
                    f"The logits of the {name} run hold NaN or inf in windows {first} to {first + len(batch) - 1}. "
                    "Look for weights out of range, or run in a wider type (float32, bfloat16)."
                )
            bar.update(len(batch))
    count = windows.numel() - len(windows)
    nats = float(total) / count
    value = math.exp(nats) if nats < 700 else math.inf
    return Perplexity(value, nats, count, window, len(windows), len(flat) - windows.numel())


def _check(model: PreTrainedModel, flat: Tensor, window: int) -> None:
    """Raises for windows that hold nothing to predict, that the text does not fill, or that the model cannot see."""
    asked = f"Asked for windows of {window} tokens"
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window < 2:
        raise UsageError(f"{asked}; the first of a window is never predicted. Ask for 2 or more.")
    if positions is not None and window > positions:
        raise UsageError(f"{asked}; the model has {positions} positions. Use a smaller window.")
    if len(flat) < window:
        raise DataError(f"{asked}; the text has {len(flat)}. Use a longer text or a smaller window.")


def _nats(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Summed cross-entropy of all tokens of `batch` [B, window] but the first of each window; a float64 scalar."""
    logits = model(input_ids=batch, use_cache=False).logits.flatten(0, 1)  # [B * window, V], not copied
    nothing = torch.full_like(batch[:, :1], IGNORED)  # what follows a window is not asked
    targets = torch.cat([batch[:, 1:], nothing], dim=1).flatten()
    rows = max(1, CHUNK // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    for few, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        nats = torch.nn.functional.cross_entropy(few.float(), wanted, reduction="none", ignore_index=IGNORED)
        total += nats.double().sum()
    return total
