"""The one call: a model trained on some data until it has back what it can of what it lost."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from resect.calibration import check_length, check_vocabulary
from resect.environment import processes, recipe_decides, tell_precision
from resect.errors import CheckpointError, DamagedProgress, ResectWarning, UsageError
from resect.explain import telling
from resect.files import temporary_folder
from resect.files.progress import claim, damaged_message, digest, noting_progress
from resect.ranges import seed_of
from resect.recovery.adapter import Adapter, adapter_of, attach, reached_share
from resect.recovery.examples import Example, Pool, read_pool
from resect.recovery.facts import Facts, Nats
from resect.recovery.heldout import overall
from resect.recovery.mixture import Supply, rounds, shares
from resect.recovery.settings import Recovery
from resect.recovery.teacher import check_teacher
from resect.recovery.training import Say, Training, damaged_trainings
from resect.statistics import tell_emulated
from resect.surgery.adapters import check_merged
from resect.surroundings import unaffected

STAGES = ("text", "instructions")
CHECKPOINTED = "gradient_checkpointing"
"""The flag of modules that compute their activations again."""


@dataclass(frozen=True)
class Recovered:
    """A recovered model, the same object that was given."""

    model: PreTrainedModel
    adapter: Adapter | None
    """The low-rank terms that were merged; None where all weights were trained."""
    facts: Facts


@telling("train the model")
@unaffected("changes")
def recover(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    data: str | Sequence[str],
    settings: Recovery | None = None,
    teacher: PreTrainedModel | None = None,
    keep_zeros: Collection[str] = (),
    seed: int = 42,
    progress: str | Path | None = None,
    resume: bool = False,
    say: Say | None = None,
) -> Recovered:
    """Trains `model` on `data` and gives it back merged, in place; any causal language model, pruned or not.

    Low-rank terms on every linear layer of the blocks, or all weights (`settings.full`). `data` names sources: JSON or JSONL
    files of instructions, conversations or text, text files, hub data sets, `demo`, each once; some of each is held out, and
    the state with the lowest held-out loss is the result. A `teacher` adds its distribution over the next token to what is
    learnt, and is what a dynamic mixture measures against. Zeros of the layers that `keep_zeros` names stay zero. States are
    noted in the directory `progress`, from where `resume` goes on as if nothing had happened; `say` is told of every
    evaluation. Runs in as many processes as torchrun or accelerate launch start. Raises `DataError`, `UsageError`,
    `ModelError` and `NumericsError`; low-rank terms are then taken off again, and the model is what it was.
    """
    settings = settings or Recovery()
    seed = seed_of(seed)
    sources = [data] if isinstance(data, str) else list(dict.fromkeys(data))
    _check(model, settings, teacher, sources)
    check_vocabulary(model, tokenizer)
    main = processes().main
    if main:
        tell_emulated(model, bf16=settings.bf16)
        tell_precision()
    pools = {source: read_pool(source, tokenizer, settings, seed=seed) for source in sources}
    with ExitStack() as stack:
        stack.enter_context(_as_it_was(model))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(recipe_decides(bf16=settings.bf16))
        folder = _folder(progress, stack)
        resumes = _claim(folder, settings, pools, seed, model, teacher, resume=resume)
        reached = 1.0 if settings.full else reached_share(model)
        trained = _trained_part(model, settings, keep_zeros, seed, stack)
        training = Training(
            model=trained,
            held_out={source: pool.held_out for source, pool in pools.items()},
            settings=settings,
            folder=folder,
            resumes=resumes,
            teacher=teacher,
            padding=tokenizer.pad_token_id or 0,
            seed=seed,
            cpu=model.device.type == "cpu",
            say=say,
        )
        facts = _measured_before(model, training, pools)
        facts.reached = reached
        if settings.mixture.kind == "dynamic":
            _dynamic(training, pools, facts, seed)
        else:
            examples = Supply({source: pool.train for source, pool in pools.items()}, seed=seed).draw(
                shares(dict.fromkeys(pools, 1 / len(pools)), _count(list(pools.values()), settings, settings.tokens))
            )
            facts.trainings.append(training("training", examples))
        facts.after = facts.trainings[-1].nats if facts.trainings else facts.before
        facts.held_out_after = overall(facts.after, training.held_out)
        adapter = adapter_of(trained) if isinstance(trained, PeftModel) else None
        if isinstance(trained, PeftModel):
            trained.merge_and_unload()
    if main:
        _warn(facts)
    return Recovered(model, adapter, facts)


def _check(model: PreTrainedModel, settings: Recovery, teacher: PreTrainedModel | None, sources: Sequence[str]) -> None:
    """Refuses what cannot be meant, before any data is read."""
    check_merged(model)
    if not sources or not all(sources):
        raise UsageError("Recovery was given no data. Name a file, a data set or demo, or several.")
    check_length(model, settings.length, f"settings.length = {settings.length}", instead="Use a shorter length.")
    if settings.mixture.kind == "dynamic" and teacher is None:
        raise UsageError(
            "A dynamic mixture measures how far the model is behind the dense one, and no teacher was given. "
            "Name it (--teacher, teacher=), or use the uniform mixture."
        )
    if teacher is not None:
        check_teacher(teacher, model, settings.distillation)


def _trained_part(
    model: PreTrainedModel, settings: Recovery, keep_zeros: Collection[str], seed: int, stack: ExitStack
) -> nn.Module:
    """The model prepared for training; what is trained requires gradients, and `stack` undoes what an error leaves."""
    if not settings.full:
        adapted = attach(model, settings, keep_zeros=keep_zeros, seed=seed)
        stack.callback(_take_off, adapted)
        return adapted
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for path in keep_zeros:
        weight: Any = model.get_submodule(path).weight
        stack.enter_context(_still(weight))
    return model


def _take_off(adapted: PeftModel) -> None:
    """Takes low-rank terms off that were not merged."""
    if any("lora_" in name for name, _ in adapted.named_parameters()):
        adapted.unload()


@contextmanager
def _still(weight: nn.Parameter) -> Iterator[None]:
    """Zeros of a weight get no gradient in the block: neither Adam nor its decay moves them then."""
    moving = weight.detach() != 0

    def masked(gradient: Tensor) -> Tensor:
        return gradient * moving

    hook = weight.register_hook(masked)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Gives modes, gradient flags, device and caching back as they were; gradients go."""
    modes = [(module, module.training, vars(module).get(CHECKPOINTED)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    caching, device = getattr(model.config, "use_cache", None), model.device
    try:
        yield
    finally:
        nn.Module.to(model, device)
        if caching is not None:
            model.config.use_cache = caching
        if hasattr(model, "_require_grads_hook"):  # of gradient checkpointing
            model.disable_input_require_grads()
        for module, training, checkpointed in modes:
            module.training = training
            vars(module).pop(CHECKPOINTED, None)  # a flag of the class is left
            if checkpointed is not None:
                setattr(module, CHECKPOINTED, checkpointed)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _folder(progress: str | Path | None, stack: ExitStack) -> Path:
    if progress is not None:
        return Path(progress).expanduser().resolve()
    return stack.enter_context(temporary_folder("for the states of a recovery"))


def _claim(
    folder: Path,
    settings: Recovery,
    pools: Mapping[str, Pool],
    seed: int,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    resume: bool,
) -> bool:
    """Notes in the folder what is asked for; whether it was begun for that, and is gone on with.

    Refuses to go on with what was begun for something else: for other weights, too, or another teacher's.
    """
    asked = {
        "settings": settings.model_dump(mode="json", exclude={"learning_rate", "report_to", "micro_batch"}),
        "sources": list(pools),
        "data": digest(_tensors(pools)),
        "seed": seed,
        "weights": digest(model.state_dict()),
        "teacher": None if teacher is None else digest(teacher.state_dict()),
    }
    described = json.dumps(asked, sort_keys=True)
    if not processes().main:
        return resume
    with noting_progress(folder):
        resumes = claim(folder, described, resume=resume)
        damaged = damaged_trainings(folder) if resumes else []
        if not damaged:
            return resumes
        if processes().count > 1:  # the others are reading there already
            raise CheckpointError(f"{folder}: {damaged[0]} was damaged since it was noted. Begin anew, without resume.")
        warnings.warn(DamagedProgress(damaged_message(folder, damaged)), stacklevel=3)
        return claim(folder, described, resume=False)


def _tensors(pools: Mapping[str, Pool]) -> Iterator[Tensor]:
    """All tokens and labels, in the order of training and measuring."""
    for pool in pools.values():
        for example in [*pool.train, *pool.held_out]:
            yield torch.stack([example.tokens, example.labels])


def _measured_before(model: PreTrainedModel, training: Training, pools: Mapping[str, Pool]) -> Facts:
    before = training.nats(training.model)
    counted = {id(p): (p.numel(), p.requires_grad) for p in training.model.parameters()}
    trainable = sum(count for count, trained in counted.values() if trained)
    return Facts(
        sources=[pool.counts for pool in pools.values()],
        trainable=trainable,
        parameters=sum(count for count, _ in counted.values()) - (0 if training.settings.full else trainable),
        before=before,
        dense=training.nats(training.teacher) if training.teacher is not None else None,
        held_out_before=overall(before, training.held_out),
        processes=processes().count,
    )


def _dynamic(training: Training, pools: Mapping[str, Pool], facts: Facts, seed: int) -> None:
    """Stage after stage in rounds, text first; adds what happened to the facts."""
    asked, nats = training.settings, facts.before
    assert facts.dense is not None
    whole = sum(pool.counts.tokens for pool in pools.values())

    def train(name: str, examples: list[Example], done: int, in_all: int) -> Nats:
        after = facts.trainings[-1].name if facts.trainings else None
        facts.trainings.append(training(name, examples, evaluations=1, after=after, done=done, in_all=in_all))
        return facts.trainings[-1].nats

    for stage in STAGES:
        if facts.trainings:
            lower = asked.rate * asked.mixture.instructions_rate
            training = replace(training, settings=asked.model_copy(update={"learning_rate": lower}))
        stage_pools = {source: pool for source, pool in pools.items() if pool.text == (stage == "text")}
        if not stage_pools:
            continue
        share = sum(pool.counts.tokens for pool in stage_pools.values()) / whole
        tokens = None if asked.tokens is None else max(1, round(share * asked.tokens))
        facts.rounds += rounds(
            stage,
            Supply({source: pool.train for source, pool in stage_pools.items()}, seed=seed),
            examples=_count(list(stage_pools.values()), asked, tokens),
            multiple=asked.batch,
            before=nats,
            dense={source: facts.dense[source] for source in stage_pools},
            train=train,
            asked=asked.mixture,
        )
        nats = facts.trainings[-1].nats if facts.trainings else nats


def _count(pools: Sequence[Pool], asked: Recovery, tokens: int | None) -> int:
    """How many examples are trained on: whole batches, for the tokens or epochs that were asked for."""
    examples = sum(len(pool.train) for pool in pools)
    if tokens is None:
        return asked.batch * max(1, math.ceil(asked.epochs * examples / asked.batch - 1e-9))
    mean = sum(sum(len(one.tokens) for one in pool.train) / len(pool.train) for pool in pools) / len(pools)
    return asked.batch * max(1, math.ceil(tokens / mean / asked.batch - 1e-9))


def _warn(facts: Facts) -> None:
    if not facts.held_out_after < facts.held_out_before:
        warnings.warn(
            f"The held-out loss did not fall: {facts.held_out_before:.4f} before, {facts.held_out_after:.4f} after. "
            "Train longer, on other data, or with another learning rate.",
            ResectWarning,
            stacklevel=3,
        )
