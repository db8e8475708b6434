"""What groups are worth: against masked models measured one by one, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import resect
from resect.errors import DataError, UsageError
from resect.methods import Knowledge
from resect.report.knowledge import GroupKnowledge, unprunable
from tests.models import FAMILIES, assert_untouched, random_tokens, snapshot, tiny_tokenizer

TEXT = random_tokens(4, 24, seed=7).flatten()
WINDOW = 12
ALL = ("heads", "channels", "residual", "sublayers", "blocks")


@torch.no_grad()
def nats_of(model: nn.Module, tokens: Tensor) -> float:
    """Mean cross-entropy by hand, a window at a time."""
    losses = []
    for window in tokens.view(-1, WINDOW):
        log = model(window[None]).logits[0].double().log_softmax(-1)
        losses += [-log[place, token].item() for place, token in enumerate(window[1:])]
    return sum(losses) / len(losses)


def by_hand(model: PreTrainedModel, graph: resect.Graph, name: str, removed: int) -> float:
    """The cross-entropy with the units of the lowest squared magnitude masked for good in a copy."""
    group = graph.group(name)
    magnitude = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        squares = model.get_parameter(member.parameter).detach().double().square().movedim(member.axis, 0)
        magnitude += squares.reshape(len(squares), -1).sum(1)[member.index].sum(1)
    keep = sorted(magnitude.argsort()[removed:].tolist())
    kept = {"kind": group.kind, "layer": group.layer, "units": group.units, "keep": keep}
    plan = resect.Plan.model_validate({"groups": {name: kept}})
    return nats_of(resect.mask(copy.deepcopy(model), plan, graph), TEXT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_equals_masking_one_group_at_a_time(family: str) -> None:
    model = FAMILIES[family]().double()
    graph, before = resect.trace(model), snapshot(model)
    found = resect.analyze(model, text=TEXT, window=WINDOW, kinds=ALL)
    assert_untouched(model, before)
    assert found.passing
    assert [group.name for group in found.groups] == [group.name for group in graph.of_kind(*ALL)]
    assert found.dense.nats == pytest.approx(nats_of(model, TEXT), rel=1e-12)
    for group in found.groups:
        for removal in group.removals:
            expected = by_hand(model, graph, group.name, removal.removed)
            assert removal.nats == pytest.approx(expected, rel=1e-11), group.name
            assert removal.perplexity == math.exp(removal.nats)
        assert group.damage == pytest.approx(sum(one.nats - found.dense.nats for one in group.removals) / 3)
    assert len({removal.nats for group in found.groups for removal in group.removals}) > len(found.groups)


def test_passing_over_blocks_changes_no_bit() -> None:
    model = FAMILIES["gemma2"]()
    asked: dict[str, Any] = {"text": TEXT, "window": WINDOW, "kinds": ALL, "units": "random"}
    passing, whole = resect.analyze(model, **asked), resect.analyze(model, **asked, passing=False)
    assert (passing.passing, whole.passing) == (True, False)
    assert passing.groups == whole.groups


def test_experts_are_tested_and_as_many_stay_as_are_chosen() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 101}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    found = resect.analyze(model.eval(), text=TEXT, window=WINDOW, kinds=("experts",), ratios=(0.1, 0.5, 0.9))
    assert [[removal.removed for removal in group.removals] for group in found.groups] == [[1, 2, 2]] * 2


def test_a_network_whose_blocks_talk_past_each_other_runs_whole() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    heard: list[Tensor] = []
    blocks: Any = model.get_submodule("model.layers")
    blocks[0].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: heard.append(output))
    blocks[2].mlp.register_forward_hook(lambda module, inputs, output: output + heard.pop())
    found = resect.analyze(model, text=TEXT, window=WINDOW, kinds=("heads",))
    assert not found.passing
    name = "model.layers.2.self_attn.heads"
    (group,) = [group for group in found.groups if group.name == name]
    for removal in group.removals:
        assert removal.nats == pytest.approx(by_hand(model, graph, name, removal.removed), rel=1e-6)


def test_random_units_follow_the_seed() -> None:
    model = FAMILIES["llama"]()
    asked: dict[str, Any] = {"text": TEXT, "window": WINDOW, "kinds": ("channels",), "units": "random"}
    one, again, other = (resect.analyze(model, **asked, seed=seed) for seed in (1, 1, 2))
    assert one.groups == again.groups != other.groups


def test_json_comes_back() -> None:
    found = resect.analyze(FAMILIES["llama"](), text=TEXT, window=WINDOW, gamma=0.5)
    assert Knowledge.from_json(found.to_json()) == found
    assert len(found.protected) == 3
    with pytest.raises(UsageError, match="not an analysis"):
        Knowledge.from_json('{"groups": []}')


@pytest.mark.parametrize(("gamma", "count"), [(0, 0), (0.1, 1), (0.2, 2), (0.21, 3), (0.3, 3), (1, 10)])
def test_the_worst_share_is_protected(gamma: float, count: int) -> None:
    cost = {f"g{number}": (number * 7) % 10 for number in range(10)}
    groups = [GroupKnowledge(name=name, kind="heads", layer=0, units=2, damage=c, removals=[]) for name, c in cost.items()]
    assert unprunable(groups, gamma) == sorted(cost, key=lambda name: -cost[name])[:count]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ratios": (0.5, 1.2)}, r"ratios=1\.2 was given.*\(0, 1\]"),
        ({"ratios": (0.0,)}, r"ratios=0\.0 was given"),
        ({"ratios": ()}, "name one or more"),
        ({"gamma": 1.5}, r"gamma=1\.5 was given.*\[0, 1\]"),
        ({"kinds": ("head",)}, "Did you mean 'heads'"),
        ({"kinds": ("vocabulary",)}, "no kind 'vocabulary' to analyse"),
        ({"kinds": ("experts",)}, "Nothing to analyse: experts were asked for, and the network offers blocks, channels"),
        ({"units": "rand"}, "Did you mean 'random'"),
        ({"text": "demo"}, "needs the model's tokenizer"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resect.analyze(FAMILIES["llama"](), **{"text": TEXT, "window": WINDOW, **asked})


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="windows of 64 tokens; the text has 20"):
        resect.analyze(FAMILIES["llama"](), tiny_tokenizer(), text=TEXT, window=64, limit=20)
