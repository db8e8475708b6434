"""LLM Surgeon: whole units by curvature, updates, shots, and runs that are cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.checkpoint import Progress
from resect.errors import FewPositions, NumericsError, UsageError
from resect.graph import Graph
from resect.methods import Compensation, LLMSurgeon
from resect.methods.compensation import compensate
from resect.plan import Kept, Plan
from resect.statistics import Classes, Data, Moments, collect_curvature, layer_of
from resect.surgery import masked
from tests.models import FAMILIES, assert_untouched, copy_of, random_tokens, snapshot

TOKENS = random_tokens(24, 16, seed=3)
KEPT = {"heads": 1, "channels": 5}


def surgeon(model: nn.Module, **options: Any) -> resect.Result:
    """A small run on fixed tokens."""
    options = {"data": TOKENS, "layout": "per-layer", "keep": 0.7, **options}
    return resect.prune(model, method="llm-surgeon", **options)


def some_plan(graph: Graph, kinds: tuple[str, ...] = ("heads", "channels")) -> Plan:
    """Half of every group of some kinds."""
    kept = {group: tuple(range(0, group.units, 2)) for group in graph.of_kind(*kinds)}
    return Plan(groups={g.name: Kept(kind=g.kind, layer=g.layer, units=g.units, keep=keep) for g, keep in kept.items()})


@pytest.mark.parametrize("family", ["llama_biases", "gpt2", "qwen3", "gemma2", "opt", "olmo2", "falcon_gqa", "phi"])
def test_families_are_cut_and_checked(family: str) -> None:
    result = surgeon(FAMILIES[family](), settings={"shots": 2})
    assert result.plan.removed()
    assert [shot["number"] for shot in result.report["shots"]] == [1, 2]
    assert result.report["shots"][-1]["parameters"] == result.report["parameters"]["pruned"]
    assert result.report["cut_equals_mask"]["difference"] <= result.report["cut_equals_mask"]["allowed"]


def test_identity_is_the_size_of_columns() -> None:
    model = FAMILIES["llama"]()
    weights = {name: value.clone() for name, value in model.named_parameters()}
    result = surgeon(model, settings={"shots": 1, "fisher": "identity", "damping": 0.0, "kinds": ["channels"]}, plan_only=True)
    for layer in range(3):
        expected = 0.5 * weights[f"model.layers.{layer}.mlp.down_proj.weight"].double().square().sum(0)
        assert torch.allclose(result.scores[f"model.layers.{layer}.mlp.channels"], expected, rtol=1e-6)


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "activations", "identity"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_every_fisher_in_every_layout(fisher: str, layout: str) -> None:
    result = surgeon(FAMILIES["llama"](), layout=layout, settings={"fisher": fisher, "shots": 2})
    share = result.report["block_parameters"]["pruned"] / result.report["block_parameters"]["dense"]
    assert 0.6 < share <= 0.7


def test_a_dry_run_leaves_the_model_alone() -> None:
    model = FAMILIES["llama"]()
    before = snapshot(model)
    assert surgeon(model, plan_only=True, settings={"shots": 3}).plan.removed()
    assert_untouched(model, before)


def inputs_of(model: nn.Module, path: str, tokens: Tensor) -> Tensor:
    """What a layer takes in: [positions, columns] float64."""
    layer, seen = layer_of(model, path), []
    assert layer is not None
    handle = layer.module.register_forward_hook(lambda module, given, output: seen.append(layer.inputs(given[0]).double()))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return torch.cat(seen)


def least_squares(wanted: Tensor, given: Tensor, weight: Tensor, gone: Tensor, damping: float) -> Tensor:
    """The matrix with zero columns that minimises `mean |wanted − Ŵ given|² + damping · scale · |Ŵ − W|²`, as one big system."""
    stays = torch.ones(given.shape[1], dtype=torch.bool)
    stays[gone] = False
    x = given[:, stays]
    ridge = damping * (given.square().mean(0)).mean().item() * len(x)
    rows = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    targets = torch.cat([wanted, ridge**0.5 * weight[:, stays].T])
    found = torch.zeros_like(weight)
    found[:, stays] = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
    return found


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compensation_is_least_squares_on_the_inputs_it_names(family: str, inputs: Any) -> None:
    """Every layer in turn: with `dense`, of the network before; with `pruned`, of what was cut and updated so far."""
    dense = FAMILIES[family]().double()
    model, graph = copy_of(dense), resect.trace(dense)
    plan = some_plan(graph)
    compensate(model, graph, plan, Data(TOKENS.split(5)), Compensation(inputs=inputs, damping=0.01))
    step = copy_of(dense)
    for path, columns in removed_columns(step, graph, plan):
        layer, reference = layer_of(model, path), layer_of(step, path)
        assert layer is not None
        assert reference is not None
        weight = layer_of(dense, path).matrix()  # type: ignore[union-attr]
        before = inputs_of(dense, path, TOKENS)
        if inputs == "dense":
            expected = damped_like_obs(before, weight, columns)
        else:
            with masked(step, plan.of_layer(graph.blocks.layer_of(path)) & earlier(plan, graph, path), graph):
                after = inputs_of(step, path, TOKENS)
            expected = least_squares(before @ weight.T, after, weight, columns, 0.01)
            reference.write(expected)
        assert torch.allclose(layer.matrix(), expected, rtol=1e-5, atol=1e-7), path


def earlier(plan: Plan, graph: Graph, path: str) -> Plan:
    """The part of a plan about blocks before the one of a layer."""
    layer = graph.blocks.layer_of(path) or 0
    return Plan(groups={name: kept for name, kept in plan.groups.items() if kept.layer is not None and kept.layer < layer})


def removed_columns(model: nn.Module, graph: Graph, plan: Plan) -> list[tuple[str, Tensor]]:
    return [(loss.layer.path, loss.columns) for loss in resect.surgery.reading(model, graph, plan)]


def damped_like_obs(x: Tensor, weight: Tensor, gone: Tensor) -> Tensor:
    """Optimal Brain Surgeon by its definition: `W − W_C ([A⁻¹]_CC)⁻¹ A⁻¹[C,:]`."""
    A = x.T @ x / len(x)
    inverse = torch.linalg.inv(A + 0.01 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype))
    found = weight - weight[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
    found[:, gone] = 0
    return found


def error_of(model: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return float((model(input_ids=TOKENS).logits - dense(input_ids=TOKENS).logits).square().mean())


def test_compensation_helps_and_pruned_inputs_help_more() -> None:
    dense = FAMILIES["llama"]()
    errors = []
    choices: list[Any] = [None, {"inputs": "dense"}, {"inputs": "pruned"}]
    for compensation in choices:
        model = copy_of(dense)
        surgeon(model, keep=0.5, settings={"shots": 1, "compensation": compensation})
        errors.append(error_of(model, dense))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("kinds", [("heads", "channels"), ("residual",)])
def test_compensation_serves_other_methods(kinds: tuple[str, ...]) -> None:
    dense = FAMILIES["llama"]()
    errors = []
    choices: list[Any] = [None, {}]
    for compensation in choices:
        model = copy_of(dense)
        settings = {"criterion": "l2", "kinds": kinds, "compensation": compensation}
        resect.prune(model, data=TOKENS, keep=0.6, layout="per-layer", settings=settings)
        errors.append(error_of(model, dense))
    assert errors[0] > errors[1]


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()))


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_corrections_lower_the_loss_of_what_is_left(family: str) -> None:
    dense = FAMILIES[family]()
    losses = []
    choices: list[Any] = [None, {"share": 1.0, "learning_rate": 1e-2, "rank": 4}]
    for correction in choices:
        model = copy_of(dense)
        result = surgeon(model, keep=0.6, settings={"shots": 2, "correction": correction})
        assert result.report["cut_equals_mask"]["difference"] <= result.report["cut_equals_mask"]["allowed"]
        losses.append(loss_of(model))
    assert losses[1] < losses[0]


class Stopped(BaseException):
    """The power went."""


@pytest.mark.parametrize(
    ("inputs", "correction", "trials"),
    [("dense", None, None), ("pruned", None, None), ("dense", {"last_epochs": 1}, None), ("dense", None, {"predictions": 64})],
)
def test_a_run_that_was_cut_short_anywhere_goes_on_to_the_same_bits(
    inputs: str, correction: Any, trials: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = FAMILIES["llama"]()
    settings = {"shots": 3, "compensation": {"inputs": inputs}, "correction": correction, "trials": trials}
    whole = copy_of(dense)
    expected = surgeon(whole, settings=settings)
    put, note, left = Progress.put, Progress.note, [-1]

    def counted(write: Any) -> Any:
        def interrupted(self: Progress, *args: Any, **kwargs: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Stopped
            write(self, *args, **kwargs)

        return interrupted

    monkeypatch.setattr(Progress, "put", counted(put))
    monkeypatch.setattr(Progress, "note", counted(note))
    progress = tmp_path / "run"
    for left[0] in (1, 8, 15, 5):  # writes until the power goes
        with pytest.raises(Stopped):
            surgeon(copy_of(dense), settings=settings, progress=progress, resume=progress.exists())
    again, left[0] = copy_of(dense), -1
    result = surgeon(again, settings=settings, progress=progress, resume=True)
    assert result.plan == expected.plan
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_progress_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(LLMSurgeon, "make_up", stop)
        with pytest.raises(Stopped):
            surgeon(FAMILIES["llama"](), progress=tmp_path / "run")
    with pytest.raises(UsageError, match="asked for something else"):
        surgeon(FAMILIES["llama"](), keep=0.6, progress=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="asked for something else"):
        surgeon(FAMILIES["llama"](), data=TOKENS.flip(0), progress=tmp_path / "run", resume=True)
    other = FAMILIES["llama"]()
    nn.init.normal_(other.get_parameter("model.norm.weight"))
    with pytest.raises(UsageError, match="asked for something else"):
        surgeon(other, progress=tmp_path / "run", resume=True)


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    for resume in (False, True):
        with pytest.raises(UsageError, match="Name another directory"):
            surgeon(FAMILIES["llama"](), progress=tmp_path, resume=resume)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("compensation", [None, {}, {"inputs": "pruned"}])
def test_moments_do_not_pile_up(compensation: Any, tmp_path: Path) -> None:
    surgeon(FAMILIES["llama"](), settings={"shots": 3, "compensation": compensation}, progress=tmp_path / "run")
    assert not list(tmp_path.glob("run/shot-*/moments"))


def test_networks_without_blocks_have_no_share_of_them() -> None:
    for mode in ("coupled", "unstructured"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        data = Data([(torch.randn(32, 8), torch.randint(5, (32,)))], Classes())
        with pytest.raises(UsageError, match="Use of=model"):
            surgeon(model, data=data, inputs=(torch.randn(2, 8),), settings={"mode": mode, "kinds": ["channels"]})


def test_too_little_text_is_said() -> None:
    with pytest.warns(FewPositions, match="rank 12 at most"):
        surgeon(FAMILIES["llama"](), data=TOKENS[:1, :12], settings={"shots": 1})


def test_weights_that_are_not_finite_are_named() -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
    with pytest.raises(NumericsError):
        surgeon(model)


# A second Kronecker term

CLIPPED = pytest.mark.filterwarnings("ignore::resect.errors.SecondTermClipped")


@CLIPPED
def test_a_second_term_is_noted_and_a_run_cut_short_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, progress = FAMILIES["llama_biases"](), tmp_path / "run"
    asked: dict[str, Any] = {"settings": {"shots": 2, "terms": 2}, "data": TOKENS[:8]}
    whole, again = copy_of(dense), copy_of(dense)
    expected = surgeon(whole, **asked)
    moments: list[dict[str, Tensor]] = []
    put = Progress.put

    def interrupted(self: Progress, name: str, tensors: Any) -> None:
        put(self, name, tensors)
        if "/moments/" in name:
            moments.append(dict(tensors))
        if name == "shot-1/scores" or (name.startswith("shot-2/moments/") and len(moments) == 9):
            raise Stopped

    for resume in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(Progress, "put", interrupted)
            with pytest.raises(Stopped):
                surgeon(copy_of(dense), **asked, progress=progress, resume=resume)
    assert len(moments) == 9
    assert all({"second_inputs", "second_gradients"} <= found.keys() for found in moments)
    result = surgeon(again, **asked, progress=progress, resume=True)
    assert result.plan == expected.plan
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@CLIPPED
def test_an_update_is_the_optimum_under_both_terms(tmp_path: Path) -> None:
    """The slope of the loss is zero along every column that stays, by the moments that were collected."""
    dense = FAMILIES["gpt2"]()
    graph, found = resect.trace(dense), dict[str, Moments]()
    plan, model = some_plan(graph), copy_of(dense)
    losing = removed_columns(dense, graph, plan)
    collect_curvature(dense, [TOKENS], graph, [path for path, _ in losing], found.__setitem__, terms=2)
    progress = Progress(tmp_path, "nothing")
    for path, moments in found.items():
        progress.put(f"shot-1/moments/{path}", moments.tensors())
    LLMSurgeon(shots=1, terms=2, damping_gradients=0.05).make_up(model, graph, plan, Data([TOKENS]), progress)
    for path, gone in losing:
        curvature = found[path].curvature(damping_gradients=0.05)
        assert curvature.joint is not None
        layers = [layer_of(network, path) for network in (model, dense)]
        after, before = (layer.matrix() for layer in layers if layer)
        slope = curvature.times(after - before)
        stays = torch.ones(slope.shape[1], dtype=torch.bool)
        stays[gone] = False
        assert (after[:, gone] == 0).all()
        assert slope[:, stays].abs().max() < 1e-4 * slope[:, gone].abs().max()


@pytest.mark.parametrize("fisher", ["activations", "identity"])
def test_a_second_term_needs_gradients(fisher: str) -> None:
    with pytest.raises(UsageError, match=f"fisher = '{fisher}' has none. Use terms = 1"):
        surgeon(FAMILIES["llama"](), settings={"terms": 2, "fisher": fisher})
