"""The one call: a model in another format, read back by who will use it, in its place only when that agreed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from resect.calibration import check_vocabulary
from resect.checkpoint import load, load_tokenizer
from resect.checkpoint.card import About, front_matter, tidy
from resect.checkpoint.load import find
from resect.errors import CheckpointError, ModelError, ResectError, UsageError, nearest
from resect.explain import telling
from resect.export import gguf_file, hf, onnx_graph, padded, torch_program
from resect.export.formats import Asked, Format, quantisation, require
from resect.export.hub import push
from resect.export.verification import Verification, verify_artefact
from resect.files import begins, claimed_directory, claimed_file, whole_directory, whole_file
from resect.surgery.adapters import check_merged
from resect.surroundings import unaffected

FORMATS: Mapping[str, Format] = {
    form.name: form for form in (hf.FORMAT, padded.FORMAT, gguf_file.FORMAT, onnx_graph.FORMAT, torch_program.FORMAT)
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Exported:
    """What was written, what its reader said, and where it was pushed."""

    model: str
    format: str
    output: str
    quantize: str
    bytes: int
    facts: Mapping[str, Any]
    """What the format says of itself: architecture, layout, sizes, notes."""
    verification: Verification | None
    """None where it was not verified."""
    pushed: str | None = None
    """Where on the hub it is."""

    def to_json(self) -> str:
        """Plain JSON."""
        return json.dumps({"schema_version": 1, "kind": "export", **asdict(self)}, indent=1) + "\n"


@telling("export the model")
@unaffected()
def export(
    model: PreTrainedModel | str | Path,
    *,
    format: str,
    output: str | Path,
    quantize: str | None = None,
    tokenizer: Any = None,
    dtype: str = "float32",
    overwrite: bool = False,
    verify: bool = True,
    push_to_hub: str | None = None,
    private: bool = True,
    trust_remote_code: bool = False,
    announce: Callable[[str], None] = lambda what: None,
) -> Exported:
    """Writes a pruned (or dense) model as `hf`, `hf-padded`, `gguf`, `onnx` or `pt2`, and has its real reader check it.

    `model` is a model or what `load` takes; of a run directory, its report goes into the model card. `output` is a directory,
    for gguf and pt2 a file. It appears only when the format's reader, in a fresh process, gave the model's log-probabilities.
    `dtype` is what a model that has to be loaded is loaded as. `push_to_hub` names a repository to put it in. Raises `UsageError`
    for a missing package, with the extra that brings it, and for a model that the format cannot take; `CheckpointError` when it
    is read otherwise than it was meant.
    """
    form = _format(format)
    if dtype not in DTYPES:
        raise UsageError(f"Asked for weights as {dtype!r}. {nearest(dtype, DTYPES)}")
    require(form.writers, form.extra, f"Writing {form.name}")
    if verify:
        require(
            form.readers,
            form.extra,
            f"Checking {form.name} in {form.consumer}",
            "Or accept it unchecked: --no-verify, verify=False.",
        )
    chosen = quantisation(form, quantize)
    inputs = [model if isinstance(model, str | Path) else getattr(model, "name_or_path", None)]
    with _claimed(form, output, overwrite, inputs) as target:
        asked = _asked(model, tokenizer, chosen, dtype, trust_remote_code, announce)
        form.check(asked)
        check_vocabulary(asked.model, asked.tokenizer)
        facts, verification = _written(form, asked, target, overwrite=overwrite, verify=verify, announce=announce)
    pushed = None
    if push_to_hub:
        announce(f"push to {push_to_hub}")
        pushed = push(target, push_to_hub, card=_card(asked, form, target.name), private=private)
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    return Exported(name, form.name, str(target), chosen, _bytes(target), facts, verification, pushed)


@contextmanager
def _claimed(form: Format, output: str | Path, overwrite: bool, inputs: list[Any]) -> Iterator[Path]:
    """The place of what will be written, for this process alone."""
    if not form.suffix:
        with claimed_directory(output, overwrite=overwrite, inputs=inputs) as target:
            yield target
        return
    if Path(output).suffix != form.suffix:
        raise UsageError(f"Asked to write {form.name} to {output}; it is one file. Name one that ends in {form.suffix}.")
    with claimed_file(output, overwrite=overwrite, alike=begins(form.magic), inputs=inputs) as target:
        yield target


def _written(
    form: Format, asked: Asked, target: Path, *, overwrite: bool, verify: bool, announce: Callable[[str], None]
) -> tuple[dict[str, Any], Verification | None]:
    """Writes the artefact, and has it read back; facts about it, and what its reader said."""
    said: dict[str, Any] = {}
    verification = None
    with _placed(form, target, overwrite) as partial:
        announce(f"write {form.name}")
        facts = form.write(asked, partial)
        if verify:
            announce(f"read it in {form.consumer}, in a fresh process")
            verification, said = verify_artefact(
                form.consumer,
                partial,
                asked.model,
                form.stored(asked),
                limits=form.limits(asked),
                rounding=lambda stored: form.rounding(asked, stored),
                tokenizer=asked.tokenizer,
                context=facts.get("context_length"),
                shortest=facts.get("shortest", 1),
            )
        if not form.suffix and not (partial / "README.md").exists():
            (partial / "README.md").write_text(_card(asked, form, target.name), encoding="utf-8")
    return {**facts, **said}, verification


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UsageError(f"Asked for the format {name!r}. {nearest(name, FORMATS)}")
    return FORMATS[name]


def _asked(
    model: PreTrainedModel | str | Path,
    tokenizer: Any,
    quantize: str,
    dtype: str,
    trust_remote_code: bool,
    announce: Callable[[str], None],
) -> Asked:
    """The model, its tokenizer and what is known of how it was made."""
    if not isinstance(model, str | Path):
        check_merged(model)
        return Asked(model, tokenizer, quantize)
    announce(f"load {model}")
    about = About.of(model)
    loaded = load(model, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    if tokenizer is None:
        tokenizer = _tokenizer(model, trust_remote_code)
    return Asked(loaded, tokenizer, quantize, about)


def _tokenizer(model: str | Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a model, None where it has none: formats that need one say so. A damaged one is an error."""
    try:
        return load_tokenizer(model, trust_remote_code=trust_remote_code)
    except (CheckpointError, ModelError):
        place = Path(find(model, weights=False).place)
        if any(os.path.lexists(place / name) for name in TOKENIZER_FILES):
            raise
    return None


@contextmanager
def _placed(form: Format, target: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write, renamed when whole; errors speak of the name that was asked for."""
    if form.suffix:
        with whole_file(target, overwrite=overwrite, alike=begins(form.magic)) as partial:
            yield partial
        return
    with whole_directory(target, overwrite=overwrite) as folder:
        partial = folder / "artefact"
        try:
            yield partial
        except ResectError as problem:
            raise type(problem)(str(problem).replace(str(partial), str(target))) from problem
        for entry in partial.iterdir():
            entry.rename(folder / entry.name)
        partial.rmdir()


def _card(asked: Asked, form: Format, name: str) -> str:
    """Markdown for formats that transformers does not load."""
    load_it = {
        "gguf": ["```bash", f"llama-cli -m {name}", "```"],
        "onnx": ["`model.onnx` runs in onnxruntime: `input_ids`, and the keys and values so far, empty at first."],
        "pt2": ["```python", "import torch", "", f'logits = torch.export.load("{name}").module()(input_ids)', "```"],
    }
    library = {"gguf": "gguf", "onnx": "onnx"}.get(form.name)
    lines = [front_matter(asked.about, library), f"# A model with parts removed, as {form.name}", "", *asked.about.lines(), ""]
    return tidy([*lines, *load_it.get(form.name, []), ""])


def _bytes(target: Path) -> int:
    files = target.rglob("*") if target.is_dir() else [target]
    return sum(file.stat().st_size for file in files if file.is_file())
