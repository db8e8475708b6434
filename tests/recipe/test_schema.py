"""A recipe says everything, and refuses what it does not know, by place and with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from resect.errors import UsageError
from resect.methods import LLMPruner
from resect.recipe import Recipe, Timing, evaluation_section, read_recipe
from resect.recipe.schema import RecoverySection

RECIPES = sorted(file for file in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if "recover" not in file.name)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modle": "demo"}, ["no key 'modle'", "Did you mean 'model'?"]),
        ({"model": "demo", "samples": 8}, ["no key 'samples'", "Did you mean 'calibration.samples'?"]),
        ({"model": "demo", "criterion": "l2"}, ["no key 'criterion'", "Did you mean 'settings.criterion'?"]),
        ({"model": "demo", "method": "llm-surgeon", "mode": "2:4"}, ["Did you mean 'settings.mode'?"]),
        ({"model": "demo", "method": "llm-prunner", "criterion": "l2"}, ["no key 'criterion'", "'llm-pruner'"]),
        ({}, ["model is missing"]),
        ({"model": " "}, ["model is empty"]),
        ({"model": "demo", "method": "llm-prunner"}, ["method = 'llm-prunner'", "Did you mean 'llm-pruner'?"]),
        ({"model": "demo", "layout": "unifrom"}, ["layout = 'unifrom'", "Did you mean 'uniform'?"]),
        ({"model": "demo", "of": "flops"}, ["of = 'flops'", "blocks, macs, model"]),
        ({"model": "demo", "dtype": "bfloat"}, ["dtype = 'bfloat'", "Did you mean 'bfloat16'?"]),
        ({"model": "demo", "keep": 0}, ["keep = 0", "more than 0"]),
        ({"model": "demo", "keep": 1.5}, ["keep = 1.5", "at most 1"]),
        ({"model": "demo", "keep": "much"}, ["keep = 'much'", "number"]),
        ({"model": "demo", "calibration": {"sample": 3}}, ["no key 'calibration.sample'", "'samples'"]),
        ({"model": "demo", "calibration": {"samples": 0}}, ["calibration.samples = 0", "at least 1"]),
        ({"model": "demo", "evaluation": {"windws": 3}}, ["no key 'evaluation.windws'", "'windows'"]),
        ({"model": "demo", "evaluation": {"windows": [1]}}, ["evaluation.windows.0 = 1", "at least 2"]),
        ({"model": "demo", "evaluation": {"latency": {"promt": 3}}}, ["no key 'evaluation.latency.promt'", "'prompt'"]),
        ({"model": "demo", "evaluation": {"latency": {"decode": 0}}}, ["evaluation.latency.decode = 0"]),
        ({"model": "demo", "settings": {"criterium": "l2"}}, ["no key 'settings.criterium'", "'criterion'"]),
        ({"model": "demo", "settings": {"criterion": "element3"}}, ["settings.criterion = 'element3'", "'element2'"]),
        ({"model": "demo", "settings": {"blocks": {"heads": [0]}}}, ["settings.blocks.heads"]),
        ({"model": "demo", "settings": {"share": 1}}, ["settings.share = 1", "less than 1"]),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(values: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_mapping(values)
    for part in said:
        assert part in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_mapping({"model": "demo", "keep": 2, "layuot": "uniform"})
    assert len(str(caught.value).splitlines()) == 2


def test_lorashear_ends_with_recovery_on_its_calibration_text() -> None:
    asked = {"model": "demo", "method": "lorashear", "calibration": {"source": ["c4", "a.txt"]}}
    recovery = Recipe.from_mapping(asked).recovery
    assert recovery is not None
    assert (recovery.data, recovery.teacher) == (("c4", "a.txt"), "dense")
    assert (recovery.settings.mixture.kind, recovery.settings.distillation.weight) == ("dynamic", 0)
    settings = {"rank": 4, "mixture": {"rounds": 3}}
    elsewhere = Recipe.from_mapping({**asked, "recovery": {"data": "alpaca", "settings": settings}}).recovery
    assert elsewhere is not None
    assert (elsewhere.data, elsewhere.settings.rank, elsewhere.settings.distillation.weight) == (("alpaca",), 4, 0)
    assert (elsewhere.settings.mixture.kind, elsewhere.settings.mixture.rounds) == ("dynamic", 3)
    uniform = Recipe.from_mapping({**asked, "recovery": {"settings": {"mixture": {"kind": "uniform"}}}}).recovery
    assert uniform is not None
    assert (uniform.data, uniform.settings.mixture.kind) == (("c4", "a.txt"), "uniform")
    assert Recipe.from_mapping({**asked, "recovery": None}).recovery is None
    assert Recipe.from_mapping({"model": "demo"}).recovery is None
    assert Recipe.from_mapping({"model": "demo", "recovery": "c4"}).recovery == RecoverySection(data=("c4",), teacher=None)
    with pytest.raises(UsageError, match="recovery=null"):
        Recipe.from_mapping({"model": "demo", "method": "lorashear"})
    with pytest.raises(UsageError, match="no teacher is named"):
        Recipe.from_mapping({**asked, "recovery": {"teacher": None}})


def test_yaml_is_complete_and_comes_back() -> None:
    recipe = Recipe.from_mapping({"model": "demo", "settings": {"criterion": "l2"}, "evaluation": {"latency": True}})
    values = yaml.safe_load(recipe.to_yaml())
    assert Recipe.from_mapping(values) == recipe
    assert set(values) == set(Recipe.model_fields)
    assert set(values["settings"]) == set(LLMPruner.model_fields)
    assert values["settings"]["reduction"] == "sum"
    assert values["evaluation"]["latency"] == {"prompt": 512, "decode": 32, "repeats": 5}


def test_shorthand() -> None:
    recipe = Recipe.from_mapping(
        {"model": "demo", "calibration": {"source": "c4"}, "evaluation": {"texts": "demo", "windows": 64, "latency": True}}
    )
    assert recipe.calibration.source == ("c4",)
    assert (recipe.evaluation.texts, recipe.evaluation.windows) == (("demo",), (64,))
    assert recipe.evaluation.latency == Timing()
    assert Recipe.from_mapping({"model": "demo", "evaluation": {"latency": False}}).evaluation.latency is None


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_shipped_recipes_are_valid(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.output
    assert Recipe.from_mapping(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_papers_recipe_holds_the_papers_settings() -> None:
    recipe = read_recipe(RECIPES[0].parent / "llm-pruner.yaml")
    settings = recipe.settings
    assert (recipe.calibration.source, recipe.calibration.samples, recipe.calibration.length) == (("bookcorpus",), 10, 64)
    assert (settings["share"], settings["blocks"]) == (0.25, {"heads": [4, 30], "channels": [4, 30]})
    assert (settings["selection"], settings["granularity"], recipe.seed) == ("local", "block-wise", 42)


def test_evaluations_are_checked_like_recipes() -> None:
    asked = evaluation_section({"texts": ["demo"], "latency": True}, assignments=["latency.prompt=16"])
    assert asked.latency == Timing(prompt=16)
    with pytest.raises(UsageError, match="no key 'widows'.*'windows'"):
        evaluation_section({}, assignments=["widows=4"])
