"""Tokenizers with fewer tokens: what a text needs, and the same tokenizer without the rest.

A fast tokenizer is a JSON document; what goes is taken out of it and what stays is numbered anew, in order. Texts whose tokens
stay are split as before: a piece is put together from the same parts by the same merges, in the same order, and nothing that
was added competes with them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from resect.calibration import texts_in_tokens
from resect.checkpoint.silence import quiet
from resect.errors import UsageError
from resect.files import temporary_folder

Document = dict[str, Any]
"""What tokenizer.json holds."""

ROLES = ("system", "user", "assistant")
NUMBERS = ("id", "ids", "pad_id")
"""Where post-processors and padding say tokens by number."""
PAIRS = ("sep", "cls")
"""Where they say a token and its number."""


def cut_tokenizer(tokenizer: Any, keep: Iterable[int]) -> Any:
    """The tokenizer without the tokens that are not in `keep`, those that stay numbered anew in their order.

    It is an ordinary tokenizer of the same class. Numbers in `keep` that are no token (rows that fill up an embedding) are left
    free. Raises `UsageError` for a tokenizer that is not a fast one, and where a token that it needs itself is not kept.
    """
    document = _document(tokenizer)
    numbers = {old: new for new, old in enumerate(sorted(set(keep)))}
    for name, token in _required(tokenizer, document).items():
        if token not in numbers:
            raise UsageError(f"The tokenizer cannot do without token {token}, its {name}. Keep it.")
    made = _rebuilt(tokenizer, _cut(document, numbers))
    wanted = {token: numbers[old] for token, old in tokenizer.get_vocab().items() if old in numbers}
    if wrong := sorted(made.get_vocab().items() ^ wanted.items()):
        raise UsageError(
            f"{type(tokenizer).__name__} numbers its tokens by itself: {wrong[0][0]!r} would be "
            f"{made.convert_tokens_to_ids(wrong[0][0])}, not {wanted.get(wrong[0][0])}. Keep its vocabulary whole."
        )
    return made


def needed_tokens(tokenizer: Any, texts: str | Iterable[str]) -> list[int]:
    """The tokens without which `texts` would be split differently, or some text could not be written at all; ascending.

    Those of the texts and everything that they are merged from, special and added tokens, the words of the chat template,
    and bytes. Raises `UsageError` for a tokenizer that is not a fast one.
    """
    parts = Parts(tokenizer)
    return sorted(parts.closed({*base_tokens(tokenizer, parts), *token_counts(tokenizer, texts)}))


def base_tokens(tokenizer: Any, parts: Parts | None = None) -> set[int]:
    """The tokens that every text may need: special and added ones, the words of the chat template, bytes."""
    parts = parts or Parts(tokenizer)
    document = parts.document
    vocabulary = _vocabulary(document)
    found = {token["id"] for token in document["added_tokens"]} | set(_required(tokenizer, document).values())
    found |= {vocabulary[piece] for piece in _bytes(document) if piece in vocabulary}
    if document["model"]["type"] == "Unigram":  # the price of an unknown character hangs on the least likely piece
        scores = [score for _, score in document["model"]["vocab"]]
        found.add(scores.index(min(scores)))
    return parts.closed({*found, *token_counts(tokenizer, _conversations(tokenizer))})


def token_counts(tokenizer: Any, texts: str | Iterable[str]) -> Counter[int]:
    """How often each token occurs in the texts."""
    counts = Counter[int]()
    for tokens in texts_in_tokens([texts] if isinstance(texts, str) else texts, tokenizer):
        counts.update(tokens)
    return counts


class Parts:
    """Which tokens a token is merged from."""

    def __init__(self, tokenizer: Any) -> None:
        self.document = _document(tokenizer)
        model = self.document["model"]
        self._found: dict[int, list[int]] = {}
        self._numbers = _vocabulary(self.document)
        self._pieces = {number: piece for piece, number in self._numbers.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""

    def closed(self, tokens: Iterable[int]) -> set[int]:
        """The tokens and all that they are merged from."""
        return {part for token in tokens for part in (token, *self.of(token))}

    def of(self, token: int) -> list[int]:
        """What a token is merged from."""
        if token not in self._found:
            self._found[token] = self._merged_from(token)
        return self._found[token]

    def _merged_from(self, token: int) -> list[int]:
        """Everything that stands between the characters of a token and the token, characters included.

        Merges within a token go the same way wherever it stands: one across its border would have made another token.
        """
        if not self._ranks or token not in self._pieces:
            return []
        symbols = self._symbols(self._pieces[token])
        seen = list(symbols)
        while len(symbols) > 1:
            pairs = [(self._ranks.get(pair, len(self._ranks)), place) for place, pair in enumerate(pairwise(symbols))]
            rank, place = min(pairs)
            if rank == len(self._ranks):
                break
            merged = _merged((symbols[place], symbols[place + 1]), self._prefix)
            symbols[place : place + 2] = [merged]
            seen.append(merged)
        return [self._numbers[symbol] for symbol in seen if symbol in self._numbers]

    def _symbols(self, piece: str) -> list[str]:
        inner = self._prefix if self._prefix and piece.startswith(self._prefix) else ""
        body = piece.removeprefix(inner)
        end = self._suffix if self._suffix and body.endswith(self._suffix) else ""
        characters = list(body.removesuffix(end))
        symbols = [(self._prefix if place else inner) + character for place, character in enumerate(characters)]
        return [*symbols[:-1], symbols[-1] + end] if symbols else []


def _document(tokenizer: Any) -> Document:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, and only those say what they are made of. "
            "Convert it to a tokenizer.json first, or keep the vocabulary whole."
        )
    document: Document = json.loads(backend.to_str())
    if document["model"].get("type") not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise UsageError(f"Tokenizers of type {document['model'].get('type')!r} cannot be cut; keep the vocabulary whole.")
    return document


def _vocabulary(document: Document) -> dict[str, int]:
    """The pieces of the model itself by number; added tokens may lie beside them."""
    pieces = document["model"]["vocab"]
    return dict(pieces) if isinstance(pieces, dict) else {piece: number for number, (piece, _) in enumerate(pieces)}


def _required(tokenizer: Any, document: Document) -> dict[str, int]:
    """Tokens that the tokenizer itself names, by what it calls them."""
    model, numbers = document["model"], {**_vocabulary(document), **{t["content"]: t["id"] for t in document["added_tokens"]}}
    found = {name: tokenizer.convert_tokens_to_ids(str(token)) for name, token in _specials(tokenizer)}
    if model.get("unk_token") in numbers:
        found["unk_token"] = numbers[model["unk_token"]]
    if isinstance(model.get("unk_id"), int):
        found["unk_id"] = model["unk_id"]
    found |= {f"template token {number}": number for number in _said(document["post_processor"])}
    found |= {f"padding token {number}": number for number in _said(document["padding"])}
    return {name: number for name, number in found.items() if isinstance(number, int)}


def _specials(tokenizer: Any) -> Iterator[tuple[str, Any]]:
    for name, token in tokenizer.special_tokens_map.items():
        for place, one in enumerate(token if isinstance(token, list) else [token]):
            yield (f"{name}[{place}]" if isinstance(token, list) else name), one


def _said(part: Any) -> Iterator[int]:
    """The numbers of tokens in a post-processor or in the padding."""
    if isinstance(part, list):
        for item in part:
            yield from _said(item)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in PAIRS and isinstance(value, list):
                yield value[1]
            elif name in NUMBERS and isinstance(value, list | int):
                yield from [value] if isinstance(value, int) else value
            else:
                yield from _said(value)


def _renumbered(part: Any, numbers: Mapping[int, int]) -> Any:
    """A post-processor or padding with new numbers."""
    if isinstance(part, list):
        return [_renumbered(item, numbers) for item in part]
    if not isinstance(part, dict):
        return part
    made: Document = {}
    for name, value in part.items():
        if name in PAIRS and isinstance(value, list):
            made[name] = [value[0], numbers[value[1]]]
        elif name in NUMBERS and isinstance(value, list | int):
            made[name] = numbers[value] if isinstance(value, int) else [numbers[number] for number in value]
        else:
            made[name] = _renumbered(value, numbers)
    return made


def _bytes(document: Document) -> list[str]:
    """The pieces that stand for single bytes."""
    if document["model"].get("byte_fallback"):
        return [f"<0x{byte:02X}>" for byte in range(256)]
    return pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in _types(document["pre_tokenizer"]) else []


def _types(part: Any) -> set[str]:
    if isinstance(part, list):
        return {name for item in part for name in _types(item)}
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type")), *(name for value in part.values() for name in _types(value))}


def _merges(model: Document) -> list[tuple[str, str]]:
    """The merges of a BPE model, the first to be made first; none for other models."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
    return [(left, right) for left, right in pairs]


def _merged(pair: Sequence[str], prefix: str) -> str:
    return pair[0] + pair[1].removeprefix(prefix)


def _cut(document: Document, numbers: Mapping[int, int]) -> Document:
    """The document without the tokens that have no new number."""
    model = dict(document["model"])
    pieces = {piece: numbers[number] for piece, number in _vocabulary(document).items() if number in numbers}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in numbers]
        model["unk_id"] = None if model["unk_id"] is None else numbers[model["unk_id"]]
    else:
        model["vocab"] = pieces
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            list(pair) for pair in _merges(model) if all(piece in pieces for piece in (*pair, _merged(pair, prefix)))
        ]
    added = [{**token, "id": numbers[token["id"]]} for token in document["added_tokens"] if token["id"] in numbers]
    named = {name: _renumbered(document[name], numbers) for name in ("post_processor", "padding")}
    return {**document, **named, "model": model, "added_tokens": added}


def _rebuilt(tokenizer: Any, document: Document) -> Any:
    """A tokenizer of the same class and settings made from a document, the way a saved one is loaded."""
    with temporary_folder("for a tokenizer") as folder, quiet():
        tokenizer.save_pretrained(folder)
        for path in Path(folder).iterdir():
            settled = path.name in ("tokenizer_config.json", "special_tokens_map.json") or path.suffix == ".jinja"
            if path.is_file() and not settled:
                path.unlink()
        settings = Path(folder, "tokenizer_config.json")
        fields = json.loads(settings.read_text(encoding="utf-8"))
        fields.pop("added_tokens_decoder", None)  # the document has them
        settings.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
        Path(folder, "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        made = type(tokenizer).from_pretrained(folder, local_files_only=True)
    made.name_or_path = made.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return made


def _conversations(tokenizer: Any) -> list[str]:
    """A conversation in the chat template, with and without each role: templates have words of their own."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    written = []
    for roles in (ROLES, ROLES[1:], ROLES[1:2], (*ROLES[1:], *ROLES[1:2])):
        messages = [{"role": role, "content": "."} for role in roles]
        for prompt in (True, False):
            try:
                written.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
            except Exception:  # templates refuse roles with errors of their own
                continue
    return written
