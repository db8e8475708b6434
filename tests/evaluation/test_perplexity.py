"""Perplexity against transformers' own loss, window by window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from resect.errors import DataError, NumericsError, UsageError
from resect.evaluation import perplexity
from resect.statistics import losses
from tests.models import FAMILIES, assert_untouched, random_tokens, snapshot


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["gemma2"]()  # soft-capped logits and a sliding window


@torch.no_grad()
def by_transformers(model: PreTrainedModel, tokens: Tensor, window: int) -> float:
    """Mean of the loss that transformers itself computes for each window alone, in float64."""
    model.double()
    windows = [tokens[start : start + window] for start in range(0, len(tokens) - window + 1, window)]
    losses = [model(input_ids=one[None], labels=one[None]).loss.item() for one in windows]
    model.float()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch_tokens", [None, 1, 30, 50, 10_000])
@pytest.mark.parametrize(("window", "length"), [(2, 21), (8, 80), (16, 100), (71, 71)])
def test_equals_the_loss_of_transformers(
    model: PreTrainedModel, window: int, length: int, batch_tokens: int | None
) -> None:
    tokens = random_tokens(1, length)[0]
    found = perplexity(model, tokens, window=window, batch_tokens=batch_tokens)
    windows = length // window
    assert (found.window, found.windows, found.dropped) == (window, windows, length % window)
    assert found.tokens == windows * (window - 1)
    assert found.nats == pytest.approx(by_transformers(model, tokens, window), rel=1e-6)
    assert found.value == math.exp(found.nats)


@torch.no_grad()
def test_begin_of_text_before_every_window(model: PreTrainedModel) -> None:
    tokens = random_tokens(1, 50)[0]
    found = perplexity(model, tokens, window=16, bos=1, batch_tokens=32)
    model.double()
    nats = []
    for start in (0, 16, 32):
        window = tokens[start : start + 16]
        logits = model(input_ids=torch.cat([torch.tensor([1]), window[:-1]])[None]).logits[0].log_softmax(-1)
        nats.append(-logits.gather(1, window[:, None]).mean().item())
    assert found.window_nats == pytest.approx(nats, rel=1e-6)
    assert found.nats == pytest.approx(sum(nats) / 3, rel=1e-6)
    assert (found.tokens, found.windows, found.dropped, found.bos) == (48, 3, 2, True)
    assert found.bits_per_byte is None


@pytest.mark.parametrize("bos", [None, 1])
def test_bits_per_byte_count_what_was_predicted(model: PreTrainedModel, bos: int | None) -> None:
    tokens, sizes = random_tokens(1, 50)[0], torch.arange(50) % 7
    found = perplexity(model, tokens, window=16, bos=bos, sizes=sizes)
    predicted = [i for i in range(48) if bos is not None or i % 16]
    covered = sum(i % 7 for i in predicted)
    assert sum(found.window_bytes) == covered
    assert found.bits_per_byte == pytest.approx(found.nats * len(predicted) / math.log(2) / covered)
    assert sum(found.window_nats) / 3 == pytest.approx(found.nats)


def test_chunks_of_the_vocabulary_do_not_matter(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(4, 32)
    whole = perplexity(model, tokens, window=16)
    monkeypatch.setitem(losses.CHUNK, "cpu", 101 * 7)
    assert perplexity(model, tokens, window=16).nats == pytest.approx(whole.nats, rel=1e-12)


def test_one_long_text_whatever_its_shape(model: PreTrainedModel) -> None:
    tokens = random_tokens(4, 20)
    assert perplexity(model, tokens, window=16) == perplexity(model, tokens.flatten(), window=16)


def test_the_model_is_handed_back_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    model.model.layers[1].eval()
    before = snapshot(model)
    perplexity(model, random_tokens(), window=4)
    assert_untouched(model, before)


def test_dropout_is_off(model: PreTrainedModel) -> None:
    calm = perplexity(model, random_tokens(), window=8)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert perplexity(model, random_tokens(), window=8) == calm


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    model = FAMILIES["llama"]().train()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = value
    tokens = torch.full((64,), 7)
    tokens[40] = 50
    with pytest.raises(NumericsError, match="the wiki run hold NaN or inf in windows 5 to 5"):
        perplexity(model, tokens, window=8, batch_tokens=8, name="wiki")
    assert model.training


def test_bad_windows(model: PreTrainedModel) -> None:
    with pytest.raises(DataError, match=r"windows of 72 tokens; the text has 24\."):
        perplexity(model, random_tokens(2, 12), window=72)
    with pytest.raises(UsageError, match="window=1 was given; it is a whole number from 2"):
        perplexity(model, random_tokens(), window=1)
    with pytest.raises(UsageError, match="windows of 81 tokens; the model has 80 positions"):
        perplexity(model, random_tokens(10, 12), window=81)


def test_losses_whose_perplexity_no_float_holds_are_told(model: PreTrainedModel) -> None:
    class Wrong(torch.nn.Module):
        config, device = model.config, torch.device("cpu")

        def forward(self, input_ids: Tensor, use_cache: bool) -> object:
            logits = torch.zeros(*input_ids.shape, 101)
            logits[..., 0] = 1e6
            return type("Output", (), {"logits": logits})

    with pytest.raises(NumericsError, match=r"wiki: the mean loss is 1e\+06 nats a token"):
        perplexity(Wrong(), random_tokens(), window=8, name="wiki")  # type: ignore[arg-type]
