"""What a model writes: greedy continuations, to be read beside one another."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from resect.calibration import chat_text, check_length
from resect.errors import ModelError, ResectError, UsageError, shown
from resect.evaluation.mode import evaluating
from resect.ranges import whole
from resect.surroundings import unaffected

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""Settings that mean nothing to greedy search, and are warned of."""


@unaffected()
def generations(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int = 64, chat: bool = False
) -> list[str]:
    """The likeliest continuation of each prompt, at most `new_tokens` tokens, without the prompt.

    With `chat` each prompt is a user's message and the tokenizer's chat template is put around it; `UsageError` if it
    has none. Prompts run one by one: padding would change rounding, and with it now and then a token. The model is
    handed back as it was.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "Asked for answers to chat messages; the tokenizer has no chat template. Ask for plain continuations."
        )
    settings = greedy(model, whole("new_tokens", new_tokens))
    with evaluating(model):
        return [
            _continue(model, tokenizer, prompt, settings, chat)
            for prompt in tqdm(prompts, desc="generating", leave=False, disable=None)
        ]


def greedy(model: PreTrainedModel, new_tokens: int) -> Any:
    """The model's own generation settings, where greedy search has a use for them."""
    settings = copy.deepcopy(model.generation_config)
    for name in SAMPLING:
        setattr(settings, name, None)
    settings.do_sample, settings.num_beams, settings.num_return_sequences = False, 1, 1
    settings.max_new_tokens, settings.max_length = new_tokens, None
    if settings.pad_token_id is None:
        ends = settings.eos_token_id
        settings.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return settings


@contextmanager
def generating(tokens: Tensor) -> Iterator[None]:
    """Around what continues `tokens` [1, T]: `ModelError` where there are none, or where the model's settings fit no model."""
    if not tokens.shape[1]:
        raise ModelError("There is nothing to continue: the prompt has no tokens. Give one, or look at the chat template.")
    try:
        yield
    except (TypeError, ValueError, OverflowError, AttributeError, LookupError) as problem:
        if isinstance(problem, ResectError):
            raise
        raise ModelError(
            f"The model cannot continue a text with its generation settings (generation_config.json): {shown(str(problem))}"
        ) from problem


def _continue(model: PreTrainedModel, tokenizer: Any, prompt: str, settings: Any, chat: bool) -> str:
    if chat:
        message = [{"role": "user", "content": prompt}]
        prompt = chat_text(tokenizer, message, add_generation_prompt=True)
    tokens = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")["input_ids"].to(model.device)
    needed = tokens.shape[1] + settings.max_new_tokens
    asked = f"A prompt of {tokens.shape[1]} tokens was to be continued by {settings.max_new_tokens}"
    check_length(model, needed, asked, instead="Ask for fewer new tokens, or a shorter prompt.")
    generate: Any = model.generate
    with generating(tokens):
        written = generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return str(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))
