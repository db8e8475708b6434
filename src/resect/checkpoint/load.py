"""Any model by name: a hub id, a directory, a GGUF file, the demo, or what resect wrote; never from pickled weights."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from resect.checkpoint.configuration import (
    check_causal,
    check_fields,
    check_positive,
    check_sizes,
    forget_prediction_heads,
    prediction_heads,
    read_configuration,
)
from resect.checkpoint.gguf_reading import (
    TABLES,
    check_header,
    check_vocabulary_size,
    plain_weights,
    pre_tokenizer_name,
    read_once,
    token_count,
)
from resect.checkpoint.precision import blocks_as_said, note_storage, settle_dtype
from resect.checkpoint.record import check_record
from resect.checkpoint.silence import quiet
from resect.checkpoint.source import DEMO, Source, adapted, find, nearest_local, pickled
from resect.checkpoint.stock import shapes_of
from resect.checkpoint.weights import (
    INDEX,
    SINGLE,
    Shapes,
    check_complete,
    check_index,
    check_room,
    check_types,
    computed,
    conversion_errors,
    listed,
    shapes_in,
    weight_files,
)
from resect.errors import CheckpointError, ModelError, NumericsError, ResectError, ResectWarning
from resect.explain import is_of_memory, telling
from resect.files import reading
from resect.surgery import modeling_resect
from resect.surroundings import unaffected

__all__ = ["DEMO", "Source", "check_finite", "find", "load", "load_tokenizer", "skeleton"]

GENERATION = "generation_config.json"
Check = Callable[[PreTrainedModel], None]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
SHOWN = 600
"""Characters of a foreign message that are repeated."""


@telling("load the model")
@unaffected()
def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    check: Check | None = None,
) -> PreTrainedModel:
    """The causal language model that `name` stands for, in evaluation mode.

    A hub id, a local directory, a `.gguf` file (dequantised), `demo`, or a directory that resect wrote (its own code
    is not used: ours is). `dtype` is what it computes in; `save` stores it in the type of the checkpoint. `check` sees the
    model without its weights, on the meta device, before these are read; what it raises ends the loading. Raises `ModelError`
    for an unknown name, `CheckpointError` for pickled or missing weights, `NumericsError` for weights that are not finite.
    """
    source = find(name)
    with quiet(), read_once():
        model = _asked(source, lambda: _read(source, dtype, trust_remote_code, check))
        settle_dtype(model, dtype)
        if not source.gguf:
            note_storage(model, _fields(source))
    check_finite(model)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


@telling("read the model's configuration")
@unaffected("shapes")
def skeleton(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `name` stands for on the meta device: shapes only, no weights are read or needed."""
    source = find(name, weights=False)
    with quiet(), read_once():
        config = _asked(source, lambda: _config(source, trust_remote_code))
        model: PreTrainedModel = _asked(source, lambda: _empty(source, config, trust_remote_code)).eval()
        _check_beside_weights(source, model)
    return model


@telling("load the tokenizer")
def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to `name`, which means what it means to `load`."""
    source = find(name, weights=False)
    options: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    options["trust_remote_code"] = trust_remote_code and not source.gguf  # False: None would ask on the terminal
    if source.local and not source.gguf:
        _check_whole(Path(source.place))
    with quiet(), read_once():
        tokenizer = _asked(source, lambda: AutoTokenizer.from_pretrained(source.place, **options), what="tokenizer")
        if source.gguf:
            _forget_added_tokens(tokenizer, Path(source.place) / source.gguf)
            _restore_pre_tokenizer(tokenizer, Path(source.place) / source.gguf)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"The tokenizer of {source.asked!r} has the length {str(tokenizer.model_max_length)[:100]!r} "
            "(model_max_length in tokenizer_config.json); it should be a number."
        )
    return tokenizer


def _check_whole(directory: Path) -> None:
    """Refuses files of a tokenizer that are links to nothing, directories or pipes: they would be passed over in silence."""
    for name in TOKENIZER_FILES:
        file = directory / name
        if os.path.lexists(file) and not file.is_file():
            raise CheckpointError(f"{file} is no file that can be read (a directory, a pipe, or a link to nothing).")


@unaffected()
def check_finite(model: torch.nn.Module) -> None:
    """Raises `NumericsError` naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            continue  # the sum of anything not finite is not finite; the other way round only overflow is
        wrong = int((~torch.isfinite(parameter)).sum())
        if wrong:
            raise NumericsError(
                f"{name} holds {wrong} values of {parameter.numel()} that are NaN or infinite. "
                "The checkpoint is damaged, or was stored in a type too narrow for it: "
                "get another copy, or convert it to bfloat16 or float32."
            )


def _asked(source: Source, read: Any, *, what: str = "model") -> Any:
    """What `read` gives; whatever is raised against it as an error of ours."""
    try:
        return read()
    except (ResectError, MemoryError):
        raise
    except Exception as error:
        if is_of_memory(error):
            raise
        said = conversion_errors(error) or " ".join(str(error).split()) or type(error).__name__
        if "pytorch_model.bin" in said or "safetensors" in said and not source.local:
            raise pickled(source.asked, "no safetensors file on the hub") from error
        if source.local:
            raise CheckpointError(
                f"Asked for the {what} of {source.asked!r}; it cannot be loaded: {said[:SHOWN]}"
            ) from error
        raise ModelError(
            f"Asked for the {what} {source.asked!r}; it is no local path, and the hub does not give it. "
            f"{nearest_local(Path(source.asked))} The hub said: {said[:SHOWN]}"
        ) from error


def _read(source: Source, dtype: torch.dtype, trust_remote_code: bool, check: Check | None) -> PreTrainedModel:
    """The model with its weights, once its configuration and the headers of its files agree with each other."""
    fields = _fields(source)
    config = _config(source, trust_remote_code, weights=True)
    _check_beside(source)
    stored = _stored_shapes(source, fields)
    heads = list[str]()
    if stored is not None:
        empty = _empty(source, config, trust_remote_code)
        check_room(empty, stored, source.asked, packed=_is_packed(source, fields))
        _check_unseen(source, config, empty, trust_remote_code)
        heads = _further_heads(config, stored)
        if check is not None:
            check(empty)
        del empty
    with blocks_as_said(fields.get("quantization_config")):
        model, report = _loaded(source, config, dtype, trust_remote_code)
    _read_generation(source, model)
    if check is not None and stored is None:
        check(model)
    if heads or prediction_heads(config):
        _warn_of_heads(source, heads)
        forget_prediction_heads(model.config)
    superfluous = [name for name in report["unexpected_keys"] if source.gguf and name in TABLES]
    superfluous += computed(report["unexpected_keys"], stored or {})
    check_complete(model, report, source.asked, ignored=[*heads, *superfluous])
    _settle_ties(source, model)
    return model


def _settle_ties(source: Source, model: PreTrainedModel) -> None:
    """The configuration says that the words' tables are two where the files hold two: transformers keeps both then."""
    text = model.config.get_text_config()
    if not getattr(text, "tie_word_embeddings", False) or not getattr(model, "_tied_weights_keys", None):
        return
    rows, head = (getattr(one, "weight", None) for one in (model.get_input_embeddings(), model.get_output_embeddings()))
    if rows is None or head is None or rows is head or rows.shape != head.shape:
        return
    text.tie_word_embeddings = model.config.tie_word_embeddings = False
    warnings.warn(
        f"The configuration of {source.asked} says that embedding and language head are one table "
        "(tie_word_embeddings), and its files hold two that differ. Both are kept, and what is saved says so.",
        ResectWarning,
        stacklevel=2,
    )


def _loaded(
    source: Source, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as transformers loads it, and what its loader says about the tensors."""
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    made: Any
    if source.gguf:
        options |= plain_weights()
        made = AutoModelForCausalLM.from_pretrained(
            source.place, gguf_file=source.gguf, trust_remote_code=False, **options
        )
    elif source.own_code:
        made = _own_class(source).from_pretrained(source.place, use_safetensors=True, **options)
    else:
        options |= {"config": config, "trust_remote_code": trust_remote_code}
        made = AutoModelForCausalLM.from_pretrained(source.place, use_safetensors=True, **options)
    model, report = made
    assert isinstance(model, PreTrainedModel)
    return model, report


def _fields(source: Source) -> dict[str, Any]:
    """What the config.json of a model says; empty for a GGUF file."""
    return read_configuration(_file(source)) if not source.gguf else {}


def _file(source: Source) -> Path:
    """The file that says what the model is: a GGUF file, or a config.json, in the hub's cache for a name on the hub."""
    if source.gguf:
        return Path(source.place) / source.gguf
    if source.local:
        return Path(source.place) / "config.json"
    return Path(cached_file(source.place, "config.json"))  # type: ignore[arg-type]


def _stored_shapes(source: Source, fields: Mapping[str, Any]) -> Shapes | None:
    """The shapes in the headers of the model's files; None where these are on the hub still."""
    if source.gguf:
        return check_header(_file(source))
    if source.local:
        return _plain_shapes(weight_files(Path(source.place), fields), fields)
    if find_adapter_config_file(source.place) is not None:
        raise adapted(source.asked, Path(cached_file(source.place, "adapter_config.json")))  # type: ignore[arg-type]
    return _shapes_on_the_hub(source, fields)


def _shapes_on_the_hub(source: Source, fields: Mapping[str, Any]) -> Shapes | None:
    """Fetches the weights as transformers does, into the hub's cache; None where they are named otherwise."""
    files = dict[str, Path]()
    for name in (str(fields.get("transformers_weights") or SINGLE), INDEX):
        found = cached_file(source.place, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            files[name] = Path(found)
            break
    if INDEX in files:
        for name in check_index(files[INDEX]):
            cached_file(source.place, name)
    return _plain_shapes(weight_files(next(iter(files.values())).parent, fields), fields) if files else None


def _plain_shapes(files: Sequence[Path], fields: Mapping[str, Any]) -> Shapes:
    """The shapes in some files, whose weights are numbers unless a `quantization_config` tells what they are."""
    if not fields.get("quantization_config"):
        check_types(files)
    return shapes_in(files)


def _config(source: Source, trust_remote_code: bool, *, weights: bool = False) -> Any:
    """The configuration of a model, checked before and after transformers read it. Whether its `weights` will be compared."""
    file = _file(source)
    if source.gguf:
        shapes = check_header(file)
        config: Any = AutoConfig.from_pretrained(source.place, gguf_file=source.gguf, trust_remote_code=False)
        check_positive(config, file)
        check_vocabulary_size(config, shapes, file)
        return config
    fields = _fields(source)
    check_fields(fields, file, trust_remote_code=trust_remote_code or source.own_code)
    check_causal(fields, file)
    with reading(f"the configuration {file}"):
        if source.own_code:
            check_record(fields.get("resect") or {}, str(file))
            config_class = _own_class(source).config_class
            assert config_class is not None
            config = config_class.from_pretrained(source.place)
        else:
            config = AutoConfig.from_pretrained(source.place, trust_remote_code=trust_remote_code)
    # The sizes that weights tell are compared with theirs.
    check_sizes(config, fields, file, weights=weights)
    storage = fields.get("quantization_config")
    if isinstance(storage, dict) and storage.get("quant_method") == "fp8":
        config.quantization_config = {**storage, "dequantize": True}
    return config


def _check_unseen(source: Source, config: PreTrainedConfig, empty: nn.Module, trust_remote_code: bool) -> None:
    """Refuses sizes that nobody wrote down where other ones would give weights of the same shapes."""
    if source.gguf:
        return
    for name in check_sizes(config, _fields(source), _file(source), weights=True):
        other = copy.deepcopy(config)
        text = other.get_text_config()
        setattr(text, name, 2 * getattr(text, name))
        try:
            same = shapes_of(_empty(source, other, trust_remote_code)) == shapes_of(empty)
        except Exception:  # the network cannot be built with another number, so its other sizes tell this one
            same = False
        if same:
            written = text.attribute_map.get(name, name)
            raise CheckpointError(
                f"{_file(source)} does not say {written}, and the weights do not tell it. "
                "Nothing is assumed about sizes: write it there."
            )


def _check_beside_weights(source: Source, empty: PreTrainedModel) -> None:
    """Refuses a shape of a model that is far larger than the weights beside it, where there are any that can be read."""
    if not source.local:
        return
    fields = _fields(source)
    try:
        stored = check_header(_file(source)) if source.gguf else shapes_in(weight_files(Path(source.place), fields))
    except CheckpointError:
        return
    check_room(empty, stored, source.asked, packed=_is_packed(source, fields))


def _is_packed(source: Source, fields: Mapping[str, Any]) -> bool:
    """Whether one element of what is stored may hold several weights."""
    return not source.gguf and bool(fields.get("quantization_config"))


def _check_beside(source: Source) -> None:
    """Reads what transformers would pass over in silence where it is damaged."""
    if _has_generation(source):
        read_configuration(Path(source.place) / GENERATION)


def _read_generation(source: Source, model: PreTrainedModel) -> None:
    """Reads the settings of generation once more: transformers takes others, in silence, where a disk fails at them."""
    if _has_generation(source) and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(source.place)


def _has_generation(source: Source) -> bool:
    return source.local and not source.gguf and os.path.lexists(Path(source.place) / GENERATION)


def _further_heads(config: PreTrainedConfig, stored: Shapes) -> list[str]:
    """The tensors of layers behind the last one, which predict further tokens, and of modules that are called `mtp`."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = [name for name in stored if re.search(r"(^|\.)mtp\.", name)]
    if isinstance(layers, int) and prediction_heads(config):
        numbered = [(name, re.search(r"(^|\.)(layers|blk)\.(\d+)\.", name)) for name in stored]
        found += [name for name, match in numbered if match and int(match[3]) >= layers and name not in found]
    return sorted(found)


def _warn_of_heads(source: Source, heads: Sequence[str]) -> None:
    what = f" ({len(heads)} tensors: {listed(heads)})" if heads else ""
    warnings.warn(
        f"The model {source.asked} has heads that predict further tokens{what}. Transformers runs none of them: "
        "they are left out, and what is saved has none.",
        ResectWarning,
        stacklevel=2,
    )


def _empty(source: Source, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model of the configuration on the meta device. The configuration is copied."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if source.own_code:
            return _own_class(source)(config)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return made


def _own_class(source: Source) -> type[PreTrainedModel]:
    """The class of our `modeling_resect` that a per-layer directory names."""
    names = _fields(source).get("architectures") or [""]
    name = str(names[0])[:200]
    made = getattr(modeling_resect, name, None) if name.startswith(modeling_resect.PREFIX) else None
    if not (isinstance(made, type) and issubclass(made, PreTrainedModel)):
        raise CheckpointError(
            f"Asked for the model {source.asked!r}; this version of transformers has no class for its {name!r}."
        )
    return made


def _forget_added_tokens(tokenizer: Any, path: Path) -> None:
    """Takes out the tokens that transformers adds behind those of a GGUF file, where its converter misses its own."""
    count = token_count(path)
    if not count or max(tokenizer.get_added_vocab().values(), default=0) < count:
        return
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(document))


def _restore_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    """Puts back what transformers drops of a GGUF's pre-tokenizer: SmolLM2 takes digits one by one, before all else."""
    if pre_tokenizer_name(path) == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
