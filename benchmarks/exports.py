"""Round trips: every family, layout and format, each artefact read by its real reader in a fresh process, beside torch.

    python benchmarks/exports.py                      # everything, a quarter of an hour on a busy core
    python benchmarks/exports.py --families llama     # some of it
    python benchmarks/exports.py --formats gguf

The models are small, with weights drawn so that predictions are far from even; heads and channels are removed, as many in every
layer (uniform) or other numbers in each (per-layer), or the middle block (depth), or a third of the residual channels (width).
`difference` is the largest difference of log-probabilities, in nats,
between the reader and torch with the weights as the artefact stores them, `divergence` the mean Kullback-Leibler divergence from
the same, and `cost` from the weights as they were. `agreement` is the share of greedily continued tokens, written with the
reader's cache where it has one, that torch would have chosen. A row without figures says why there is no such artefact.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from record import environment, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import resect
from resect.errors import ResectError
from resect.export import padded
from resect.plan import Kept, Plan

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 160, "num_hidden_layers": 3}
FORMATS = {
    "gguf": ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"),
    "gguf of hf-padded": ("f32",),
    "hf": ("none", "int8"),
    "onnx": ("none",),
    "hf-padded": ("none",),
    "pt2": ("none",),
}
SUFFIXES = {"gguf": ".gguf", "pt2": ".pt2"}
NEEDED = {"gguf": "xllamacpp", "gguf of hf-padded": "xllamacpp", "onnx": "onnxruntime", "int8": "torchao"}
"""Packages of the readers."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with three merges."""
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    made = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model(family: str, **fields: Any) -> PreTrainedModel:
    """A small model with weights drawn from seed 0, no two predictions alike."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=262, max_position_embeddings=96, **TOKENS, **{**COMMON, **fields}
    )
    made: PreTrainedModel = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            table = 0.1 if family.startswith("Gemma") else 0.4  # Gemma scales it up
            spread = 0.2 if parameter.dim() < 2 else table if "emb" in name or "wte" in name else 1.5 / parameter.shape[-1] ** 0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") and not family.startswith("Gemma") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + offset)
    return made


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: model("Llama"),
    "llama, tied, biases": lambda: model("Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": lambda: model("Mistral", sliding_window=16),
    "qwen2": lambda: model("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: model("Qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3, untied": lambda: model("Qwen3", head_dim=16),
    "gemma2": lambda: model("Gemma2", head_dim=16, query_pre_attn_scalar=20, sliding_window=12),
    "gpt2": lambda: model("GPT2", n_inner=160),
    "gpt2, heads whole": lambda: model("GPT2", n_inner=160),
}


KINDS = {"gpt2, heads whole": ("channels",)}
"""What is removed instead of heads and channels."""
NARROW = (("gguf", "f32"), ("gguf", "q8_0"), ("hf", "none"), ("onnx", "none"))
"""Where models that lost a block or residual channels are tried too."""


def pruned(dense: PreTrainedModel, layout: str, kinds: tuple[str, ...]) -> PreTrainedModel:
    """The model without what the layout says."""
    graph = resect.trace(dense)
    groups = {}
    for group in graph.of_kind(*{"depth": ("blocks",), "width": ("residual",)}.get(layout, kinds)):
        layer = group.layer or 0
        gone = {
            "uniform": {"heads": group.units // 3, "channels": 32},
            "per-layer": {"heads": layer, "channels": 40 * (layer + 1)},
            "depth": {"blocks": int(layer == 1)},
            "width": {"residual": group.units // 3},
        }[layout][group.kind]
        keep = tuple(range(gone, group.units))
        groups[group.name] = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=keep)
    resect.cut(dense, Plan(groups=groups), graph)
    return dense


def rows(families: list[str], formats: list[str]) -> Iterator[dict[str, Any]]:
    """A row for everything that is tried; variants of a family are tried as GGUF only, where they matter."""
    layouts = [(family, layout) for family in families for layout in ("uniform", "per-layer", "depth", "width")]
    models = {
        (family, layout): pruned(FAMILIES[family](), layout, KINDS.get(family, ("heads", "channels")))
        for family, layout in layouts
    }
    for form, quantize in [(one, kind) for one in formats for kind in FORMATS[one]]:
        if any(importlib.util.find_spec(NEEDED[one]) is None for one in (form, quantize) if one in NEEDED):
            continue
        for (family, layout), small in models.items():
            wanted = layout in ("uniform", "per-layer") or (form, quantize) in NARROW and "," not in family
            if wanted and ("," not in family or "gguf" in form):
                yield {"format": form, "weights": quantize, "family": family, "layout": layout, **tried(small, form, quantize)}


def tried(small: PreTrainedModel, form: str, quantize: str) -> dict[str, Any]:
    """What came of one export."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if form.endswith("hf-padded"):
                small, form = padded(small)[0], form.split()[0]
            found = resect.export(
                small, format=form, output=Path(folder, f"out{SUFFIXES.get(form, '')}"), quantize=quantize, tokenizer=tokenizer()
            )
        except ResectError as problem:
            return {"as": f"no: {problem}"}
    seen = found.verification
    assert seen is not None
    return {
        "as": found.facts.get("architecture") or found.facts.get("layout") or form,
        "difference": seen.difference,
        "divergence": seen.divergence,
        "cost": seen.cost,
        "agreement": seen.agreement,
        "predictions": seen.positions,
        "bytes": found.bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Everything that was asked for, written after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--output", default="exports")
    asked = parser.parse_args()
    packages = [
        name for name in ("gguf", "xllamacpp", "onnx", "onnxruntime", "onnxscript", "torchao") if importlib.util.find_spec(name)
    ]
    about = {**environment(), **{name: importlib.metadata.version(name) for name in packages}}
    done: list[dict[str, Any]] = []
    for row in rows(asked.families, asked.formats):
        done.append(row)
        print(*row.values(), flush=True)
        write(asked.output, about, done)


if __name__ == "__main__":
    main()
