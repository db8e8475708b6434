"""Windows of a fixed length out of tokenised pieces of text: random crops, or one packed stream; never one twice."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Piece = Sequence[int]
"""The tokens of one piece of text."""


@dataclass(frozen=True)
class Windows:
    """Different windows, and the pieces that they came from."""

    tokens: Tensor  # [n, length] long
    pieces: frozenset[int]


Window = tuple[tuple[int, ...], frozenset[int]]
"""Its tokens, and the numbers of the pieces that they came from."""


def crop(pieces: Sequence[Piece], length: int, generator: torch.Generator) -> Iterator[Window]:
    """Random crops that do not overlap; every piece that is long enough gives one before any gives a second.

    Paper (arXiv 2305.11627, released code): for each sample a random crop of a random document that is long enough.
    Here: without repetition, because a window drawn twice counts double in every mean.
    """
    candidates: list[tuple[int, int, int]] = []
    for number, piece in enumerate(pieces):
        slots = len(piece) // length
        if slots:
            first = _below(len(piece) - slots * length + 1, generator)
            order = torch.randperm(slots, generator=generator).tolist()
            candidates += [(turn, number, first + slot * length) for turn, slot in enumerate(order)]
    candidates.sort(key=lambda candidate: candidate[0])  # stable: within a turn the pieces keep their order
    for _, number, start in candidates:
        yield tuple(pieces[number][start : start + length]), frozenset([number])


def pack(pieces: Sequence[Piece], length: int, generator: torch.Generator, *, separator: Piece) -> Iterator[Window]:
    """The windows, in random order, of one stream: all pieces in the order given, `separator` between them."""
    stream = array("i")
    owner = array("i")
    for number, piece in enumerate(pieces):
        between = separator if number else []
        stream.extend(between)
        stream.extend(piece)
        owner.extend(array("i", [-1]) * len(between) + array("i", [number]) * len(piece))
    slots = len(stream) // length
    first = _below(len(stream) - slots * length + 1, generator)
    for slot in torch.randperm(slots, generator=generator).tolist():
        window = slice(first + slot * length, first + (slot + 1) * length)
        yield tuple(stream[window]), frozenset(owner[window]) - {-1}


def different(windows: Iterable[Window], *, samples: int, length: int, taken: Iterable[Tensor] = ()) -> Windows:
    """The first `samples` windows that differ from each other and from those already taken ([n, length] each)."""
    before = {tuple(window) for some in taken for window in some.tolist()}
    chosen: dict[tuple[int, ...], frozenset[int]] = {}
    for tokens, numbers in windows:
        if len(chosen) == samples:
            break
        if tokens not in before:
            chosen.setdefault(tokens, numbers)
    kept = torch.tensor(list(chosen), dtype=torch.long).reshape(-1, length)
    return Windows(kept, frozenset().union(*chosen.values()))


def digest(tokens: Tensor) -> str:
    """The sha256 of tokens as little-endian 64-bit integers, hexadecimal."""
    return hashlib.sha256(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))
