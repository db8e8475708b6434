"""The same call gives the same bits, whatever hashes strings get, wherever it runs and whatever language is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import resect
from tests.models import _llama, random_tokens

ROOT = Path(__file__).parents[1]
CHILD = """
import pathlib, sys
import torch
import resect
from tests.models import _llama, random_tokens, tiny, tiny_tokenizer

torch.set_num_threads(1)
experts = dict(num_local_experts=4, num_experts_per_tok=2)
sizes = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=56, num_hidden_layers=2)
mixture = tiny("Mixtral", vocab_size=101, max_position_embeddings=80, **sizes, **experts)
text = "".join(chr(32 + 7 * place % 95) for place in range(4000))
pathlib.Path("text.txt").write_text(text, encoding="utf-8")
for name, model, asked in [
    ("surgeon", _llama(), {"method": "llm-surgeon", "settings": {"shots": 2}, "data": "text.txt", "samples": 4, "length": 16}),
    ("experts", mixture, {"settings": {"kinds": ["experts"]}, "data": random_tokens(4, 12)}),
    ("words", _llama(), {"keep": 1, "vocabulary": resect.Vocabulary(["text.txt"], keep=0.9)}),
]:
    asked = {"keep": 0.7, "layout": "per-layer", **asked}
    found = resect.prune(model, tiny_tokenizer(), **asked)
    resect.save(found.model, name, tokenizer=found.tokenizer, plan=found.plan)
"""


def test_hashes_places_and_languages_change_no_bit(tmp_path: Path) -> None:
    children = []
    for seed, folder, language in (("1", "here", "C"), ("4242", "elsewhere/below", "de_DE.UTF-8")):
        place = tmp_path / folder
        place.mkdir(parents=True)
        paths = os.pathsep.join([str(ROOT), str(Path(resect.__file__).parents[1])])
        surroundings = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": language, "PYTHONPATH": paths}
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CHILD], cwd=place, env=surroundings)
        children.append((place, child))
    assert [child.wait(timeout=300) for _, child in children] == [0, 0]
    first, second = (
        {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()} for place, _ in children
    )
    for name in ("surgeon", "experts", "words"):
        assert {Path(name, "plan.json"), Path(name, "model.safetensors")} <= set(first)
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []


def test_the_record_says_with_how_many_threads() -> None:
    found = resect.prune(_llama(num_hidden_layers=1), data=random_tokens(2, 8), plan_only=True)
    assert found.report["threads"] == torch.get_num_threads()
    assert resect.report.machine()["threads"] == torch.get_num_threads()
