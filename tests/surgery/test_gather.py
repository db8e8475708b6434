"""Rows and columns of single layers taken out: the small layer computes what the masked one computes, or nothing is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import resect
from resect.checkpoint import record_of
from resect.errors import ModelError, UsageError
from resect.evaluation.size import parameter_count
from resect.plan import Kept, Plan
from resect.surgery import dense_tensors, gather
from resect.surgery.modeling_resect import Gathered, resize
from tests.models import FAMILIES, assert_same_function, assert_untouched, random_plan, random_tokens, randomise, snapshot

ROWS, COLUMNS = 7, 6
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(COLUMNS, ROWS), (2, 5, COLUMNS)),
    "linear, no bias": (lambda: nn.Linear(COLUMNS, ROWS, bias=False), (2, 5, COLUMNS)),
    "linear, a vector": (lambda: nn.Linear(COLUMNS, ROWS), (COLUMNS,)),
    "Conv1D": (lambda: Conv1D(ROWS, COLUMNS), (2, 5, COLUMNS)),
    "convolution over one axis": (lambda: nn.Conv1d(COLUMNS, ROWS, 3, padding="same"), (2, COLUMNS, 8)),
    "convolution": (lambda: nn.Conv2d(COLUMNS, ROWS, 3, stride=2, padding=1), (2, COLUMNS, 9, 8)),
    "convolution, no bias": (lambda: nn.Conv2d(COLUMNS, ROWS, (3, 1), dilation=2, bias=False), (2, COLUMNS, 9, 8)),
    "convolution, reflected": (lambda: nn.Conv2d(COLUMNS, ROWS, 3, padding=(1, 2), padding_mode="reflect"), (2, COLUMNS, 9, 8)),
    "convolution, one image": (lambda: nn.Conv2d(COLUMNS, ROWS, 3), (COLUMNS, 9, 8)),
    "convolution over three axes": (lambda: nn.Conv3d(COLUMNS, ROWS, 2), (2, COLUMNS, 4, 3, 4)),
}
KEPT: dict[str, tuple[list[int] | None, list[int] | None]] = {
    "rows": ([5, 0, 3], None),
    "columns": (None, [1, 4]),
    "both": ([0, 2, 6], [5, 0, 3, 2]),
    "no rows": ([], [1, 4]),
    "no columns": ([0, 2, 6], []),
    "nothing": ([], []),
}


def numbers(kept: list[int] | None) -> Tensor | None:
    return None if kept is None else torch.tensor(kept, dtype=torch.int64)


def layer_of(name: str) -> tuple[nn.Module, Tensor]:
    """A layer in float64 with random weights, and something that it takes in."""
    build, shape = LAYERS[name]
    layer = build().double()
    randomise(layer)
    return layer, torch.randn(shape, dtype=torch.float64)


def masked(layer: nn.Module, rows: list[int] | None, columns: list[int] | None) -> nn.Module:
    """The layer with zeros in all other rows, the bias of those included, and columns."""
    layer = copy.deepcopy(layer)
    axis = 0 if isinstance(layer, Conv1D) else 1
    with torch.no_grad():
        for kept, places in ((rows, ((layer.weight, 1 - axis), (layer.bias, 0))), (columns, ((layer.weight, axis),))):
            for tensor, along in places:
                if kept is not None and isinstance(tensor, Tensor):
                    gone = [number for number in range(tensor.shape[along]) if number not in kept]
                    tensor.index_fill_(along, torch.tensor(gone), 0)
    return layer


def gathered(layer: nn.Module, rows: list[int] | None, columns: list[int] | None) -> Gathered:
    small = gather(nn.Sequential(copy.deepcopy(layer)), {"0": (numbers(rows), numbers(columns))})[0]  # type: ignore[index]
    assert isinstance(small, Gathered)
    return small


def small_shape(layer: nn.Module, rows: list[int] | None, columns: list[int] | None) -> list[int]:
    axis = 0 if isinstance(layer, Conv1D) else 1
    shape = list(layer.weight.shape)  # type: ignore[arg-type]
    shape[1 - axis] = ROWS if rows is None else len(rows)
    shape[axis] = COLUMNS if columns is None else len(columns)
    return shape


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_what_the_masked_layer_computes(name: str, kept: str) -> None:
    layer, given = layer_of(name)
    expected, small = masked(layer, *KEPT[kept]), gathered(layer, *KEPT[kept])
    assert list(small.weight.shape) == small_shape(layer, *KEPT[kept])
    found, wanted = small(given), expected(given)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    if small.weight.numel():
        assert not torch.allclose(found, layer(given))
        assert found.std() > 0.1
    weight, bias = dense_tensors(small)
    assert torch.equal(weight, expected.weight)  # type: ignore[arg-type]
    assert (bias is None) == (layer.bias is None)
    assert bias is None or torch.equal(bias, expected.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_masked_layer(name: str, kept: str) -> None:
    rows, columns = KEPT[kept]
    layer, given = layer_of(name)
    expected, small = masked(layer, rows, columns), gathered(layer, rows, columns)
    taken, wanted = given.clone().requires_grad_(), given.clone().requires_grad_()
    out = small(taken)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected(wanted) * weights).sum().backward()
    assert torch.allclose(taken.grad, wanted.grad, rtol=0, atol=1e-12)  # type: ignore[arg-type]
    for parameter, dense in ((small.weight, expected.weight), (small.bias, expected.bias)):
        if parameter is None:
            continue
        gradient: Tensor = dense.grad  # type: ignore[assignment]
        axis = small.input_axis if gradient.dim() > 1 else 1
        for kept_numbers, along in ((rows, 1 - axis), (columns, axis)):
            if kept_numbers is not None and along < gradient.dim():
                gradient = gradient.index_select(along, torch.tensor(sorted(kept_numbers), dtype=torch.int64))
        assert torch.allclose(parameter.grad, gradient, rtol=0, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYERS)
def test_all_rows_and_columns_need_no_gather(name: str) -> None:
    layer, given = layer_of(name)
    whole = Gathered(layer, None, None)
    assert torch.equal(whole(given), layer(given))
    assert list(whole.state_dict()) == list(layer.state_dict())
    model = nn.Sequential(layer)
    gather(model, {"0": (torch.arange(ROWS), None)})
    assert model[0] is layer
    assert not hasattr(model, "resect_record")
    gather(model, {"0": (torch.arange(ROWS).flip(0), torch.tensor([2]))})
    small: Any = model[0]
    assert small.rows is None
    assert small.columns.tolist() == [2]


def test_it_looks_like_the_layer_it_stands_for() -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Conv2d(COLUMNS, ROWS, 3), Conv1D(ROWS, COLUMNS)).to(torch.bfloat16)
    model.eval()
    model[0].get_parameter("weight").requires_grad_(False)
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, given, found: seen.append(found))
    gather(model, {str(i): (torch.tensor([4, 1], dtype=torch.int32), torch.tensor([3])) for i in range(3)})
    layers: list[Any] = list(model)
    linear, convolution, transposed = layers
    assert (linear.in_features, linear.out_features) == (COLUMNS, ROWS)
    assert (convolution.in_channels, convolution.out_channels, convolution.kernel_size) == (COLUMNS, ROWS, (3, 3))
    assert (transposed.nx, transposed.nf) == (COLUMNS, ROWS)
    assert "rows=2 of 7, columns=1 of 6" in repr(linear)
    for layer in layers:
        assert not layer.training
        assert list(layer.state_dict()) == ["weight", "bias", "rows", "columns"]
        assert layer.weight.dtype == torch.bfloat16
        assert layer.rows.dtype == layer.columns.dtype == torch.int64
        assert layer.rows.tolist() == [1, 4]
    assert not linear.weight.requires_grad
    assert linear.bias.requires_grad
    found = linear(torch.randn(2, COLUMNS, dtype=torch.bfloat16))
    assert seen == [found]
    handle.remove()
    linear(torch.randn(2, COLUMNS, dtype=torch.bfloat16))
    assert len(seen) == 1
    assert copy.deepcopy(model).double()[0].rows.dtype == torch.int64
    assert parameter_count(model) == (2 + 2) + (2 * 9 + 2) + (2 + 2)


def some(model: nn.Module, paths: Mapping[str, str]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Some two thirds of rows ("r"), columns ("c") or both of layers, at random."""
    kept: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for path, which in paths.items():
        layer: Any = model.get_submodule(path)
        rows, columns = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape[:2]
        chosen = (torch.randperm(size)[: size * 2 // 3] for size in (rows, columns))
        kept[path] = tuple(index if side in which else None for side, index in zip("rc", chosen, strict=True))  # type: ignore[assignment]
    return kept


def fewer(layer: Any, rows: Tensor | None, columns: Tensor | None) -> int:
    """Parameters that a linear layer loses, indices not counted."""
    outer_columns, outer_rows = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    left_rows = outer_rows if rows is None else len(rows)
    left_columns = outer_columns if columns is None else len(columns)
    weights = int(outer_rows * outer_columns - left_rows * left_columns)
    return weights if layer.bias is None else weights + int(outer_rows - left_rows)


def masked_model(model: nn.Module, kept: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> nn.Module:
    model = copy.deepcopy(model)
    for path, (rows, columns) in kept.items():
        parent, _, leaf = path.rpartition(".")
        lists = (None if index is None else index.tolist() for index in (rows, columns))
        setattr(model.get_submodule(parent), leaf, masked(model.get_submodule(path), *lists))
    return model


LLAMA = {
    "model.layers.0.self_attn.q_proj": "rc",
    "model.layers.0.self_attn.o_proj": "rc",
    "model.layers.1.mlp.gate_proj": "c",
    "model.layers.2.mlp.down_proj": "r",
    "lm_head": "c",
}
GPT2 = {"transformer.h.0.attn.c_attn": "rc", "transformer.h.2.mlp.c_fc": "c", "transformer.h.2.mlp.c_proj": "rc"}
PATHS = {"llama": LLAMA, "llama_biases": LLAMA, "gpt2": GPT2}


def blank(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


@pytest.mark.parametrize("family", PATHS)
def test_a_model_computes_what_the_masked_one_computes(family: str) -> None:
    model = FAMILIES[family]()
    kept = some(model, PATHS[family])
    expected, small = masked_model(model, kept), gather(copy.deepcopy(model), kept)
    assert_same_function(small, expected, random_tokens())
    with pytest.raises(AssertionError, match="off by"):
        assert_same_function(small, model, random_tokens())
    assert parameter_count(model) - parameter_count(small) == sum(fewer(model.get_submodule(path), *kept[path]) for path in kept)
    output: Any = small(random_tokens(), labels=random_tokens())
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in small.parameters())


@pytest.mark.parametrize("family", PATHS)
def test_the_record_is_replayed_on_an_empty_model(family: str) -> None:
    model = FAMILIES[family]()
    small = gather(copy.deepcopy(model), some(model, PATHS[family]))
    record = record_of(small)
    fresh = resize(blank(model), record)
    state = small.state_dict()
    found, expected = ({name: (t.shape, t.dtype) for name, t in one.items()} for one in (fresh.state_dict(), state))
    assert found == expected
    assert all(tensor.is_meta for tensor in fresh.state_dict().values())
    filled = resize(FAMILIES[family](), record)
    with pytest.raises(AssertionError):
        assert_same_function(filled, small, random_tokens())
    filled.load_state_dict(state)
    assert_same_function(filled, small, random_tokens())


def test_the_record_speaks_of_the_bare_model_too() -> None:
    model = FAMILIES["llama"]()
    small = gather(copy.deepcopy(model), some(model, LLAMA))
    with torch.device("meta"):
        bare = type(model.base_model)(model.config)
    resize(bare, record_of(small))
    shapes = {name: tensor.shape for name, tensor in small.get_submodule("model").state_dict().items()}
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == shapes


def test_it_comes_after_other_cuts() -> None:
    """Heads, channels and a block first; the path of a layer is then another one than in the dense model."""
    model = FAMILIES["llama"]()
    graph = resect.trace(model)
    plan = random_plan(graph, 4, uniform=False, kinds=("heads", "channels"))
    gone = Kept(kind="blocks", layer=1, units=1, keep=())
    plan = Plan(groups={**{name: kept for name, kept in plan.groups.items() if ".1." not in name}, "model.layers.1": gone})
    cut = resect.cut(copy.deepcopy(model), plan, graph)
    kept = some(cut, {"model.layers.1.mlp.up_proj": "rc", "model.layers.0.self_attn.o_proj": "r"})
    expected, small = masked_model(cut, kept), gather(cut, kept)
    assert_same_function(small, expected, random_tokens())
    record = record_of(small)
    assert set(record["gathered"]) == {"model.layers.2.mlp.up_proj", "model.layers.0.self_attn.o_proj"}
    assert record["removed"] == ["model.layers.1"]
    filled = resize(FAMILIES["llama"](), record)
    filled.load_state_dict(small.state_dict())
    assert_same_function(filled, small, random_tokens())


def test_a_second_gathering_adds_to_the_record() -> None:
    model = FAMILIES["llama"]()
    gather(model, some(model, {"lm_head": "c"}))
    gather(model, some(model, {"model.layers.0.mlp.up_proj": "r"}))
    assert record_of(model)["gathered"] == {
        "lm_head": {"rows": None, "columns": 40},
        "model.layers.0.mlp.up_proj": {"rows": 37, "columns": None},
    }


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def hooked() -> nn.Module:
    layer = nn.Linear(COLUMNS, ROWS)
    layer.forward = lambda given: given  # type: ignore[method-assign, assignment]
    return layer


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(COLUMNS, ROWS), nn.Linear(COLUMNS, ROWS)
        self.other.bias = self.one.bias


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "another kind": (lambda: nn.Sequential(nn.LayerNorm(ROWS)), "0", "LayerNorm is neither a linear layer nor"),
    "a table": (lambda: nn.Sequential(nn.Embedding(COLUMNS, ROWS)), "0", "Embedding is neither"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=3)), "0", "Conv2d of 3 groups is neither"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(6, 7, 3)), "0", "ConvTranspose2d is neither"),
    "a forward of its own": (lambda: nn.Sequential(Own(COLUMNS, ROWS)), "0", "Own there may compute in a way of its own"),
    "a forward put there": (lambda: nn.Sequential(hooked()), "0", "may compute in a way of its own"),
    "no such path": (lambda: nn.Sequential(nn.Linear(COLUMNS, ROWS)), "1", "'1', which Sequential has not"),
    "the model itself": (lambda: nn.Linear(COLUMNS, ROWS), "", "the model itself"),
    "parametrised": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(COLUMNS, ROWS))),
        "0",
        "ParametrizedLinear there may compute",
    ),
    "masked by torch": (
        lambda: nn.Sequential(prune.random_unstructured(nn.Linear(COLUMNS, ROWS), "weight", 0.5)),
        "0",
        "holds more than a weight and a bias",
    ),
    "an attention of torch": (lambda: nn.MultiheadAttention(6, 2), "out_proj", "may compute in a way of its own"),
    "a fast path": (lambda: nn.TransformerEncoderLayer(6, 2, 7), "linear1", "TransformerEncoderLayer around it reads"),
    "gathered before": (
        lambda: gather(nn.Sequential(nn.Linear(COLUMNS, ROWS)), {"0": (torch.tensor([1]), None)}),
        "0",
        "gathered already",
    ),
    "a tied bias": (Twice, "other", "whose bias is tied to one.bias"),
    "a tied head": (lambda: FAMILIES["llama_tied"](), "lm_head", "whose weight is tied to model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_gathered_is_refused(case: str) -> None:
    build, path, match = REFUSED[case]
    model = build()
    before = snapshot(model)
    modules = list(model.modules())
    with pytest.raises(ModelError, match=match):
        gather(model, {path: (torch.tensor([0, 2]), None)})
    assert_untouched(model, before)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_a_head_that_will_be_tied_again_is_refused() -> None:
    model = FAMILIES["llama_tied"]()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ModelError, match="whose weight is tied to model.embed_tokens.weight"):
        gather(model, {"lm_head": (None, torch.tensor([0, 2]))})


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        (torch.tensor([0, 56]), None, "number 56 of the rows of model.layers.0.mlp.up_proj; there are 56"),
        (None, torch.tensor([-1, 3]), "number -1 of the columns of model.layers.0.mlp.up_proj; there are 60"),
        (torch.tensor([1, 2, 1]), None, "number 1 of the rows .* more than once"),
        (torch.tensor([[1, 2]]), None, r"rows .* shape \(1, 2\)"),
        (None, torch.ones(60, dtype=torch.bool), "columns .* torch.bool"),
        (torch.tensor([1.0]), None, "rows .* torch.float32"),
    ],
)
def test_numbers_that_are_not_there_are_refused(rows: Tensor | None, columns: Tensor | None, match: str) -> None:
    """The first of two layers is right, and stays as it is."""
    model = FAMILIES["llama"]()
    before = snapshot(model)
    path = "model.layers.0.mlp.up_proj"
    with pytest.raises(UsageError, match=match):
        gather(model, {"model.layers.1.mlp.up_proj": (torch.tensor([3]), None), path: (rows, columns)})
    assert_untouched(model, before)
    assert not any(isinstance(module, Gathered) for module in model.modules())


@pytest.mark.parametrize(
    ("gathered", "match"),
    [
        ({"lm_head": {"rows": 102, "columns": None}}, "102 rows of lm_head; the dense model has 101"),
        ({"lm_head": {"rows": None, "columns": 61}}, "61 columns of lm_head; the dense model has 60"),
        ({"model.norm": {"rows": 2, "columns": None}}, "'model.norm', but LlamaRMSNorm is neither"),
        ({"head": {"rows": 2, "columns": None}}, "names 'head'"),
    ],
)
def test_a_record_of_another_model_is_refused(gathered: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        resize(blank(FAMILIES["llama"]()), {"gathered": gathered})


def test_other_cuts_do_not_come_after_it() -> None:
    """Channels whose rows lie in a gathered layer are refused; whole blocks may still go."""
    small: Any = gather(FAMILIES["llama"](), some(FAMILIES["llama"](), {"model.layers.1.mlp.gate_proj": "c"}))
    del small.resect_record  # as after loading
    graph = resect.trace(small)
    assert graph.parameter_count() == parameter_count(small) == parameter_count(FAMILIES["llama"]()) - 56 * 20
    name = "model.layers.1.mlp.channels"
    plan = Plan(groups={name: Kept(kind="channels", layer=1, units=56, keep=tuple(range(20)))})
    before = snapshot(small)
    with pytest.raises(ModelError, match=f"{name}, which has slices in model.layers.1.mlp.gate_proj") as refused:
        resect.cut(small, plan, graph)
    assert refused.value.groups == (name,)
    assert_untouched(small, before)
    gone = {f"model.layers.{layer}": Kept(kind="blocks", layer=layer, units=1, keep=()) for layer in (0, 1)}
    with resect.masked(small, Plan(groups=gone), graph):
        expected = small(random_tokens()).logits
    assert torch.allclose(resect.cut(small, Plan(groups=gone), graph)(random_tokens()).logits, expected, atol=1e-5)
