"""States of torch that a caller may have left on, and that no result of resect may hang on.

Every public function that runs or changes a network is `unaffected`: autocast, inference mode, a default device and the like
are off while it works and come back afterwards; a wrapper is taken off; what cannot be undone is refused by name.
Inside such a function nothing is switched again, so that what resect itself switches on (`bf16`) stays on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.utils._python_dispatch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.errors import ModelError, UsageError

Needs = Literal["shapes", "values", "changes"]
"""What a function wants of the weights: that they have shapes, values, or may be written to and have gradients."""
P = ParamSpec("P")
R = TypeVar("R")
Network = TypeVar("Network", bound=nn.Module)

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")
"""Kinds of devices that autocast knows."""
LAYERS_OF_OTHERS = {
    "DistributedDataParallel": "Pass model.module.",
    "FullyShardedDataParallel": "Load the model again, and leave it whole.",
    "DeepSpeedEngine": "Pass engine.module before it is sharded, or load the model again.",
}
"""Classes that wrap a network and keep hold of its parameters, and what to do instead."""
GLOBAL_HOOKS = tuple(
    f"_global_{name}"
    for name in (
        "forward_hooks",
        "forward_hooks_always_called",
        "forward_hooks_with_kwargs",
        "forward_pre_hooks",
        "backward_hooks",
        "backward_pre_hooks",
    )
)
"""Tables in which torch keeps the hooks of all modules."""
GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Attributes in which a tensor keeps its hooks."""
PLAIN_FIELDS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Fields of a configuration that change what a network puts out, and how resect needs them."""


class _Depth(threading.local):
    """How many functions of ours are running in this thread."""

    value = 0


_depth = _Depth()


def unaffected(needs: Needs = "values") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function independent of what the caller left on.

    Args:
        needs: What it wants of the weights of the networks among its arguments.

    Returns:
        A decorator. The function raises `ModelError` for networks without what it `needs` and for wrappers that cannot be
        taken off, and `UsageError` for states that cannot be left.
    """

    def wrapped(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def plainly(*args: P.args, **keywords: P.kwargs) -> R:
            given, named = _plain_arguments((args, keywords), needs)
            networks = [one for one in (*given, *named.values()) if isinstance(one, nn.Module)]
            with plain(*networks):
                return function(*given, **named)

        return plainly

    return wrapped


@contextmanager
def plain(*networks: nn.Module) -> Iterator[None]:
    """Torch as it is when a process starts, and configurations as resect needs them, while this lasts."""
    with ExitStack() as stack:
        stack.enter_context(_plain_configurations(networks))
        stack.enter_context(_counted())
        if _depth.value == 1:
            _enter(stack)
            stack.enter_context(_without_gradient_hooks(networks))
        yield


def unwrapped(network: Network, needs: Needs = "values") -> Network:
    """The network itself, out of the wrappers of `torch.compile` and `DataParallel`.

    Raises `ModelError` for other wrappers, and where weights lack what is needed.
    """
    while True:
        kind = type(network).__name__
        if kind in LAYERS_OF_OTHERS:
            raise ModelError(f"The model is wrapped in {kind}, which keeps hold of its weights. {LAYERS_OF_OTHERS[kind]}")
        inner = vars(network).get("_modules", {}).get("_orig_mod" if kind == "OptimizedModule" else "module")
        if kind not in ("OptimizedModule", "DataParallel") or inner is None:
            break
        network = inner
    if hasattr(network, "_original_forward"):
        raise ModelError(
            "The model was prepared by accelerate, which computes in mixed precision inside its forward. "
            "Pass accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    if needs != "shapes":
        _check_values(network)
    if needs == "changes":
        _check_changeable(network)
    return network


def _check_values(network: nn.Module) -> None:
    """Refuses weights without values: on the meta device, offloaded, or fake."""
    for name, tensor in network.named_parameters():
        if tensor.is_meta or type(tensor).__name__ == "FakeTensor":
            raise ModelError(
                f"{name} has no values: it is on the meta device, as weights are that accelerate offloads (device_map) or that "
                'were never loaded. Load the model whole: resect.load, or from_pretrained(..., device_map=None) and .to("cuda").'
            )
        if type(tensor).__name__ == "DTensor":
            raise ModelError(f"{name} is distributed over processes (DTensor). Load the model whole in one process.")


def _check_changeable(network: nn.Module) -> None:
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_inference():
            raise ModelError(
                f"{name} was made in inference mode (torch.inference_mode), where gradients and changes are not possible. "
                "Load the model outside of it, or pass copy.deepcopy(model)."
            )


def _plain_arguments(arguments: Any, needs: Needs) -> Any:
    """Positional and named arguments with networks unwrapped and with tensors that were made in inference mode copied."""
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves(arguments)):
        with torch.inference_mode(False):
            arguments = tree_map_only(Tensor, lambda one: one.clone() if one.is_inference() else one, arguments)

    def plain_value(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return unwrapped(value, needs)
        if isinstance(value, Mapping) and any(isinstance(one, nn.Module) for one in value.values()):
            return {name: plain_value(one) for name, one in value.items()}
        return value

    given, named = arguments
    return tuple(map(plain_value, given)), {name: plain_value(value) for name, value in named.items()}


@contextmanager
def _counted() -> Iterator[None]:
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def _enter(stack: ExitStack) -> None:
    """Switches off everything that the caller may have left on, the innermost first."""
    _refuse_transforms()
    stack.enter_context(_without_function_modes())
    stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.set_grad_enabled(True))
    stack.enter_context(_without_global_hooks())
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged))
    if torch.is_anomaly_enabled():
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
    for device in DEVICES:
        if _autocasts(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    stack.enter_context(_float32())
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))
    where = torch.empty(0).device
    if where.type != "cpu":
        raise UsageError(
            f"torch.set_default_tensor_type puts new tensors on {where}. "
            "Leave it: torch.set_default_tensor_type(torch.FloatTensor)."
        )


def _refuse_transforms() -> None:
    """Refuses to run inside of transformations of functions and traces, which see no values."""
    inside = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)()
    if inside is not None:
        raise UsageError(
            "resect was called inside of a transformation of torch.func (grad, vmap, jvp or another). Call it outside of that."
        )
    if torch._C._get_tracing_state() is not None:
        raise UsageError("resect was called while torch.jit.trace was running. Call it outside of that.")


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """No `TorchFunctionMode` of the caller's, a default device among them."""
    modes = [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch.overrides._push_mode(mode)


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """No hooks that the caller put on all modules at once."""
    tables = [getattr(torch.nn.modules.module, name) for name in GLOBAL_HOOKS]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


@contextmanager
def _without_gradient_hooks(networks: tuple[nn.Module, ...]) -> Iterator[None]:
    """No hooks of the caller's that see or change gradients of weights; those of the network's modules stay."""
    weights = {id(weight): weight for network in networks for weight in network.parameters()}
    kept = [
        (weight, name, getattr(weight, name))
        for weight in weights.values()
        for name in GRADIENT_HOOKS
        if getattr(weight, name, None)
    ]
    for weight, name, _ in kept:
        setattr(weight, name, None)
    try:
        yield
    finally:
        for weight, name, hooks in kept:
            setattr(weight, name, hooks)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _autocasts(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a kind of device that this torch was built without
        return False


@contextmanager
def _float32() -> Iterator[None]:
    """New numbers at least in float32, and float32 products in float32."""
    dtype, products = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        if torch.finfo(dtype).bits < 32:
            torch.set_default_dtype(torch.float32)
        if products != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_default_dtype(dtype)
        if products != "highest":
            torch.set_float32_matmul_precision(products)


@contextmanager
def _plain_configurations(networks: tuple[nn.Module, ...]) -> Iterator[None]:
    """Networks put out what they do by default, and what was compiled of them runs as it is written."""
    changed: list[tuple[Any, str, Any]] = []
    compiled = False
    for module in (module for network in networks for module in network.modules()):
        compiled = compiled or getattr(module, "_compiled_call_impl", None) is not None
        fields = getattr(getattr(module, "config", None), "__dict__", {})
        if "model_type" not in fields and not hasattr(getattr(module, "config", None), "model_type"):
            continue
        for name, value in PLAIN_FIELDS.items():
            held = next((one for one in (name, f"_{name}") if one in fields), None)
            if held is not None and fields[held] is not value:
                changed.append((fields, held, fields[held]))
                fields[held] = value
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for fields, name, value in changed:
            fields[name] = value
