"""Networks from outside transformers: what is offered is cut and equals the mask, or is refused where the code cannot follow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import ModelError
from resect.graph import Replay
from resect.plan import Kept, Plan
from tests.graph import outside
from tests.graph.outside import CHANNELS, HEADS, WIDTH, WORDS
from tests.graph.verify import assert_cut_equals_mask, plans
from tests.zoo.examine import lively


@dataclass(frozen=True)
class Network:
    """What builds it, its example, how many groups of a kind and of how many units it offers, and what must be refused."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    groups: Mapping[tuple[str, int], int]
    refused: tuple[str, ...] = ()


def tokens() -> tuple[Tensor, ...]:
    """One text."""
    return (torch.randint(WORDS, (2, 7)),)


def values(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Random numbers."""
    return lambda: (torch.randn(shape),)


def language(attention: Callable[[], nn.Module], *, steps_first: bool = False) -> Callable[[], nn.Module]:
    """A language model around an attention."""
    return lambda: outside.Language(attention, steps_first=steps_first)


def encoder(**options: Any) -> Callable[[], nn.Module]:
    """torch's own encoder."""
    layer = lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, CHANNELS, batch_first=True, **options)  # noqa: E731
    return lambda: outside.Classes(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False))


LANGUAGE = {("heads", HEADS): 2, ("channels", CHANNELS): 2, ("residual", WIDTH): 1, ("blocks", 1): 2}
KEPT_HEADS = {kind: count for kind, count in LANGUAGE.items() if kind[0] != "heads"}
# Torch's attention and teaching code read the size of a head off the width of the stream: both go together.
JOINED = {("channels", CHANNELS): 2, ("residual", HEADS): 1, ("blocks", 1): 2}
STATES = {("channels", 20): 1, ("channels", 24): 1}

NETWORKS = {
    "packed, unflatten": Network(language(lambda: outside.Packed(unpack="unflatten")), tokens, LANGUAGE),
    "packed, chunk": Network(language(lambda: outside.Packed(unpack="chunk")), tokens, LANGUAGE),
    "packed, slopes": Network(language(lambda: outside.Packed(unpack="chunk", alibi=True)), tokens, KEPT_HEADS),
    "per head": Network(language(outside.PerHead, steps_first=True), tokens, LANGUAGE),
    "groups": Network(language(lambda: outside.Groups(2), steps_first=True), tokens, {**KEPT_HEADS, ("heads", 2): 2}),
    "groups of one": Network(language(lambda: outside.Groups(HEADS), steps_first=True), tokens, LANGUAGE),
    "einsum": Network(language(outside.Named), tokens, LANGUAGE),
    "einsum, talking": Network(language(lambda: outside.Named(talking=True)), tokens, {**LANGUAGE, ("heads", HEADS): 4}),
    "head axes": Network(language(outside.HeadAxes), tokens, LANGUAGE),
    "teaching": Network(lambda: outside.Teaching(free=False), tokens, JOINED),
    "teaching, free": Network(lambda: outside.Teaching(free=True), tokens, LANGUAGE),
    "encoder": Network(encoder(), tokens, JOINED),
    "encoder, norm first": Network(encoder(norm_first=True), tokens, JOINED),
    "lstm": Network(lambda: outside.Recurrent(nn.LSTM), tokens, {**STATES, ("channels", 32): 1}),
    "lstm, two ways": Network(
        lambda: outside.Recurrent(nn.LSTM, num_layers=2, bidirectional=True), tokens, {**STATES, ("channels", 32): 1}
    ),
    "gru": Network(lambda: outside.Recurrent(nn.GRU), tokens, {**STATES, ("channels", 32): 1}),
    "rnn": Network(lambda: outside.Recurrent(nn.RNN), tokens, {**STATES, ("channels", 32): 1}),
    "lstm cell": Network(lambda: outside.Cell(nn.LSTMCell), tokens, STATES),
    "gru cell": Network(lambda: outside.Cell(nn.GRUCell), tokens, STATES),
    "mlp": Network(
        lambda: nn.Sequential(
            nn.Linear(10, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 18), nn.LayerNorm(18), nn.Tanh(), nn.Linear(18, 4)
        ),
        values(3, 10),
        {("channels", 24): 1, ("channels", 18): 1},
    ),
    "convolutions": Network(
        lambda: nn.Sequential(
            *(nn.Conv1d(5, 12, 5, stride=2), nn.BatchNorm1d(12), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(12, 28, 3)),
            *(nn.GLU(1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(14, 3)),
        ),
        values(2, 5, 40),
        {("channels", 12): 1, ("channels", 14): 1},
    ),
    "mixer": Network(outside.mixer, values(2, 7, 9), {("channels", 15): 2, ("channels", 28): 2, ("channels", 20): 1}),
    "branches": Network(outside.Branches, values(2, 6), {("channels", size): 1 for size in (8, 10, 12, 14)}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_equals_mask_or_is_refused(name: str) -> None:
    network = NETWORKS[name]
    model, inputs = lively(network.build(), seed=0), network.inputs()
    graph = resect.trace(model, inputs)
    offered = Counter((group.kind, group.units) for group in graph.groups if group.kind not in ("sublayers", "vocabulary"))
    assert offered == Counter(network.groups), graph.frozen
    for kind, plan in plans(graph).items():
        if kind in network.refused:
            with pytest.raises(ModelError, match="does not take the new sizes"):
                resect.cut(model, plan, graph)
        else:
            assert_cut_equals_mask(model, graph, inputs, plan)


def test_of_torchs_own_encoder_decoder_all_is_cut() -> None:
    model, inputs = lively(outside.Translation(), seed=0), (*tokens(), torch.randint(WORDS, (2, 5)))
    graph = resect.trace(model, inputs)
    assert Counter(group.units for group in graph.groups if group.units in (HEADS, CHANNELS)) == {HEADS: 1, CHANNELS: 4}
    alike = {re.sub(r"\d+", "N", f"{group.units} {group.members[0].parameter}"): group for group in graph.groups}
    for group in (group for group in alike.values() if group.kind != "vocabulary"):
        kept = Kept(kind=group.kind, layer=group.layer, units=group.units, keep=tuple(range(1, group.units)))
        assert_cut_equals_mask(model, graph, inputs, Plan(groups={group.name: kept}))


def test_heads_of_torchs_own_attention_go_with_as_much_of_the_stream() -> None:
    """Its code divides the width of the stream by the number of heads: 5 heads of 8 need a stream of 40."""
    model, inputs = lively(outside.Classes(outside.Attending()), seed=0), tokens()
    graph = resect.trace(model, inputs)
    (heads,) = (group for group in graph.groups if group.units == HEADS)
    touched = {member.parameter for member in heads.members}
    assert "embed.weight" in touched
    assert any("attn.in_proj_weight" in name for name in touched)
    kept = Kept(kind=heads.kind, layer=heads.layer, units=HEADS, keep=(0, 1, 3, 4, 5))
    assert_cut_equals_mask(model, graph, inputs, Plan(groups={heads.name: kept}))


def test_what_a_run_only_passes_by_is_kept() -> None:
    """Places of other texts than the example: what is cut from them would be missing there."""
    model = lively(outside.Places(), seed=0)
    graph = resect.trace(model, tokens())
    assert {(member.parameter, member.axis) for group in graph.groups for member in group.members if group.units != 20} == {
        *(("project.weight", 0), ("project.bias", 0), ("leave.weight", 1))
    }
    assert {frozen.size for frozen in graph.frozen if frozen.reason == "not used in the traced run"} >= {3, 20}


class Offset(nn.Module):
    """Reads a part of a projection by its place; the part before it is as long as an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.first = 4
        self.enter, self.left, self.right = nn.Linear(5, 12), nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 3]."""
        hidden = self.enter(x)
        return self.left(hidden[:, : self.first]) + self.right(hidden[:, 4:9])


def test_a_part_that_would_be_read_from_the_wrong_place_is_refused() -> None:
    model = lively(Offset(), seed=0)
    graph = resect.trace(model, (torch.randn(2, 5),))
    (group,) = (group for group in graph.groups if group.units == 4)
    plan = Plan(groups={group.name: Kept(kind=group.kind, layer=group.layer, units=4, keep=(0, 2))})
    with pytest.raises(ModelError, match="starts at position 4, the coupling demands 2"):
        resect.cut(model, plan, graph)


class Halves(nn.Module):
    """A gate whose code knows how wide its two halves are."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out, self.side = nn.Linear(8, 20), nn.Linear(10, 8), 10

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).unflatten(-1, (2, self.side)).unbind(-2)
        out: Tensor = self.out(gate.sigmoid() * value)
        return x + out


@pytest.mark.parametrize("depth", [2, 9])
def test_what_worked_for_one_module_is_used_for_its_likes(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many replays for nine modules as for two, though each keeps another number of units."""
    replays, run = list[Replay](), Replay.run

    def counted(replay: Replay) -> tuple[float, str, str]:
        replays.append(replay)
        return run(replay)

    monkeypatch.setattr(Replay, "run", counted)
    model, inputs = lively(nn.Sequential(*(Halves() for _ in range(depth))), seed=0), values(3, 8)()
    graph = resect.trace(model, inputs)
    names = [group.name for group in graph.groups if group.units == 10]
    assert len(names) == depth
    kept = {name: tuple(range(3 + place % 5)) for place, name in enumerate(names)}
    plan = Plan(groups={name: Kept(kind="channels", layer=None, units=10, keep=keep) for name, keep in kept.items()})
    resect.cut(model, plan, graph)
    assert [vars(module)["side"] for module in model.children()] == [len(keep) for keep in kept.values()]
    assert len(replays) <= 5
