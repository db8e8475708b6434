"""Multiple-choice tasks: the choice whose text the model finds likeliest is its answer, as in lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from resect.calibration import positions_of
from resect.errors import DataError, NumericsError, UsageError
from resect.evaluation.mode import evaluating
from resect.evaluation.perplexity import LOGITS, row_nats
from resect.ranges import whole
from resect.statistics import IGNORED
from resect.surroundings import unaffected

SEVEN = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The tasks that pruned models are judged by (arXiv 2305.11627), and which accuracy of each is reported."""
SEED = 1234
"""Draws the solved examples of few-shot prompts; lm-evaluation-harness has the same."""
POSITIONS = 2048
"""Tokens that a model takes whose configuration sets no limit."""


@dataclass(frozen=True)
class Item:
    """A question: what each choice continues, the text of each choice, and the right one."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    def solved(self) -> str:
        """The question with its answer."""
        return f"{self.contexts[self.gold]} {self.choices[self.gold]}"


@dataclass(frozen=True)
class Answers:
    """A model's answers to the items of one task, in their order, by the accuracy that is reported for it."""

    task: str
    metric: str
    """`acc`: the likeliest choice is the answer; `acc_norm`: the likeliest per character."""
    chosen: tuple[int, ...]
    correct: tuple[bool, ...]
    shots: int
    acc: float
    acc_norm: float | None = None
    """None where the task has none."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def stderr(self) -> float:
        """Standard error of `accuracy`: the sample's standard deviation over the root of its size; of one item, NaN."""
        count = len(self.correct)
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (count - 1)) if count > 1 else math.nan


@dataclass(frozen=True)
class Task:
    """Items with a name, which a model can answer."""

    name: str
    metric: str
    items: tuple[Item, ...]

    @unaffected()
    def answered(
        self, model: PreTrainedModel, tokenizer: Any, *, shots: int = 0, limit: int | None = None, name: str = ""
    ) -> Answers:
        """The model's answers to the first `limit` items, each after `shots` others with their answers.

        Raises `UsageError` for more shots than there are other items and `NumericsError` for logits that are not finite.
        """
        shots = whole("shots", shots, low=0)
        if limit is not None:
            limit = whole("limit", limit)
        if shots >= len(self.items):
            raise UsageError(f"Asked for {shots} shots of {self.name}; it has {len(self.items)} items. Ask for fewer.")
        items = self.items[:limit]
        prompts = list(_prompts(items, self.items, shots))
        requests = [
            [
                _request(model, tokenizer, prompt + context, f" {choice}")
                for context, choice in zip(item.contexts, item.choices, strict=True)
            ]
            for prompt, item in zip(prompts, items, strict=True)
        ]
        found = log_likelihoods(model, requests, name=f"{name}: {self.name}" if name else self.name)
        chosen = {
            metric: [likeliest(row, item.choices, metric) for row, item in zip(found, items, strict=True)]
            for metric in ("acc", "acc_norm")
        }
        correct = {
            metric: [choice == item.gold for choice, item in zip(by, items, strict=True)] for metric, by in chosen.items()
        }
        acc, acc_norm = (sum(right) / len(items) for right in correct.values())
        return Answers(
            self.name, self.metric, tuple(chosen[self.metric]), tuple(correct[self.metric]), shots, acc=acc, acc_norm=acc_norm
        )


@dataclass(frozen=True)
class Request:
    """Tokens that a model reads, and how many of the last ones it is to predict."""

    tokens: tuple[int, ...]
    count: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """All but the last, after which nothing is asked."""
        return self.tokens[:-1]


def likeliest(values: Sequence[float], choices: Sequence[str], metric: str) -> int:
    """The choice whose log-likelihood is the largest, the first of several; for `acc_norm` per character of its text."""
    lengths = [len(choice) if metric == "acc_norm" else 1 for choice in choices]
    shares = [value / max(1, length) for value, length in zip(values, lengths, strict=True)]
    return shares.index(max(shares))


def mean_accuracy(answers: Sequence[Answers]) -> tuple[float, float]:
    """The mean of several tasks' accuracies, and its standard error."""
    count = len(answers)
    return sum(a.accuracy for a in answers) / count, math.sqrt(sum(a.stderr**2 for a in answers)) / count


def log_likelihoods(
    model: PreTrainedModel, requests: Sequence[Sequence[Request]], *, name: str = "choices"
) -> list[list[float]]:
    """The log-probability of the tokens asked for by every request, item by item.

    What all choices of an item begin with is read once, where the model's cache can be handed to each of them; items with
    beginnings of one length run together, the rest sorted by length and padded behind, which no causal model sees.
    Log-probabilities are float32, their sums float64. The model is handed back as it was.
    """
    found: list[list[float]] = [[] for _ in requests]
    with evaluating(model), tqdm(total=len(requests), desc=name, unit="item", leave=False, disable=None) as bar:
        common = [_common(item) for item in requests] if _can_share(model) else [0] * len(requests)
        for batch in _batches(requests, common, LOGITS // model.config.get_text_config().vocab_size):
            nats = _nats(model, [requests[i] for i in batch], common[batch[0]])
            if not nats.isfinite().all():
                raise NumericsError(
                    f"The logits of the {name} run hold NaN or inf. Look for weights out of range, or run in a wider type."
                )
            for i, row in zip(batch, nats.split([len(requests[i]) for i in batch]), strict=True):
                found[i] = (-row).tolist()
            bar.update(len(batch))
    return found


def _nats(model: PreTrainedModel, items: Sequence[Sequence[Request]], common: int) -> Tensor:
    """Summed cross-entropy of every request of some items, whose first `common` tokens are the same within each item."""
    rows = [request for item in items for request in item]
    inputs = _padded([row.inputs[common:] for row in rows], 0)
    targets = _padded([_targets(row)[common:] for row in rows], IGNORED)
    cache = None
    if common:
        beginnings = torch.tensor([item[0].inputs[:common] for item in items], device=model.device)
        least = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        cache = model(input_ids=beginnings, use_cache=True, **least).past_key_values
        owners = torch.tensor([i for i, item in enumerate(items) for _ in item], device=model.device)
        cache.batch_select_indices(owners)
    output = model(input_ids=inputs.to(model.device), past_key_values=cache, use_cache=cache is not None)
    return row_nats(output.logits, targets.to(model.device)).cpu()


def _common(item: Sequence[Request]) -> int:
    """How many tokens all requests begin with, before any that is asked for can be predicted."""
    least = min(len(request.inputs) - request.count for request in item)
    columns = zip(*(request.inputs[:least] for request in item), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), least)


def _batches(requests: Sequence[Sequence[Request]], common: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Items of equally long beginnings and about equally long rests, of which at most so many tokens run together."""

    def longest(i: int) -> int:
        return max(len(request.inputs) for request in requests[i])

    order = sorted(range(len(requests)), key=lambda i: (common[i], longest(i)), reverse=True)
    for _, group in groupby(order, key=lambda i: common[i]):
        batch: list[int] = []
        rows = width = 0
        for i in group:
            width = width or longest(i)
            if batch and (rows + len(requests[i])) * width > tokens:
                yield batch
                batch, rows, width = [], 0, longest(i)
            batch.append(i)
            rows += len(requests[i])
        yield batch


def _can_share(model: PreTrainedModel) -> bool:
    """Whether what the model keeps of a text is keys and values by sequence, which can be copied."""
    output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    kinds = {DynamicLayer, DynamicSlidingWindowLayer}
    return isinstance(cache, DynamicCache) and {type(layer) for layer in cache.layers} <= kinds


def _targets(request: Request) -> list[int]:
    """What is to be predicted at each place of the inputs."""
    return [IGNORED] * (len(request.inputs) - request.count) + list(request.tokens[-request.count :])


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _prompts(items: Sequence[Item], pool: Sequence[Item], shots: int) -> Iterator[str]:
    """What stands before each item: solved others, drawn from `pool` as lm-evaluation-harness draws them."""
    random = Random(SEED)
    for item in items:
        drawn = [one for one in random.sample(pool, shots + 1) if one != item][:shots] if shots else []
        if len(drawn) < shots:  # the item is there twice
            drawn = random.sample([one for one in pool if one != item], shots)
        yield "".join(f"{other.solved()}\n\n" for other in drawn)


def _request(model: PreTrainedModel, tokenizer: Any, context: str, continuation: str) -> Request:
    """The tokens of both, split where those of the context alone end; spaces between them belong to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer.encode(context + continuation) if context else _after_nothing(tokenizer, continuation)
    count = len(whole) - (len(tokenizer.encode(context)) if context else 1)
    most = _positions(model)
    if not 0 < count <= most:
        raise DataError(
            f"A choice of {count} tokens was to be predicted, {continuation[:60]!r}; a choice has 1 to {most}. Mend the item."
        )
    return Request(tuple(whole[-most - 1 :]), count)


def _after_nothing(tokenizer: Any, text: str) -> list[int]:
    """A text without a context follows the begin-of-text token, or the end of another text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [start, *tokenizer.encode(text, add_special_tokens=False)]


def _positions(model: PreTrainedModel) -> int:
    return positions_of(model) or POSITIONS
