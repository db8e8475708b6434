"""A cut model as a directory that others can load: through a stock configuration if one says it, else with its code."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from resect.calibration import positions_of
from resect.checkpoint.card import About, card
from resect.checkpoint.record import Record, record_of
from resect.checkpoint.shipped import own_code_refusal, shipped_code
from resect.checkpoint.silence import quiet
from resect.checkpoint.stock import Stock, find_stock, shapes_of
from resect.errors import CheckpointError, UsageError
from resect.evaluation import evaluating
from resect.explain import telling
from resect.files import check_directory, whole_directory
from resect.surgery import modeling_resect
from resect.surgery.adapters import check_merged
from resect.surgery.modeling_resect import removed_blocks, shorten
from resect.surroundings import unaffected

FORMAT = 1


class Jsonable(Protocol):
    """A plan, as far as this room knows."""

    def to_json(self) -> str:
        """Plain JSON."""
        ...


@dataclass(frozen=True)
class Saved:
    """What was written and how it can be loaded."""

    directory: str
    layout: str
    """`uniform`: stock transformers loads it. `per-layer`: with the code beside it, or `resect.load`."""
    model_type: str
    relabelled_from: str | None
    """The dense model's type, where a relative's configuration says what its own refuses."""
    changes: Mapping[str, Any]
    """Fields of the stock configuration that differ from the dense one."""
    reason: str
    """Why no stock configuration was found; empty for `uniform`."""
    difference: float
    """Largest logit difference between the cut model and the written one, relative to the logits' spread."""
    parameters: int


@telling("save the model")
@unaffected()
def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    plan: Jsonable | None = None,
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
    about: About | None = None,
) -> Saved:
    """Writes the cut (or dense) `model`: safetensors, configuration, tokenizer, `plan.json`, `resect.json`, README.

    The directory is whole or not there: it is written beside its place and renamed. What is written is checked first:
    a model built from the configuration and filled with the weights must give the logits of `model`, within rounding.
    The model is not changed. `extra_files` maps relative paths to text, `about` goes into the README. Raises
    `CheckpointError` when `directory` holds something and not `overwrite`, when writing fails, and when no configuration
    reproduces the model.
    """
    inputs = [getattr(model, "name_or_path", None)]
    target = check_directory(directory, overwrite=overwrite, inputs=inputs)
    check_merged(model)
    code = shipped_code(model)
    record = record_of(model)
    _check_tokenizer(model, tokenizer, record)
    written, saved = _loadable(model, record, target)
    readme = card(saved, has_tokenizer=tokenizer is not None, about=about)
    files = {"resect.json": _describe(saved, record), "README.md": readme}
    files |= {"plan.json": plan.to_json()} if plan is not None else {}
    files |= extra_files or {}
    with whole_directory(target, overwrite=overwrite, inputs=inputs) as partial, quiet():
        # Merged experts and the like are stored as they are where no stock code would merge them again.
        written.save_pretrained(partial, save_original_format=saved.layout == "uniform")
        if code is not None:
            code.write(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, text in files.items():
            _write(partial, name, text)
    return saved


def _check_tokenizer(model: PreTrainedModel, tokenizer: Any, record: Record) -> None:
    """Refuses, beside a model whose embedding was cut, a tokenizer that names rows which it has not."""
    table: Any = getattr(model.get_input_embeddings(), "weight", None)
    names = [name for name, parameter in model.named_parameters() if parameter is table]
    if tokenizer is None or not any(name in record["shapes"] for name in names):
        return
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(table):
        raise UsageError(
            f"The tokenizer numbers its tokens up to {highest}; {len(table)} rows of the vocabulary are left. "
            "Save the tokenizer that resect.cut_tokenizer(tokenizer, keep) makes."
        )


def _loadable(model: PreTrainedModel, record: Record, target: Path) -> tuple[PreTrainedModel, Saved]:
    """A model with the weights of `model` whose configuration, saved, gives it back; and how it will load."""
    stock_class: type[PreTrainedModel] = getattr(type(model), "stock_class", type(model))
    config = shortened(model, stock_class, record)
    filled: list[tuple[PreTrainedModel, float]] = []  # of the last proposal accepted

    def accept(stock: Stock) -> str:
        try:
            filled[:] = [_fill(model, stock.config, stock.model_class)]
        except CheckpointError as error:
            return str(error)
        return ""

    stock, reason = None, "single layers keep only some of their rows and columns"
    if not record["gathered"]:
        stock, reason = find_stock(shapes_of(model), config, stock_class, accept=accept)
    if stock is not None:
        written, difference = filled[0]
        layout, relabelled, changes = "uniform", stock.relabelled_from, stock.changes
    else:
        written, difference = _fill(model, *_own_code(config, stock_class, record))
        layout, relabelled, changes = "per-layer", None, {}
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = written.config.model_type
    return written, Saved(str(target), layout, kind, relabelled, changes, reason, difference, count)


def shortened(model: PreTrainedModel, stock_class: type[PreTrainedModel], record: Record) -> PreTrainedConfig:
    """The dense configuration of the model's stock class, with as many layers as are left; `record` is the model's."""
    fields = model.config.to_dict()
    for name in ("resect", "auto_map", "model_type", "quantization_config"):
        fields.pop(name, None)
    assert stock_class.config_class is not None
    config = stock_class.config_class.from_dict(fields)
    config._attn_implementation = model.config._attn_implementation
    path, removed = removed_blocks(record)
    if removed:
        left = len(model.get_submodule(path))  # type: ignore[arg-type]
        shorten(config, removed, blocks=left + len(removed))
    return config


def _own_code(
    config: PreTrainedConfig, stock_class: type[PreTrainedModel], record: Record
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Configuration and class of `modeling_resect.py` for a model that no stock configuration describes."""
    if not hasattr(transformers, stock_class.__name__) or type(config) not in MODEL_MAPPING:
        raise CheckpointError(own_code_refusal(stock_class.__name__))
    bare: Any = MODEL_MAPPING[type(config)]
    names = {
        "AutoConfig": type(config).__name__,
        "AutoModel": bare.__name__,
        "AutoModelForCausalLM": stock_class.__name__,
    }
    prefix = modeling_resect.PREFIX
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    own = getattr(modeling_resect, prefix + names["AutoConfig"]).from_dict({**fields, "resect": record})
    own.auto_map = {auto: f"modeling_resect.{prefix}{name}" for auto, name in names.items()}
    own._attn_implementation = config._attn_implementation
    return own, getattr(modeling_resect, prefix + stock_class.__name__)


def _fill(model: PreTrainedModel, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> tuple[PreTrainedModel, float]:
    """A `model_class` with the weights of `model`, sharing their memory, and how far its logits are off.

    Raises `CheckpointError` when weights and configuration do not fit or the logits differ by more than rounding.
    """
    with quiet():
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=model.state_dict(), dtype=model.dtype, output_loading_info=True
        )
    filled, loading = loaded
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    if wrong:
        raise CheckpointError(f"{wrong[0]} of the cut model has no place under the configuration of {model_class.__name__}")
    filled.to(model.device)
    if model.can_generate():
        filled.generation_config = copy.deepcopy(model.generation_config)
    with _buffers_like(model, filled):
        difference = logit_difference(filled, model)
    allowed = tolerance(model.dtype)
    if not difference <= allowed:
        raise CheckpointError(f"its logits are off by {difference:.1e} of their spread, {allowed:.0e} is allowed")
    return filled, difference


@contextmanager
def _buffers_like(model: PreTrainedModel, filled: PreTrainedModel) -> Iterator[None]:
    """Gives the buffers of `filled` the types they have in `model` for a while.

    `model.to(torch.bfloat16)` rounds rotary frequencies, which loading keeps in float32; that is no fault of the
    checkpoint.
    """
    theirs, kept = dict(model.named_buffers()), []
    for name, buffer in filled.named_buffers():
        if name in theirs and theirs[name].dtype != buffer.dtype:
            kept.append((buffer, buffer.data))
            buffer.data = buffer.data.to(theirs[name].dtype)
    try:
        yield
    finally:
        for buffer, data in kept:
            buffer.data = data


def tolerance(dtype: torch.dtype) -> float:
    """How far logits may be off, relative to their spread, when the same sums are merely ordered differently."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2


def logit_difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest difference of the logits of two models on random tokens, relative to the spread of the second's."""
    found, expected = (logits_of(one, random_tokens(other)) for one in (model, other))
    return relative_difference(found, expected)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over the standard deviation of `expected`; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).abs().max() / expected.double().std().clamp_min(1e-30)
    return float(difference)


def random_tokens(model: PreTrainedModel) -> Tensor:
    """Tokens [2, 24] of the model's vocabulary, or as many as it sees at once, the same every time."""
    generator = torch.Generator().manual_seed(0)
    length = min(24, positions_of(model) or 24)
    return torch.randint(model.config.get_text_config().vocab_size, (2, length), generator=generator)


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of `tokens` in evaluation mode; the model is handed back as it was."""
    with evaluating(model):
        logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits


def _describe(saved: Saved, record: Record) -> str:
    """`resect.json`: how the directory was made."""
    facts = asdict(replace(saved, directory="."))
    del facts["directory"]
    return json.dumps({"format": FORMAT, **facts, "threads": torch.get_num_threads(), "record": record}, indent=1) + "\n"


def _write(directory: Path, name: str, text: str) -> None:
    """A text file at a relative path inside `directory`."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"Asked to write {name!r} into the checkpoint; extra files stay inside it. Give a relative path.")
    path = directory / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
