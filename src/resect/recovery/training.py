"""One training through transformers' Trainer: examples in a given order, the best state by held-out loss, resumed exactly."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from resect.environment import processes
from resect.errors import CheckpointError, DamagedProgress, NumericsError, UsageError
from resect.files import read_json
from resect.files.progress import (
    damaged_message,
    digest_of_file,
    noting_progress,
    read_note,
    read_tensors,
    write_note,
    write_tensors,
)
from resect.files.writing import flush_file, flush_folder
from resect.recovery.examples import Example, collate
from resect.recovery.facts import Nats, Trained
from resect.recovery.heldout import held_out_nats, overall
from resect.recovery.settings import Recovery
from resect.recovery.teacher import state_difference
from resect.statistics import IGNORED, computing, token_losses

Say = Callable[[str], None]
WEIGHTS = "trained.safetensors"
DONE = "done.json"
DIGESTS = "digests.json"
"""Names the files of a state; the last that is written to it."""
POINTS = 200
"""Losses noted of a training, about."""
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Training:
    """What trainings of one recovery share."""

    model: nn.Module
    """With only what is trained requiring gradients."""
    held_out: Mapping[str, Sequence[Example]]
    settings: Recovery
    folder: Path
    """Where states are noted."""
    resumes: bool = False
    """Whether what an earlier process noted there counts; a training that finds itself done only reads its result."""
    teacher: PreTrainedModel | None = None
    padding: int = 0
    seed: int = 42
    cpu: bool = True
    say: Say | None = None

    def __call__(
        self,
        name: str,
        examples: Sequence[Example],
        *,
        evaluations: int | None = None,
        after: str | None = None,
        done: int = 0,
        in_all: int | None = None,
    ) -> Trained:
        """Trains on the examples once, in their order, from where a process got to before; the model has the best state then.

        Their number is a multiple of the batch. Trainings that come `after` another, by name, go on with its optimizer; the
        learning rate rises and falls over `in_all` steps, of which earlier trainings have `done` some. Raises `NumericsError`
        when the loss or a gradient is not finite.
        """
        folder = self.folder / name
        result = folder / DONE
        if self.resumes and result.exists():
            read_trained(self.model, folder / WEIGHTS)
            return Trained.model_validate(read_note(result))
        start = time.perf_counter()
        steps = len(examples) // self.settings.batch
        in_all = in_all or steps
        watch = Watch(name, examples, self.settings.batch, self.say)
        arguments = self._arguments(folder, steps, evaluations or self.settings.evaluations, in_all)
        verbosity = logging.get_verbosity()
        before = last_state(self.folder / after) if after else None
        trainer = _Trainer(self, examples, arguments, watch, before, done, in_all)
        try:
            with noting_progress(folder):
                trainer.train(resume_from_checkpoint=last_state(folder) if self.resumes else None)
        finally:
            watch.close()
            logging.set_verbosity(verbosity)
            vars(self.model).pop("_original_forward", None)  # what accelerate puts around one that it is told to run in bfloat16
            vars(self.model).pop("forward", None)
        found = self._result(name, examples, trainer, time.perf_counter() - start)
        if trainer.is_world_process_zero():
            with noting_progress(folder):
                write_trained(self.model, folder / WEIGHTS)
                write_note(result, found.model_dump(mode="json"))
                if before:
                    _remove(Path(before))
        return found

    def nats(self, model: nn.Module) -> Nats:
        """The held-out loss of this model, or of another on the same text, in the precision of the training."""
        asked = self.settings
        return held_out_nats(model, self.held_out, batch=asked.micro_batch, padding=self.padding, bf16=asked.bf16)

    def _result(self, name: str, examples: Sequence[Example], trainer: Trainer, seconds: float) -> Trained:
        history = trainer.state.log_history
        best = trainer.state.best_global_step
        assert best is not None
        nats = next(entry for entry in history if "eval_loss" in entry and entry["step"] == best)
        return Trained(
            name=name,
            steps=trainer.state.max_steps,
            examples=len(examples),
            tokens=sum(len(example.tokens) for example in examples),
            seconds=round(seconds, 3),
            losses=[(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry],
            held_out=[(int(entry["step"]), entry["eval_loss"]) for entry in history if "eval_loss" in entry],
            best_step=best,
            nats={source: nats[f"eval_{source}"] for source in self.held_out},
        )

    def _arguments(self, folder: Path, steps: int, evaluations: int, in_all: int) -> TrainingArguments:
        asked, every = self.settings, math.ceil(steps / evaluations)
        micro = micro_batch(asked)
        try:
            arguments = TrainingArguments(
                output_dir=str(folder),
                num_train_epochs=1,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=asked.batch // (micro * processes().count),
                average_tokens_across_devices=True,
                train_sampling_strategy="sequential",
                learning_rate=asked.rate,
                lr_scheduler_type=SCHEDULES[asked.schedule],
                warmup_steps=min(asked.warmup, in_all // 10),
                weight_decay=asked.weight_decay,
                max_grad_norm=asked.clip,
                **_checkpointing(asked),
                logging_steps=max(1, steps // POINTS),
                logging_nan_inf_filter=False,
                eval_strategy="steps",
                eval_steps=every,
                save_strategy="steps",
                save_steps=every,
                ddp_find_unused_parameters=False,
                load_best_model_at_end=True,
                metric_for_best_model="loss",
                greater_is_better=False,
                remove_unused_columns=False,
                label_names=["labels"],
                dataloader_pin_memory=not self.cpu,
                disable_tqdm=True,
                report_to=list(asked.report_to),
                log_level="error",
                seed=self.seed,
                use_cpu=self.cpu,
            )
        except (ValueError, ImportError) as problem:
            raise UsageError(f"These settings cannot be trained with here: {problem}") from problem
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process uses one device; torchrun starts more of them
        return arguments


class _Trainer(Trainer):
    """The Trainer with our loss, our held-out loss, and states that hold exactly what is trained."""

    def __init__(
        self,
        asked: Training,
        examples: Sequence[Example],
        arguments: TrainingArguments,
        watch: Watch,
        before: str | None,
        done: int,
        in_all: int,
    ) -> None:
        self.asked, self.before, self.done, self.in_all = asked, before, done, in_all
        try:
            super().__init__(
                model=asked.model,
                args=arguments,
                train_dataset=list(examples),
                eval_dataset=list(itertools.chain(*asked.held_out.values())),
                data_collator=partial(collate, padding=asked.padding),
                callbacks=[watch],
            )
        except RuntimeError as problem:
            if "requires" in str(problem):  # a tracker that is not installed
                raise UsageError(f"settings.report_to = {list(asked.settings.report_to)}: {problem}") from problem
            raise
        self.callback_handler.callbacks = [one for one in self.callback_handler.callbacks if "Printer" not in type(one).__name__]
        self.model_accepts_loss_kwargs = True  # our loss wants the number of predicted tokens of the whole batch
        self.loss_is_scaled_for_ga = True
        if asked.teacher is not None:
            nn.Module.to(asked.teacher, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The sum over predicted tokens, over the number of them in the batch of all processes."""
        losses = self._losses(model, inputs)
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        total = losses.sum()
        if not total.isfinite():
            raise self._not_finite("loss", float(total.detach()))
        share: Tensor = total / count * self.accelerator.num_processes
        return share

    def _losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of each predicted token, the teacher's terms with it."""
        settings, labels = self.asked.settings, inputs["labels"]
        asked = settings.distillation
        teacher = self.asked.teacher if asked.weight or asked.hidden else None
        given: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        given |= {"use_cache": False, "output_hidden_states": teacher is not None and asked.hidden > 0}
        theirs = None
        with computing(model, bf16=settings.bf16):
            found = model(**given)
            if teacher is not None:
                with torch.no_grad():
                    theirs = teacher(**given)
        said = None if theirs is None else theirs.logits
        losses = token_losses(found.logits, labels, teacher=said, weight=asked.weight, temperature=asked.temperature)
        if theirs is not None and asked.hidden:
            chosen = labels[:, 1:] != IGNORED
            states = (one.hidden_states[-1][:, :-1][chosen] for one in (found, theirs))
            losses = losses + asked.hidden * state_difference(*states)
        return losses

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss, each source by itself too; every process measures the same."""
        asked = self.asked
        nats = asked.nats(asked.model)
        metrics = {"eval_loss": overall(nats, asked.held_out)} | {f"eval_{source}": value for source, value in nats.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm: Any = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if not math.isfinite(float(norm)):  # before the step, so that no weight has it yet
            raise self._not_finite("gradient", float(norm))
        return norm

    def _not_finite(self, what: str, value: float) -> NumericsError:
        state = last_state(Path(str(self.args.output_dir)))
        kept = f"The last good state is {state}." if state else "No state was noted yet."
        return NumericsError(
            f"The {what} is {value} in step {self.state.global_step + 1} of {self.state.max_steps}. {kept} Lower "
            f"settings.learning_rate ({self.asked.settings.rate:g} here) or settings.clip ({self.asked.settings.clip:g}), or "
            "compute in a wider type (float32; bfloat16 instead of float16). With --resume a lower learning rate goes on from "
            "the last good state."
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:  # every process gets here
            write_trained(self.asked.model, Path(str(output_dir)) / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir))
        seal(folder / f"checkpoint-{self.state.global_step}", number=self.args.process_index)
        if self.args.should_save:
            remove_old_states(folder, best=self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_trained(self.asked.model, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        read_trained(self.asked.model, best / WEIGHTS)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate over all trainings that share it; the optimizer goes on from the one before."""
        scheduler = super().create_scheduler(self.in_all, optimizer)
        if self.before:
            super()._load_optimizer_and_scheduler(self.before)
            self._learn_as_in(self.done)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As they were, but with the learning rate that is asked for now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            scheduler: Any = self.lr_scheduler
            self._learn_as_in(scheduler.last_epoch)

    def _learn_as_in(self, step: int) -> None:
        """Sets the learning rate to that of a step."""
        rate, scheduler, optimizer = self.args.learning_rate, cast(Any, self.lr_scheduler), cast(Any, self.optimizer)
        scheduler.last_epoch, scheduler.base_lrs = step, [rate] * len(scheduler.base_lrs)
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(step)


class Watch(TrainerCallback):
    """A progress bar with loss and tokens per second, or a line at every evaluation where there is no terminal."""

    def __init__(self, name: str, examples: Sequence[Example], batch: int, say: Say | None) -> None:
        sizes = [len(example.tokens) for example in examples]
        self.tokens = list(itertools.accumulate((sum(sizes[i : i + batch]) for i in range(0, len(sizes), batch)), initial=0))
        self.name, self.say = name, say
        self.facts: dict[str, str] = {}
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.first, self.started = state.global_step, time.perf_counter()
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=self.first, desc=self.name, unit="step", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts, and has the last step measured and noted whatever its number."""
        seen = self.tokens[state.global_step] - self.tokens[self.first]
        self.facts["tokens/s"] = f"{seen / (time.perf_counter() - self.started):,.0f}"
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(self.facts)
        if state.global_step == state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the loss."""
        if logs and "loss" in logs:
            self.facts["loss"] = f"{logs['loss']:.3f}"

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Shows the held-out loss."""
        self.facts["held-out"] = f"{metrics['eval_loss']:.3f}"
        if self.say and self.bar is None and state.is_world_process_zero:
            facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
            self.say(f"{self.name}, step {state.global_step} of {state.max_steps}: {facts}")

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()


def micro_batch(asked: Recovery) -> int:
    """The most examples at a time, not above those asked for, that divide the batch evenly among the processes."""
    count = processes().count
    share, rest = divmod(asked.batch, count)
    if rest or not share:
        raise UsageError(f"settings.batch = {asked.batch} cannot be divided among {count} processes. Make it a multiple.")
    return max(size for size in range(1, min(asked.micro_batch, share) + 1) if share % size == 0)


def _checkpointing(asked: Recovery) -> dict[str, Any]:
    """Arguments for it, under the name that this version of transformers has."""
    name = "activation_checkpointing"
    name = name if name in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if asked.checkpointing else {}


def last_state(folder: Path) -> str | None:
    """The newest state that is whole, with the best one that it names; a warning tells of others."""
    damaged = []
    for state in states(folder):
        if _is_sound(state) and _is_sound(state.with_name(f"checkpoint-{_best_step(state)}")):
            break
        damaged.append(state.name)
    else:
        state = None
    sealed = [name for name in damaged if (folder / name / DIGESTS).exists()]
    if sealed:
        warnings.warn(DamagedProgress(damaged_message(folder, sealed)), stacklevel=3)
    return None if state is None else str(state)


def states(folder: Path) -> list[Path]:
    """The states of a training, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=_step, reverse=True)


def _step(state: Path) -> int:
    return int(state.name.rpartition("-")[2])


def remove_old_states(folder: Path, *, best: int | None) -> None:
    """Removes all states but the best and the two newest: other processes may still be writing to the last but one."""
    for state in states(folder)[2:]:
        if _step(state) != best:
            _remove(state)


def _remove(state: Path) -> None:
    """Removes a state, which is none any more while that lasts."""
    hidden = state.with_name(f".{state.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    state.rename(hidden)
    shutil.rmtree(hidden)


def damaged_trainings(folder: Path) -> list[str]:
    """What trainings that are done left and does not match its digest: results, weights, and states that others go on from."""
    damaged = []
    for result in sorted(folder.glob(f"*/{DONE}")):
        name = result.parent.name
        try:
            read_note(result)
            read_tensors(result.with_name(WEIGHTS))
        except CheckpointError:
            damaged.append(name)
            continue
        damaged += [f"{name}/{state.name}" for state in states(result.parent)[:1] if not _is_sound(state)]
    return damaged


def seal(state: Path, *, number: int) -> None:
    """Notes digests of the files of a state, which is whole then; each of several processes notes its own random state's."""
    own = state / f"rng_state_{number}.pth"
    shared = [path for path in state.iterdir() if not re.match(r"rng_state_|\.?digests", path.name)]
    files = [*(shared if number == 0 else []), *([own] if own.exists() else [])]
    for path in files:
        flush_file(path)
    digests = {path.name: digest_of_file(path) for path in files}
    write_note(state / (DIGESTS if number == 0 else f"digests-{number}.json"), digests)
    flush_folder(state.parent)


def _is_sound(state: Path) -> bool:
    """Whether all files of a state are there and match their digests."""
    try:
        digests = read_note(state / DIGESTS)
        for note in state.glob("digests-*.json"):
            digests |= read_note(note)
        found = {path.name for path in state.iterdir() if not path.name.startswith(("digests", "."))}
        return found == set(digests) and all(digest_of_file(state / name) == digests[name] for name in digests)
    except (OSError, CheckpointError):
        return False


def _best_step(state: Path) -> int:
    """The step of the best state so far, as a sound state names it."""
    found = read_json(state / "trainer_state.json")
    return int(found["best_global_step"])


def write_trained(model: nn.Module, path: Path) -> None:
    """Writes every parameter that requires a gradient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})


@torch.no_grad()
def read_trained(model: nn.Module, path: Path) -> None:
    """Reads what `write_trained` wrote. Raises `CheckpointError` where it was damaged since."""
    tensors = read_tensors(path)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[name])
