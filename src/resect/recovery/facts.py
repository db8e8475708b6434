"""What a recovery did, as plain values."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict

Nats = dict[str, float]
"""Mean cross-entropy of every source, nats per predicted token."""


class Part(BaseModel):
    """Plain values; a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class Counts(Part):
    """What came of a source."""

    source: str
    kind: str
    """`text`, `instructions` or `messages`."""
    rows: int
    examples: int = 0
    held_out: int = 0
    tokens: int = 0
    """Of all examples."""
    predicted: int = 0
    """Tokens of them that are learnt or measured."""
    truncated: int = 0
    """Rows that were cut off at the length."""
    remainder: int = 0
    """Tokens at the end of the text that fill no window."""
    skipped: dict[str, int] = {}
    """Rows that give no example, by reason."""
    detail: dict[str, Any] = {}
    """Where the rows came from."""


class Trained(Part):
    """What a training did."""

    name: str
    steps: int
    examples: int
    tokens: int
    seconds: float
    """In the process that finished it."""
    losses: list[tuple[int, float]]
    """Step, and the mean loss of the steps up to it since the one before."""
    held_out: list[tuple[int, float]]
    """Step, and the loss on all held-out tokens."""
    best_step: int
    """The state that was kept."""
    nats: Nats
    """Its held-out loss, source by source."""


class Round(Part):
    """How far the model is behind the dense one after a round, source by source; round 0 is before the first."""

    stage: str
    """`text` or `instructions`."""
    number: int
    weights: dict[str, float] = {}
    """Shares of the examples of this round."""
    drawn: dict[str, int] = {}
    gaps: dict[str, float]
    """`max(0, log perplexity of the model - of the dense one)` on held-out examples."""
    weighted: float
    """The sum of the gaps, each times the weight that it gives its source in the next round."""


class Facts(Part):
    """What a recovery did, as plain values."""

    sources: list[Counts]
    trainable: int
    """Parameters that were trained."""
    parameters: int
    reached: float | None = None
    """The share of the parameters in blocks that belong to matrices which learn; None in reports of older versions."""
    before: Nats
    """Held-out loss of every source, nats per predicted token."""
    after: Nats = {}
    dense: Nats | None = None
    """The teacher's."""
    held_out_before: float
    """Over all held-out tokens."""
    held_out_after: float = math.nan
    trainings: list[Trained] = []
    rounds: list[Round] = []
    """How the gap to the dense model moved, of a dynamic mixture."""
    processes: int = 1

    @property
    def names(self) -> dict[str, str]:
        """Sources without the directories that they lie in, unless that makes some of them the same."""
        short = {counts.source: PurePath(counts.source).name for counts in self.sources}
        return short if len(set(short.values())) == len(short) else {source: source for source in short}
