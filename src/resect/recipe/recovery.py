"""A recovery carried out: from a directory with a model to a directory with the recovered one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
import yaml
from pydantic import BeforeValidator, Field, ValidationError
from transformers import PreTrainedModel

from resect.calibration import check_length, check_vocabulary
from resect.checkpoint import load, load_tokenizer, round_to_storage, save, verify
from resect.checkpoint.card import About
from resect.checkpoint.load import find
from resect.checkpoint.silence import quiet
from resect.environment import processes
from resect.errors import CheckpointError, UsageError, shown
from resect.explain import explain, telling
from resect.files import beside, claimed_directory, read_text, whole_directory
from resect.files.outputs import located
from resect.graph import trace
from resect.plan import Pattern, Plan
from resect.recipe.directories import discard, facts, fill, noting, progress_of, resumable
from resect.recipe.measure import Announce, Stages, device_of, dtype_of, storage_asked
from resect.recipe.reading import check_trust, laid_over, read_values
from resect.recipe.schema import Recipe, RecoverySection, RecoverySettings, Section, Seed, _several, overlaid
from resect.recovery import Recovery
from resect.report import RecoveryReport, peak_memory, recovery_card, recovery_html, recovery_markdown, recovery_report
from resect.surroundings import unaffected

if TYPE_CHECKING:
    from resect.recovery import Recovered

Value = TypeVar("Value")
HEADER = "# Everything that this recovery was asked for, with its defaults. Again: resect recover --recipe recipe.yaml -o DIR\n"
KEPT = ("plan.json", "pattern.json")
"""Files of a pruned model that say what was pruned; they hold for the recovered one too."""


class RecoveryRecipe(Section):
    """A complete description of a recovery; `to_yaml` writes out every default."""

    model: str = Field(min_length=1)
    """A directory that resect wrote, or any model by name."""
    output: str | None = None
    data: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]
    """Files, hub data sets or `demo`."""
    teacher: str | None = None
    """The dense model, by name."""
    settings: RecoverySettings = Recovery()
    seed: Seed = 42
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in."""
    store_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What weights are stored in; `auto`: what the model's own files hold, where that is narrower than `dtype`."""
    trust_remote_code: bool = False

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
        return text


@dataclass(frozen=True)
class RecoveryResult:
    """A finished recovery."""

    directory: Path
    report: RecoveryReport
    model: PreTrainedModel
    main: bool
    """Whether this process wrote the directory; of several, one does."""


def read_recovery_recipe(
    path: str | Path | None = None, values: Mapping[str, Any] | None = None, *, assignments: Iterable[str] = ()
) -> RecoveryRecipe:
    """The recipe in a YAML file, under `values`, under assignments like `settings.rank=16`; else a `UsageError`.

    Code that comes with a model runs where `values` or an assignment say so, as in `read_recipe`.
    """
    own = laid_over(values or {}, assignments)
    try:
        recipe = RecoveryRecipe.model_validate(overlaid(read_values(path), own) if path is not None else own)
    except ValidationError as problem:
        raise UsageError(explain(problem, RecoveryRecipe)) from problem
    check_trust(recipe.trust_remote_code, own, path)
    return recipe


@telling("carry out the recovery")
@unaffected()
def run_recovery(
    recipe: RecoveryRecipe, *, overwrite: bool = False, resume: bool = False, announce: Announce | None = None
) -> RecoveryResult:
    """Loads, trains, merges, saves, verifies in a fresh process, and reports.

    The directory holds the model, `adapter/`, plan.json and pattern.json where there were any, recipe.yaml and the report as
    HTML, Markdown and JSON, and appears whole. States are noted beside it until then; `resume` goes on from there. Under
    torchrun or accelerate launch all processes train, and the first writes. Raises the errors of the rooms.
    """
    if not recipe.output:
        raise UsageError("The recipe does not say where to write. Give it `output: DIRECTORY`, or the command -o DIRECTORY.")
    main = processes().main
    stages = Stages(announce if main else None)
    with (
        _places(recipe, main, resume=resume, overwrite=overwrite) as (directory, progress),
        resumable(progress),
        noting(f"Nothing was written to {directory}."),
    ):
        if "tensorboard" in recipe.settings.report_to:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(directory.with_name(f"{directory.name}.logs")))
        found, pattern = _recovered(recipe, progress, resume=resume, stages=stages)
        round_to_storage(found.model, storage_asked(recipe.store_dtype))
        report = recovery_report(recipe.model_dump(mode="json"), found.facts)
        report.zeros_kept = _check_zeros(found.model, pattern)
        if main:
            _save(recipe, found, report, pattern=pattern, directory=directory, overwrite=overwrite, stages=stages)
            discard(progress)
    return RecoveryResult(directory, report, found.model, main)


@contextmanager
def _places(recipe: RecoveryRecipe, main: bool, *, resume: bool, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """The directory to write and where states are noted; of several processes, the main one claims and checks both."""
    assert recipe.output
    if not main:
        directory = located(recipe.output)
        yield directory, beside(directory, "{}.progress")
        return
    inputs = [recipe.model, recipe.teacher, *recipe.data]
    with claimed_directory(recipe.output, overwrite=overwrite, inputs=inputs) as directory:
        yield directory, progress_of(directory, resume=resume, overwrite=overwrite)


def _recovered(
    recipe: RecoveryRecipe, progress: Path, *, resume: bool, stages: Stages
) -> tuple[Recovered, Pattern | None]:
    device = device_of(_own_device(recipe.device))

    def loaded(name: str, check: Callable[[PreTrainedModel], None] | None = None) -> PreTrainedModel:
        trust = recipe.trust_remote_code
        return load(name, dtype=dtype_of(recipe.dtype), device=device, trust_remote_code=trust, check=check)

    with stages("load", f"load {recipe.model}"):
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
        model = loaded(recipe.model, partial(_check_lengths, tokenizer=tokenizer, length=recipe.settings.length))
        pattern = _pattern(recipe.model, model)
        _check_plan(recipe.model, model)
    found = healed(
        model,
        tokenizer,
        recipe,
        teacher=recipe.teacher,
        load=loaded,
        pattern=pattern,
        progress=progress,
        resume=resume,
        stages=stages,
        seed=recipe.seed,
    )
    return found, pattern


def _check_lengths(model: PreTrainedModel, *, tokenizer: Any, length: int) -> None:
    """Refuses tokens and lengths that the model cannot take in."""
    check_vocabulary(model, tokenizer)
    check_length(model, length, f"settings.length = {length}", instead="Use a shorter length.")


def healed(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: RecoveryRecipe | RecoverySection,
    *,
    teacher: str | None,
    load: Callable[[str], PreTrainedModel],
    pattern: Pattern | None,
    progress: Path,
    resume: bool,
    stages: Stages,
    seed: int,
) -> Recovered:
    """A pruned model trained on the data and with the settings that were asked for, beside the teacher of that name."""
    from resect.recovery import recover  # brings PEFT and the Trainer, which other commands need not wait for

    dense = None
    if teacher is not None:
        with stages("load teacher", f"load the teacher {teacher}"):
            dense = load(teacher)
    with stages("recover", f"train on {', '.join(asked.data)}"), quiet():
        return recover(
            model,
            tokenizer,
            data=asked.data,
            settings=asked.settings,
            teacher=dense,
            keep_zeros=pattern.zeroed if pattern else (),
            seed=seed,
            progress=progress,
            resume=resume,
            say=stages.announce,
        )


def _own_device(device: str) -> str:
    """`cuda` as the one that belongs to this process, where several run."""
    local = processes().local
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def _beside(model: str, name: str) -> Path | None:
    """A file that lies beside the weights of a model, if it is there."""
    file = Path(find(model).place) / name
    return file if file.is_file() else None


def _pattern(name: str, model: PreTrainedModel) -> Pattern | None:
    """The pattern that lies beside a model, if one does. Raises `CheckpointError` where it is not of these weights."""
    file = _beside(name, "pattern.json")
    if file is None:
        return None
    pattern = _parsed(file, Pattern.from_json)
    for path, matrix in pattern.layers.items():
        rows, columns = matrix.rows or range(matrix.shape[0]), matrix.columns or range(matrix.shape[1])
        if _weight_count(model, path) not in (prod(matrix.shape), len(rows) * len(columns)):
            raise CheckpointError(f"The pattern {file} is not of these weights: {shown(path)} has another shape. Move it away.")
    _check_zeros(model, pattern)
    return pattern


def _parsed(file: Path, parse: Callable[[str], Value]) -> Value:
    """The value in a file; whatever is wrong with it is a `CheckpointError` that names the file."""
    try:
        return parse(read_text(file))
    except UsageError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def _weight_count(model: PreTrainedModel, path: str) -> int:
    """How many weights a layer has; 0 where there is none of that name."""
    try:
        weight = getattr(model.get_submodule(path), "weight", None)
    except AttributeError:
        return 0
    return weight.numel() if isinstance(weight, torch.Tensor) else 0


def _check_plan(name: str, model: PreTrainedModel) -> None:
    """Refuses a plan beside a model that left other sizes than the model has.

    Where blocks went, names tell nothing; heads that are left of one group of queries are units by themselves.
    """
    file = _beside(name, "plan.json")
    if file is None:
        return
    plan = _parsed(file, Plan.from_json)
    removed = [kept for kept in plan.groups.values() if kept.removed]
    if not removed or any(kept.kind in ("blocks", "sublayers") for kept in removed):
        return
    for group in trace(model).groups:
        kept = plan.groups.get(group.name)
        if kept is not None and len(kept.keep) > 1 and group.kind != "heads" and len(kept.keep) != group.units:
            raise CheckpointError(
                f"The plan {file} is not of these weights: it keeps {len(kept.keep)} of {shown(group.name)}, "
                f"the model has {group.units}. Move it away."
            )


@torch.no_grad()
def _check_zeros(model: PreTrainedModel, pattern: Pattern | None) -> int:
    """How many zeros of the pattern there are; `CheckpointError` where the model has fewer."""
    total = 0
    for path, matrix in pattern.layers.items() if pattern else ():
        if matrix.zeros:
            weight: Any = model.get_submodule(path).weight
            found = int((weight == 0).sum())
            if found < matrix.zeros:
                raise CheckpointError(f"{path} has {found} zeros, its pattern {matrix.zeros}: it is not of these weights.")
            total += matrix.zeros
    return total


def _save(
    recipe: RecoveryRecipe,
    found: Recovered,
    report: RecoveryReport,
    *,
    pattern: Pattern | None,
    directory: Path,
    overwrite: bool,
    stages: Stages,
) -> None:
    """Writes the whole directory, which gets its name only when a fresh process gave the model's logits."""
    place = Path(find(recipe.model).place)
    extra = {name: read_text(place / name) for name in KEPT if (place / name).is_file()}
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    made = About.of(place)
    about = About(made.recipe or {"model": recipe.model}, {"calibration": made.report.get("calibration")}, recovery_card(report))
    with whole_directory(directory, overwrite=overwrite) as partial:
        with stages("save", f"save to {directory}"):
            stored = storage_asked(recipe.store_dtype)
            saved = save(found.model, partial, tokenizer=tokenizer, extra_files=extra, about=about, dtype=stored)
            if found.adapter is not None:
                found.adapter.save(partial / "adapter", base=recipe.model)
                report.adapter = _adapter_note(recipe.model, pattern, saved.layout)
        with stages("verify", "verify in a fresh process"):
            report.reload_difference = verify(partial, found.model)
        report.saved = facts(saved, directory)
        report.seconds, report.peak_memory_bytes = dict(stages.seconds), peak_memory()
        texts = {"report.json": report.to_json(), "report.md": recovery_markdown(report), "report.html": recovery_html(report)}
        fill(partial, texts | {"recipe.yaml": recipe_text(HEADER, recipe)})


def recipe_text(header: str, recipe: Recipe | RecoveryRecipe) -> str:
    """A recipe as the file in a run directory, under the command that repeats it."""
    trusting = " --trust-remote-code" if recipe.trust_remote_code else ""
    return header.replace(" -o DIR", f"{trusting} -o DIR") + recipe.to_yaml()


def _adapter_note(model: str, pattern: Pattern | None, layout: str) -> str:
    if pattern is not None:
        return "adapter/, for the record: loaded by PEFT alone they would fill zeros of the pattern"
    loads = "AutoModelForCausalLM.from_pretrained" if layout == "uniform" else "resect.load"
    return f"adapter/, for PeftModel.from_pretrained({loads}({json.dumps(model)}), adapter)"
