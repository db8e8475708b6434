"""The vocabulary: the rows that the numbers of a text look up, and the logits over them, as one family of units.

Rows may go only where a number means nothing but its row: the text is followed through views to the tables it is looked up
in, and any other operator that looks at its numbers keeps every row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from resect.graph.atoms import Axis, Misaligned, freeze, join, leaves, length, mark

VOCABULARY = "vocabulary"
"""The kind, the name of the only group of that kind, and the mark of its atom."""

TOKEN_FIELD = re.compile(r".*_token_ids?|.*_token_index|forced_decoder_ids")
"""Fields of a configuration that hold numbers of tokens."""

SHAPE_ONLY = frozenset(
    f"aten.{name}"
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty")
)
"""Operators that look at a tensor's shape and at none of its values."""


class Vocabulary:
    """What a traced run shows of the numbers in its text."""

    def __init__(self) -> None:
        self._text: dict[int, Tensor] = {}
        self._tables: list[tuple[Axis, str]] = []
        self._reason = ""

    def follow(self, *tensors: Tensor) -> None:
        """These tensors hold the numbers of the text."""
        self._text.update((id(tensor), tensor) for tensor in tensors)

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor holds the numbers of the text."""
        return id(tensor) in self._text

    def look_up(self, rows: Axis, site: str) -> None:
        """The numbers of the text are looked up among these rows."""
        mark(rows, label=VOCABULARY)
        self._tables.append((rows, site))

    def refuse(self, reason: str) -> None:
        """Something else looks at the numbers of the text; the first reason stays."""
        self._reason = self._reason or reason

    def settle(self, logits: Axis | None) -> bool:
        """Unites all tables and the logits over them, or keeps all rows whole; whether the logits' positions may go."""
        reason = self._reason or self._differing(logits) or self._united(logits or ())
        for rows, site in self._tables if reason else ():
            freeze(rows, f"rows are looked up by number at {site}, and {reason}")
        return bool(self._tables) and not reason

    def _differing(self, logits: Axis | None) -> str:
        sizes = list(dict.fromkeys(length(rows) for rows, _ in self._tables))
        if len(sizes) > 1:
            return f"the same numbers are looked up in tables of {' and '.join(map(str, sizes))} rows"
        if logits is None:
            return "the network puts out no logits"
        if sizes and length(logits) != sizes[0]:
            return f"what the network puts out has {length(logits)} positions for {sizes[0]} rows"
        return ""

    def _united(self, logits: Axis) -> str:
        try:
            for rows, _ in self._tables:
                join(rows, logits)
        except Misaligned:
            return "the logits over them are made of other parts"
        parts = leaves(logits)
        return "" if len(parts) == 1 and parts[0].definition is None else "they are made of parts"


def named_tokens(model: nn.Module) -> dict[int, str]:
    """The tokens that a model's configurations and modules name by number, and the field that does: they must stay."""
    owners: dict[str, Any] = {}
    for owner in ("config", "generation_config"):
        config: Any = getattr(model, owner, None)
        owners[f"{owner}."] = config.to_dict() if hasattr(config, "to_dict") else {}
    for path, module in model.named_modules():
        owners[f"{path}." if path else "own "] = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    found: dict[int, str] = {}
    for owner, fields in owners.items():
        for name, value in _token_fields(fields):
            for token in _numbers(value):
                found.setdefault(token, f"{owner}{name}")
    return found


def _token_fields(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if TOKEN_FIELD.fullmatch(str(name)):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _token_fields(value, f"{prefix}{name}.")


def _numbers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _numbers(item[-1:] if isinstance(item, list | tuple) else item)  # forced ids: [place, token]
