"""The source ``self``: text that the model writes, by plain ancestral sampling.

No data is needed: what a model writes at temperature 1 follows the distribution that it learnt, which serves as its
training text would (the idea of LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.calibration.limits import positions_of
from resect.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_TOKENS = 8192
"""Tokens written side by side, which bounds the KV cache (about 4 GB for a 7B model in bfloat16)."""
CONCURRENT = 64
"""Sequences written side by side at most; more gain little and cost logits of [sequences, vocabulary]."""


def write(model: nn.Module, *, samples: int, length: int, seed: int, start: int) -> Tensor:
    """Sequences sampled at temperature 1, the token `start` first: [samples, length] long, on the CPU.

    The model is left as it was, the global random state too. A sequence runs on after an end-of-text token, as packed
    training text does. Errors: `UsageError` for a length past the model's positions, `NumericsError` for logits that
    are not finite.
    """
    limit = positions_of(model)
    if limit is not None and length > limit:
        raise UsageError(f"The model was asked to write {length} tokens; it has {limit} positions. Ask for less.")
    generator = torch.Generator().manual_seed(seed)
    batch = max(1, min(CONCURRENT, CACHED_TOKENS // length))
    with _evaluating(model), tqdm(total=samples * length, desc="the model writes text", unit="token", delay=1) as bar:
        written = [
            _continue(model, torch.full((min(batch, samples - done), 1), start), length, generator, bar)
            for done in range(0, samples, batch)
        ]
    return torch.cat(written)


def start_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that text begins with: begin-of-text, or end-of-text where a model has none."""
    config = getattr(model, "config", None)
    for owner in (tokenizer, config):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(owner, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    raise UsageError(
        "The source 'self' lets the model write from its begin-of-text or end-of-text token; neither the tokenizer nor "
        "the config names one. Give a text file instead."
    )


@torch.no_grad()
def _continue(model: nn.Module, tokens: Tensor, length: int, generator: torch.Generator, bar: tqdm[Any]) -> Tensor:
    device = next(model.parameters()).device
    cache = None
    bar.update(tokens.numel())
    while tokens.shape[1] < length:
        unseen = tokens if cache is None else tokens[:, -1:]
        output = model(input_ids=unseen.to(device), past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)  # None: no cache, so everything is read again
        chances = output.logits[:, -1].float().softmax(-1).cpu()  # [batch, vocabulary]
        if not chances.isfinite().all():
            raise NumericsError(
                f"The model's logits after token {tokens.shape[1]} of its own text are not finite. "
                "Check its weights and dtype."
            )
        # drawn on the CPU, so that the device does not change the text
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
        bar.update(len(tokens))
    return tokens


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
