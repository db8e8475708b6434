"""A recipe carried out: from a dense model to a run directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from resect.calibration import HeldOut, check_length, check_vocabulary, check_windows
from resect.checkpoint import Saved, load, load_tokenizer, round_to_storage, save, verify
from resect.checkpoint.card import About, card
from resect.checkpoint.load import find
from resect.checkpoint.shipped import own_code_refusal, shipped_code
from resect.environment import processes, tell_precision
from resect.errors import CheckpointError, UsageError
from resect.evaluation import AnyTask, tasks_named
from resect.explain import sizes_asked, telling
from resect.files import claimed_directory, whole_directory, write_text
from resect.files.progress import RECOVERY
from resect.graph import Graph
from resect.methods import Result, Vocabulary, check_sizes_once, prune
from resect.methods.prune import method_settings
from resect.plan import Plan
from resect.recipe.directories import check_unclaimed, discard, facts, fill, noting, progress_of, resumable
from resect.recipe.measure import (
    Announce,
    Observed,
    Stages,
    agreements,
    bos_token,
    check_evaluation,
    compared,
    curve_of,
    device_of,
    dtype_of,
    measure,
    read_evaluation_texts,
    same_texts,
    same_tokens,
    storage_asked,
    timed,
    weight_bytes,
)
from resect.recipe.recovery import healed, recipe_text
from resect.recipe.schema import DENSE, Recipe
from resect.recovery import Facts
from resect.report import Curve, Knowledge, RunReport, peak_memory, run_html, run_markdown, run_report, saliency
from resect.surroundings import unaffected

HEADER = "# Everything that this run was asked for, defaults written out. Again: resect run recipe.yaml -o DIRECTORY\n"


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    directory: Path
    plan: Plan
    report: RunReport
    model: PreTrainedModel
    """Pruned; still dense after a dry run."""


@telling("carry out the recipe")
@unaffected()
def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    announce: Announce | None = None,
) -> RunResult:
    """Loads, evaluates, prunes, recovers, saves, verifies in a fresh process, evaluates again, and reports.

    The run directory holds the model's files, plan.json, recipe.yaml and the report as HTML, Markdown and JSON. It appears whole,
    once the saved model was verified; the pruned model's measurements are added to the reports afterwards. `dry_run` stops at the
    plan. Shots of a method and states of a recovery are noted beside the run directory until the model is saved; `resume`
    goes on from there.
    `announce` is told what begins. Raises the errors of the rooms; nothing is then left half-written, and a note
    on the exception says what there is.
    """
    if (together := processes()).count > 1:
        raise UsageError(
            f"This is process {together.rank} of {together.count} (RANK, WORLD_SIZE), and pruning takes one. Start it without "
            "torchrun; `resect recover` trains in several."
        )
    tell_precision()
    if not recipe.output:
        raise UsageError("The recipe does not say where to write. Give it `output: DIRECTORY`, or the command -o DIRECTORY.")
    with claimed_directory(recipe.output, overwrite=overwrite, inputs=_inputs(recipe)) as directory:
        progress = progress_of(directory, resume=resume, overwrite=overwrite)
        chosen = method_settings(recipe.method, recipe.settings)
        check_sizes_once(chosen, keep=recipe.keep, of=recipe.of)
        chosen.check()
        if resume and not chosen.long:
            check_unclaimed(progress)
        with resumable(progress), noting(f"Nothing was written to {directory}."):
            return _run(
                recipe, directory, overwrite=overwrite, dry_run=dry_run, progress=progress, resume=resume, stages=Stages(announce)
            )


def _run(
    recipe: Recipe, directory: Path, *, overwrite: bool, dry_run: bool, progress: Path, resume: bool, stages: Stages
) -> RunResult:
    asked = recipe.evaluation
    model, tokenizer = _load(recipe, stages, check=partial(_check_lengths, recipe, dry_run=dry_run))
    texts = {} if dry_run else read_evaluation_texts(asked, tokenizer)
    tasks = [] if dry_run else tasks_named(asked.tasks)
    bos_token(asked, tokenizer)  # a missing one is refused now
    if asked.reference and recipe.vocabulary:
        raise UsageError("Agreement with a reference was asked for and a smaller vocabulary: leave evaluation.reference out.")
    dense = None
    if asked.dense and (texts or tasks or (asked.generations and not dry_run)):
        with stages("evaluate dense", "evaluate the dense model"):
            dense = measure(model, tokenizer, asked, texts=texts, tasks=tasks, name="dense")
    with stages("prune", _pruning(recipe)):
        result, curve = _prune(recipe, model, tokenizer, texts=texts, plan_only=dry_run, progress=progress, resume=resume)
    stages.seconds |= {f"prune: {stage}": seconds for stage, seconds in result.report["seconds"].items()}
    report = run_report(
        recipe.model_dump(mode="json"),
        result.report,
        dense=dense.figures if dense else None,
        saliency=saliency(result.plan, result.scores),
    )
    report.prompts, report.curve = list(asked.generations), curve
    analysed = result.report.get("knowledge")
    report.knowledge = analysed.model_dump(mode="json") if analysed else _knowledge(recipe)
    if recipe.recovery is not None and not dry_run:
        report.recovery = _recover(recipe, result, progress=progress, resume=resume, stages=stages)
    if not dry_run:
        assert isinstance(result.model, PreTrainedModel)
        round_to_storage(result.model, storage_asked(recipe.store_dtype))
    if dry_run:
        files = _texts(recipe, report, stages) | {"plan.json": result.plan.to_json()} | _decided(result)
        _write_plan(directory, files, overwrite=overwrite)
        if not resume:
            discard(progress)
        return RunResult(directory, result.plan, report, model)
    saved = _save(recipe, result, report, directory=directory, overwrite=overwrite, stages=stages)
    discard(progress)
    with noting(f"The pruned model in {directory} is whole and verified; its report lacks what was not measured."):
        if report.vocabulary is not None:
            texts, report.vocabulary.texts = same_texts(texts, tokenizer, result)
        _measure_pruned(recipe, model, result.tokenizer, report=report, dense=dense, texts=texts, tasks=tasks, stages=stages)
        report.status = "complete"
        _replace(directory, _texts(recipe, report, stages) | _readme(saved, result, report))
    return RunResult(directory, result.plan, report, model)


def _inputs(recipe: Recipe) -> list[str | None]:
    """Everything that a run reads, by name."""
    evaluation, recovery = recipe.evaluation, recipe.recovery
    texts = [*(recipe.calibration.source or ()), *evaluation.texts, *evaluation.tasks, *recipe.protect]
    texts += recipe.vocabulary.source if recipe.vocabulary else ()
    texts += recovery.data if recovery else ()
    teacher = recovery.teacher if recovery else None
    return [recipe.model, evaluation.reference, recipe.latency_table, teacher, *texts]


def _load(
    recipe: Recipe, stages: Stages, *, check: Callable[..., None] | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model and its tokenizer; `check(model, tokenizer=...)` comes before weights are read."""
    device = device_of(recipe.device)
    with stages("load", f"load {recipe.model}"):
        # The tokenizer first: it is quick, and without one there is no use in reading weights.
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
        return _load_model(recipe, device, check=partial(check, tokenizer=tokenizer) if check else None), tokenizer


def _check_lengths(recipe: Recipe, model: PreTrainedModel, tokenizer: Any, *, dry_run: bool) -> None:
    """Refuses tokens and lengths that the model cannot take in, before anything is read or measured."""
    check_vocabulary(model, tokenizer)
    chosen = method_settings(recipe.method, recipe.settings)
    if shipped_code(model) is not None and (recipe.layout == "per-layer" or not chosen.coupled):
        raise UsageError(own_code_refusal(type(model).__name__))
    only_vocabulary = recipe.vocabulary is not None and recipe.keep == 1 and not recipe.budget
    if chosen.needs_data and not only_vocabulary:
        check_windows(model, recipe.calibration.length)
    if dry_run:
        return
    check_evaluation(model, tokenizer, recipe.evaluation)
    if recipe.recovery is not None:
        length = recipe.recovery.settings.length
        check_length(model, length, f"recovery.settings.length = {length}", instead="Use a shorter length.")


def _load_model(
    recipe: Recipe, device: Any, *, check: Callable[[PreTrainedModel], None] | None = None
) -> PreTrainedModel:
    dtype, trust = dtype_of(recipe.dtype), recipe.trust_remote_code
    return load(recipe.model, dtype=dtype, device=device, trust_remote_code=trust, check=check)


def _pruning(recipe: Recipe) -> str:
    """What is about to happen, in words."""
    if recipe.vocabulary is not None and recipe.keep == 1 and not recipe.budget:
        return f"cut the vocabulary to what {', '.join(recipe.vocabulary.source)} needs"
    if not method_settings(recipe.method, recipe.settings).needs_data:
        return f"{recipe.method}, {sizes_asked(recipe.settings) or 'by weights alone'}"
    text = ", ".join(recipe.calibration.source or ("text that the model writes itself",))
    return f"{recipe.method} on {recipe.calibration.samples} x {recipe.calibration.length} tokens of {text}"


def _prune(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    texts: Mapping[str, HeldOut],
    plan_only: bool,
    progress: Path,
    resume: bool,
) -> tuple[Result, Curve | None]:
    """The pruned model, and what sizes on the way are worth where that was asked for."""
    calibration, found = recipe.calibration, list[Curve]()

    def watch(dense: Any, graph: Graph, plans: Sequence[Plan]) -> None:
        found.append(curve_of(dense, tokenizer, graph, plans, asked=recipe.evaluation, texts=texts))

    result = prune(
        model,
        tokenizer,
        method=recipe.method,
        keep=recipe.keep,
        of=recipe.of,
        budget=recipe.budget,
        latency_table=recipe.latency_table,
        layout=recipe.layout,
        align=recipe.align if isinstance(recipe.align, int) else {str(kind): size for kind, size in recipe.align.items()},
        data=calibration.source,
        samples=calibration.samples,
        length=calibration.length,
        seed=recipe.seed,
        settings=recipe.settings,
        vocabulary=Vocabulary(**recipe.vocabulary.model_dump()) if recipe.vocabulary else None,
        protect=recipe.protect,
        plan_only=plan_only,
        progress=progress,
        resume=resume,
        watch=watch if recipe.evaluation.curve and texts else None,
        stops=recipe.evaluation.curve,
    )
    return result, found[0] if found else None


def _knowledge(recipe: Recipe) -> dict[str, Any] | None:
    """The first analysis that the recipe names among what is to be protected."""
    for name in recipe.protect:
        if name.endswith(".json"):
            return Knowledge.from_json(Path(name).expanduser().read_text(encoding="utf-8")).model_dump(mode="json")
    return None


def _recover(recipe: Recipe, result: Result, *, progress: Path, resume: bool, stages: Stages) -> Facts:
    """Trains what is left, as the recipe says."""
    asked = recipe.recovery
    assert asked is not None
    assert isinstance(result.model, PreTrainedModel)
    return healed(
        result.model,
        result.tokenizer,
        asked,
        teacher=recipe.model if asked.teacher == DENSE else asked.teacher,
        load=lambda name: _load_model(recipe.model_copy(update={"model": name}), device_of(recipe.device)),
        pattern=result.pattern,
        progress=progress / RECOVERY,
        resume=resume,
        stages=stages,
        seed=recipe.seed,
    ).facts


def _decided(result: Result) -> dict[str, str]:
    """Files besides the plan by name: what stays of single matrices, and what widths cost, where that decided."""
    pattern = {"pattern.json": result.pattern.to_json()} if result.pattern else {}
    return pattern | ({"latency.json": result.latency_table.to_json()} if result.latency_table else {})


def _save(
    recipe: Recipe, result: Result, report: RunReport, *, directory: Path, overwrite: bool, stages: Stages
) -> Saved:
    """Writes the whole run directory, which gets its name only when a fresh process gave the model's logits."""
    assert isinstance(result.model, PreTrainedModel)
    with whole_directory(directory, overwrite=overwrite) as partial:
        with stages("save", f"save to {directory}"):
            saved = save(
                result.model,
                partial,
                tokenizer=result.tokenizer,
                plan=result.plan,
                extra_files=_decided(result),
                dtype=storage_asked(recipe.store_dtype),
            )
        with stages("verify", "verify in a fresh process"):
            report.reload_difference = verify(partial, result.model)
        report.saved = facts(saved, directory)
        report.pruned.file_bytes = weight_bytes(str(partial))
        if not find(recipe.model).gguf:  # quantised, and no measure of what was removed
            report.dense.file_bytes = weight_bytes(recipe.model)
        report.status = "saved"
        fill(partial, _texts(recipe, report, stages) | _readme(saved, result, report))
    return saved


def _measure_pruned(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    report: RunReport,
    dense: Observed | None,
    texts: Mapping[str, HeldOut],
    tasks: Sequence[AnyTask],
    stages: Stages,
) -> None:
    """Adds the figures of the pruned model to the report; of both, where they are measured in turns."""
    asked = recipe.evaluation
    if texts or tasks or asked.generations:
        with stages("evaluate pruned", "evaluate the pruned model"):
            found = measure(model, tokenizer, asked, texts=texts, tasks=tasks, name="pruned")
        report.differences = compared(found, dense) if dense else []
        for part in ("perplexities", "tasks", "task_mean", "task_mean_stderr", "flips", "generations"):
            setattr(report.pruned, part, getattr(found.figures, part))
    if asked.reference and texts:
        with stages("agreement", f"the pruned model beside {asked.reference}"):
            reference, theirs = _load(recipe.model_copy(update={"model": asked.reference}), stages)
            same_tokens(texts, read_evaluation_texts(asked, theirs), recipe.model, asked.reference)
            report.pruned.agreements = agreements(model, reference, tokenizer, asked, texts=texts, name="pruned")
            del reference
    if not asked.latency:
        return
    models = {"pruned": model}
    with stages("latency", "latency, in turns"):
        if asked.dense:
            models = {"dense": _load_model(recipe, device_of(recipe.device)), **models}
        timings = timed(models, asked.latency)
    report.dense.timings, report.pruned.timings = timings.get("dense"), timings["pruned"]


def _texts(recipe: Recipe, report: RunReport, stages: Stages) -> dict[str, str]:
    """The text files of a run, as they are now."""
    report.seconds = dict(stages.seconds)
    report.peak_memory_bytes = peak_memory()
    pages = {"report.json": report.to_json(), "report.md": run_markdown(report), "report.html": run_html(report)}
    return {"recipe.yaml": recipe_text(HEADER, recipe), **pages}


def _readme(saved: Saved, result: Result, report: RunReport) -> dict[str, str]:
    """The model card, with all that the report says by now."""
    about = About(report.recipe, json.loads(report.to_json()))
    return {"README.md": card(saved, has_tokenizer=result.tokenizer is not None, about=about)}


def _write_plan(directory: Path, files: Mapping[str, str], *, overwrite: bool) -> None:
    with whole_directory(directory, overwrite=overwrite) as partial:
        fill(partial, files)


def _replace(directory: Path, files: Mapping[str, str]) -> None:
    """Puts new files in the place of old ones, each of them whole at any time."""
    for name, text in files.items():
        try:
            write_text(directory / name, text)
        except OSError as problem:
            raise CheckpointError(
                f"Asked to complete {directory / name}; {problem}. Free some space and evaluate the model again."
            ) from problem
