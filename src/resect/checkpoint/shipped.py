"""A model with code of its own (`trust_remote_code`): its files are saved with it, and named in its configuration."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_relative_import_files

from resect.checkpoint.configuration import read_configuration
from resect.files import reading
from resect.surgery.modeling_resect import PREFIX


@dataclass(frozen=True)
class ShippedCode:
    """The modules of a model's own code, and under which names transformers finds its classes in them."""

    auto_map: Mapping[str, Any]
    files: tuple[Path, ...]

    def write(self, directory: Path) -> None:
        """Puts the files into a directory that was saved, and the whole `auto_map` into its config.json."""
        for file in self.files:
            shutil.copyfile(file, directory / file.name)
        config = directory / "config.json"
        fields = read_configuration(config)
        auto_map = {**self.auto_map, **(fields.get("auto_map") or {})}
        text = json.dumps({**fields, "auto_map": auto_map}, indent=2, sort_keys=True)
        config.write_text(text + "\n", encoding="utf-8")


def shipped_code(model: Any) -> ShippedCode | None:
    """The code that a model brought along; None for classes of transformers, and for those that resect makes of them."""
    kind = type(model)
    if not has_own_code(kind):
        return None
    auto_map = dict(getattr(model.config, "auto_map", None) or {})
    folder = Path(str(sys.modules[kind.__module__].__file__)).parent
    with reading(f"the code of {kind.__name__} in {folder}"):
        found, named = dict[str, Path](), dict[str, Any]()
        for auto, reference in auto_map.items():
            plain = _plain(reference)
            modules = {str(one).partition(".")[0] for one in (plain if isinstance(plain, list) else [plain]) if one}
            paths = [folder / f"{module}.py" for module in modules]
            if not all(path.is_file() for path in paths):
                named[auto] = reference  # stays where it is on the hub
                continue
            named[auto] = plain
            for path in paths:
                found |= {one.name: Path(one) for one in (path, *map(Path, get_relative_import_files(path)))}
    return ShippedCode(named, tuple(found[name] for name in sorted(found)))


def has_own_code(kind: type) -> bool:
    """Whether a class was loaded from files beside a checkpoint, and is not one that resect makes of transformers' own."""
    known = hasattr(transformers, kind.__name__.removeprefix(PREFIX))
    return kind.__module__.partition(".")[0] == "transformers_modules" and not known


def _plain(reference: Any) -> Any:
    """A reference to a class without the repository that it came from: its file comes along."""
    if isinstance(reference, list | tuple):
        return [_plain(one) for one in reference]
    return None if reference is None else str(reference).rpartition("--")[2]


def own_code_refusal(name: str) -> str:
    """Why a model with code of its own cannot have layers of different sizes."""
    return (
        f"{name} is code of the model's own, and layers of different sizes are only saved for classes of transformers. "
        "Ask for layout=uniform."
    )
