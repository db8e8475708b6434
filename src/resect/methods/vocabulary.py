"""The vocabulary a text needs: rows of tokens that it never uses go, out of the embedding and out of the head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from resect.calibration import read_texts
from resect.checkpoint.tokenizer import Parts, base_tokens, token_counts
from resect.errors import DataError, UsageError
from resect.graph import VOCABULARY, Graph, Group
from resect.plan import Kept, Plan
from resect.ranges import share, whole
from resect.surroundings import unaffected


@dataclass(frozen=True)
class Vocabulary:
    """The text whose tokens stay, by the names of its sources, and how many rows with them."""

    source: Sequence[str]
    keep: int | float | None = None
    align: int = 1

    def plan(self, graph: Graph, tokenizer: Any) -> Plan:
        """The plan that leaves these rows."""
        if tokenizer is None:
            raise UsageError("A vocabulary is cut by what a text needs, and that takes the model's tokenizer. Pass it.")
        names = [self.source] if isinstance(self.source, str) else self.source
        texts = [text for name in names for text in read_texts(name)]
        return vocabulary_plan(graph, tokenizer, texts, keep=self.keep, align=self.align)


@unaffected("shapes")
def vocabulary_plan(
    graph: Graph, tokenizer: Any, texts: str | Iterable[str], *, keep: int | float | None = None, align: int = 1
) -> Plan:
    """The plan that keeps the rows of the tokens that `texts` need, and no token else.

    Special and added tokens, those that the model's configuration names, bytes and the words of the chat template stay in any
    case. `keep` bounds the rows (an int) or their share (a float): the most frequent tokens stay then, and free rows are filled
    with tokens that the text does not need. The rows are a multiple of `align`. `cut_tokenizer(tokenizer, plan.keep)`
    makes the tokenizer; the plan's notes say what was found.
    Raises `UsageError` where the network's rows cannot go, for another model's tokenizer and for a `keep` that is too small,
    `DataError` for a text without tokens.
    """
    align = whole("align", align)
    if keep is not None:
        keep = share("keep", keep) if isinstance(keep, float) else whole("keep", keep)
    group = _offered(graph)
    parts = Parts(tokenizer)
    base = base_tokens(tokenizer, parts) | set(group.named)
    highest = max(*tokenizer.get_vocab().values(), *base)
    if highest >= group.units:
        raise UsageError(
            f"The tokenizer numbers its tokens up to {highest}; the network has {group.units} rows for them. "
            "It belongs to another model."
        )
    counts = token_counts(tokenizer, texts)
    if not counts:
        raise DataError("The vocabulary was to be cut to what a text needs, but the text holds no token. Give more text.")
    needed = parts.closed({*base, *counts})
    if keep is None:
        chosen, rows = needed, min(-(-len(needed) // align) * align, group.units)
    else:
        chosen, rows = base, _rows(keep, group.units, align, least=len(base))
    order = [*_by_count(counts), *sorted(tokenizer.get_vocab().values()), *range(group.units)]
    chosen = _filled(chosen, order, parts, rows)
    facts = {
        "rows": group.units,
        "kept": len(chosen),
        "base": len(base),
        "needed": len(needed),
        "tokens": counts.total(),
        "missing": sum(count for token, count in counts.items() if token not in chosen),
    }
    kept = Kept(kind=group.kind, layer=None, units=group.units, keep=tuple(sorted(chosen)))
    return Plan(groups={group.name: kept}, notes={VOCABULARY: facts})


def _offered(graph: Graph) -> Group:
    for group in graph.of_kind(VOCABULARY):
        return group
    reasons = dict.fromkeys(item.reason for item in graph.frozen if item.parameter in graph.tables and item.axis == 0)
    why = "; ".join(reasons) or "no text is looked up in any table"
    raise UsageError(f"The vocabulary of this network stays whole: {why}.")


def _rows(keep: int | float, units: int, align: int, *, least: int) -> int:
    """How many rows a bound allows: a multiple of `align`, all at most."""
    asked = min(int(keep * units) if isinstance(keep, float) else keep, units)
    rows = asked if asked == units else asked // align * align
    if rows < least:
        raise UsageError(
            f"keep={keep} leaves {rows} rows of the vocabulary (a multiple of {align}); {least} are needed for special tokens, "
            "bytes and the chat template alone. Keep more."
        )
    return rows


def _by_count(counts: Counter[int]) -> Iterator[int]:
    return (token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _filled(chosen: set[int], order: Iterable[int], parts: Parts, rows: int) -> set[int]:
    """The tokens in their order, with all that they are merged from, as long as there is room."""
    chosen = set(chosen)
    for token in order:
        if len(chosen) == rows:
            break
        more = parts.closed([token]) - chosen
        if len(chosen) + len(more) <= rows:
            chosen |= more
    return chosen
