"""Positions, rows and chat templates: what a model cannot take in, and a template that fails, are refused by name."""

from __future__ import annotations

import sys
from typing import Any, cast

import pytest
import torch
from tokenizers import processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForCausalLM,
)

import resect
from resect.calibration import chat, chat_text, check_length, check_vocabulary, positions_of
from resect.calibration.limits import rows_of
from resect.errors import ModelError, UsageError
from tests.models import FAMILIES, tiny_tokenizer


class Words:
    """A tokenizer as far as its vocabulary goes."""

    def __init__(self, highest: int) -> None:
        self.highest = highest

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": self.highest}


class Templated:
    """A tokenizer with a chat template that does what it is told."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result() if callable(self.result) else self.result


def gpt2(positions: int = 12) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=positions)).eval()


def test_positions_are_what_the_configuration_says_and_the_table_holds() -> None:
    assert positions_of(gpt2()) == 12
    assert positions_of(FAMILIES["llama"]()) == FAMILIES["llama"]().config.max_position_embeddings
    assert positions_of(torch.nn.Linear(2, 2)) is None
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=12))
    assert positions_of(opt) == 12  # the table has two rows more
    roberta = RobertaForCausalLM(RobertaConfig(**sizes, intermediate_size=16, max_position_embeddings=14, is_decoder=True))
    assert positions_of(roberta) == 12  # and here two rows are for padding
    for model in (opt, roberta):
        model.eval()(torch.full((1, 12), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 13), 5))


def test_lengths() -> None:
    check_length(gpt2(), 12, "Asked")
    with pytest.raises(UsageError, match="^Asked; the model has 12 positions. Ask for a shorter length.$"):
        check_length(gpt2(), 13, "Asked")


def test_tokenizers_with_more_tokens_than_rows() -> None:
    assert rows_of(gpt2()) == 40
    check_vocabulary(gpt2(), Words(39))
    check_vocabulary(gpt2(), None)
    with pytest.raises(ModelError, match="numbers its tokens to 40; the model has 40 rows"):
        check_vocabulary(gpt2(), Words(40))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 13, dtype=torch.long), "windows of 13 tokens; the model has 12 positions"),
        (torch.tensor([[3, 40]]), "from 3 to 40; the model has 40 rows"),
        (torch.tensor([[-1, 4]]), "from -1 to 4; the model has 40 rows"),
        (torch.zeros(2, 4), "float32"),
    ],
)
def test_tokens_that_were_given(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resect.prune(gpt2(), data=tokens)


def test_every_call_refuses_at_the_start() -> None:
    model = gpt2()
    tokenizer, larger = (cast(PreTrainedTokenizerBase, Words(highest)) for highest in (39, 99))
    asked = "the model has 12 positions"
    with pytest.raises(UsageError, match=f"Calibration was asked for windows of 128 tokens; {asked}. Ask for a shorter length."):
        resect.prune(model, tokenizer, data="nowhere.txt")
    with pytest.raises(UsageError, match=f"windows of 128 tokens; {asked}"):
        resect.analyze(model, tokenizer, text="nowhere.txt")
    with pytest.raises(UsageError, match=asked):
        resect.recover(model, tokenizer, data="nowhere.txt", settings=resect.Recovery(tokens=512, length=13, batch=2))
    for call in (
        lambda: resect.prune(model, larger, data="nowhere.txt", length=8),
        lambda: resect.analyze(model, larger, text="nowhere.txt", window=8),
        lambda: resect.recover(model, larger, data="nowhere.txt", settings=resect.Recovery(tokens=512, length=8, batch=2)),
    ):
        with pytest.raises(ModelError, match="numbers its tokens to 99; the model has 40 rows"):
            call()


def test_small_tables_are_pruned_and_saved(tmp_path: Any) -> None:
    """What resect reads by itself, to trace and to check, fits too."""
    model = gpt2(8)
    result = resect.prune(model, keep=0.8, data=torch.randint(40, (4, 8)), layout="per-layer")
    assert resect.save(model, tmp_path / "saved", plan=result.plan).difference < 1e-4


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (ValueError("only one turn"), r"chat template refused a conversation of 1 message\(s\): only one turn"),
        (TypeError(), "refused.*TypeError"),
        (None, "wrote no text"),
        (lambda: "x" * (chat.LARGEST + 1), "at most 10,000,000 characters"),
    ],
)
def test_templates_that_fail(result: Any, message: str) -> None:
    assert chat_text(Templated("hello"), [{"role": "user", "content": "."}]) == "hello"
    with pytest.raises(ModelError, match=message):
        chat_text(Templated(result), [{"role": "user", "content": "."}])


def test_templates_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> str:
        while True:
            pass

    monkeypatch.setattr(chat, "SECONDS", 0.05)
    with pytest.raises(ModelError, match=r"did not end within 0.05 seconds"):
        chat_text(Templated(endless), [])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_a_template_of_unbounded_memory() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 10**11 }}"
    with pytest.raises(ModelError, match="wanted more than 1024 MiB"):
        chat_text(tokenizer, [{"role": "user", "content": "hi"}])
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert chat_text(tokenizer, [{"role": "user", "content": "hi"}]) == "hi"


def test_tokens_that_are_put_around_a_text() -> None:
    tokenizer = tiny_tokenizer()
    around = processors.TemplateProcessing(single="<x> $A", special_tokens=[("<x>", 999)])
    tokenizer.backend_tokenizer.post_processor = around
    with pytest.raises(ModelError, match="numbers its tokens to 999"):
        check_vocabulary(FAMILIES["llama"](), tokenizer)
