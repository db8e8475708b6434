"""A conversation with a model, its answers given out word by word."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from resect.calibration import chat_text, positions_of
from resect.errors import UsageError
from resect.evaluation.generation import generating, greedy
from resect.evaluation.mode import evaluating
from resect.ranges import amount, whole
from resect.surroundings import plain, unwrapped

Write = Callable[[str], None]


@dataclass(frozen=True)
class Said:
    """An answer."""

    text: str
    tokens: int
    seconds: float


@dataclass
class Conversation:
    """A model, its tokenizer, and what was said so far.

    A tokenizer with a chat template puts it around the messages; without one the model goes on writing the plain text.
    `temperature` 0 takes the likeliest token, others draw.
    """

    model: PreTrainedModel
    tokenizer: Any
    new_tokens: int = 256
    temperature: float = 0.0
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = unwrapped(self.model)
        whole("new_tokens", self.new_tokens)
        amount("temperature", self.temperature)
        self.reset()

    def reset(self) -> None:
        """Forgets what was said; the system's message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, message: str, write: Write = lambda text: None) -> Said:
        """The answer to a message; `write` gets it piece by piece as it comes. Both are remembered once it is whole."""
        asked = [*self.messages, {"role": "user", "content": message}]
        tokens = self._tokens(asked)
        pieces: list[str] = []

        def take(text: str) -> None:
            pieces.append(text)
            write(text)

        start = time.perf_counter()
        with plain(self.model), evaluating(self.model), generating(tokens):
            generate: Any = self.model.generate
            written = generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=self._settings(),
                streamer=_Pieces(self.tokenizer, take),
            )
        said = Said("".join(pieces), written.shape[1] - tokens.shape[1], time.perf_counter() - start)
        self.messages = [*asked, {"role": "assistant", "content": said.text}]
        return said

    def _tokens(self, messages: list[dict[str, str]]) -> torch.Tensor:
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        if chat:
            text = chat_text(self.tokenizer, messages, add_generation_prompt=True)
        else:
            breaks = ["\n" if place and one["role"] == "user" else "" for place, one in enumerate(messages)]
            text = "".join(before + one["content"] for before, one in zip(breaks, messages, strict=True))
        tokens: torch.Tensor = self.tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
        positions = positions_of(self.model)
        if positions is not None and tokens.shape[1] + self.new_tokens > positions:
            raise UsageError(
                f"The conversation has {tokens.shape[1]} tokens, and {self.new_tokens} more would not fit into the model's "
                f"{positions} positions. Forget what was said, or ask for shorter answers."
            )
        return tokens.to(self.model.device)

    def _settings(self) -> Any:
        settings = greedy(self.model, self.new_tokens)
        if self.temperature:
            settings.do_sample, settings.temperature = True, self.temperature
        return settings


class _Pieces(TextStreamer):
    """Hands on what a model writes, without the prompt."""

    def __init__(self, tokenizer: Any, take: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Some text that will not change any more."""
        if text:
            self._take(text)
