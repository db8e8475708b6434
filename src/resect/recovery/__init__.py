"""Training what is left: the only room, with surgery, that writes to a model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resect.recovery.correction import Correction, correct
from resect.recovery.facts import Facts
from resect.recovery.settings import AdapterSettings, Distillation, Mixture, Recovery

if TYPE_CHECKING:
    from resect.recovery.adapter import Adapter
    from resect.recovery.adapting import adapted, deltas, trained
    from resect.recovery.half_space import spent
    from resect.recovery.recovering import Recovered, recover
    from resect.recovery.steps import Steps

__all__ = [
    "Adapter",
    "AdapterSettings",
    "Correction",
    "Distillation",
    "Facts",
    "Mixture",
    "Recovered",
    "Recovery",
    "Steps",
    "adapted",
    "correct",
    "deltas",
    "recover",
    "spent",
    "trained",
]

_LATE = {
    "Adapter": "adapter",
    **dict.fromkeys(("adapted", "deltas", "trained"), "adapting"),
    "spent": "half_space",
    **dict.fromkeys(("Recovered", "recover"), "recovering"),
    "Steps": "steps",
}


def __getattr__(name: str) -> Any:
    """What needs PEFT and the Trainer, which take seconds to import, is imported on first use."""
    if name not in _LATE:
        raise AttributeError(f"module 'resect.recovery' has no attribute {name!r}")
    return getattr(import_module(f"resect.recovery.{_LATE[name]}"), name)
