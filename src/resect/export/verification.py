"""Proof that an artefact computes what the model computes: its real reader, in a fresh process, beside torch.

Two figures. The difference is against torch with the weights as precise as the artefact stores them: what a faulty export
gets wrong. The divergence is against the model itself: what storing it so costs.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from resect.environment import python
from resect.errors import CheckpointError
from resect.evaluation import evaluating
from resect.export.formats import Limits
from resect.files import temporary_folder

SLACK = 4
LENGTHS = (1, 7, 24)
"""Tokens of the prompts."""
NEW_TOKENS = 8
TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; 2,024 of them!",
    "  Spaces   first, then\n\n\ta tab and CamelCase don't_break: 3.14159 + x==y",
    "Größe, naïve café, Ελληνικά, привет, 你好, 🙂",
)
"""What a tokenizer splits: digits, blanks, words of several alphabets."""
PACKAGES = {"transformers": "transformers", "llama.cpp": "xllamacpp", "onnxruntime": "onnxruntime", "torch": "torch"}


@dataclass(frozen=True)
class Verification:
    """What the reader of an artefact said, beside torch."""

    consumer: str
    """Who read it, and which version."""
    positions: int
    """Predictions compared: at every token of the prompts (llama.cpp: at the last) and of their continuations."""
    difference: float
    """Largest difference of log-probabilities, nats, from torch with the weights as stored."""
    divergence: float
    """Mean Kullback-Leibler divergence, nats, from the same."""
    limits: Limits
    """What these two may be: what the format allows, and some times what the reader's rounding does to this model."""
    cost: float
    """Mean Kullback-Leibler divergence, nats, from the model with the weights that it had."""
    agreement: float
    """Share of the greedy continuations' tokens that the model itself would have chosen there."""
    tokenizer: bool | None = None
    """Whether its own tokenizer splits texts in the same way; None where the artefact brings none."""


def verify_artefact(
    consumer: str,
    path: Path,
    model: PreTrainedModel,
    stored: PreTrainedModel,
    *,
    limits: Limits,
    rounding: Callable[[PreTrainedModel], AbstractContextManager[None]] = lambda model: nullcontext(),
    tokenizer: Any = None,
    context: int | None = None,
    shortest: int = 1,
) -> tuple[Verification, dict[str, Any]]:
    """Has `consumer` read what lies at `path`; also gives what it said besides.

    Prompts are `shortest` tokens long at least, and fit in `context`. Raises `CheckpointError` when it cannot read it or its
    log-probabilities are further from those of `stored` than `limits` allow, and `SLACK` times what `rounding` the inputs of
    its matrix products does to it besides: models differ in how much they make of that, badly pruned ones most.
    """
    prompts = some_prompts(model, context, shortest)
    with temporary_folder("to read the result back") as folder:
        answers, found = _ask(consumer, path, prompts, TEXTS if tokenizer is not None else (), Path(folder))
    difference, divergence, cost, agreed, positions = 0.0, 0.0, 0.0, 0, 0
    moved, drift = 0.0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [*prompt, *answer["continuation"].tolist()][:-1]
        first = int(answer["first"])
        asked = log_probabilities(model, tokens)[first:]
        same = asked if stored is model else log_probabilities(stored, tokens)[first:]
        with rounding(stored):
            rounded = {"logprobs": log_probabilities(stored, tokens)[first:]}
        moved, drift = max(moved, _largest(rounded, same)), drift + float(_divergences(rounded, same).sum())
        difference = max(difference, _largest(answer, same))
        divergence += float(_divergences(answer, same).sum())
        cost += float(_divergences(answer, asked).sum())
        positions += len(asked)
        agreed += int((asked[len(prompt) - 1 - first :].argmax(-1) == answer["continuation"]).sum())
    split = _same_texts(found.pop("texts", None), tokenizer)
    divergence, cost, drift = (max(0.0, one / positions) for one in (divergence, cost, drift))  # rounding leaves either side of 0
    largest = None if limits.difference is None else limits.difference + SLACK * moved
    limits = Limits(largest, limits.divergence + SLACK * drift)
    if not ((limits.difference is None or difference <= limits.difference) and divergence <= limits.divergence):
        allowed = "any" if limits.difference is None else f"{limits.difference:.2g}"
        raise CheckpointError(
            f"{consumer} read the artefact in a fresh process; its log-probabilities are off by {difference:.2g} at most "
            f"({allowed} is allowed) and diverge by {divergence:.2g} nats ({limits.divergence:.2g} is allowed). "
            "It was not kept. Please report how the model was made."
        )
    chosen = sum(len(answer["continuation"]) for answer in answers)
    named = f"{consumer} ({PACKAGES[consumer]} {importlib.metadata.version(PACKAGES[consumer])})"
    return Verification(named, positions, difference, divergence, limits, cost, agreed / chosen, split), found


def some_prompts(model: PreTrainedModel, context: int | None = None, shortest: int = 1) -> list[list[int]]:
    """Tokens of the model's vocabulary, the same every time; with what follows they fit in `context`."""
    generator = torch.Generator().manual_seed(0)
    table: Any = model.get_input_embeddings()
    longest = max(1, (context or max(LENGTHS) + NEW_TOKENS) - NEW_TOKENS)
    lengths = sorted({max(shortest, min(length, longest)) for length in LENGTHS})
    return [torch.randint(len(table.weight), (length,), generator=generator).tolist() for length in lengths]


def log_probabilities(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Of what follows each token [tokens, vocabulary], float64; without a cache."""
    with evaluating(model):
        logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
    found: Tensor = logits[0].double().log_softmax(-1).cpu()
    return found


def _largest(answer: dict[str, Tensor], expected: Tensor) -> float:
    """The largest difference between the log-probabilities of an answer and those expected."""
    if "tokens" in answer:
        expected = expected.gather(1, answer["tokens"])
    if expected.shape != answer["logprobs"].shape:
        return float("inf")
    found = (answer["logprobs"] - expected).abs().max()
    return float(found) if found.isfinite() else float("inf")


def _divergences(answer: dict[str, Tensor], expected: Tensor) -> Tensor:
    """Kullback-Leibler divergence at each position, all tokens that were not asked for taken as one."""
    found = answer["logprobs"]
    if "tokens" in answer:
        expected = expected.gather(1, answer["tokens"])
        if found.shape[1] >= 2:
            expected, found = (torch.cat([one, _rest(one)], 1) for one in (expected, found))
    return (expected.exp() * (expected - found)).sum(-1)


def _rest(logprobs: Tensor) -> Tensor:
    """The log-probability of everything else [positions, 1]."""
    return (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()


def _same_texts(found: list[list[int]] | None, tokenizer: Any) -> bool | None:
    """Whether texts were split as the model's tokenizer splits them; raises where not."""
    if not found:
        return None
    for text, tokens in zip(TEXTS, found, strict=True):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokens != expected:
            raise CheckpointError(
                f"llama.cpp splits {text!r} into {len(tokens)} tokens, the tokenizer into {len(expected)}: it has no name for "
                "this way of splitting. Use --format hf, or a tokenizer of a family that llama.cpp knows."
            )
    return True


def _ask(
    consumer: str, path: Path, prompts: Sequence[Sequence[int]], texts: Sequence[str], folder: Path
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """The answers of a process of its own, prompt by prompt."""
    given, wanted = folder / "question.safetensors", folder / "answers.safetensors"
    tensors = {f"{number:04}": torch.tensor(prompt) for number, prompt in enumerate(prompts)}
    save_file(tensors, given, {"new_tokens": str(NEW_TOKENS), "texts": json.dumps(texts)})
    variables = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("consume.py")  # by path: nothing else of this package is imported there
    run = python(str(script), consumer, str(path.resolve()), str(given), str(wanted), variables=variables, folder=folder)
    if run.returncode or not wanted.exists():
        raise CheckpointError(f"{consumer} could not read the artefact: {run.stderr.strip()[-1500:]}")
    with safe_open(wanted, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["found"])
        answers: list[dict[str, Tensor]] = [{} for _ in prompts]
        for name in file.keys():  # noqa: SIM118
            part, _, number = name.partition(".")
            answers[int(number)][part] = file.get_tensor(name)
    return answers, found
