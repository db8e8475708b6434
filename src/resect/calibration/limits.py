"""What a model can take in: how many positions it has, and how many tokens; asked before anything long is done."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from resect.errors import ModelError, UsageError

TABLES = re.compile(r"(position|wpe)[^.]*$")
"""What tables of positions are called."""
OTHERS = re.compile(r"vision|visual|image|patch|audio")
"""Parts of a network that number something else than tokens."""


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model can see at once; None where nothing limits them.

    That is what its configuration says or, where it looks positions up, the rows of that table: some keep their first
    rows for padding.
    """
    config = _text_config(model)
    stated = getattr(config, "max_position_embeddings", None)
    limits = [stated] if isinstance(stated, int) and stated > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and TABLES.search(name) and not OTHERS.search(name):
            padding = -1 if module.padding_idx is None else module.padding_idx
            limits.append(module.num_embeddings - int(getattr(module, "offset", padding + 1)))
    return min(limits, default=None)


def rows_of(model: nn.Module) -> int | None:
    """How many tokens a model knows: the rows of its embedding; None for a network that takes none."""
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = get() if get is not None else None
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(table, "weight", None)
    return len(weight) if isinstance(table, nn.Embedding) and isinstance(weight, Tensor) else None


def check_length(model: nn.Module, length: int, asked: str, *, instead: str = "Ask for a shorter length.") -> None:
    """Raises `UsageError` where a model has fewer positions than `length`; `asked` says by what they were asked for."""
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise UsageError(f"{asked}; the model has {positions} positions. {instead}")


def check_windows(model: nn.Module, length: int) -> None:
    """Raises `UsageError` where calibration windows of `length` tokens do not fit into a model."""
    check_length(model, length, f"Calibration was asked for windows of {length} tokens")


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raises `ModelError` where a tokenizer has tokens that a model has no row for."""
    rows = rows_of(model)
    known = getattr(tokenizer, "get_vocab", None)
    if rows is None or known is None:
        return
    highest = max([*known().values(), *_set_around(tokenizer)], default=0)
    if highest >= rows:
        raise ModelError(
            f"The tokenizer numbers its tokens to {highest}; the model has {rows} rows (0 to {rows - 1}). Tokens were added "
            "and the model was not resized, or they belong to different models: model.resize_token_embeddings(len(tokenizer))."
        )


def _set_around(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts around a text; its file gives their numbers apart from the vocabulary."""
    try:
        return [int(token) for token in tokenizer("")["input_ids"]]
    except Exception:  # one that takes no empty text says so where it matters
        return []


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if get is not None else config
