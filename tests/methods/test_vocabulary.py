"""A vocabulary cut to what a text needs: which rows stay, in one call or beside other cuts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import resect
from resect.errors import DataError, UsageError
from resect.graph import Graph
from tests.models import FAMILIES, assert_same_logits, logits_without_cache, random_tokens, tiny_tokenizer
from tests.zoo.shrink import build

TEXT = ["the river ran low that summer", "the boats lay on the mud"]
LETTERS = sorted(set("".join(TEXT)))
SPECIAL = {0, 1, 2, 3}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return resect.trace(FAMILIES["llama"]())


def plan(graph: Graph, texts: Any = TEXT, **options: Any) -> resect.Plan:
    return resect.vocabulary_plan(graph, tiny_tokenizer(), texts, **options)


def kept(found: resect.Plan) -> list[str]:
    """The characters that stay."""
    (group,) = found.groups.values()
    return [str(tiny_tokenizer().convert_ids_to_tokens(token)) for token in group.keep if token not in SPECIAL]


def test_what_the_text_needs(graph: Graph) -> None:
    found = plan(graph)
    assert sorted(kept(found)) == LETTERS
    assert set(found.groups["vocabulary"].keep) > SPECIAL
    facts = found.notes["vocabulary"]
    assert facts == {"rows": 101, "kept": len(LETTERS) + 4, "base": 4, "needed": len(LETTERS) + 4, "tokens": 53, "missing": 0}
    assert plan(graph, "".join(TEXT)).groups == found.groups  # one text as well as several


def test_the_most_frequent_stay(graph: Graph) -> None:
    found = plan(graph, keep=4 + 3)
    assert sorted(kept(found)) == [" ", "e", "t"]
    assert found.notes["vocabulary"]["missing"] == sum(character not in " et" for character in "".join(TEXT))
    assert plan(graph, keep=7 / 101 + 1e-9).groups == found.groups


def test_rows_are_a_multiple(graph: Graph) -> None:
    assert len(plan(graph, align=16).groups["vocabulary"].keep) == 32
    assert set(LETTERS) < set(kept(plan(graph, align=16)))
    assert len(plan(graph, align=16, keep=31).groups["vocabulary"].keep) == 16
    assert len(plan(graph, align=64, keep=1.0).groups["vocabulary"].keep) == 101
    assert len(plan(graph, align=200).groups["vocabulary"].keep) == 101


def test_tokens_that_only_the_model_names_stay() -> None:
    model = FAMILIES["llama"]()
    model.config.eos_token_id = [2, 99]
    assert 99 in resect.vocabulary_plan(resect.trace(model), tiny_tokenizer(), TEXT).groups["vocabulary"].keep


@pytest.mark.parametrize("texts", ["", [], ["", ""]])
def test_a_text_without_tokens(graph: Graph, texts: Any) -> None:
    with pytest.raises(DataError, match="holds no token"):
        plan(graph, texts)


@pytest.mark.parametrize(
    ("keep", "said"), [(3, "4 are needed"), (0.03, "4 are needed"), (0, "keep=0 .* whole number"), (1.5, r"keep=1\.5 .* share")]
)
def test_too_few_rows(graph: Graph, keep: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(graph, keep=keep)


def test_a_tokenizer_of_another_model(graph: Graph) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["river"])
    with pytest.raises(UsageError, match="up to 101; the network has 101 rows.*another model"):
        resect.vocabulary_plan(graph, tokenizer, TEXT)


def test_a_slow_tokenizer(graph: Graph) -> None:
    class Slow:
        """Splits in Python."""

    with pytest.raises(UsageError, match="not a fast tokenizer"):
        resect.vocabulary_plan(graph, Slow(), TEXT)


def test_a_network_whose_rows_stay() -> None:
    with pytest.raises(UsageError, match=r"stays whole: .*aten\.ne in roberta"):
        resect.vocabulary_plan(resect.trace(build("roberta")), tiny_tokenizer(), TEXT)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    with pytest.raises(UsageError, match="no text is looked up"):
        resect.vocabulary_plan(resect.trace(layers, (torch.zeros(2, 4),)), tiny_tokenizer(), TEXT)


@pytest.fixture
def source(tmp_path: Path) -> resect.Vocabulary:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXT))
    return resect.Vocabulary([str(file)])


def test_the_vocabulary_alone(source: resect.Vocabulary) -> None:
    """`keep=1`: nothing else is cut, no calibration text is asked for."""
    dense, model = FAMILIES["llama_tied"](), FAMILIES["llama_tied"]()
    result = resect.prune(model, tiny_tokenizer(), keep=1, vocabulary=source)
    assert result.plan.removed().keys() == {"vocabulary"}
    assert result.report["calibration"] is None
    assert result.report["vocabulary"]["needed"] == len(LETTERS) + 1 + 4  # and a line end
    keep = torch.tensor(result.plan.groups["vocabulary"].keep)
    new = torch.randint(len(keep), (2, 9))
    assert_same_logits(logits_without_cache(model, new), logits_without_cache(dense, keep[new])[..., keep])
    before, after = tiny_tokenizer()(TEXT)["input_ids"], result.tokenizer(TEXT)["input_ids"]
    assert [[int(keep[token]) for token in line] for line in after] == before


def test_with_other_kinds(source: resect.Vocabulary) -> None:
    model = FAMILIES["llama"]()
    result = resect.prune(model, tiny_tokenizer(), keep=0.7, data=random_tokens(6, 12), vocabulary=source)
    assert {kept.kind for kept in result.plan.groups.values() if kept.removed} >= {"channels", "vocabulary"}
    assert result.report["cut_equals_mask"]["difference"] <= 1e-4
    assert result.report["parameters"]["pruned"] == sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(result.tokenizer, PreTrainedTokenizerFast)
    assert len(result.tokenizer) == model.config.vocab_size


def test_without_being_asked_rows_stay() -> None:
    model = FAMILIES["llama"]()
    result = resect.prune(model, keep=0.7, data=random_tokens(6, 12))
    assert "vocabulary" not in result.plan.groups
    assert "vocabulary" not in result.scores
    assert model.config.vocab_size == 101


def test_no_tokenizer(source: resect.Vocabulary) -> None:
    with pytest.raises(UsageError, match="takes the model's tokenizer"):
        resect.prune(FAMILIES["llama"](), keep=1, vocabulary=source)
