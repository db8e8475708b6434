"""Token batches for calibration, drawn from any mix of sources."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from resect.calibration.corpora import sections
from resect.calibration.generated import start_token, write
from resect.calibration.sources import SELF, read_corpus
from resect.calibration.tokenised import texts_in_tokens
from resect.calibration.windows import Piece, Windows, crop, different, digest, pack
from resect.errors import DataError, UsageError
from resect.explain import telling
from resect.ranges import seed_of, whole
from resect.surroundings import unaffected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECTION = 20_000
"""Characters after which a long document may be cut in pieces, so that a book need not be tokenised whole."""
CHARACTERS_PER_TOKEN = 16
"""More than tokenizers reach on prose: a piece is never cut so short that it misses a window."""
ENCODED_TOGETHER = 64


@dataclass(frozen=True)
class Calibration:
    """Fixed token windows and where they came from."""

    tokens: Tensor
    """[samples, length] long, on the CPU."""
    provenance: dict[str, Any]
    """Plain JSON: source, detail (per source: files with sha256, or data set, split, column), seed, samples, length,
    documents (how many gave a window), digest (sha256 of the tokens)."""


@telling("read calibration text")
@unaffected()
def calibrate(
    source: str | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int = 128,
    seed: int = 42,
    model: nn.Module | None = None,
) -> Calibration:
    """`samples` different windows of `length` tokens; the same arguments give the same tokens.

    Each source is a text, JSON or JSONL file (``file.jsonl:column``), a hub data set by short name or as
    ``name:config:split:column``, ``demo``, or ``self``: text that `model` writes. No source means ``self``.
    Several sources give equal shares, one named twice a single one. Windows are random crops of documents that are long
    enough (as LLM-Pruner draws them); where there are too few, all documents are packed into one stream, end-of-text between
    them, and windows are drawn from that.
    Errors: `UsageError` for what cannot be meant, `DataError` for text that is missing, unreadable or too short.
    """
    names = _names(source)
    samples = whole("samples", samples)
    length = whole("length", length, low=2)
    seed = seed_of(seed)
    if length < 2 or samples < len(names):
        raise UsageError(
            f"Calibration was asked for {samples} windows of {length} tokens from {len(names)} source(s): "
            "a window needs 2 tokens, a source 1 window."
        )
    shares = [samples // len(names) + (place < samples % len(names)) for place in range(len(names))]
    drawn: list[Tensor] = []
    detail: list[dict[str, Any]] = []
    for name, share in zip(names, shares, strict=True):
        if name == SELF:
            windows, facts = _written(model, tokenizer, samples=share, length=length, seed=seed)
        else:
            windows, facts = _read(name, tokenizer, samples=share, length=length, seed=seed, taken=drawn)
        drawn.append(windows)
        detail.append(facts)
    tokens = torch.cat(drawn)
    provenance = {
        "source": names,
        "detail": detail,
        "seed": seed,
        "samples": samples,
        "length": length,
        "documents": sum(facts["documents"] for facts in detail),
        "digest": digest(tokens),
    }
    return Calibration(tokens, provenance)


def _names(source: str | Sequence[str] | None) -> list[str]:
    names = [SELF] if source is None else [source] if isinstance(source, str) else list(dict.fromkeys(source))
    if not names or not all(names):
        raise UsageError("Calibration was given an empty list or name of sources. Name one, or give None for 'self'.")
    return names


def _written(
    model: nn.Module | None, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Windows that the model writes, and the facts about them."""
    if model is None:
        raise UsageError(
            "Calibration on 'self' (the default without a source) lets the model write the text, "
            "but no model was given. Give model=…, or name a source."
        )
    start = start_token(model, tokenizer)
    tokens = write(model, samples=samples, length=length, seed=seed, start=start)
    return tokens, {"kind": SELF, "temperature": 1.0, "start": start, "samples": samples, "documents": samples}


def _read(
    name: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int, taken: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Windows out of a stored text, none of those already taken, and the facts about them."""
    corpus = read_corpus(name, split="train")
    owners, pieces = _pieces(corpus.documents(), max(SECTION, CHARACTERS_PER_TOKEN * length))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(pieces), generator=generator).tolist()
    shuffled = [pieces[number] for number in order]
    encoded = _encode(shuffled, tokenizer, length=length, enough=samples)
    rule, windows = "crops", different(crop(encoded, length, generator), samples=samples, length=length, taken=taken)
    documents = {owners[order[place]] for place in windows.pieces}
    if len(windows.tokens) < samples:
        encoded += _encode(shuffled[len(encoded) :], tokenizer, length=length)
        joined = _rejoin(encoded, order, owners)
        stream = pack(list(joined.values()), length, generator, separator=_separator(tokenizer))
        rule, windows = "packed", different(stream, samples=samples, length=length, taken=taken)
        documents = {list(joined)[place] for place in windows.pieces}
    if len(windows.tokens) < samples:
        raise _too_short(name, encoded, windows, samples=samples, length=length)
    return windows.tokens, {**corpus.detail, "rule": rule, "samples": samples, "documents": len(documents)}


def _pieces(documents: Sequence[str], characters: int) -> tuple[list[int], list[str]]:
    """The documents in pieces of workable size, and the number of the document that each belongs to."""
    both = [(number, piece) for number, text in enumerate(documents) for piece in sections(text, characters)]
    return [number for number, _ in both], [piece for _, piece in both]


def _encode(
    pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int, enough: int | None = None
) -> list[Piece]:
    """The tokens of the pieces in turn, all or until `enough` of them have `length` tokens."""
    encoded: list[Piece] = []
    long = 0
    with tqdm(total=len(pieces), desc="tokenising", unit="piece", delay=1) as bar:
        for start in range(0, len(pieces), ENCODED_TOGETHER):
            some = list(pieces[start : start + ENCODED_TOGETHER])
            tokens = [array("i", found) for found in texts_in_tokens(some, tokenizer)]
            encoded += tokens
            long += sum(len(piece) >= length for piece in tokens)
            bar.update(len(some))
            if enough is not None and long >= enough:
                break
    return encoded


def _rejoin(encoded: Sequence[Piece], order: Sequence[int], owners: Sequence[int]) -> dict[int, Piece]:
    """Each document's tokens by its number: its pieces in order again, documents as they came."""
    parts: dict[int, dict[int, Piece]] = {}
    for number, tokens in zip(order, encoded, strict=True):
        parts.setdefault(owners[number], {})[number] = tokens
    joined: dict[int, Piece] = {}
    for owner, own in parts.items():
        tokens = array("i")
        for number in sorted(own):
            tokens.extend(own[number])
        joined[owner] = tokens
    return joined


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-text, or a blank line where the tokenizer has none."""
    if isinstance(tokenizer.eos_token_id, int):
        return [tokenizer.eos_token_id]
    return list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])


def _too_short(
    name: str, encoded: Sequence[Sequence[int]], windows: Windows, *, samples: int, length: int
) -> DataError:
    found = sum(map(len, encoded))
    return DataError(
        f"Calibration needs {samples} different windows of {length} tokens from {name!r}, {samples * length:,} tokens; "
        f"it holds {found:,} tokens, which give {len(windows.tokens)}. "
        "Give more text, fewer samples or a shorter length."
    )
