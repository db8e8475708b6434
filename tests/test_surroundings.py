"""What a caller left on changes no result, and is still on afterwards; what cannot be left is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import resect
from resect.errors import ModelError, ResectError, UsageError
from resect.evaluation import perplexity
from tests.models import _llama, random_tokens

TOKENS = random_tokens(6, 12, seed=3)


def dense() -> PreTrainedModel:
    return _llama(num_hidden_layers=2)


def pruned(model: Any, method: str, tokens: Tensor = TOKENS) -> resect.Result:
    settings = {"shots": 1} if method == "llm-surgeon" else {}
    return resect.prune(model, data=tokens, method=method, keep=0.7, layout="per-layer", settings=settings)


@cache
def expected(method: str) -> resect.Result:
    """What comes out when nothing is on."""
    return pruned(dense(), method)


def assert_same(found: resect.Result, method: str) -> None:
    """The same plan, the same scores and weights to the bit, and an ordinary model."""
    wanted = expected(method)
    assert type(found.model) is type(wanted.model)
    assert found.plan == wanted.plan
    assert all(torch.equal(found.scores[name], scores) for name, scores in wanted.scores.items())
    ours, theirs = dict(found.model.named_parameters()), dict(wanted.model.named_parameters())
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


class Functions(TorchFunctionMode):
    """Adds noise to what some functions give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is nn.functional.silu else found


class Operators(TorchDispatchMode):
    """Adds noise to what some operators give."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.ops.aten.silu.default else found


@contextmanager
def switched(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """A global state with another value, which must still be there in the end."""
    before = get()
    put(value)
    try:
        yield
        assert get() == value
    finally:
        put(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
        assert torch.get_default_device() == torch.device(name)
    finally:
        torch.set_default_device(None)


@contextmanager
def doubled_everywhere() -> Iterator[None]:
    """A hook on all modules, which must still be there in the end."""
    calls: list[nn.Module] = []

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(module)
        return output * 2 if isinstance(output, Tensor) else output

    handle = register_module_forward_hook(double)
    try:
        yield
        assert not calls
        nn.Linear(1, 1)(torch.ones(1))
        assert len(calls) == 1
    finally:
        handle.remove()


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default device meta": lambda: default_device("meta"),
    "a device in a with": lambda: torch.device("meta"),
    "default dtype bfloat16": lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default dtype float64": lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "products in bfloat16": lambda: switched(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms": lambda: switched(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "a mode of functions": Functions,
    "a mode of operators": Operators,
    "fake tensors": FakeTensorMode,
    "hooks on all modules": lambda: doubled_everywhere(),
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.half().float() if tensor.is_floating_point() else tensor, lambda tensor: tensor
    ),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(
    ("state", "method"), [*((state, "llm-surgeon") for state in STATES), ("autocast", "llm-pruner")]
)
def test_states_change_nothing(state: str, method: str) -> None:
    expected(method)
    model = dense()
    with STATES[state]():
        found = pruned(model, method)
    assert_same(found, method)


def test_states_are_on_again_afterwards_and_after_an_error() -> None:
    model = dense()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"), Functions():
        modes = torch._C._len_torch_function_stack()
        for keep in (0.7, 7.0):
            try:
                resect.prune(model, data=TOKENS, keep=keep, plan_only=True)
            except UsageError:
                assert keep == 7.0
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_inference_mode_enabled()
            assert torch.empty(1).is_meta
            assert torch._C._len_torch_function_stack() == modes
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.empty(1).is_meta


def test_what_resect_switches_on_itself_stays_on() -> None:
    """bf16 computes in bfloat16 also where functions for everyone are called inside of others."""
    found = resect.prune(
        dense(), data=TOKENS, keep=0.7, layout="per-layer", settings={"bf16": True}
    )
    wanted = expected("llm-pruner")
    assert any(not torch.equal(found.scores[name], scores) for name, scores in wanted.scores.items())


def tuples() -> PreTrainedModel:
    model = dense()
    model.config.return_dict = False
    return model


def chatty() -> PreTrainedModel:
    model = _llama(num_hidden_layers=2, attn_implementation="eager")
    model.config.output_attentions = model.config.output_hidden_states = True
    return model


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place() -> PreTrainedModel:
    model = dense()
    model.model.layers[0].compile(backend="eager")
    model.compile(backend="eager")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: compiled(dense()),
    "compiled in place": compiled_in_place,
    "data parallel": lambda: nn.DataParallel(dense()),
    "compiled and data parallel": lambda: compiled(nn.DataParallel(dense())),
    "tuples": tuples,
    "training": lambda: dense().train(),
    "frozen": lambda: dense().requires_grad_(False),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrappers_and_configurations_change_nothing(name: str) -> None:
    assert_same(pruned(MODELS[name](), "llm-pruner"), "llm-pruner")


def test_what_a_model_puts_out_is_as_it_was_afterwards() -> None:
    for model in (tuples(), chatty()):
        fields = {name: getattr(model.config, name) for name in ("return_dict", "output_attentions", "output_hidden_states")}
        pruned(model, "llm-pruner")
        assert {name: getattr(model.config, name) for name in fields} == fields


def test_data_may_be_made_in_inference_mode() -> None:
    with torch.inference_mode():
        tokens = TOKENS.clone()
    assert_same(pruned(dense(), "llm-pruner", tokens), "llm-pruner")
    batches = resect.statistics.Data((tokens,))
    plan = resect.prune(dense(), data=batches, keep=0.7, layout="per-layer").plan
    assert plan == expected("llm-pruner").plan


def test_measures_change_with_no_state() -> None:
    model, text = compiled(tuples()), random_tokens(4, 16)
    wanted = perplexity(dense(), text, window=16)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        found = perplexity(model, text, window=16)
    assert found == wanted


def test_masks_are_made_and_undone_in_any_state() -> None:
    plan = expected("llm-pruner").plan
    model = dense()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), resect.masked(model, plan):
        wanted = model(TOKENS).logits
    with torch.inference_mode(), torch.device("meta"), resect.masked(compiled(model), plan) as masked:
        found = masked(TOKENS).logits
    assert torch.equal(found, wanted)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class DistributedDataParallel(nn.Module):
    """Called like torch's, which needs other processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def inference_tensors() -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(dense())


def on_meta() -> nn.Module:
    model: nn.Module = dense()
    return model.to("meta")


def prepared() -> nn.Module:
    """Marked as accelerate marks a model whose forward it has put into mixed precision."""
    model: Any = dense()
    model._original_forward = model.forward
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "made in inference mode": (inference_tensors, "inference mode"),
    "on the meta device": (on_meta, "meta device"),
    "distributed": (lambda: DistributedDataParallel(dense()), "DistributedDataParallel.*model.module"),
    "prepared by accelerate": (prepared, "accelerate.*unwrap_model"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    "call",
    [
        lambda model: pruned(model, "llm-pruner"),
        lambda model: resect.mask(model, resect.Plan()),
        lambda model: resect.masked(model, resect.Plan()).__enter__(),
        lambda model: resect.analyze(model, text=TOKENS),
    ],
    ids=["prune", "mask", "masked", "analyze"],
)
def test_what_cannot_be_undone_is_refused(name: str, call: Callable[[nn.Module], Any]) -> None:
    make, said = REFUSED[name]
    with pytest.raises(ModelError, match=said):
        call(make())


def test_transformations_of_functions_are_refused() -> None:
    model = dense()

    def inside(weight: Tensor) -> Tensor:
        resect.trace(model)
        return weight

    with pytest.raises(UsageError, match=r"torch\.func"):
        torch.func.vmap(inside)(torch.ones(2))
    assert issubclass(UsageError, ResectError)


@pytest.mark.parametrize("method", ["llm-pruner", "llm-surgeon"])
def test_hooks_on_gradients_change_nothing_and_come_back(method: str) -> None:
    model = dense()
    weight: Any = model.get_input_embeddings().weight
    up: Any = model.get_submodule("model.layers.0.mlp.up_proj").weight
    seen: list[Tensor] = []
    weight.register_hook(seen.append)
    up.register_hook(lambda gradient: gradient * 0)
    up.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
    found = pruned(model, method)
    assert_same(found, method)
    assert not seen
    (weight * 2).sum().backward()
    assert len(seen) == 1
