"""Files, under flags, under assignments."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from resect.errors import UsageError
from resect.recipe import read_recipe
from resect.recipe.reading import assigned, read_values


def test_assignments_lie_over_values_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: demo\nkeep: 0.5\nseed: 1\ncalibration: {samples: 3, length: 7}\n")
    recipe = read_recipe(
        file, {"seed": 2, "calibration": {"samples": 4}}, assignments=["calibration.samples=5", "settings.blocks.heads=[1, 3]"]
    )
    assert (recipe.keep, recipe.seed) == (0.5, 2)
    assert (recipe.calibration.samples, recipe.calibration.length) == (5, 7)
    assert recipe.settings["blocks"] == {"heads": [1, 3]}


@pytest.mark.parametrize(
    ("assignment", "found"),
    [("keep=0.25", 0.25), ("evaluation.latency=true", True), ("calibration.source=[a, b]", ("a", "b")), ("output=null", None)],
)
def test_assigned_values_are_yaml(assignment: str, found: object) -> None:
    recipe = read_recipe(None, {"model": "demo"}, assignments=[assignment]).model_dump()
    for key in assignment.partition("=")[0].split("."):
        recipe = recipe[key]
    assert recipe == found or (found is True and recipe["prompt"] == 512)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2:4", "2:4"), ("1:30:59", "1:30:59"), ("1e-4", 1e-4), ("-1.5E+3", -1500.0), (".5", 0.5), ("3.", 3.0),
        ("12", 12), ("-3", -3), ("0", 0), ("08", "08"), ("0.5", 0.5), ("1e", "1e"),
        ("1_000", 1000), ("0x10", 16), ("-.inf", -inf), ("e5", "e5"), ("1.2.3", "1.2.3"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, found: object, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: demo\nsettings:\n  mode: {text}\n")
    for value in (assigned(f"mode={text}")["mode"], read_values(file)["settings"]["mode"]):
        assert value == found
        assert type(value) is type(found)


@pytest.mark.parametrize("assignment", ["keep", "=3", "a..b=3", ""])
def test_what_is_no_assignment(assignment: str) -> None:
    with pytest.raises(UsageError, match="place=value"):
        read_recipe(None, {"model": "demo"}, assignments=[assignment])


@pytest.mark.parametrize(("text", "said"), [("", "holds nothing"), ("- a\n", "holds a list"), ("a: [1\n", "not YAML")])
def test_files_that_hold_no_recipe(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_recipe(file)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "llm-pruner.yaml").write_text("model: demo\n")
    with pytest.raises(UsageError, match=r"There is no recipe .*Did you mean .*llm-pruner\.yaml"):
        read_recipe(tmp_path / "llm-prune.yaml")
