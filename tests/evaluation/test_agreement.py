"""Agreement of two models against the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from resect.errors import NumericsError, UsageError
from resect.evaluation import Answers, agreement, flips
from tests.models import FAMILIES, assert_untouched, random_tokens, snapshot, tiny


def changed(model: PreTrainedModel, by: float) -> PreTrainedModel:
    other = FAMILIES["llama"]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=by)
    return other


@torch.no_grad()
def by_definition(
    model: PreTrainedModel, reference: PreTrainedModel, tokens: torch.Tensor, window: int, bos: int | None
) -> tuple[float, float]:
    divergences, same = [], []
    for start in range(0, len(tokens) - window + 1, window):
        text = tokens[start : start + window].tolist()
        read = text[:-1] if bos is None else [bos, *text[:-1]]
        q, p = (one.double()(torch.tensor([read]), use_cache=False).logits[0].softmax(-1) for one in (model, reference))
        divergences += (p * (p / q).log()).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    model.float(), reference.float()
    return sum(divergences) / len(divergences), sum(same) / len(same)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("batch_tokens", [None, 20])
def test_equals_the_definition(bos: int | None, batch_tokens: int | None) -> None:
    model, tokens = FAMILIES["llama"](), random_tokens(1, 70)[0]
    other = changed(model, 0.05)
    found = agreement(other, model, tokens, window=16, bos=bos, batch_tokens=batch_tokens)
    kl, same = by_definition(other, model, tokens, 16, bos)
    assert kl > 0.01
    assert 0 < same < 1
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.same_top == pytest.approx(same)
    assert (found.tokens, found.window, found.bos) == (4 * (15 if bos is None else 16), 16, bos is not None)
    turned = agreement(model, other, tokens, window=16, bos=bos)
    assert turned.kl == pytest.approx(by_definition(model, other, tokens, 16, bos)[0], rel=1e-4)
    assert abs(turned.kl - found.kl) > 1e-3  # it is no distance


def test_a_model_agrees_with_itself_and_is_left_alone() -> None:
    model, twin = FAMILIES["llama"]().train(), FAMILIES["llama"]()
    before = snapshot(model)
    found = agreement(model, twin, random_tokens(1, 40), window=8)
    assert (found.kl, found.same_top) == (0.0, 1.0)
    assert_untouched(model, before)


def test_other_vocabularies_and_broken_models() -> None:
    model, tokens = FAMILIES["llama"](), random_tokens(1, 40)
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    smaller = tiny("Llama", vocab_size=90, **{name: getattr(model.config, name) for name in names})
    with pytest.raises(UsageError, match="vocabularies of 101 and 90"):
        agreement(model, smaller, tokens, window=8)
    broken = FAMILIES["llama"]()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericsError, match="divergence"):
        agreement(broken, model, tokens, window=8)


def test_flips() -> None:
    before = Answers("t", "acc", (0, 1, 2, 3, 0), (True, True, False, False, False), 0, acc=0.4)
    now = Answers("t", "acc", (0, 0, 2, 1, 1), (True, False, False, True, False), 0, acc=0.4)
    found = flips(now, before)
    assert (found.task, found.changed, found.lost, found.gained) == ("t", 3 / 5, 1 / 5, 1 / 5)
