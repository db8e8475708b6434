"""The dense model that a pruned one learns from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resect.errors import UsageError
from resect.recovery.settings import Distillation


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, asked: Distillation) -> None:
    """Raises `UsageError` for a teacher whose tokens, or states, are not the student's."""
    theirs, ours = (one.config.get_text_config().vocab_size for one in (teacher, student))
    if theirs != ours:
        raise UsageError(
            f"The teacher has {theirs:,} tokens in its vocabulary, the model {ours:,}: their logits do not compare. Name the "
            "dense model that this one was cut from; a model whose vocabulary was cut can be recovered without a teacher."
        )
    theirs, ours = (one.config.get_text_config().hidden_size for one in (teacher, student))
    if asked.hidden and theirs != ours:
        raise UsageError(
            f"The teacher's hidden states are {theirs} wide, the model's {ours}: they do not compare. "
            "Set settings.distillation.hidden=0."
        )


def state_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference of each row of states [N, D], over the variance of the teacher's: [N] float32."""
    ours, theirs = student.float(), teacher.float()
    return (ours - theirs).square().mean(-1) / theirs.var().clamp_min(torch.finfo(torch.float32).tiny)
