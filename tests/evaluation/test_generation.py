"""Generations are greedy, complete, quiet and harmless."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from resect.errors import ModelError, UsageError
from resect.evaluation import generations, parameter_count
from tests.models import FAMILIES, assert_untouched, logits_without_cache, snapshot, tiny_tokenizer

PROMPTS = ["Once upon a time", "2 + 2 ="]


def by_hand(model: PreTrainedModel, prompt: str, steps: int) -> str:
    """The argmax of a full forward pass, again and again, up to the end token."""
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = tokens.shape[1]
    for _ in range(steps):
        following = logits_without_cache(model, tokens)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
        if following.item() == model.generation_config.eos_token_id:
            break
    return str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_follows_the_argmax(family: str) -> None:
    model = FAMILIES[family]()
    found = generations(model, tiny_tokenizer(), PROMPTS, new_tokens=12)
    assert found == [by_hand(model, prompt, 12) for prompt in PROMPTS]


def test_sampling_settings_are_ignored_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    model = FAMILIES["llama"]()
    expected = generations(model, tiny_tokenizer(), PROMPTS, new_tokens=8)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k, config.num_beams = True, 0.3, 0.5, 7, 3
    config.max_length, config.pad_token_id = 9, None
    logging.getLogger("transformers").setLevel(logging.WARNING)
    before = snapshot(model), config.to_dict()
    capfd.readouterr()
    assert generations(model, tiny_tokenizer(), PROMPTS, new_tokens=8) == expected
    assert capfd.readouterr() == ("", "")
    assert_untouched(model, before[0])
    assert config.to_dict() == before[1]


@pytest.mark.parametrize("end", ["", 2**70, [None]])
def test_generation_settings_that_fit_no_model_are_refused(end: Any) -> None:
    model = FAMILIES["llama"]()
    model.generation_config.eos_token_id = end
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        generations(model, tiny_tokenizer(), ["Bells"], new_tokens=2)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="the prompt has no tokens"):
        generations(FAMILIES["llama"](), tiny_tokenizer(), [""], new_tokens=2)


def test_chat_wraps_the_prompt_in_the_template() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    with pytest.raises(UsageError, match="no chat template"):
        generations(model, tokenizer, PROMPTS, chat=True)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
    found = generations(model, tokenizer, PROMPTS[:1], new_tokens=6, chat=True)
    assert found == [by_hand(model, "<s>user: Once upon a time\nbot:", 6)]


def test_parameters_are_counted_once() -> None:
    model = FAMILIES["llama_tied"]()
    embedding = 101 * 60
    block = 60 * 48 * 2 + 60 * 16 * 2 + 3 * 60 * 56 + 2 * 60
    assert parameter_count(model) == embedding + 3 * block + 60
