"""Cut tokenizers: what stays is split as before, what goes is gone everywhere, and the result is an ordinary tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import resect
from resect.checkpoint.tokenizer import Parts, base_tokens, cut_tokenizer, needed_tokens, token_counts
from resect.errors import UsageError
from resect.plan import Kept, Plan
from tests.models import tiny

WORDS = [
    "river", "boats", "bells", "tide", "pencil", "bread", "salt", "rope", "wind", "mill", "fields", "summer", "mud", "counted",
    "wrote", "heard", "across", "turned", "lay", "low", "unhappiness", "happily", "restless", "restlessness", "counting",
    "counts", "riverside", "mudslide", "windmill", "millstone", "breadth", "breads", "salted",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def corpus(seed: int, words: int, count: int = 300) -> list[str]:
    """Lines of random words, out of the first so many."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[:words], k=8)) for _ in range(count)]


TEXT, SOME = corpus(0, len(WORDS)), corpus(1, 14)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As sentencepiece has it: blanks are a sign, every pair that makes a piece is a merge, unknown characters are bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])}
    pairs = [(p[:at], p[at:]) for p in pieces for at in range(1, len(p)) if p[:at] in vocabulary and p[at:] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def end_of_word() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def continuing_subword() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="@@"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, continuing_subword_prefix="@@")
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.BertProcessing(("</s>", 3), ("<s>", 2))
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    made.__name__: made for made in (byte_level, byte_fallback, end_of_word, continuing_subword, unigram, word_piece, word_level)
}


def wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    """With words that were added behind the vocabulary, a template, and padding."""
    made.add_special_tokens(["<call>"])
    made.add_tokens(["mudflat"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if made.post_processor is None:
        ends = [(token, made.token_to_id(token)) for token in ("<s>", "<call>")]
        made.post_processor = processors.TemplateProcessing(single="<s> $A <call>", pair="<s> $A <call> $B", special_tokens=ends)
    made.enable_padding(pad_id=made.token_to_id("<pad>"), pad_token="<pad>")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_texts_whose_tokens_stay_are_split_as_before(kind: str, tmp_path: Path) -> None:
    tokenizer = wrapped(KINDS[kind]())
    keep = needed_tokens(tokenizer, SOME)
    assert len(keep) < len(tokenizer) - 10
    small = cut_tokenizer(tokenizer, keep)
    assert len(small) == len(keep)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    held_out = [*corpus(2, 14), f"{WORDS[3]}<call>{WORDS[5]} mudflat {WORDS[1]}</s>"]
    for line in held_out:
        before = tokenizer(line)["input_ids"]
        assert set(before) <= set(keep), "the held-out text is made of kept tokens"
        assert [keep[token] for token in small(line)["input_ids"]] == before
        assert loaded(line)["input_ids"] == small(line)["input_ids"]
        assert small.decode(small(line)["input_ids"]) == tokenizer.decode(before)
    pair = held_out[:2]
    assert [keep[token] for token in small(*pair)["input_ids"]] == tokenizer(*pair)["input_ids"]
    assert [keep[token] for token in small.all_special_ids] == tokenizer.all_special_ids
    assert small.pad_token_id == keep.index(tokenizer.pad_token_id)
    both = small([held_out[0], WORDS[0]], padding=True)["input_ids"]
    assert both[1][-1] == small.pad_token_id


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_any_text_can_still_be_written(kind: str) -> None:
    small = cut_tokenizer(tokenizer := wrapped(KINDS[kind]()), needed_tokens(tokenizer, SOME))
    for text in ("unhappiness is a windmill", "völlig \t unbekannt\n你好 🤖 \x00", "restlessness"):
        tokens = small(text, add_special_tokens=False)["input_ids"]
        assert small.decode(tokens) == text
        assert small.unk_token_id not in tokens


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "end_of_word", "continuing_subword"])
def test_without_the_parts_of_a_token_texts_are_split_otherwise(kind: str) -> None:
    """What the closure under merges is for: the tokens of a text alone are not enough."""
    tokenizer = wrapped(KINDS[kind]())
    used = {*token_counts(tokenizer, SOME), *tokenizer.all_special_ids, *range(len(SPECIAL))}
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    bare = cut_tokenizer(tokenizer, used | {token["id"] for token in document["added_tokens"]})
    assert any(len(bare(line)["input_ids"]) != len(tokenizer(line)["input_ids"]) for line in SOME)


def test_parts_are_those_of_the_real_merges() -> None:
    tokenizer = wrapped(byte_level())
    parts = Parts(tokenizer)
    number = tokenizer.get_vocab()
    tree = parts.of(number["Ġriver"])
    assert {number[character] for character in "Ġriver"} < set(tree)
    assert tree[-1] == number["Ġriver"]
    assert parts.of(number["<s>"]) in ([], [number[c] for c in "<s>"])


def test_the_template_of_a_conversation_is_needed() -> None:
    tokenizer = wrapped(byte_level())
    without = base_tokens(tokenizer)
    tokenizer.chat_template = CHAT.replace("<s>{{ m['role'] }}", "<s>restlessness")
    tokens = set(tokenizer("restlessness", add_special_tokens=False)["input_ids"])
    assert not tokens <= without
    assert tokens <= base_tokens(tokenizer)


def test_rows_beyond_the_tokens_stay_free() -> None:
    tokenizer = wrapped(byte_level())
    keep = [*needed_tokens(tokenizer, SOME), len(tokenizer) + 3, len(tokenizer) + 5]
    assert len(cut_tokenizer(tokenizer, keep)) == len(keep) - 2


@pytest.mark.parametrize("name", ["pad", "unk", "bos", "eos"])
def test_a_token_that_the_tokenizer_names_must_stay(name: str) -> None:
    tokenizer = wrapped(byte_level())
    gone = getattr(tokenizer, f"{name}_token_id")
    with pytest.raises(UsageError, match=rf"cannot do without token {gone}, its .*{name}"):
        cut_tokenizer(tokenizer, set(needed_tokens(tokenizer, SOME)) - {gone})


def test_slow_tokenizers() -> None:
    class Slow:
        """Splits at blanks, in Python."""

    for call in (lambda: cut_tokenizer(Slow(), [1]), lambda: needed_tokens(Slow(), "text")):
        with pytest.raises(UsageError, match="Slow is not a fast tokenizer"):
            call()


def library_tokenizers() -> dict[str, Any]:
    """Tokenizers of classes that build their parts themselves."""
    found: dict[str, Any] = {}
    for name, made in (("GPT2Tokenizer", byte_level()), ("LlamaTokenizer", byte_fallback())):
        model = json.loads(made.to_str())["model"]
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        merges = [tuple(pair) for pair in model["merges"]]
        found[name] = getattr(transformers, name)(vocab=model["vocab"], merges=merges, **names)
    model = json.loads(word_piece().to_str())["model"]
    special: Any = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    found["BertTokenizer"] = transformers.BertTokenizer(vocab={**model["vocab"], "<mask>": len(model["vocab"])}, **special)
    pieces = [(piece, score) for piece, score in json.loads(unigram().to_str())["model"]["vocab"] if piece not in SPECIAL]
    heads = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    found["T5Tokenizer"] = transformers.T5Tokenizer(vocab=[*heads, *pieces], extra_ids=0)
    return found


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizer", "BertTokenizer", "T5Tokenizer"])
def test_classes_that_build_their_own_parts(name: str, tmp_path: Path) -> None:
    tokenizer = library_tokenizers()[name]
    keep = needed_tokens(tokenizer, SOME)
    assert len(keep) < len(tokenizer) - 10
    small = cut_tokenizer(tokenizer, keep)
    assert type(small) is type(tokenizer)
    small.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    for line in corpus(3, 14, count=20):
        for one in (small, loaded):
            assert [keep[token] for token in one(line)["input_ids"]] == tokenizer(line)["input_ids"]


def special_model(tokenizer: Any, **fields: Any) -> Any:
    """A model whose special tokens are the tokenizer's."""
    names = ("pad", "bos", "eos")
    specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 56, "num_hidden_layers": 2}
    return tiny("Llama", vocab_size=len(tokenizer) + 5, **sizes, **specials, **fields)


@pytest.mark.parametrize("tied", [True, False])
def test_model_and_tokenizer_reload_as_stock_and_write_the_same(tied: bool, tmp_path: Path) -> None:
    tokenizer = wrapped(byte_level())
    model = special_model(tokenizer, tie_word_embeddings=tied)
    written = model.generate(**tokenizer("river boats", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0]
    # random weights write anything: what they write is needed too
    keep = tuple(sorted({*needed_tokens(tokenizer, SOME), *written.tolist()}))
    resect.cut(model, Plan(groups={"vocabulary": Kept(kind="vocabulary", layer=None, units=len(tokenizer) + 5, keep=keep)}))
    saved = resect.save(model, tmp_path / "small", tokenizer=cut_tokenizer(tokenizer, keep))
    assert saved.layout == "uniform"
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert loaded.config.vocab_size == loaded.get_input_embeddings().weight.shape[0] == len(keep)
    for one in (model, loaded):
        again = one.generate(**small("river boats", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0]
        assert [keep[token] for token in again.tolist()] == written.tolist()
    assert small.decode(again) == tokenizer.decode(written)


def test_the_dense_tokenizer_beside_a_cut_model(tmp_path: Path) -> None:
    tokenizer = wrapped(byte_level())
    model = special_model(tokenizer)
    keep = tuple(needed_tokens(tokenizer, SOME))
    resect.cut(model, Plan(groups={"vocabulary": Kept(kind="vocabulary", layer=None, units=len(tokenizer) + 5, keep=keep)}))
    with pytest.raises(UsageError, match="cut_tokenizer"):
        resect.save(model, tmp_path / "small", tokenizer=tokenizer)
