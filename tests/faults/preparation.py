"""What makes forks quick: all modules are imported before, and one thread does the work."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from tests.faults.children import forked


def quiet_process() -> None:
    """One thread, no hub, no progress bars; before torch and tokenizers are imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_DISABLE": "1",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    import torch

    torch.set_num_threads(1)


def imported_before(function: Callable[[], Any], *, seconds: float = 300) -> Any:
    """Calls a function in a child, imports here what it has imported there, and gives back what it returned."""

    def modules() -> tuple[list[str], Any]:
        found = function()
        return [
            name
            for name in sys.modules
            if name.partition(".")[0] not in ("__main__", "tests", "pytest")
        ], found

    ended = forked(modules, seconds=seconds)
    if ended.how != "returned":
        raise AssertionError(f"{ended.how}: {ended.value}")
    names, found = ended.value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if name not in sys.modules:
                try:
                    importlib.import_module(name)
                except (
                    Exception
                ):  # a module that is made while others run; the children make it themselves
                    continue
    return found
