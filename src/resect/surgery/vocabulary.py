"""Tokens after a cut of the vocabulary: which stay, and their new numbers wherever the model's own code names them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from resect.graph import TOKEN_FIELD, VOCABULARY, Graph, Group
from resect.plan import Plan
from resect.surgery.positions import changed

SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
"""Fields of a generation configuration that list tokens which must not be written."""
BIASED = "sequence_bias"
"""The field that gives sequences of tokens a bias: a mapping, or a list of pairs."""
SEQUENCES = ("bad_words_ids", "force_words_ids")
"""Fields that list sequences of tokens."""


def kept_tokens(graph: Graph, plan: Plan) -> Tensor | None:
    """The tokens that stay, ascending, so that their places are their new numbers; None where no token goes."""
    return next((keep for _, keep in changed(graph, plan, kinds=(VOCABULARY,))), None)


def embedding_table(model: nn.Module) -> Tensor | None:
    """The table of a model's tokens [tokens, width]; None for a network that has none, or does not say where."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, Tensor) and table.ndim == 2 else None


def renumber_tokens(model: nn.Module, group: Group, keep: Tensor) -> None:
    """Gives sizes and tokens that modules and configurations name their new numbers; configurations are copied.

    The model's tensors are cut already. A padding row that went is none any more, a suppressed token that went is left out.
    """
    numbers = {old: new for new, old in enumerate(keep.tolist())}
    before = _padding(model)
    copied: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(vars(module).get("config"), "to_dict"):
            module.config = copy.deepcopy(vars(module)["config"], copied)
    if hasattr(vars(model).get("generation_config"), "to_dict"):
        model.generation_config = copy.deepcopy(vars(model)["generation_config"])
        _renumber_config(model.generation_config, group.units, numbers)
    for config in _configs(model):
        _renumber_config(config, group.units, numbers)
    members = {member.parameter for member in group.members}
    tables = [parameter for name, parameter in model.named_parameters() if name in members]
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if "vocab_size" in name and value == group.units:
                setattr(module, name, len(numbers))
            elif value is not None and TOKEN_FIELD.fullmatch(name):
                setattr(module, name, _renumbered(name, value, group.units, numbers))
        padding = vars(module).get("padding_idx")
        is_table = any(getattr(module, "weight", None) is table for table in tables)
        if type(padding) is int and (is_table or padding == before.get(path)):
            module.padding_idx = numbers.get(padding)


def _padding(model: nn.Module) -> dict[str, int]:
    """The padding token in the configuration of every module that is no table."""
    found = {
        path: getattr(getattr(module, "config", None), "pad_token_id", None)
        for path, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
    }
    return {path: token for path, token in found.items() if type(token) is int}


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration in use and those inside it, once."""
    waiting = [vars(module).get("config") for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += vars(config).values()


def _renumber_config(config: Any, units: int, numbers: Mapping[int, int]) -> None:
    if getattr(config, "vocab_size", None) == units:
        config.vocab_size = len(numbers)
    for name, value in list(vars(config).items()):
        if "vocab_size" in name and value == units:
            setattr(config, name, len(numbers))
        elif value is not None and TOKEN_FIELD.fullmatch(name):
            setattr(config, name, _renumbered(name, value, units, numbers))
        elif name in SUPPRESSED and value is not None:
            setattr(config, name, [numbers[token] for token in value if token in numbers])
        elif name == BIASED and value is not None:
            setattr(config, name, _biased(value, numbers))
        elif name in SEQUENCES and value is not None:
            whole = [sequence for sequence in value if all(token in numbers for token in sequence)]
            setattr(config, name, [[numbers[token] for token in sequence] for sequence in whole] or None)


def _biased(value: Any, numbers: Mapping[int, int]) -> Any:
    """Biases of sequences whose tokens all stay, under their new numbers."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    whole = [(tokens, bias) for tokens, bias in pairs if all(token in numbers for token in tokens)]
    renumbered = [([numbers[token] for token in tokens], bias) for tokens, bias in whole]
    if isinstance(value, Mapping):
        return {tuple(tokens): bias for tokens, bias in renumbered} or None
    return [[tokens, bias] for tokens, bias in renumbered] or None


def _renumbered(name: str, value: Any, units: int, numbers: Mapping[int, int]) -> Any:
    """Named tokens in their new numbers; what is no row, like -1, is left as it is."""
    if name == "forced_decoder_ids":
        return [[place, _renumbered("", token, units, numbers)] for place, token in value]
    if isinstance(value, list | tuple):
        return type(value)(_renumbered(name, item, units, numbers) for item in value)
    return numbers[value] if type(value) is int and 0 <= value < units else value
