"""LLM Surgeon on single matrices: rows and columns, elements, neighbours; what is zero stays zero."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
import resect.saliency.ladders as ladders
from resect.checkpoint import Progress
from resect.errors import ModelError, UsageError
from resect.methods.sparsity import matrices
from resect.statistics import Classes, Data, collect_curvature
from resect.surgery.modeling_resect import Gathered
from tests.models import FAMILIES, assert_same_function, copy_of, random_tokens, tiny_tokenizer

TOKENS = random_tokens(24, 16, seed=3)
MODES = ["rows-columns", "unstructured", "2:4"]


def surgeon(model: nn.Module, mode: str, *, keep: float = 0.6, **settings: Any) -> resect.Result:
    """A small run on fixed tokens."""
    options = set(signature(resect.prune).parameters) & set(settings)
    given: dict[str, Any] = {"data": TOKENS, **{key: settings.pop(key) for key in options}}
    return resect.prune(model, method="llm-surgeon", keep=keep, settings={"mode": mode, **settings}, **given)


def zeros(model: nn.Module, graph: resect.Graph) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in matrices(model, graph))


def error_of(model: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return float((model(input_ids=TOKENS).logits - dense(input_ids=TOKENS).logits).square().mean())


@pytest.mark.parametrize(("family", "shots"), [("llama", 1), ("llama", 3), ("gpt2", 2)])
@pytest.mark.parametrize("mode", MODES)
def test_the_share_asked_for_stays(mode: str, family: str, shots: int) -> None:
    model = FAMILIES[family]()
    graph = resect.trace(model)
    result = surgeon(model, mode, shots=shots, gather=False)
    assert result.pattern is not None
    found = zeros(model, graph)
    assert found == result.report["zeros"] == sum(matrix.zeros for matrix in result.pattern.layers.values())
    whole = graph.parameter_count(blocks_only=True)
    if mode == "2:4":
        assert found == sum(layer.weight.numel() for layer in matrices(model, graph)) // 2
    else:
        assert 0.36 * whole < found <= 0.4 * whole


def test_no_row_keeps_more_than_two_of_four() -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    surgeon(model, "2:4", shots=2)
    for layer in matrices(model, graph):
        assert ((layer.weight == 0).reshape(layer.rows, -1, 4).sum(2) == 2).all()


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("mode", ["rows-columns", "unstructured"])
def test_every_matrix_loses_the_same_share(mode: str, shots: int) -> None:
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    surgeon(model, mode, keep=0.6, shots=shots, selection="local", gather=False)
    layers = matrices(model, graph)
    asked = 0.4 * graph.parameter_count(blocks_only=True) / sum(layer.weight.numel() for layer in layers)
    for layer in layers:
        line = max(1 / layer.rows, 1 / layer.inner_columns) if mode == "rows-columns" else 1 / layer.weight.numel()
        assert asked - line <= float((layer.weight == 0).double().mean()) <= asked


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_and_columns_are_really_taken_out(family: str, tmp_path: Path) -> None:
    """The zeros of the same run without gathering are gone: smaller, the same function, saved and loaded."""
    model = FAMILIES[family]()
    masked = copy_of(model)
    result = surgeon(model, "rows-columns", shots=2)
    surgeon(masked, "rows-columns", shots=2, gather=False)
    assert_same_function(model, masked, TOKENS[:2])
    found = sum(parameter.numel() for parameter in model.parameters())
    assert result.report["parameters"]["pruned"] == found
    assert result.report["parameters"]["dense"] - found >= result.report["zeros"] > 0
    assert result.report["cut_equals_mask"]["difference"] <= 1e-4
    resect.save(model, tmp_path / "saved")
    assert_same_function(resect.load(tmp_path / "saved"), model, TOKENS[:2])


def test_rows_and_columns_are_those_of_the_pattern() -> None:
    model = FAMILIES["llama_biases"]()
    pattern = surgeon(model, "rows-columns", shots=2, gather=False).pattern
    assert pattern is not None
    assert resect.plan.Pattern.from_json(pattern.to_json()) == pattern
    for path, matrix in pattern.layers.items():
        weight = model.get_parameter(f"{path}.weight")
        stays = torch.ones(matrix.shape, dtype=torch.bool)
        for axis, kept in enumerate((matrix.rows, matrix.columns)):
            gone = torch.ones(matrix.shape[axis], dtype=torch.bool)
            gone[list(kept) if kept is not None else slice(None)] = False
            stays[(slice(None),) * axis + (gone,)] = False
            if axis == 0:
                assert (model.get_parameter(f"{path}.bias")[gone] == 0).all()
        assert torch.equal(weight != 0, stays)


@pytest.mark.parametrize("mode", MODES)
def test_updates_help(mode: str) -> None:
    dense = FAMILIES["llama"]()
    errors = []
    choices: list[Any] = [None, {}]
    for compensation in choices:
        model = copy_of(dense)
        surgeon(model, mode, shots=1, keep=0.7, compensation=compensation, fisher="activations")
        errors.append(error_of(model, dense))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("mode", "shots"), [("coupled", 1), ("coupled", 3), ("rows-columns", 1), ("rows-columns", 3)])
def test_ladders_reach_as_far_as_they_must(mode: str, shots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far they reach at first, what goes is the same, to the bit."""
    found, taken = {}, dict[float, int]()
    remove = ladders._State.remove
    for ahead in (1e-9, 1.0, 1e9):

        def counted(state: Any, unit: int, ahead: float = ahead) -> None:
            taken[ahead] = taken.get(ahead, 0) + 1
            remove(state, unit)

        monkeypatch.setattr(ladders, "AHEAD", ahead)
        monkeypatch.setattr(ladders._State, "remove", counted)
        model = FAMILIES["llama"]()
        surgeon(model, mode, shots=shots, layout="per-layer")
        found[ahead] = model.state_dict()
    assert taken[1.0] != taken[1e9]
    for name, expected in found[1e9].items():
        assert torch.equal(found[1e-9][name], expected)
        assert torch.equal(found[1.0][name], expected)


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()))


@pytest.mark.parametrize("mode", MODES)
def test_corrections_lower_the_loss_and_keep_zeros(mode: str) -> None:
    dense = FAMILIES["llama"]()
    results = {}
    for name, correction in {"without": None, "with": {"share": 1.0, "learning_rate": 1e-2, "rank": 4}}.items():
        model = copy_of(dense)
        result = surgeon(model, mode, shots=2, keep=0.7, correction=correction, gather=False)
        assert zeros(model, resect.trace(dense)) == result.report["zeros"]
        assert not any("parametrizations" in key for key in model.state_dict())
        results[name] = loss_of(model)
    assert results["with"] < results["without"]


class Stopped(BaseException):
    """The power went."""


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = FAMILIES["llama"]()
    expected = copy_of(dense)
    pattern = surgeon(expected, mode, shots=2, correction={}).pattern
    note, left = Progress.note, [1]

    def interrupted(self: Progress, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        note(self, *args, **kwargs)

    monkeypatch.setattr(Progress, "note", interrupted)
    for left[0] in (1, 2, 2):  # before the first note; after one more each time
        with pytest.raises(Stopped):
            surgeon(copy_of(dense), mode, shots=2, correction={}, progress=tmp_path / "run", resume=(tmp_path / "run").exists())
    model = copy_of(dense)
    assert surgeon(model, mode, shots=2, correction={}, progress=tmp_path / "run", resume=True).pattern == pattern
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_shots_that_are_done_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        if done[0] == 3:
            raise Stopped
        done[0] += 1
        return collect_curvature(*args, **kwargs)

    monkeypatch.setattr("resect.methods.llm_surgeon.collect_curvature", counted)
    with pytest.raises(Stopped):
        surgeon(FAMILIES["llama"](), "unstructured", shots=4, progress=tmp_path / "run")
    done[0] = -1
    surgeon(FAMILIES["llama"](), "unstructured", shots=4, progress=tmp_path / "run", resume=True)
    assert done[0] == 0


def test_a_dry_run_leaves_the_weights_alone() -> None:
    model = FAMILIES["llama"]()
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    result = surgeon(model, "unstructured", shots=1, plan_only=True)
    assert result.report["zeros"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neighbours_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="7:11 was asked"):
        surgeon(FAMILIES["llama"](), "7:11")


def test_as_many_neighbours_as_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match="fewer than 2 stay"):
        surgeon(FAMILIES["llama"](), "2:2")


@pytest.mark.parametrize("mode", ["5:4", "rows", "2:4:6"])
def test_unknown_modes_are_refused(mode: str) -> None:
    with pytest.raises(UsageError):
        surgeon(FAMILIES["llama"](), mode)


@pytest.fixture
def uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be collected."""

    def collected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("resect.methods.llm_surgeon.collect_curvature", collected)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(("mode", "options"), [("rows-columns", {"floor": 40}), ("unstructured", {"of": "model", "keep": 0.02})])
def test_more_than_can_go_is_refused_before_the_long_part(mode: str, options: Any) -> None:
    with pytest.raises(UsageError, match="parameters were to go"):
        surgeon(FAMILIES["llama"](), mode, **{"keep": 0.2, "shots": 1, **options})


@pytest.mark.usefixtures("uncollected")
def test_layers_that_cannot_be_gathered_are_refused_before_the_long_part() -> None:
    layers = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True) for _ in range(2))
    data, example = Data([(torch.randn(8, 3, 12), torch.randint(12, (8,)))], Classes()), (torch.randn(2, 3, 12),)
    with pytest.raises(ModelError, match="reads its weight without calling it") as problem:
        surgeon(nn.Sequential(*layers), "rows-columns", of="model", data=data, inputs=example)
    assert "gather=false" in problem.value.__notes__[0]


def test_rows_and_columns_go_beside_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the river ran low")
    model, source = FAMILIES["llama"](), resect.Vocabulary([str(tmp_path / "text.txt")])
    result = surgeon(model, "rows-columns", shots=1, tokenizer=tiny_tokenizer(), vocabulary=source)
    assert len(result.tokenizer) == len(model.get_parameter("model.embed_tokens.weight")) < 101
    assert any(isinstance(module, Gathered) for module in model.modules())


def test_multiply_accumulates_are_refused() -> None:
    with pytest.raises(UsageError, match="of=macs"):
        surgeon(FAMILIES["llama"](), "unstructured", of="macs")


@pytest.mark.parametrize("mode", ["rows-columns", "2:4"])
@pytest.mark.filterwarnings("ignore::resect.errors.SecondTermClipped")
def test_a_second_term_serves_single_matrices(mode: str) -> None:
    """It changes what is done, and for the better than zeros in the same places."""
    dense = FAMILIES["llama_biases"]()
    one, two = copy_of(dense), copy_of(dense)
    for terms, model in ((1, one), (2, two)):
        surgeon(model, mode, shots=1, gather=False, terms=terms, data=TOKENS)
    zeroed = copy_of(dense)
    layers = matrices(two, resect.trace(two))
    with torch.no_grad():
        for layer in layers:
            zeroed.get_parameter(f"{layer.path}.weight")[layer.weight == 0] = 0
    assert error_of(two, dense) < error_of(zeroed, dense)
    assert any(not torch.equal(layer.weight, one.get_parameter(f"{layer.path}.weight")) for layer in layers)
