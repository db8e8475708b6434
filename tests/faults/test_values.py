"""What is accepted is meant: numbers in range, written and read again, applied without an error but ours."""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from resect.calibration.files import read_file, read_file_rows
from resect.checkpoint import load
from resect.errors import ResectError
from resect.graph import Graph, trace
from resect.plan import Budget, Kept, Pattern, Plan
from resect.plan.pattern import Matrix
from resect.recipe import Recipe, read_recipe, read_recovery_recipe
from resect.recipe.reading import assigned
from resect.surgery import cut_and_check
from tests.faults.runs import dense
from tests.faults.values import anything, as_json, count, examples, nearly, numbers, write_counts

SEEDS = 2**63
"""No seed of torch's is larger."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("values")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load(dense(folder / "dense"))


@pytest.fixture(scope="module")
def graph(model: PreTrainedModel) -> Graph:
    return trace(model)


def accepted(read: Any, *given: Any) -> Any:
    """What a reader makes of something; None where it refuses in our words."""
    test = sys._getframe(1).f_code.co_name
    try:
        found = read(*given)
    except ResectError as problem:
        assert_short(str(problem))
        count(test, "refused")
        return None
    count(test, "survived")
    return found


def assert_short(message: str) -> None:
    """A value in a message is cut."""
    assert len(message) < 4000


@pytest.fixture(scope="module", autouse=True)
def _counts() -> Iterator[None]:
    yield
    write_counts()


PLAN = {
    "version": 1,
    "notes": {"method": "llm-pruner"},
    "groups": {
        "model.layers.0.heads": {"kind": "heads", "layer": 0, "units": 4, "keep": [0, 2]},
        "model.layers.1.channels": {
            "kind": "channels",
            "layer": 1,
            "units": 24,
            "keep": [0, 1, 5, 23],
        },
    },
}


@examples(60)
@given(nearly(PLAN))
def test_a_plan_that_is_accepted_can_be_written_and_read(document: Any) -> None:
    plan = accepted(Plan.from_json, as_json(document))
    if plan is None:
        return
    for kept in plan.groups.values():
        assert kept.units >= 1
        assert kept.layer is None or kept.layer >= 0
        assert list(kept.keep) == sorted(set(kept.keep))
        assert all(0 <= unit < kept.units for unit in kept.keep)
    again = Plan.from_json(plan.to_json())
    assert again.groups == plan.groups
    assert (plan & plan).groups == plan.groups


@examples(4)
@given(nearly(PLAN))
def test_a_plan_that_is_accepted_cuts_or_is_refused(
    model: PreTrainedModel, graph: Graph, document: Any
) -> None:
    plan = accepted(Plan.from_json, as_json(document))
    if plan is not None:
        accepted(lambda: cut_and_check(copy.deepcopy(model), plan, graph))


@examples(40)
@given(st.text(max_size=8), st.integers(1, 40), st.data())
def test_plans_of_any_names_survive(name: str, units: int, data: st.DataObject) -> None:
    keep = tuple(sorted(data.draw(st.sets(st.integers(0, units - 1)))))
    plan = Plan(groups={name: Kept(kind="heads", layer=None, units=units, keep=keep)})
    assert Plan.from_json(plan.to_json()) == plan


PATTERN = {
    "version": 1,
    "kind": "2:4",
    "layers": {
        "model.layers.0.mlp.up_proj": {"shape": [24, 16], "zeros": 192},
        "model.layers.1.mlp.up_proj": {"shape": [24, 16], "rows": [0, 1], "columns": [3, 15]},
    },
}


@examples(60)
@given(nearly(PATTERN))
def test_a_pattern_that_is_accepted_is_one(document: Any) -> None:
    pattern = accepted(Pattern.from_json, as_json(document))
    if pattern is None:
        return
    for matrix in pattern.layers.values():
        rows, columns = matrix.shape
        assert rows >= 1
        assert columns >= 1
        assert 0 <= matrix.zeros <= rows * columns
        for numbers_, size in ((matrix.rows, rows), (matrix.columns, columns)):
            assert numbers_ is None or list(numbers_) == sorted(
                {*numbers_} & {*range(min(size, 10_000))}
            )
    assert Pattern.from_json(pattern.to_json()) == pattern


@examples(20)
@given(st.text(max_size=8), st.text(max_size=8))
def test_patterns_of_any_names_survive(name: str, kind: str) -> None:
    try:
        pattern = Pattern(kind=kind, layers={name: Matrix(shape=(2, 3))})
    except ValueError:
        return  # a kind that is none
    assert Pattern.from_json(pattern.to_json()) == pattern


RECIPE = {
    "model": "demo",
    "output": "out",
    "keep": 0.7,
    "align": 2,
    "seed": 7,
    "calibration": {"source": ["text.txt"], "samples": 4, "length": 12},
    "evaluation": {
        "texts": ["text.txt"],
        "windows": [12, 24],
        "limit": 48,
        "shots": 0,
        "latency": {"prompt": 8, "decode": 2},
    },
    "settings": {"criterion": "l2"},
    "recovery": {
        "data": ["text.txt"],
        "settings": {"learning_rate": 0.001, "batch": 2, "dropout": 0.1, "clip": 1.0},
    },
}


@examples(80)
@given(nearly(RECIPE))
def test_a_recipe_that_is_accepted_is_in_range_and_survives(document: Any) -> None:
    recipe = accepted(Recipe.from_mapping, document) if isinstance(document, dict) else None
    if recipe is None:
        return
    assert 0 < recipe.keep <= 1
    assert 0 <= recipe.seed < SEEDS
    assert_finite(recipe.model_dump(mode="json"))
    path = Path(tempfile.gettempdir()) / f"resect-recipe-{id(document)}.yaml"
    try:
        path.write_text(recipe.to_yaml(), encoding="utf-8", errors="surrogatepass")
        assert read_recipe(path) == recipe
    finally:
        path.unlink(missing_ok=True)


RECOVERY = {
    "model": "demo",
    "output": "out",
    "data": ["text.txt"],
    "seed": 7,
    "settings": {"rank": 2, "alpha": 4, "tokens": 48},
}


@examples(40)
@given(nearly(RECOVERY))
def test_a_recipe_of_a_recovery_is_in_range(document: Any) -> None:
    recipe = (
        accepted(lambda: read_recovery_recipe(None, document))
        if isinstance(document, dict)
        else None
    )
    if recipe is not None:
        assert 0 <= recipe.seed < SEEDS
        assert_finite(recipe.model_dump(mode="json"))


@examples(120)
@given(st.one_of(st.text(max_size=30), st.from_regex(r"[a-z.]{1,8}=[^\n]{0,12}", fullmatch=True)))
def test_assignments_are_read_or_refused(text: str) -> None:
    found = accepted(assigned, text)
    if found is not None:
        assert list(found) == [text.partition("=")[0].strip().split(".")[0]]


@examples(40)
@given(
    st.sampled_from(
        ["keep", "seed", "align", "calibration.samples", "evaluation.windows", "evaluation.limit"]
    ),
    anything,
)
def test_what_is_set_is_in_range_or_refused(place: str, value: Any) -> None:
    recipe = accepted(
        lambda: read_recipe(None, {"model": "demo"}, assignments=[f"{place}={as_json(value)}"])
    )
    if recipe is not None:
        assert 0 < recipe.keep <= 1
        assert 0 <= recipe.seed < SEEDS
        assert_finite(recipe.model_dump(mode="json"))


SIZES = st.one_of(
    numbers.map(str), st.from_regex(r"[0-9.]{0,4}[kMG]?i?B?", fullmatch=True), st.text(max_size=6)
)


@examples(150)
@given(
    st.sampled_from(["params", "model", "macs", "bytes", "latency", "bits", ""]),
    SIZES,
    st.sampled_from(
        ["", "@", "@prefill", "@decode:1x8", "@decode:0x8", "@prefill:1x99999999999999999999", "@x"]
    ),
)
def test_a_budget_that_is_accepted_is_a_share_or_an_amount(
    kind: str, size: str, where: str
) -> None:
    budget = accepted(Budget.parse, f"{kind}:{size}{where}")
    if budget is None:
        return
    assert (budget.share is None) != (budget.amount is None)
    assert budget.share is None or 0 < budget.share <= 1
    assert budget.amount is None or budget.amount >= 1
    assert 0 < budget.keep(1000) <= 1
    assert Budget.parse(str(budget)).kind == budget.kind


@examples(60)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    )
)
def test_texts_are_text_or_refused(folder: Path, data: bytes) -> None:
    file = folder / "words.txt"
    file.write_bytes(data)
    corpus = accepted(read_file, str(file))
    if corpus is not None:
        assert any(row.strip() for row in corpus.rows)
        for row in corpus.rows:
            row.encode("utf-8")


@examples(60)
@given(st.lists(nearly({"text": "some words", "number": 1}), min_size=1, max_size=3), st.booleans())
def test_rows_hold_text_or_are_refused(folder: Path, rows: list[Any], as_lines: bool) -> None:
    file = folder / ("rows.jsonl" if as_lines else "rows.json")
    said = "\n".join(map(as_json, rows)) if as_lines else f"[{', '.join(map(as_json, rows))}]"
    file.write_text(said, encoding="utf-8", errors="surrogatepass")
    corpus = accepted(read_file, str(file))
    for row in corpus.rows if corpus is not None else ():
        row.encode("utf-8")
    accepted(read_file_rows, str(file))


@examples(6)
@given(
    st.dictionaries(
        st.sampled_from(["model.norm.weight", "lm_head.weight", "other"]),
        anything,
        min_size=1,
        max_size=2,
    )
)
def test_an_index_names_files_beside_it_or_is_refused(
    folder: Path, changes: dict[str, Any]
) -> None:
    place = folder / "sharded"
    if not place.exists():
        load(dense(folder / "for-shards")).save_pretrained(place, max_shard_size="8KB")
    index = place / "model.safetensors.index.json"
    before = index.read_bytes()
    document = json.loads(before)
    document["weight_map"] |= changes
    try:
        index.write_text(as_json(document), encoding="utf-8", errors="surrogatepass")
        model = accepted(load, place)
        if model is not None:
            assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
            assert (
                document["weight_map"].keys() - {"other"} == json.loads(before)["weight_map"].keys()
            )
    finally:
        index.write_bytes(before)


def assert_finite(value: Any) -> None:
    """No number of the document is NaN or infinite."""
    if isinstance(value, dict):
        for below in value.values():
            assert_finite(below)
    elif isinstance(value, list):
        for below in value:
            assert_finite(below)
    elif isinstance(value, float):
        assert math.isfinite(value)
