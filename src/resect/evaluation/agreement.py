"""How close a model stays to another: next-token distributions over a text, and answers to tasks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from resect.errors import NumericsError, UsageError
from resect.evaluation.perplexity import batches
from resect.evaluation.tasks import Answers
from resect.statistics import IGNORED, prediction_losses
from resect.surroundings import unaffected


@dataclass(frozen=True)
class Agreement:
    """Next-token distributions of a model beside those of a reference, over the tokens that perplexity predicts."""

    kl: float
    """Mean Kullback-Leibler divergence of the model from the reference, KL(reference || model), nats a token."""
    same_top: float
    """Share of tokens at which both hold the same one for likeliest."""
    tokens: int
    window: int
    bos: bool


@dataclass(frozen=True)
class Flips:
    """Answers to one task that differ from a reference's, as shares of its items."""

    task: str
    changed: float
    """Another choice."""
    lost: float
    """Right before, wrong now."""
    gained: float
    """Wrong before, right now."""


@unaffected()
def agreement(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int,
    bos: int | None = None,
    batch_tokens: int | None = None,
    name: str = "agreement",
) -> Agreement:
    """Both models read the same windows, as for `perplexity`, and are in memory together.

    Log-probabilities are at least float32, sums float64. Raises `UsageError` where vocabularies differ, and what `perplexity`
    raises.
    """
    sizes = [one.config.get_text_config().vocab_size for one in (model, reference)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"Agreement was asked for between vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens; distributions over "
            "different tokens have no divergence. Leave the reference out: bits per byte and tasks compare."
        )
    kl, same, count = 0.0, 0, 0
    with batches(tokens, model, reference, window=window, bos=bos, batch_tokens=batch_tokens, name=name) as parts:
        for _, inputs, targets in parts:
            labels = targets.flatten()
            ours, theirs = (
                one(input_ids=inputs.to(one.device), use_cache=False).logits.flatten(0, 1).to(inputs.device)
                for one in (model, reference)
            )
            divergences = prediction_losses(ours, labels, teacher=theirs, weight=1.0)
            kl += float(divergences.double().sum())
            same += int((ours.argmax(-1) == theirs.argmax(-1))[labels != IGNORED].sum())
            count += len(divergences)
    if not kl < float("inf"):
        raise NumericsError(f"The divergence of the {name} run is {kl}: logits hold NaN or inf. Run in a wider type.")
    return Agreement(kl / count, same / count, count, window, bos is not None)


def flips(answers: Answers, reference: Answers) -> Flips:
    """What changed in the answers to the same items."""
    count = len(answers.chosen)
    right = list(zip(answers.correct, reference.correct, strict=True))
    changed = sum(a != b for a, b in zip(answers.chosen, reference.chosen, strict=True))
    return Flips(
        answers.task,
        changed / count,
        sum(before and not now for now, before in right) / count,
        sum(now and not before for now, before in right) / count,
    )
