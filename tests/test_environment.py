"""Other processes, variables that would change results, and children that import nothing from the working directory."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

from resect.environment import TORCHRUN, import_path, processes, python, recipe_decides, tell_precision
from resect.errors import ResectWarning, UsageError

ALL = dict(zip(TORCHRUN, ("1", "2", "1", "localhost", "29500"), strict=True))


def given(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_rank_counts_beside_a_world_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"RANK": "1", "LOCAL_RANK": "1"})
    assert (processes().main, processes().local) == (True, None)
    given(monkeypatch, ALL)
    assert (processes().count, processes().rank, processes().local, processes().main) == (2, 1, 1, False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": ""}, "RANK=''"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (ALL | {"RANK": "2"}, "RANK=2"),
        (ALL | {"LOCAL_RANK": "x" * 900}, "LOCAL_RANK='x"),
    ],
)
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    given(monkeypatch, variables)
    with pytest.raises(UsageError, match=message) as refused:
        processes()
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("name", "value", "bf16", "told"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", False, True),
        ("ACCELERATE_MIXED_PRECISION", "fp8", True, True),
        ("ACCELERATE_MIXED_PRECISION", "bf16", True, False),
        ("ACCELERATE_MIXED_PRECISION", "no", False, False),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", False, True),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", False, False),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", False, True),
        ("ACCELERATE_DEBUG_MODE", "1", False, False),
        ("OMPI_COMM_WORLD_SIZE", "4", False, True),
        ("RANK", "1", False, True),
    ],
)
def test_the_recipe_decides(monkeypatch: pytest.MonkeyPatch, name: str, value: str, bf16: bool, told: bool) -> None:
    given(monkeypatch, {name: value})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with recipe_decides(bf16=bf16):
            assert name not in os.environ
            os.environ["ACCELERATE_MIXED_PRECISION"] = "noted by the Trainer"
    assert os.environ.pop(name) == value
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert told == any(f"{name}='{value}'" in str(one.message) for one in said)


def test_weights_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(UsageError, match="ACCELERATE_USE_FSDP='true'"), recipe_decides(bf16=False):
        pass


def test_fewer_bits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    tell_precision()
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.warns(ResectWarning, match="ONEDNN_DEFAULT_FPMATH_MODE='BF16'"):
        tell_precision()


def test_a_child_imports_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, folder = tmp_path / "here", tmp_path / "folder"
    here.mkdir()
    folder.mkdir()
    (here / "colorsys.py").write_text("raise SystemExit('code of the working directory')")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(here)]))
    monkeypatch.setattr(sys, "path", ["", ".", str(here), "..", *sys.path])
    assert all(os.path.isabs(entry) and Path(entry) != here for entry in import_path())
    code = "import colorsys, resect, os; print(colorsys.__file__, resect.__file__, os.getcwd(), os.environ['WORD'])"
    ran = python("-c", code, variables={"WORD": "said"}, folder=folder)
    assert ran.returncode == 0, ran.stderr
    module, package, where, word = ran.stdout.split()
    assert Path(module).parent == Path(os.__file__).parent
    assert Path(package).parts[-2:] == ("resect", "__init__.py")
    assert (Path(where), word) == (folder.resolve(), "said")
