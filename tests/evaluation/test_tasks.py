"""Choices scored through shared beginnings, against one plain float64 run for each."""

from __future__ import annotations

import math
from statistics import stdev

import pytest
import torch
from transformers import PreTrainedModel

from resect.errors import DataError, NumericsError, UsageError
from resect.evaluation import tasks as module
from resect.evaluation.perplexity import LOGITS
from resect.evaluation.tasks import Answers, Item, Request, Task, likeliest, log_likelihoods, mean_accuracy
from resect.graph import trace
from resect.plan import Kept, Plan
from resect.surgery import cut
from tests.models import FAMILIES, assert_untouched, copy_of, random_tokens, snapshot, tiny_tokenizer


@torch.no_grad()
def twin(model: PreTrainedModel, request: Request) -> float:
    """The sum of the log-probabilities, alone, without a cache, in float64."""
    logits = copy_of(model).double()(torch.tensor([request.tokens]), use_cache=False).logits[0].log_softmax(-1)
    places = range(len(request.tokens) - request.count, len(request.tokens))
    return sum(logits[place - 1, request.tokens[place]].item() for place in places)


def requests(seed: int = 0) -> list[list[Request]]:
    """Items whose choices share all of their context, a part of it, or nothing; equal and unequal lengths, one token and many."""
    text = random_tokens(1, 400, seed)[0].tolist()
    items = []
    for number, (shared, rests) in enumerate([(20, (1, 1)), (20, (7, 3, 12)), (9, (5, 4)), (0, (3, 30)), (1, (2, 2, 1, 9))]):
        start = text[number * 20 : number * 20 + shared]
        items.append([Request((*start, *text[200 + 13 * i : 201 + 13 * i + n]), n) for i, n in enumerate(rests)])
    both = tuple(text[:10])
    return [*items, [Request((*both, 5, *text[50:58]), 8), Request((*both, 6, *text[50:58]), 8)]]  # different contexts


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "falcon_gqa", "opt", "gpt_neox", "phi3", "glm4"])
@pytest.mark.parametrize("budget", [LOGITS, 101 * 40])
def test_equals_a_plain_run_of_every_choice(family: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", budget)
    model = FAMILIES[family]()
    found = log_likelihoods(model, requests())
    for row, item in zip(found, requests(), strict=True):
        assert row == pytest.approx([twin(model, request) for request in item], rel=1e-5)


def test_a_beginning_is_read_once() -> None:
    model, seen = FAMILIES["llama"](), []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    log_likelihoods(model, [requests()[1]])
    probe, beginning, rests = seen
    assert (tuple(beginning), tuple(rests)) == ((1, 20), (3, 12))


def test_without_sub_layers_the_cache_still_counts() -> None:
    model = FAMILIES["llama"]()
    graph = trace(model)
    first = next(group for group in graph.groups if group.kind == "sublayers" and "self_attn" in group.name)
    plan = Plan(groups={first.name: Kept(kind="sublayers", layer=first.layer, units=1, keep=())})
    cut(model, plan)
    for row, item in zip(log_likelihoods(model, requests()), requests(), strict=True):
        assert row == pytest.approx([twin(model, request) for request in item], rel=1e-5)


def test_caches_of_another_kind_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    expected = log_likelihoods(model, requests())
    monkeypatch.setattr(module, "DynamicCache", dict)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    found = log_likelihoods(model, requests())
    assert seen[1:] == [32]  # all items in one padded batch: the longest has 33 tokens
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_the_model_is_handed_back_as_it_was() -> None:
    model = FAMILIES["gemma2"]().train()
    before = snapshot(model)
    log_likelihoods(model, requests())
    assert_untouched(model, before)


def test_what_is_not_finite_is_an_error() -> None:
    model = FAMILIES["llama"]().train()
    with torch.no_grad():
        model.get_input_embeddings().weight[requests()[0][0].tokens[0]] = torch.nan
    with pytest.raises(NumericsError, match="the odd run hold NaN"):
        log_likelihoods(model, requests()[:1], name="odd")


QUESTIONS = (
    Item(("Water is", "Water is"), ("wet", "a very dry thing"), 0),
    Item(("The sun is", "The sun is"), ("cold", "warm", "blue and small")[:2], 1),
    Item(("So Ann", "So Bo"), ("went home.", "went home."), 1),
    Item(("", ""), ("yes", "no"), 0),
    Item(("ends in a space ", "ends in a space "), ("yes", "maybe not"), 1),
)


def character_requests(item: Item, prompt: str = "") -> list[Request]:
    """By hand: a token a character; text without a context comes after begin-of-text."""
    tokenizer = tiny_tokenizer()
    found = []
    for context, choice in zip(item.contexts, item.choices, strict=True):
        stripped = (prompt + context).rstrip()
        tail = (prompt + context)[len(stripped) :] + f" {choice}"
        tokens = tokenizer.encode(stripped + tail, add_special_tokens=False)
        found.append(Request((*([] if stripped else [1]), *tokens), len(tail)))
    return found


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_answers_are_the_likeliest_choices(metric: str) -> None:
    model = FAMILIES["llama"]()
    found = Task("trivia", metric, QUESTIONS).answered(model, tiny_tokenizer())
    values = [[twin(model, request) for request in character_requests(item)] for item in QUESTIONS]
    scaled = [[v / len(c) for v, c in zip(row, item.choices, strict=True)] for row, item in zip(values, QUESTIONS, strict=True)]
    by = {name: [row.index(max(row)) for row in rows] for name, rows in (("acc", values), ("acc_norm", scaled))}
    assert by["acc"] != by["acc_norm"]
    golds = [item.gold for item in QUESTIONS]
    assert list(found.chosen) == by[metric]
    assert list(found.correct) == [a == b for a, b in zip(by[metric], golds, strict=True)]
    assert found.acc == sum(a == b for a, b in zip(by["acc"], golds, strict=True)) / 5
    assert found.acc_norm == sum(a == b for a, b in zip(by["acc_norm"], golds, strict=True)) / 5


def test_the_first_of_equal_choices_and_characters_not_tokens() -> None:
    assert likeliest([-1.0, -1.0], ["a", "b"], "acc") == 0
    assert likeliest([-4.0, -6.0], ["ab", "abcdef"], "acc") == 0
    assert likeliest([-4.0, -6.0], ["ab", "abcdef"], "acc_norm") == 1
    assert likeliest([-4.0, -4.1], ["éé", "abc"], "acc_norm") == 1  # two characters, four bytes


def test_standard_errors() -> None:
    one = Answers("a", "acc", (0, 1, 1), (True, False, True), 0, acc=2 / 3)
    two = Answers("b", "acc", (0,) * 4, (True, False, False, False), 0, acc=1 / 4)
    assert one.stderr == pytest.approx(stdev([1, 0, 1]) / math.sqrt(3))
    mean, error = mean_accuracy([one, two])
    assert mean == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert error == pytest.approx(math.hypot(one.stderr, two.stderr) / 2)
    assert math.isnan(Answers("c", "acc", (0,), (True,), 0, acc=1.0).stderr)


def test_shots_are_other_items_with_their_answers() -> None:
    items = QUESTIONS[:3]
    (first, *_) = module._prompts(items, items, 2)
    both = ["The sun is warm\n\n", "So Bo went home.\n\n"]
    assert first in ("".join(both), "".join(reversed(both)))
    assert list(module._prompts(items, items, 0)) == ["", "", ""]
    model = FAMILIES["llama"]()
    found = Task("trivia", "acc", items).answered(model, tiny_tokenizer(), shots=2, limit=1)
    values = [twin(model, request) for request in character_requests(items[0], first)]
    assert found.chosen == (values.index(max(values)),)
    assert found.shots == 2


def test_shots_are_drawn_as_the_harness_draws_them() -> None:
    samplers = pytest.importorskip("lm_eval.api.samplers")
    items = [Item((f"Question {i}",) * 2, ("a", "b"), i % 2) for i in range(9)]
    pool = [*items, items[3], items[3]]
    sampler = samplers.ContextSampler([vars(item) for item in pool], rnd=module.SEED)
    expected = ["".join(f"{Item(**row).solved()}\n\n" for row in sampler.sample(4, eval_doc=vars(item))) for item in pool]
    assert list(module._prompts(pool, pool, 4)) == expected


def test_what_does_not_fit_loses_its_beginning() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()  # 80 positions
    request = module._request(model, tokenizer, "x" * 100, " right")
    assert (len(request.inputs), request.count) == (80, 6)
    assert request.tokens[-6:] == tuple(tokenizer.encode(" right", add_special_tokens=False))
    with pytest.raises(DataError, match="A choice of 91 tokens"):
        module._request(model, tokenizer, "x", " " + "y" * 90)


def test_too_many_shots() -> None:
    with pytest.raises(UsageError, match="Asked for 5 shots of trivia; it has 5 items"):
        Task("trivia", "acc", QUESTIONS).answered(FAMILIES["llama"](), tiny_tokenizer(), shots=5)
