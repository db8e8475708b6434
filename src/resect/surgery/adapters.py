"""Networks with low-rank adapters of PEFT on them: measured as they are, but merged before they are pruned or saved."""

from __future__ import annotations

from torch import nn

from resect.errors import UsageError

PACKAGE = "peft"


def check_merged(model: nn.Module) -> None:
    """Raises `UsageError` for a network with adapters: layers that are wrapped have other names in what is saved."""
    wrapped = [name for name, module in model.named_modules() if type(module).__module__.partition(".")[0] == PACKAGE]
    if wrapped:
        place = next((name for name in wrapped if name), "")
        raise UsageError(
            f"The {type(model).__name__} has low-rank adapters{f' ({place} and others)' if place else ''}. "
            "Merge them first, and hand in what that gives: PeftModel.merge_and_unload()."
        )
