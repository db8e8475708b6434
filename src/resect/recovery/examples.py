"""Rows of data as tokens and labels: instructions, conversations, packed text; and what was left out, counted."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from resect.calibration import Rows, chat_text, read_rows, texts_in_tokens
from resect.errors import DataError, ModelError, UsageError
from resect.recovery.facts import Counts
from resect.recovery.settings import Recovery
from resect.statistics import IGNORED

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The Alpaca format."""
MULTIPLE = 8
"""Padded batches are as wide as a multiple of this, as LLM-Pruner's."""


@dataclass(frozen=True)
class Example:
    """Tokens [T] and their labels [T]: the token itself where it is learnt, `IGNORED` elsewhere; the first is never predicted."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pool:
    """The examples of one source: those to train on, and those to measure on."""

    train: list[Example]
    held_out: list[Example]
    counts: Counts

    @property
    def text(self) -> bool:
        """Whether this is plain text, not instructions."""
        return self.counts.kind == "text"


def read_pool(source: str, tokenizer: Any, settings: Recovery, *, seed: int) -> Pool:
    """The examples of a source, some of them held out at random.

    Rows with `messages` are conversations, those with `instruction` and `output` (and perhaps `input`) instructions, those
    with `text` documents. Raises `DataError` for rows that are none of these, and where fewer than two examples are left.
    """
    found = read_rows(source)
    kind = _kind(source, found)
    counts = Counts(source=source, kind=kind, rows=len(found.rows), detail=found.detail)
    if kind == "text":
        examples = packed([str(row.get("text") or "") for row in found.rows], tokenizer, length=settings.length, counts=counts)
    else:
        conversation = _messages if kind == "messages" else _alpaca if settings.template == "alpaca" else _chat
        examples = _responses(found.rows, tokenizer, conversation, length=settings.length, counts=counts)
    if len(examples) < 2:
        skipped = ", ".join(f"{count} x {reason}" for reason, count in counts.skipped.items()) or "none skipped"
        raise DataError(
            f"{source!r} gives {len(examples)} examples of {settings.length} tokens; training and measuring need 2 or more. "
            f"It has {len(found.rows)} rows ({skipped}; {counts.remainder} tokens fill no window). "
            "Give more data or a shorter settings.length."
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = min(settings.held_out, max(1, len(examples) // 10))
    counts.examples, counts.held_out = len(examples), aside
    counts.tokens = sum(len(example.tokens) for example in examples)
    counts.predicted = sum(int((example.labels != IGNORED).sum()) for example in examples)
    return Pool([examples[number] for number in order[aside:]], [examples[number] for number in order[:aside]], counts)


def packed(documents: Iterable[str], tokenizer: Any, *, length: int, counts: Counts) -> list[Example]:
    """Windows of `length` tokens of one stream: all documents in turn, an end-of-text after each.

    No token is lost but those at the end that fill no window, which are counted.
    """
    texts = [text for text in documents if text.strip()]
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else _encode("\n\n", tokenizer)
    stream = array("q")  # eight bytes a token
    for tokens in texts_in_tokens(texts, tokenizer):
        stream.extend(tokens)
        stream.extend(end)
    windows = len(stream) // length
    counts.remainder = len(stream) - windows * length
    if counts.rows > len(texts):
        counts.skipped["no text"] = counts.rows - len(texts)
    kept = torch.tensor(np.frombuffer(stream, dtype=np.int64)[: windows * length]).view(windows, length)
    labels = kept.clone()
    labels[:, 0] = IGNORED
    return [Example(*both) for both in zip(kept, labels, strict=True)]


@dataclass(frozen=True)
class Conversation:
    """A text, where the responses in it begin and end, whether an end-of-text has to follow, and whether to begin specially."""

    text: str
    responses: Sequence[tuple[int, int]]
    plain: bool
    """Whether no template put special tokens in."""


class Unusable(Exception):
    """A row that gives no example, and why."""


def _responses(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    conversation: Callable[[Mapping[str, Any], Any], Conversation],
    *,
    length: int,
    counts: Counts,
) -> list[Example]:
    """An example of every row that can be used."""
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    refusals: list[ModelError] = []
    for row in rows:
        try:
            example = labelled(conversation(row, tokenizer), tokenizer)
            long = len(example.tokens) > length
            example = Example(example.tokens[:length], example.labels[:length])
            if (example.labels == IGNORED).all():
                raise Unusable("no response within the length")
        except Unusable as reason:
            skipped[str(reason)] += 1
            refusals += [reason.__cause__] if isinstance(reason.__cause__, ModelError) else []
        else:
            counts.truncated += long
            examples.append(example)
    counts.skipped = dict(skipped)
    if refusals and not examples:
        raise refusals[0]
    return examples


def labelled(conversation: Conversation, tokenizer: Any) -> Example:
    """A conversation as tokens, of which only those of the responses are learnt.

    The text is tokenised whole. A response begins at the first token in which it differs from the text before it, so that
    tokens which reach across the border count as its own.
    """
    text, plain = conversation.text, conversation.plain
    tokens = _encode(text, tokenizer, special=plain)
    end = tokenizer.eos_token_id
    ended = plain and isinstance(end, int) and tokens[-1:] != [end]
    labels = [IGNORED] * len(tokens)
    for first, last in conversation.responses:
        start, stop = (_common(tokens, _encode(text[:place], tokenizer, special=plain)) for place in (first, last))
        stop = len(tokens) if last == len(text) else stop
        labels[start:stop] = tokens[start:stop]
    both = torch.tensor([tokens + [end] * ended, labels + [end] * ended], dtype=torch.long)
    both[1, :1] = IGNORED
    return Example(both[0], both[1])


def collate(examples: Sequence[Example], *, padding: int) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    width = -(-max(len(example.tokens) for example in examples) // MULTIPLE) * MULTIPLE
    filler = torch.zeros(width, dtype=torch.long)
    lengths = torch.tensor([len(example.tokens) for example in examples])

    def padded(tensors: list[Tensor], value: int) -> Tensor:
        return pad_sequence([*tensors, filler], batch_first=True, padding_value=value)[:-1]

    return {
        "input_ids": padded([example.tokens for example in examples], padding),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "labels": padded([example.labels for example in examples], IGNORED),
    }


def _kind(source: str, found: Rows) -> str:
    """What the rows are: the first kind whose columns any of them has."""
    kinds = {"messages": ("messages",), "instructions": ("instruction", "output"), "text": ("text",)}
    for kind, needed in kinds.items():
        if any(all(column in row for column in needed) for row in found.rows):
            return kind
    columns = ", ".join(map(repr, found.rows[0])) or "none"
    raise DataError(
        f"{source!r} has rows with the columns {columns}. Recovery reads 'messages', 'instruction' and 'output', or 'text'; "
        "name a column of text as FILE:COLUMN, or rename the columns."
    )


def _alpaca(row: Mapping[str, Any], tokenizer: Any) -> Conversation:
    instruction, context, response = _parts(row)
    prompt = (WITH_INPUT if context else WITHOUT_INPUT).format(instruction=instruction, input=context)
    return Conversation(prompt + response, [(len(prompt), len(prompt) + len(response))], plain=True)


def _chat(row: Mapping[str, Any], tokenizer: Any) -> Conversation:
    instruction, context, response = _parts(row)
    asked = f"{instruction}\n\n{context}" if context else instruction
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": response}]
    return _messages({"messages": messages}, tokenizer)


def _parts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Instruction, input and output of a row."""
    if "instruction" not in row or "output" not in row:
        raise Unusable("missing columns")
    texts = [row.get(column) or "" for column in ("instruction", "input", "output")]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("no text in the columns")
    if not texts[2].strip():
        raise Unusable("empty response")
    return texts[0], texts[1].strip(), texts[2]


def _messages(row: Mapping[str, Any], tokenizer: Any) -> Conversation:
    """A conversation in the tokenizer's chat template; every turn of the assistant is a response."""
    messages = row.get("messages")
    if messages is None:
        raise Unusable("missing columns")
    if not isinstance(messages, list) or not all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in messages):
        raise Unusable("malformed messages")
    if not tokenizer.chat_template:
        raise UsageError("The data holds conversations; the tokenizer has no chat template. Give one, or other data.")
    turns = [number for number, one in enumerate(messages) if one["role"] == "assistant"]
    if not any(str(messages[number]["content"]).strip() for number in turns):
        raise Unusable("empty response")
    text = _rendered(messages, tokenizer)
    responses = []
    for number in turns:
        prompt = _rendered(messages[:number], tokenizer, add_generation_prompt=True)
        answered = _rendered(messages[: number + 1], tokenizer).rstrip()  # a line break after the end is never generated
        if not (text.startswith(prompt) and text.startswith(answered) and len(prompt) < len(answered)):
            raise Unusable("turns that the chat template rewrites")
        responses.append((len(prompt), len(answered)))
    return Conversation(text, responses, plain=False)


def _rendered(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **options: Any) -> str:
    try:
        return chat_text(tokenizer, messages, **options)
    except ModelError as problem:
        raise Unusable("messages that the chat template refuses") from problem


def _encode(text: str, tokenizer: Any, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
