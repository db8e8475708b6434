"""GGUF files read once: transformers parses the same header, vocabulary included, over and over."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

from resect.checkpoint.configuration import MOST_EXPERTS, MOST_LAYERS
from resect.errors import CheckpointError
from resect.files import reading

SIZES = ("block_count", "embedding_length", "attention.head_count")
"""What a file must say of its network: transformers would fill in the sizes of a 7B llama."""
TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of llama.cpp that repeat what a configuration says."""


class PlainReader(gguf.GGUFReader):
    """gguf's reader on a plain array: a slice of a memory map is a memory map, and making those took most of it."""

    def _get(self, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = np.asarray(self.data)  # type: ignore[assignment]
        return super()._get(*arguments, **options)


@contextmanager
def read_once() -> Iterator[None]:
    """Inside the block every GGUF header is parsed once, and every table of tensor names built once, whoever asks."""
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    shared: Any = gguf
    shared.GGUFReader = functools.cache(PlainReader)
    shared.get_tensor_name_map = functools.cache(names)
    try:
        yield
    finally:
        shared.GGUFReader, shared.get_tensor_name_map = reader, names


def check_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a GGUF file, by llama.cpp's names.

    Raises `CheckpointError` for a file that is damaged or cut off, and for one that does not say its sizes.
    """
    with reading(f"the GGUF file {path}"):
        reader = gguf.GGUFReader(str(path))
        architecture = str(_value(reader, "general.architecture") or "")
        shapes = {one.name: tuple(int(size) for size in reversed(one.shape)) for one in reader.tensors}
        absent = [name for name in SIZES if _value(reader, f"{architecture}.{name}") is None]
    if not architecture or absent:
        what = ", ".join(f"{architecture}.{name}" for name in absent) if architecture else "general.architecture"
        raise CheckpointError(f"The GGUF file {path} does not say {what}. Nothing is assumed about sizes.")
    if not shapes:
        raise CheckpointError(f"The GGUF file {path} holds no tensors.")
    for name, most in (("block_count", min(MOST_LAYERS, len(shapes))), ("expert_count", MOST_EXPERTS)):
        with reading(f"the GGUF file {path}"):
            count = int(_value(reader, f"{architecture}.{name}") or 0)
        if not 0 <= count <= most:
            raise CheckpointError(f"The GGUF file {path}: {architecture}.{name} is {count}; at most {most} fit into it.")
    return shapes


def check_vocabulary_size(config: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuses a vocabulary of another size than the embedding has rows: where a file names none, one is made up."""
    table, stated = shapes.get("token_embd.weight"), config.get_text_config().vocab_size
    if table is not None and table[0] != stated:
        raise CheckpointError(f"The GGUF file {path} is read with {stated} tokens; its embedding has {table[0]} rows.")


def _value(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def plain_weights() -> dict[str, Any]:
    """Options by which transformers widens a GGUF file's weights, also where it could compute on them as they are."""
    known: Any = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": known(dequantize=True)} if known is not None else {}


def token_count(path: Path) -> int:
    """How many tokens a GGUF file lists."""
    field = gguf.GGUFReader(str(path)).get_field("tokenizer.ggml.tokens")
    return len(field.data) if field is not None else 0


def pre_tokenizer_name(path: Path) -> str:
    """What a GGUF file calls its pre-tokenizer; "" if it does not say."""
    field = gguf.GGUFReader(str(path)).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""
