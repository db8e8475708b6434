"""Tokenizers as llama.cpp knows them: byte-level BPE by the name of its pre-tokenizer, and SentencePiece's BPE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf

from resect.errors import UsageError

Document = Mapping[str, Any]
Kind = gguf.TokenType

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {GPT2: "gpt-2", _WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
"""Regular expressions of pre-tokenizers by what llama.cpp calls them."""
SPECIALS = ("bos", "eos", "unk", "sep", "pad", "mask")


def write_tokenizer(writer: gguf.GGUFWriter | None, tokenizer: Any, rows: int) -> None:
    """The tokenizer as metadata of a file whose embedding has so many rows; without a writer it is only looked at.

    Raises `UsageError` for a tokenizer that llama.cpp has no words for.
    """
    document = _document(tokenizer)
    model = document["model"]
    sentencepiece = bool(model.get("byte_fallback"))
    pre = "default" if sentencepiece else _pre_tokenizer(document)
    tokens, kinds = _tokens(tokenizer, document, rows)
    if writer is None:
        return
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    if sentencepiece:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(document))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for name in SPECIALS:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    start, end = _added(tokenizer)
    writer.add_add_bos_token(start)
    writer.add_add_eos_token(end)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _document(tokenizer: Any) -> Document:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    document: Document = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    kind = document["model"].get("type")
    if kind != "BPE":
        raise UsageError(
            f"Asked to write GGUF; the tokenizer {type(tokenizer).__name__} is of type {kind or 'slow'}, and only BPE "
            "(byte-level, or SentencePiece's with bytes) is written. Use --format hf."
        )
    return document


def _pre_tokenizer(document: Document) -> str:
    """What llama.cpp calls the way in which text is split before merges."""
    said = document["pre_tokenizer"] or {}
    steps = said["pretokenizers"] if said.get("type") == "Sequence" else [said]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None and (name == "llama-bpe") == bool(document["model"].get("ignore_merges")):
            return name
    raise UsageError(
        f"Asked to write GGUF; the tokenizer splits text by {', '.join(map(str, kinds))}, for which llama.cpp has no name known "
        f"here ({', '.join([*PATTERNS.values(), 'smollm'])} are). Use --format hf."
    )


def _tokens(tokenizer: Any, document: Document, rows: int) -> tuple[list[str], list[int]]:
    """A text and a kind for every row of the embedding; rows without a token are unused."""
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [int(Kind.UNUSED)] * rows
    pieces = {**document["model"]["vocab"]}
    bytes_ = bool(document["model"].get("byte_fallback"))
    added = {token["content"]: token for token in document["added_tokens"]}
    highest = max([*pieces.values(), *(token["id"] for token in added.values())])
    if highest >= rows:
        raise UsageError(
            f"The tokenizer numbers its tokens up to {highest}; the embedding has {rows} rows. Give the model's own."
        )
    for piece, number in pieces.items():
        tokens[number], kinds[number] = piece, int(Kind.BYTE if bytes_ and _is_byte(piece) else Kind.NORMAL)
    for piece, token in added.items():
        kind = Kind.CONTROL if token["special"] else Kind.USER_DEFINED
        tokens[token["id"]], kinds[token["id"]] = piece, int(kind)
    if bytes_ and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = int(Kind.UNKNOWN)
    return tokens, kinds


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """The earlier a piece is merged, the higher its score, which is what SentencePiece merges by."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _adds_space(document: Document) -> bool:
    """Whether text gets a blank in front."""
    said = [document.get("normalizer"), document.get("pre_tokenizer")]
    steps = [step for one in said if one for step in one.get("normalizers") or one.get("pretokenizers") or [one]]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts begin-of-text before, end-of-text after a text."""
    plain, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    longer = len(framed) > len(plain)
    return longer and first is not None and framed[0] == first, longer and last is not None and framed[-1] == last
