"""What surrounds this process: other processes that train along, variables that would change results, and children of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resect.errors import ResectWarning, UsageError, shown

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and accelerate launch give each of several processes."""
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")
MPI = tuple(
    f"{launcher}_{what}"
    for launcher in ("OMPI_COMM_WORLD", "PMI", "MV2_COMM_WORLD")
    for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
)
"""Variables by which accelerate would take a process for one of several."""
PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "DEEPSPEED_", "XLA_USE_")
"""Settings of accelerate, which the recipe makes instead."""
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
NEUTRAL = ("", "no", "false", "0", "none", "off")
STARTED = tuple(
    f"ACCELERATE_{what}" for what in ("DEBUG_MODE", "DISABLE_RICH", "CONFIG_FILE", "LOG_LEVEL", "CPU_AFFINITY", "USE_CPU")
)
"""Of accelerate's, those that change no result: the recipe names the device."""
PRECISION = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""Variables by which products of float32 matrices are computed in fewer bits."""


@dataclass(frozen=True)
class Processes:
    """Processes that train together."""

    count: int = 1
    rank: int = 0
    """The number of this one, from 0."""
    local: int | None = None
    """Its number on this machine; None where it is alone."""

    @property
    def main(self) -> bool:
        """Whether this one writes files, and warns."""
        return self.rank == 0


def processes() -> Processes:
    """The processes that torchrun or accelerate launch started, this one among them.

    `RANK` counts only together with a `WORLD_SIZE` of more than 1. Raises `UsageError` for numbers that are none, and for
    more than one process where what they need to find each other is missing.
    """
    count = _number("WORLD_SIZE", 1)
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if count < 1:
        raise UsageError(f"WORLD_SIZE={count} is set in the environment; it is a number of processes. Unset it.")
    if count == 1:
        return Processes()
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE={count} is set in the environment, as for several processes that train together, but not "
            f"{', '.join(missing)}. Start them with torchrun, which sets all of them, or unset WORLD_SIZE."
        )
    if not 0 <= rank < count:
        raise UsageError(f"RANK={rank} is set in the environment; WORLD_SIZE={count} processes are numbered from 0. Unset both.")
    return Processes(count, rank, local)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"{name}={shown(text)} is set in the environment; a whole number was expected. Unset it, or start with torchrun."
        ) from None


@contextmanager
def recipe_decides(*, bf16: bool) -> Iterator[None]:
    """In the block no variable of launchers or of accelerate reaches the Trainer: the settings of the training count.

    Those that would have changed the result are named in a `ResectWarning`. Raises `UsageError` for weights that are to be
    split among processes, which this training does not do.
    """
    for name in SHARDED:
        if os.environ.get(name, "").lower() not in NEUTRAL:
            raise UsageError(
                f"{name}={shown(os.environ[name])} is set in the environment, which splits the weights among "
                "processes. Recovery keeps them whole in each. Unset it, or start with torchrun."
            )
    together = processes()
    hidden = {name: value for name, value in os.environ.items() if name in MPI or name.startswith(PREFIXES)}
    if together.count == 1:
        hidden |= {name: os.environ[name] for name in LAUNCHERS if name in os.environ}
    ignored = [name for name, value in sorted(hidden.items()) if _contradicts(name, value, bf16=bf16)]
    if ignored and together.main:
        named = ", ".join(f"{name}={shown(os.environ[name], 40)}" for name in ignored)
        warnings.warn(ResectWarning(f"The environment has {named}; the recipe decides, and this is ignored."), stacklevel=3)
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        for name in [name for name in os.environ if name in MPI or name.startswith(PREFIXES)]:
            del os.environ[name]  # what the Trainer noted there
        os.environ.update(hidden)


def _contradicts(name: str, value: str, *, bf16: bool) -> bool:
    """Whether a variable asks for something else than what the recipe says."""
    if name in STARTED or name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"):
        return False
    if name.endswith(("_SIZE", "GRADIENT_ACCUMULATION_STEPS")):
        return value.strip() not in ("", "1")
    if name == "ACCELERATE_MIXED_PRECISION":
        return value.lower() not in (("bf16",) if bf16 else NEUTRAL)
    return value.lower() not in NEUTRAL


def tell_precision() -> None:
    """Warns of variables by which libraries compute in fewer bits than the recipe says."""
    said = [name for name in PRECISION if os.environ.get(name, "").lower() not in (*NEUTRAL, "strict")]
    if said:
        named = ", ".join(f"{name}={shown(os.environ[name], 40)}" for name in said)
        warnings.warn(
            ResectWarning(f"The environment has {named}: products of float32 matrices may be computed in fewer bits, with other "
            "results. Unset it for results that can be repeated elsewhere."),
            stacklevel=3,
        )  # fmt: skip


def python(*words: str, variables: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with these words in a process of its own, and waits for its end.

    It imports what this process can, but nothing from the working directory: `-P`, no relative entry on its path, and
    `folder`, which holds nothing of strangers, to work in. `variables` are added to its environment.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(import_path()), "PYTHONSAFEPATH": "1"} | dict(variables)
    command = [sys.executable, "-P", *words]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    return subprocess.run(command, env=environment, cwd=folder, check=False, **streams)


def import_path() -> Sequence[str]:
    """Where a child looks for modules: fixed places on this process's path, where resect lies among them."""
    here = str(Path(__file__).resolve().parents[1])
    entries = [entry for entry in sys.path if entry == here or not _of_working_directory(entry)]
    return entries if here in entries else [here, *entries]


def _of_working_directory(entry: str) -> bool:
    """Whether an entry of a path stands for the working directory, or depends on it."""
    if not os.path.isabs(entry):
        return True
    try:
        return os.path.samefile(entry, os.getcwd())
    except OSError:
        return False
