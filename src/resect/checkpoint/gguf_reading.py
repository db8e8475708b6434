"""GGUF files read once: transformers parses the same header, vocabulary included, over and over."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np


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


def pre_tokenizer_name(path: Path) -> str:
    """What a GGUF file calls its pre-tokenizer; "" if it does not say."""
    field = gguf.GGUFReader(str(path)).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""
