"""Values for hypothesis: documents that are nearly right, and texts that nobody would write."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.faults.mutations import HOSTILE, Literal, dumped

MANY = int(os.environ.get("RESECT_EXAMPLES", "0"))
"""Examples of each property in the whole campaign; 0: the few of the test suite."""


def examples(few: int) -> settings:
    """The same examples every time, without a deadline; more of them where many are asked for."""
    return settings(
        max_examples=max(few, MANY),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


COUNTS = os.environ.get("RESECT_COUNTS", "")
"""Where the campaign wants the number of examples that were accepted and refused."""

PLAIN = [value for value in HOSTILE if not isinstance(value, Literal) and len(str(value)) < 1000]
odd = st.sampled_from(PLAIN).map(copy.deepcopy)
"""Values that no reader should take as they are, as Python's."""
EDGES = [0, 1, -1, 2**31, 2**63, 10**30, 0.0, 1.0, float("nan"), float("inf")]
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from(EDGES))
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
anything = st.one_of(odd, plain)


_counted: dict[str, Counter[str]] = {}


def count(test: str, verdict: str) -> None:
    """Counts what became of an example, for the table of the campaign."""
    _counted.setdefault(test, Counter())[verdict] += 1


def write_counts() -> None:
    """Leaves the counts where the campaign looks for them."""
    if COUNTS:
        Path(COUNTS).write_text(json.dumps(_counted), encoding="utf-8")


@st.composite
def nearly(draw: st.DrawFn, document: Mapping[str, Any]) -> Any:
    """The document with up to three of its values replaced, taken out or added."""
    found = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, 3))):
        holders = [found, *(below for _, below in _below(found))]
        holder = draw(st.sampled_from([one for one in holders if isinstance(one, dict | list)]))
        if isinstance(holder, dict):
            key = draw(st.sampled_from([*holder, "other"]))
            if draw(st.booleans()):
                holder[key] = draw(anything)
            else:
                holder.pop(key, None)
        elif holder:
            holder[draw(st.integers(0, len(holder) - 1))] = draw(anything)
        else:
            holder.append(draw(anything))
    return found


def as_json(document: Any) -> str:
    """A document as a file would hold it, NaN and half an emoji too."""
    return dumped(document)


def _below(value: Any) -> list[tuple[Any, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [pair for key, below in items for pair in [(key, below), *_below(below)]]
