"""What was measured, as values with a versioned JSON form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from resect.errors import NumericsError
from resect.evaluation import Agreement, Answers, Flips, Interval, Latency, Perplexity, Spread
from resect.recovery import Facts
from resect.report.machine import machine, versions

SCHEMA: Final = 1
"""Raised when a field changes its meaning or goes; new fields may appear without."""


Uncertain = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(lambda value: math.nan if value is None else value)]
"""NaN, and null in JSON, where one item says nothing of how sure a figure is."""


class Record(BaseModel):
    """A result: plain values, written once."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> str:
        """JSON; raises `NumericsError` for a figure that is NaN or infinite. Standard errors of one item are null."""
        wrong = next(_not_finite(self.model_dump()), None)
        if wrong is not None:
            raise NumericsError(f"The result {wrong[0]} is {wrong[1]}, which is no figure. Please report how this was made.")
        return self.model_dump_json(indent=1) + "\n"


def _not_finite(values: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested values that are NaN or infinite, with their dotted places."""
    if isinstance(values, float) and not math.isfinite(values) and not place.endswith("stderr"):
        yield place, values
    parts = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list | tuple) else ()
    for name, part in parts:
        yield from _not_finite(part, f"{place}.{name}".lstrip("."))


class TextPerplexity(Record):
    """Perplexity on one text in windows of one size."""

    text: str
    window: int
    value: float
    nats: float
    tokens: int
    """Tokens predicted."""
    windows: int
    dropped: int
    bos: bool = False
    """Whether a begin-of-text token stands before every window."""
    bits_per_byte: float | None = None
    digest: str
    """sha256 of the text's tokens."""

    @classmethod
    def of(cls, found: Perplexity, *, text: str, digest: str) -> TextPerplexity:
        """The figures of an evaluation."""
        return cls(
            text=text,
            window=found.window,
            value=found.value,
            nats=found.nats,
            tokens=found.tokens,
            windows=found.windows,
            dropped=found.dropped,
            bos=found.bos,
            bits_per_byte=found.bits_per_byte,
            digest=digest,
        )


class TaskAccuracy(Record):
    """Answers to the items of one task."""

    task: str
    metric: str
    """Which of the two accuracies is reported for the task: `acc` or `acc_norm`."""
    accuracy: float
    stderr: Uncertain
    items: int
    shots: int
    acc: float
    acc_norm: float | None = None

    @classmethod
    def of(cls, found: Answers) -> TaskAccuracy:
        """The figures of an evaluation."""
        return cls(
            task=found.task,
            metric=found.metric,
            accuracy=found.accuracy,
            stderr=found.stderr,
            items=len(found.correct),
            shots=found.shots,
            acc=found.acc,
            acc_norm=found.acc_norm,
        )


class TextAgreement(Record):
    """Next-token distributions beside those of the reference."""

    text: str
    window: int
    kl: float
    """KL(reference || model), nats a token."""
    same_top: float
    tokens: int
    bos: bool = False

    @classmethod
    def of(cls, found: Agreement, *, text: str) -> TextAgreement:
        """The figures of an evaluation."""
        return cls(text=text, window=found.window, kl=found.kl, same_top=found.same_top, tokens=found.tokens, bos=found.bos)


class TaskFlips(Record):
    """Answers that differ from those of the model beside, as shares of the items."""

    task: str
    changed: float
    lost: float
    """Right there, wrong here."""
    gained: float

    @classmethod
    def of(cls, found: Flips) -> TaskFlips:
        """The figures of an evaluation."""
        return cls(task=found.task, changed=found.changed, lost=found.lost, gained=found.gained)


class Difference(Record):
    """A figure of a model beside the same of another, with its paired bootstrap interval."""

    model: str
    beside: str
    figure: str
    """As in the tables: `perplexity TEXT @WINDOW`, a task, `mean of 7 tasks`."""
    kind: Literal["ratio", "points"]
    """`ratio`: of perplexities, minus one; `points`: accuracies subtracted. Both as shares."""
    value: float
    low: float | None
    high: float | None
    level: float
    resamples: int
    seed: int

    @classmethod
    def of(cls, found: Interval, *, model: str, beside: str, figure: str, kind: Literal["ratio", "points"]) -> Difference:
        """From an interval of accuracies, or of nats for a ratio of perplexities."""
        value, low, high = (
            math.expm1(end) if kind == "ratio" and end is not None else end for end in (found.value, found.low, found.high)
        )
        assert value is not None
        return cls(
            model=model,
            beside=beside,
            figure=figure,
            kind=kind,
            value=value,
            low=low,
            high=high,
            level=found.level,
            resamples=found.resamples,
            seed=found.seed,
        )


class Measurements(Record):
    """A quantity measured several times."""

    median: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, found: Spread) -> Measurements:
        """The figures of an evaluation."""
        return cls(median=found.median, low=found.low, high=found.high, values=list(found.values))


class Timings(Record):
    """Wall-clock figures."""

    prompt: int
    decode: int
    prefill_seconds: Measurements
    decode_tokens_per_second: Measurements
    device: str
    dtype: str
    threads: int

    @classmethod
    def of(cls, found: Latency) -> Timings:
        """The figures of an evaluation."""
        return cls(
            prompt=found.prompt,
            decode=found.decode,
            prefill_seconds=Measurements.of(found.prefill_seconds),
            decode_tokens_per_second=Measurements.of(found.decode_tokens_per_second),
            device=found.device,
            dtype=found.dtype,
            threads=found.threads,
        )


class Measured(Record):
    """Everything known of one model."""

    name: str
    parameters: int
    block_parameters: int | None = None
    macs: int | None = None
    """Multiply-accumulates of one sequence of `macs_tokens` tokens."""
    macs_tokens: int | None = None
    file_bytes: int | None = None
    """Size of the weight files, where they are local."""
    perplexities: list[TextPerplexity] = []
    tasks: list[TaskAccuracy] = []
    task_mean: float | None = None
    """The mean accuracy of several tasks."""
    task_mean_stderr: float | None = None
    agreements: list[TextAgreement] = []
    """With the reference, where one was named."""
    flips: list[TaskFlips] = []
    """Beside the first model."""
    timings: Timings | None = None
    generations: list[str] = []


class GroupSizes(Record):
    """How many units of a coupled group stay."""

    name: str
    kind: str
    layer: int | None
    units: int
    kept: int


class GroupScores(Record):
    """How the scores of a coupled group's units are spread."""

    name: str
    kind: str
    layer: int | None
    quantiles: list[float]
    """At the levels of the report's `saliency`."""
    threshold: float | None
    """The lowest score of a unit that stays, where some go and some stay."""


class ScoreHistogram(Record):
    """Units of one kind by the decimal logarithm of their score."""

    kind: str
    edges: list[float]
    """One more than there are bins, evenly spaced logarithms."""
    kept: list[int]
    removed: list[int]
    nothing: int
    """Units that are worth nothing or less, such as those that went in an earlier shot."""


class Saliency(Record):
    """The scores that decided: of the last shot, where there were several."""

    levels: list[float]
    groups: list[GroupScores]
    histograms: list[ScoreHistogram]


class ShotSizes(Record):
    """What is left after a shot."""

    number: int
    parameters: int
    block_parameters: int
    macs: int
    loss: float
    """The summed scores of the units that went in it, when they went."""
    prices: dict[str, float] = {}
    """What multiplied the scores of each group, where trials found it."""


class CurvePoint(Record):
    """A size between the dense model and the pruned one, and what the model is worth at it."""

    parameters: int
    block_parameters: int
    macs: int
    perplexity: float


class Curve(Record):
    """Perplexity over size on the way from the dense model to the pruned one."""

    text: str
    window: int
    tokens: int
    """Tokens predicted."""
    digest: str
    points: list[CurvePoint]
    """Dense first; the last is the plan as it was carried out."""


class BudgetMet(Record):
    """A budget, and what the plan costs: as predicted, and as measured with the whole network where it is one of seconds."""

    asked: str
    keep: float
    """The share that was to stay."""
    cost: float
    dense: float
    predicted: float
    """The share that stays, as counted, or by the latency table."""
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    """What the measured share lies between, 95 % of a bootstrap of the rounds."""
    seconds: float | None = None
    dense_seconds: float | None = None
    tried: list[dict[str, float]] = []
    """Every plan that was measured, predicted and measured share."""


class RunReport(Record):
    """A run: what was asked, what came of it, what it took."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["run"] = "run"
    status: Literal["planned", "saved", "complete"]
    """`planned`: a dry run. `saved`: the pruned model is on disk, not measured. `complete`: nothing is missing."""
    recipe: dict[str, Any]
    models: list[Measured]
    """Dense, then pruned (as planned, in a dry run)."""
    prompts: list[str] = []
    differences: list[Difference] = []
    groups: list[GroupSizes]
    withheld: dict[str, str] = {}
    """Kinds of units that were asked for and left whole, and why."""
    protected: list[str] = []
    """Groups that were to stay whole."""
    vocabulary: VocabularyCut | None = None
    """None where all tokens stay."""
    budget: BudgetMet | None = None
    """None where `keep` and `of` say it."""
    frozen: list[str] = []
    """Why axes are kept whole."""
    saliency: Saliency | None = None
    """None where single matrices became sparse, or nothing was scored."""
    shots: list[ShotSizes] = []
    curve: Curve | None = None
    """None where it was not asked for."""
    losses: list[float] = []
    """Training losses, a step each, of a method that trains."""
    knowledge: dict[str, Any] | None = None
    """The analysis that found what was to be protected, as `analysis.json` has it."""
    calibration: dict[str, Any] | None = None
    """Where the text came from; None where the criterion needs none."""
    recovery: Facts | None = None
    """What training after the cut did; None where there was none."""
    cut_equals_mask: dict[str, float] | None = None
    """`difference`, the largest of the logits of the cut model and the masked one, and what is `allowed`."""
    saved: dict[str, Any] | None = None
    """How the directory loads."""
    reload_difference: float | None = None
    """Largest logit difference of what a fresh process loads, as a share of the logit scale."""
    seconds: dict[str, float] = {}
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}

    @property
    def dense(self) -> Measured:
        """The model before."""
        return self.models[0]

    @property
    def pruned(self) -> Measured:
        """The model after."""
        return self.models[1]


class Respelled(Record):
    """A text of the evaluation before and after its vocabulary was cut."""

    text: str
    tokens: int
    missing: int
    """Tokens of the dense model's that are gone, and spelled with others."""
    pruned_tokens: int


class VocabularyCut(Record):
    """Which rows of the vocabulary stay."""

    source: list[str]
    rows: int
    kept: int
    base: int
    """Needed whatever the text: special and added tokens, bytes, the words of the chat template."""
    needed: int
    """By the text and the base."""
    tokens: int
    """Tokens of the text."""
    missing: int
    """Of these, how many are gone."""
    texts: list[Respelled] = []


class EvaluationReport(Record):
    """Several models measured in the same way."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["evaluation"] = "evaluation"
    models: list[Measured]
    differences: list[Difference] = []
    """From the reference, or else from the first model."""
    reference: str | None = None
    limit: int | None = None
    """Tokens that each text was cut to."""
    prompts: list[str] = []
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}


def run_report(
    recipe: Mapping[str, Any],
    pruning: Mapping[str, Any],
    *,
    dense: Measured | None,
    pruned: Measured | None = None,
    saliency: Saliency | None = None,
) -> RunReport:
    """The report of a run so far, from the facts that pruning gives; sizes are put into the models' figures."""
    models = []
    for name, found in (("dense", dense), ("pruned", pruned)):
        sizes = {key: pruning[key][name] for key in ("parameters", "block_parameters", "macs")}
        known = found.model_dump() if found else {}
        models.append(Measured(**{**known, "name": name, **sizes, "macs_tokens": pruning["macs"].get("tokens")}))
    return RunReport(
        status="planned",
        recipe=dict(recipe),
        models=models,
        groups=_groups(pruning["groups"]),
        withheld=pruning["withheld"],
        protected=pruning.get("protected", []),
        vocabulary=_vocabulary(recipe, pruning),
        budget=BudgetMet(**pruning["budget"]) if pruning.get("budget") else None,
        frozen=pruning["frozen"],
        saliency=saliency,
        shots=[ShotSizes(**shot) for shot in pruning.get("shots", [])],
        losses=pruning.get("losses", []),
        calibration=pruning["calibration"],
        cut_equals_mask=pruning.get("cut_equals_mask"),
        versions=versions(),
        machine=machine(),
    )


def _vocabulary(recipe: Mapping[str, Any], pruning: Mapping[str, Any]) -> VocabularyCut | None:
    found = pruning.get("vocabulary")
    return VocabularyCut(source=recipe["vocabulary"]["source"], **found) if found else None


def _groups(groups: Sequence[Mapping[str, Any]]) -> list[GroupSizes]:
    return [GroupSizes(**group) for group in groups]
