from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from resect.calibration.generated import CONCURRENT, start_token, write
from resect.errors import NumericsError, UsageError
from tests.models import FAMILIES, assert_untouched, snapshot, tiny_tokenizer


class Markov(nn.Module):
    """A model without a cache whose next token depends on the last alone, by known chances [vocabulary, vocabulary]."""

    def __init__(self, chances: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(chances.log())

    def forward(self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "phi3"])
def test_writing_is_seeded_and_leaves_the_model_untouched(family: str) -> None:
    model = FAMILIES[family]()
    model.train()
    next(iter(model.children())).eval()
    before = snapshot(model)
    first, again, other = (write(model, samples=3, length=12, seed=seed, start=1) for seed in (0, 0, 1))
    assert_untouched(model, before)
    assert first.shape == (3, 12)
    assert first.dtype == torch.long
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[:, 0] == 1).all()


def test_the_cache_does_not_change_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    cached = write(model, samples=4, length=16, seed=0, start=1)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits))
    assert torch.equal(write(model, samples=4, length=16, seed=0, start=1), cached)


def test_tokens_follow_the_models_chances() -> None:
    chances = torch.tensor([[0.0, 0.7, 0.3], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    tokens = write(Markov(chances), samples=CONCURRENT + 6, length=100, seed=0, start=0)
    counts = torch.zeros(3, 3)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.ones(()), accumulate=True)
    # 6930 steps: three standard errors of a share are below 0.04 in every row
    assert torch.allclose(counts / counts.sum(1, keepdim=True), chances, atol=0.04)
    assert counts[2, 1] == counts[2, 2] == counts[0, 0] == 0


def test_a_model_that_yields_nan_is_named_and_gets_its_mode_back() -> None:
    model = Markov(torch.full((3, 3), float("nan"))).train()
    with pytest.raises(NumericsError, match="after token 1 of its own text"):
        write(model, samples=1, length=4, seed=0, start=0)
    assert model.training


def test_no_more_tokens_than_the_model_has_positions() -> None:
    with pytest.raises(UsageError, match="asked to write 81 tokens; it has 80 positions"):
        write(FAMILIES["llama"](), samples=1, length=81, seed=0, start=1)


def test_text_starts_with_the_first_token_that_is_known() -> None:
    tokenizer = tiny_tokenizer()
    model = nn.Module()
    assert start_token(model, tokenizer) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert start_token(model, tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="neither the tokenizer nor the config names one"):
        start_token(model, tokenizer)
    setattr(model, "config", SimpleNamespace(bos_token_id=None, eos_token_id=[7, 8]))  # noqa: B010
    assert start_token(model, tokenizer) == 7
