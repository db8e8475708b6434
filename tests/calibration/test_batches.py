from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resect.calibration import Calibration, calibrate, digest
from resect.errors import DataError, UsageError
from tests.models import FAMILIES, assert_untouched, snapshot, tiny_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def prose(characters: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=characters))


def documents_in(folder: Path, *sizes: int, name: str = "a.jsonl") -> str:
    """A JSONL file of random documents with the given numbers of characters, which are tokens here."""
    rows = [json.dumps({"text": prose(size, seed)}) for seed, size in enumerate(sizes)]
    (folder / name).write_text("\n".join(rows))
    return str(folder / name)


def texts(tokens: Tensor) -> list[str]:
    return [str(tiny_tokenizer().decode(window)) for window in tokens]


def assert_all_different(calibration: Calibration) -> None:
    assert len(torch.unique(calibration.tokens, dim=0)) == len(calibration.tokens)


def test_windows_are_crops_of_long_documents(tmp_path: Path) -> None:
    source = documents_in(tmp_path, *range(5, 65))
    calibration = calibrate(source, tiny_tokenizer(), samples=16, length=32)
    whole = [row["text"] for row in map(json.loads, Path(source).read_text().splitlines())]
    assert calibration.tokens.shape == (16, 32)
    assert calibration.tokens.dtype == torch.long
    owners = {next(i for i, text in enumerate(whole) if window in text) for window in texts(calibration.tokens)}
    assert len(owners) == calibration.provenance["documents"] == 16
    assert calibration.provenance["detail"][0]["rule"] == "crops"


def test_short_documents_are_packed_with_end_of_text_between(tmp_path: Path) -> None:
    source = documents_in(tmp_path, *[10] * 30)
    calibration = calibrate(source, tiny_tokenizer(), samples=8, length=32)
    assert calibration.provenance["detail"][0]["rule"] == "packed"
    assert 8 < calibration.provenance["documents"] <= 30
    assert all(window.count("</s>") in {2, 3} for window in texts(calibration.tokens))
    assert_all_different(calibration)


def test_without_an_end_of_text_token_a_blank_line_goes_between(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokens = calibrate(documents_in(tmp_path, *[10] * 30), tokenizer, samples=8, length=32).tokens
    assert all("\n\n" in window for window in texts(tokens))


def test_a_long_text_gives_windows_from_all_over_and_is_packed_without_cuts(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    text = "\n".join(prose(60, seed) for seed in range(3000))
    file.write_text(text)
    tokenizer = tiny_tokenizer()
    crops = calibrate(str(file), tokenizer, samples=40, length=50)
    places = [text.index(window) for window in texts(crops.tokens)]
    assert max(places) > 0.8 * len(text)
    assert min(places) < 0.2 * len(text)
    whole = calibrate(str(file), tokenizer, samples=len(text) // 50000, length=50000)
    assert all(window in text for window in texts(whole.tokens))
    assert whole.provenance["documents"] == 1


def test_the_same_arguments_give_the_same_tokens_and_another_seed_others(tmp_path: Path) -> None:
    source = documents_in(tmp_path, *range(40, 80))
    first, again, other = (
        calibrate(source, tiny_tokenizer(), samples=8, length=32, seed=seed) for seed in (42, 42, 7)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    assert first.provenance["digest"] != other.provenance["digest"]


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    calibrate(documents_in(tmp_path, 100), tiny_tokenizer(), samples=2, length=32)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_window_comes_twice_not_even_from_two_sources(tmp_path: Path) -> None:
    sizes = [64] * 10
    sources = [documents_in(tmp_path, *sizes), documents_in(tmp_path, *sizes, name="copy.jsonl")]
    calibration = calibrate(sources, tiny_tokenizer(), samples=16, length=32)
    assert_all_different(calibration)
    repeated = tmp_path / "repeated.txt"
    repeated.write_text("all work and no play " * 500)
    assert_all_different(calibrate(str(repeated), tiny_tokenizer(), samples=4, length=32))
    with pytest.raises(DataError, match=r"10,500 tokens, which give 21\."):
        calibrate(str(repeated), tiny_tokenizer(), samples=22, length=32)


def test_several_sources_give_equal_shares(tmp_path: Path) -> None:
    sources = [documents_in(tmp_path, *[50] * 9), documents_in(tmp_path, *[60] * 9, name="b.jsonl"), "self"]
    calibration = calibrate(sources, tiny_tokenizer(), samples=11, length=32, model=FAMILIES["llama"]())
    assert calibration.tokens.shape == (11, 32)
    assert [detail["samples"] for detail in calibration.provenance["detail"]] == [4, 4, 3]
    assert [detail["kind"] for detail in calibration.provenance["detail"]] == ["file", "file", "self"]
    assert (calibration.tokens[8:, 0] == tiny_tokenizer().bos_token_id).all()


def test_provenance_is_plain_json_and_complete(tmp_path: Path) -> None:
    source = documents_in(tmp_path, *[50] * 9)
    calibration = calibrate(source, tiny_tokenizer(), samples=4, length=32, seed=3)
    facts = json.loads(json.dumps(calibration.provenance))
    assert facts == calibration.provenance
    assert facts.keys() == {"source", "detail", "seed", "samples", "length", "documents", "digest"}
    assert (facts["source"], facts["seed"], facts["samples"], facts["length"]) == ([source], 3, 4, 32)
    assert facts["digest"] == digest(calibration.tokens)
    assert len(facts["detail"][0]["sha256"]) == 64


def test_without_a_source_the_model_writes_the_text() -> None:
    model = FAMILIES["qwen2"]().train()
    before = snapshot(model)
    calibration = calibrate(None, tiny_tokenizer(), samples=3, length=8, model=model)
    assert_untouched(model, before)
    assert calibration.tokens.shape == (3, 8)
    assert calibration.provenance["source"] == ["self"]
    with pytest.raises(UsageError, match="no model was given"):
        calibrate(None, tiny_tokenizer(), samples=3, length=8)


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(tmp_path: Path) -> None:
    source = documents_in(tmp_path, 10, 20, 30)
    with pytest.raises(DataError, match=r"4 different windows of 32 tokens .* 128 tokens; it holds 60 tokens"):
        calibrate(source, tiny_tokenizer(), samples=4, length=32)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 1}, {"source": []}, {"source": ""}])
def test_what_cannot_be_meant_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    arguments = {"source": documents_in(tmp_path, 100), "samples": 1, "length": 8, **wrong}
    with pytest.raises(UsageError, match="Calibration was|was given; it is a whole number"):
        calibrate(arguments.pop("source"), tiny_tokenizer(), **arguments)  # type: ignore[arg-type]
