"""Settings of recovery. What the LLM-Pruner paper and its released code use is in recipes/recover-alpaca.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from resect.ranges import MOST_TOKENS, Numbers


class Section(Numbers):
    """A part of the settings: unknown keys are refused, values do not change."""


class AdapterSettings(Section):
    """Low-rank adapters. The defaults are LLM-Pruner's (arXiv 2305.11627, section 4.1)."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class Distillation(Section):
    """How a teacher is listened to: `(1 - weight) x cross-entropy + weight x T² x KL(teacher || student) + hidden x states`."""

    weight: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0)
    """T: both distributions are softened by it."""
    hidden: float = Field(default=0.0, ge=0)
    """Of the squared difference of the last hidden states, as a share of the teacher's variance; 0: not looked at."""


class Mixture(Section):
    """How sources are mixed. The rounds are LoRAShear's (arXiv 2310.18356); the constants are ours."""

    kind: Literal["uniform", "dynamic"] = "uniform"
    """`uniform`: every source gives as many examples. `dynamic`: the further behind the teacher on a source, the more of it."""
    rounds: int = Field(default=10, ge=1)
    """At most so many in each stage; the tokens of a stage are divided among them."""
    steps: int = Field(default=10, ge=1)
    """A round has at least so many, unless its stage has fewer: a short stage has fewer rounds."""
    floor: float = Field(default=0.05, ge=0)
    """This share of the mean gap is added to every gap, so that no source is forgotten."""
    tolerance: float = Field(default=0.01, ge=0)
    """An improvement of the weighted gap by less than this share of it is none."""
    patience: int = Field(default=2, ge=1)
    """A stage ends after so many rounds in a row without an improvement."""
    instructions_rate: float = Field(default=0.3, gt=0)
    """The learning rate of instructions that come after text, over that of the text: high rates undo what it gave back."""


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Recovery(Section):
    """Everything that decides a recovery but its data, teacher and seed. Rank, alpha, dropout and length are LLM-Pruner's."""

    full: bool = False
    """Train all weights instead of low-rank terms."""
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    """The term is `alpha / rank x B A`."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Of what the low-rank terms take in."""
    learning_rate: float | None = Field(default=None, gt=0)
    """None: 3e-4 for low-rank terms, 2e-5 for all weights (LLM-Pruner: 1e-4 with batches of 64)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls (LLM-Pruner: linear)."""
    warmup: int = Field(default=100, ge=0)
    """Steps in which the learning rate rises; at most a tenth of all."""
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """The largest norm of a gradient."""
    epochs: float = Field(default=1.0, gt=0)
    """How often as many examples are seen as there are (LLM-Pruner: 2)."""
    tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """About so many tokens instead of epochs, rounded up to whole batches."""
    batch: int = Field(default=16, ge=1)
    """Examples a step, over all processes (LLM-Pruner: 64)."""
    micro_batch: int = Field(default=4, ge=1)
    """At most so many examples at a time in one process; gradients are summed until the batch is complete."""
    length: int = Field(default=256, ge=2)
    """Tokens an example: longer rows are cut off, text is packed into windows of this size."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How rows with `instruction` and `output` are written: Alpaca's words, or the tokenizer's chat template."""
    held_out: int = Field(default=64, ge=1)
    """Examples of every source that are measured on and never trained on; at most a tenth (LLM-Pruner: 2,000)."""
    evaluations: int = Field(default=10, ge=1)
    """How often the held-out loss is measured and the state is noted; the best of them is the result."""
    bf16: bool = False
    """Compute in bfloat16 where torch.autocast deems it safe. Not float16: it gives NaN."""
    checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, a third more time."""
    report_to: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], BeforeValidator(_several)] = ()
    """Trackers that are installed."""
    distillation: Distillation = Distillation()
    """Used where there is a teacher. With nothing to weigh, it is only measured against."""
    mixture: Mixture = Mixture()

    @property
    def rate(self) -> float:
        """The learning rate, or its default."""
        return self.learning_rate or (2e-5 if self.full else 3e-4)
