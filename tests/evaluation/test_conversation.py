"""Answers against plain greedy generation; what a model is given when it answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from resect.errors import UsageError
from resect.evaluation import Conversation, generations
from tests.models import FAMILIES, assert_untouched, snapshot, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return FAMILIES["llama_mha"]()


def chatty() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def given(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is given to go on from, in turn."""
    prompts: list[str] = []
    generate: Any = conversation.model.generate

    def note(tokens: torch.Tensor, **settings: Any) -> Any:
        prompts.append(conversation.tokenizer.decode(tokens[0]))
        return generate(tokens, **settings)

    monkeypatch.setattr(conversation.model, "generate", note)
    return prompts


def test_a_plain_answer_is_the_greedy_continuation(model: PreTrainedModel) -> None:
    before = snapshot(model)
    pieces: list[str] = []
    said = Conversation(model, tiny_tokenizer(), new_tokens=12).say("The river", pieces.append)
    assert_untouched(model, before)
    assert said.text == "".join(pieces) == generations(model, tiny_tokenizer(), ["The river"], new_tokens=12)[0]
    assert said.text
    assert 1 <= said.tokens <= 12
    assert said.seconds > 0


def test_an_answer_to_a_message_is_that_of_the_chat_template(model: PreTrainedModel) -> None:
    said = Conversation(model, chatty(), new_tokens=9).say("Hello?")
    assert said.text == generations(model, chatty(), ["Hello?"], new_tokens=9, chat=True)[0]


def test_history_and_the_system_message_are_given_again(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model, chatty(), new_tokens=3, system="Be brief.")
    prompts = given(talk, monkeypatch)
    first = talk.say("One")
    talk.say("Two")
    talk.reset()
    talk.say("Three")
    assert prompts == [
        "[system]Be brief.[user]One[assistant]",
        f"[system]Be brief.[user]One[assistant]{first.text}[user]Two[assistant]",
        "[system]Be brief.[user]Three[assistant]",
    ]


def test_without_a_template_the_text_goes_on(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model, tiny_tokenizer(), new_tokens=3)
    prompts = given(talk, monkeypatch)
    first = talk.say("One")
    talk.say("Two")
    assert prompts == ["One", f"One{first.text}\nTwo"]


def test_temperature_draws(model: PreTrainedModel) -> None:
    answers = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        answers.add(Conversation(model, tiny_tokenizer(), new_tokens=20, temperature=2.0).say("The river").text)
    assert len(answers) == 2


def test_what_cannot_be_meant_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match=r"temperature=-1(\.0)? was given"):
        Conversation(model, tiny_tokenizer(), temperature=-1)
    with pytest.raises(UsageError, match="new_tokens=0 was given"):
        Conversation(model, tiny_tokenizer(), new_tokens=0)
    talk = Conversation(model, tiny_tokenizer(), new_tokens=30)
    with pytest.raises(UsageError, match="60 tokens, and 30 more would not fit into the model's 80 positions"):
        talk.say("x" * 60)
    assert not talk.messages  # as if it had not been said
