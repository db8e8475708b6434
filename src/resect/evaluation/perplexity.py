"""Perplexity the way the field reports it: one long text cut into windows that do not overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from resect.calibration import positions_of
from resect.errors import DataError, NumericsError, UsageError
from resect.evaluation.mode import evaluating
from resect.ranges import whole
from resect.statistics import IGNORED, perplexity_of, prediction_losses
from resect.surroundings import unaffected

LOGITS = 2**27
"""Logits that a batch may give, if `batch_tokens` is not set: 512 MiB of float32."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text; never print `value` without `window`, `bos` and the text's name."""

    value: float
    """exp(`nats`)."""
    nats: float
    """Mean cross-entropy, nats per predicted token."""
    tokens: int
    """Tokens predicted: with begin-of-text all of a window, else one less."""
    window: int
    """Tokens a window."""
    windows: int
    dropped: int
    """Tokens at the end that fill no window."""
    bos: bool = False
    """Whether a begin-of-text token stands before every window."""
    bits_per_byte: float | None = None
    """Bits that the predicted tokens cost, over the bytes that they cover: comparable across tokenizers."""
    window_nats: tuple[float, ...] = field(default=(), repr=False)
    """The mean of every window."""
    window_bytes: tuple[int, ...] = field(default=(), repr=False)
    """Bytes that the predicted tokens of every window cover; empty where they are not known."""


@unaffected()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int,
    bos: int | None = None,
    sizes: Tensor | None = None,
    batch_tokens: int | None = None,
    name: str = "perplexity",
) -> Perplexity:
    """Perplexity of `model` on `tokens` (one text, tokenised whole; any shape), in windows that do not overlap.

    By default no token is added to a window, and its first is not predicted (arXiv 2305.11627 evaluates so, with windows
    of 128). With `bos`, the number of a begin-of-text token, the model reads that before each window, of which all tokens
    are then predicted; it never sees more than `window` tokens. `sizes`, the bytes of each token, give bits per byte.
    Windows run together in batches of about `batch_tokens`. Log-probabilities are float32, their sum float64. The
    model is handed back as it was. `name` labels the progress bar. Raises `DataError` for a text shorter than a window
    and `NumericsError` for logits that are not finite and losses whose perplexity no float holds.
    """
    found = []
    with batches(tokens, model, window=window, bos=bos, batch_tokens=batch_tokens, name=name) as parts:
        for first, inputs, targets in parts:
            nats = row_nats(model(input_ids=inputs, use_cache=False).logits, targets)
            if not nats.isfinite().all():
                raise NumericsError(
                    f"The logits of the {name} run hold NaN or inf in windows {first} to {first + len(inputs) - 1}. "
                    "Look for weights out of range, or run in a wider type (float32, bfloat16)."
                )
            found.append(nats.cpu())
    by_window = torch.cat(found)
    predicted = window - (bos is None)
    mean = float(by_window.sum()) / (len(by_window) * predicted)
    covered = _covered(sizes, len(by_window), window, first=int(bos is None))
    return Perplexity(
        value=perplexity_of(mean, name),
        nats=mean,
        tokens=len(by_window) * predicted,
        window=window,
        windows=len(by_window),
        dropped=tokens.numel() - len(by_window) * window,
        bos=bos is not None,
        bits_per_byte=float(by_window.sum()) / math.log(2) / sum(covered) if sum(covered) else None,
        window_nats=tuple((by_window / predicted).tolist()),
        window_bytes=covered,
    )


@contextmanager
def batches(
    tokens: Tensor, *models: PreTrainedModel, window: int, bos: int | None, batch_tokens: int | None, name: str
) -> Iterator[Iterator[tuple[int, Tensor, Tensor]]]:
    """Windows as (number of the first, inputs [B, window], targets [B, window]), while the models are being evaluated.

    Raises for windows that hold nothing to predict, that the text does not fill, or that a model cannot see.
    """
    if bos is not None:
        bos = whole("bos", bos, low=0, high=min(model.config.get_text_config().vocab_size for model in models) - 1)
    several = [windows_of(model, tokens, window=window, batch_tokens=batch_tokens) for model in models][0]
    firsts = itertools.accumulate(map(len, several), initial=0)

    def each() -> Iterator[tuple[int, Tensor, Tensor]]:
        for first, batch in zip(firsts, several, strict=False):
            yield first, *_shifted(batch.to(models[0].device), bos)
            bar.update(len(batch))

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        bar = stack.enter_context(tqdm(total=sum(map(len, several)), desc=name, unit="window", leave=False, disable=None))
        yield each()


def windows_of(
    model: PreTrainedModel, tokens: Tensor, *, window: int, batch_tokens: int | None = None
) -> tuple[Tensor, ...]:
    """The windows of a text, several in a batch [B, window]; what is left at the end of the text is dropped."""
    flat = tokens.reshape(-1)
    _check(model, flat, window)
    if batch_tokens is not None:
        batch_tokens = whole("batch_tokens", batch_tokens)
    batch_tokens = batch_tokens or LOGITS // model.config.get_text_config().vocab_size
    windows = flat[: len(flat) // window * window].view(-1, window)
    return tuple(windows.split(max(1, batch_tokens // window)))


def summed_nats(model: PreTrainedModel, batch: Tensor) -> float:
    """Summed cross-entropy of all tokens of `batch` [B, window] but the first of each window."""
    inputs, targets = _shifted(batch.to(model.device), None)
    return float(row_nats(model(input_ids=inputs, use_cache=False).logits, targets).sum())


def row_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy [B], float64, of logits [B, T, V] under targets [B, T], but where those are `IGNORED`."""
    flat = targets.flatten()
    nats = torch.zeros(flat.shape, dtype=torch.float64, device=logits.device)
    nats[flat != IGNORED] = prediction_losses(logits.flatten(0, 1), flat).double()
    return nats.view(targets.shape).sum(1)


def _shifted(batch: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    """What the model reads and what it is to predict at each place."""
    if bos is not None:
        return torch.cat([torch.full_like(batch[:, :1], bos), batch[:, :-1]], dim=1), batch
    nothing = torch.full_like(batch[:, :1], IGNORED)  # what follows a window is not asked
    return batch, torch.cat([batch[:, 1:], nothing], dim=1)


def _covered(sizes: Tensor | None, windows: int, window: int, *, first: int) -> tuple[int, ...]:
    """Bytes of the tokens of every window from its token `first` on."""
    if sizes is None:
        return ()
    return tuple(sizes.reshape(-1)[: windows * window].view(windows, window)[:, first:].sum(1).tolist())


def _check(model: PreTrainedModel, flat: Tensor, window: int) -> None:
    asked = f"Asked for windows of {window} tokens"
    positions = positions_of(model)
    window = whole("window", window, low=2)  # the first of a window is never predicted
    if positions is not None and window > positions:
        raise UsageError(f"{asked}; the model has {positions} positions. Use a smaller window.")
    if len(flat) < window:
        raise DataError(f"{asked}; the text has {len(flat)}. Use a longer text or a smaller window.")
