"""Files, under flags, under assignments."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from resect.errors import UsageError
from resect.recipe import read_recipe
from resect.recipe.reading import assigned, read_values
from resect.recipe.recovery import RecoveryRecipe, read_recovery_recipe


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


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("said", ["true", "yes", "1", "'on'"])
def test_a_file_alone_runs_no_code_of_models(tmp_path: Path, said: str) -> None:
    file = written(tmp_path, f"model: strange\ndata: x.jsonl\ntrust_remote_code: {said}\n")
    recovery = RecoveryRecipe(model="strange", data=("x.jsonl",))
    with pytest.raises(UsageError, match="--trust-remote-code"):
        read_recovery_recipe(file)
    assert read_recovery_recipe(file, {"trust_remote_code": False}) == recovery
    file = written(tmp_path, f"model: strange\ntrust_remote_code: {said}\n")
    with pytest.raises(UsageError, match="--trust-remote-code"):
        read_recipe(file)
    assert read_recipe(file, {"trust_remote_code": True}).trust_remote_code
    assert read_recipe(file, assignments=["trust_remote_code=true"]).trust_remote_code
    assert not read_recipe(file, assignments=["trust_remote_code=false"]).trust_remote_code
    assert read_recipe(None, {"model": "strange", "trust_remote_code": True}).trust_remote_code


MULTIPLIED = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{key}: &{key} [{','.join([f'*{before}'] * 9)}]\n" for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MULTIPLIED, "more than 20,000 values"),
        ("a: &a [*a]", "inside of what it names"),
        ("a: &a {b: *a}", "inside of what it names"),
        ("model: " + "[" * 9000, "nested more than 32 deep"),
        ("- " * 9000, "nested more than 32 deep"),
        ("seed: " + "9" * 9000, "not YAML"),
        ("model: a\x00b", "not YAML"),
        (b"model: \xff", "not YAML"),
        ("model: 2001-99-99", "not YAML"),
        ('model: "\\ud83d"', "half of a character"),
        ('output: "a\\0b"\nmodel: x', "the character NUL"),
        ("model: " + "x" * (1 << 20), "more than 1,048,576 bytes"),
        ("model: {" + ", ".join(f"k{i}: 1" for i in range(9000)) + "}", "valid string"),
        ("\n".join(f"key{i}: 1" for i in range(9000)), "8993 more faults"),
        ("model: x\nkeep: .nan", "keep = nan"),
        ("model: x\nseed: 0x" + "f" * 9000, "seed = a number of 36,000 bits"),
        ("model: x\nseed: 4294967296", "at most 4294967295"),
        ("model: x\ncalibration: {samples: 2147483648}", "samples = 2147483648: it must be at most 2147483647"),
    ],
)
def test_files_that_would_never_end_or_print_for_ever(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        read_recipe(written(tmp_path, text))
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "loop"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="recipe"):
        read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: demo\nmodel: other\n", "the key 'model' stands there twice"),
        ("settings: {a: 1, 'a': 2}\n", "the key 'a' stands there twice"),
        ("model: !!timestamp x\n", "does not fit its tag"),
    ],
)
def test_what_may_mean_either_or_nothing(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=f"is not YAML.*{said}"):
        read_recipe(file)
    file.write_text("settings: &a {shots: 1}\n<<: *a\n<<: *a\n")
    assert read_values(file) == {"shots": 1, "settings": {"shots": 1}}


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory, a pipe or a device"):
        read_recipe(tmp_path)
