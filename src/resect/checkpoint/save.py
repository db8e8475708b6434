"""A cut model as a directory that others can load: through a stock configuration if one says it, else with its code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from resect.calibration import positions_of
from resect.checkpoint.card import About, card
from resect.checkpoint.example import Inputs, difference_between, example_of, relative_difference
from resect.checkpoint.plain import save_plain
from resect.checkpoint.precision import settle_dtype, storage_of
from resect.checkpoint.record import Record, record_of
from resect.checkpoint.saved import Jsonable, Saved, describe, write_text
from resect.checkpoint.shipped import own_code_refusal, shipped_code
from resect.checkpoint.silence import quiet
from resect.checkpoint.stock import Stock, find_stock, shapes_of
from resect.errors import CheckpointError, OtherLayout, UsageError
from resect.evaluation import evaluating
from resect.explain import telling
from resect.files import check_directory, read_text, whole_directory
from resect.surgery import embedding_table, modeling_resect
from resect.surgery.adapters import check_merged
from resect.surgery.modeling_resect import auto_classes, removed_by_list, shorten
from resect.surroundings import unaffected

PROCESSOR_FILES = tuple(
    f"{name}_config.json" for name in ("preprocessor", "processor", "image_processor", "video_preprocessor", "feature_extractor")
)
"""What transformers calls the settings by which images, films and sound are prepared for a model."""


@telling("save the model")
@unaffected()
def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    plan: Jsonable | None = None,
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
    about: About | None = None,
    inputs: Any = None,
    dtype: torch.dtype | None = None,
) -> Saved:
    """Writes the cut (or dense) `model`: safetensors, configuration, tokenizer, `plan.json`, `resect.json`, README.

    The directory is whole or not there: it is written beside its place and renamed. What is written is checked first:
    a model built from the configuration and filled with the weights must give the logits of `model`, within rounding.
    The model is not changed. `extra_files` maps relative paths to text, `about` goes into the README. `inputs` are what the
    model is called with, like those of `resect.trace`; none are needed after a cut, nor for models of tokens alone.
    Weights are stored in `dtype`; by default in the type of the checkpoint that `load` read, where that is narrower than the
    model's own. Settings of processors beside the weights that the model was read from, in a local directory, are kept.
    A network that is no `PreTrainedModel` is written as its weights, the plan and what was cut: `load_into` gives them to a
    dense one that the caller builds. Raises
    `CheckpointError` when `directory` holds something and not `overwrite`, when writing fails, and when no configuration
    reproduces the model.
    """
    sources = [getattr(model, "name_or_path", None)]
    target = check_directory(directory, overwrite=overwrite, inputs=sources)
    check_merged(model)
    if not isinstance(model, PreTrainedModel):
        return save_plain(model, target, plan=plan, overwrite=overwrite, extra_files=extra_files, inputs=inputs)
    code = shipped_code(model)
    record = record_of(model)
    _check_tokenizer(model, tokenizer, record)
    written, saved = _loadable(model, record, target, example_of(model, inputs))
    _tell_layout(saved, plan)
    readme = card(saved, has_tokenizer=tokenizer is not None, about=about)
    files = {"resect.json": describe(saved, record), "README.md": readme}
    files |= {"plan.json": plan.to_json()} if plan is not None else {}
    files |= _processor_files(model) | dict(extra_files or {})
    with whole_directory(target, overwrite=overwrite, inputs=sources) as partial, quiet():
        stored = dtype or storage_of(model)
        if stored != model.dtype:
            settle_dtype(written, stored)
        # Merged experts and the like are stored as they are where no stock code would merge them again.
        written.save_pretrained(partial, save_original_format=saved.layout == "uniform")
        if code is not None:
            code.write(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, text in files.items():
            write_text(partial, name, text)
    return saved


def _tell_layout(saved: Saved, plan: Any) -> None:
    """Warns where a uniform layout was asked for and another one is written."""
    asked = (getattr(plan, "notes", None) or {}).get("layout")
    if asked == "uniform" and saved.layout != asked:
        warnings.warn(
            OtherLayout(
                f"layout=uniform was asked for, and no stock configuration describes what was cut ({saved.reason}). The model "
                "is written with code beside it, and loads with resect.load or with remote code trusted."
            ),
            stacklevel=4,
        )


def _processor_files(model: PreTrainedModel) -> dict[str, str]:
    """What says how images and sound are prepared, beside the weights that a model was read from."""
    source = Path(model.name_or_path) if model.name_or_path else None
    names = PROCESSOR_FILES if source is not None and source.is_dir() else ()
    what = "the settings of a processor"
    return {name: read_text(source / name, what=what) for name in names if source and (source / name).is_file()}


def _check_tokenizer(model: PreTrainedModel, tokenizer: Any, record: Record) -> None:
    """Refuses, beside a model whose embedding was cut, a tokenizer that names rows which it has not."""
    table = embedding_table(model)
    names = [name for name, parameter in model.named_parameters() if parameter is table]
    if tokenizer is None or table is None or not any(name in record["shapes"] for name in names):
        return
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(table):
        raise UsageError(
            f"The tokenizer numbers its tokens up to {highest}; {len(table)} rows of the vocabulary are left. "
            "Save the tokenizer that resect.cut_tokenizer(tokenizer, keep) makes."
        )


def _loadable(
    model: PreTrainedModel, record: Record, target: Path, inputs: Inputs
) -> tuple[PreTrainedModel, Saved]:
    """A model with the weights of `model` whose configuration, saved, gives it back; and how it will load."""
    stock_class: type[PreTrainedModel] = getattr(type(model), "stock_class", type(model))
    config = shortened(model, stock_class, record)
    filled: list[tuple[PreTrainedModel, float]] = []  # of the last proposal accepted

    def accept(stock: Stock) -> str:
        try:
            filled[:] = [_fill(model, stock.config, stock.model_class, inputs)]
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
        written, difference = _fill(model, *_own_code(config, stock_class, record), inputs)
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
    for path, removed in removed_by_list(record).items():
        left = len(model.get_submodule(path))  # type: ignore[arg-type]
        shorten(config, removed, blocks=left + len(removed), path=path)
    return config


def _own_code(
    config: PreTrainedConfig, stock_class: type[PreTrainedModel], record: Record
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Configuration and class of `modeling_resect.py` for a model that no stock configuration describes."""
    if not hasattr(transformers, stock_class.__name__) or type(config) not in MODEL_MAPPING:
        raise CheckpointError(own_code_refusal(stock_class.__name__))
    names = {"AutoConfig": type(config).__name__, **auto_classes(type(config), stock_class)}
    prefix = modeling_resect.PREFIX
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    own = getattr(modeling_resect, prefix + names["AutoConfig"]).from_dict({**fields, "resect": record})
    own.auto_map = {auto: f"modeling_resect.{prefix}{name}" for auto, name in names.items()}
    own._attn_implementation = config._attn_implementation
    return own, getattr(modeling_resect, prefix + stock_class.__name__)


def _fill(
    model: PreTrainedModel, config: PreTrainedConfig, model_class: type[PreTrainedModel], inputs: Inputs
) -> tuple[PreTrainedModel, float]:
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
        difference = difference_between(filled, model, inputs)
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
