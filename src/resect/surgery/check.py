"""Cut equals mask, checked on every run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_with_path

from resect.calibration import positions_of
from resect.errors import ModelError, NumericsError
from resect.graph import Graph
from resect.plan import Plan
from resect.surgery.cut import cut
from resect.surgery.gather import Kept, gather
from resect.surgery.mask import masked
from resect.surgery.situations import TOKENS, Inputs, Witnessed, key, learn, numbered, run, situations, witness
from resect.surgery.vocabulary import kept_tokens
from resect.surroundings import unaffected

SHAPE = (2, 16)
"""Sequences and tokens of the check."""
TOLERANCE = 1e-4
"""Largest logit difference as a share of the logits' standard deviation, where rounding allows it."""
CACHED = 1e-2
"""The same for a token that is computed from a cache: other kernels, other orders of sums."""
ELSEWHERE = 10
"""How many times what is allowed a difference may reach at other sizes and in training, where statistics round more."""
ROUNDING = 16
"""How many times the effect of one rounding error per block the difference may reach in deep models."""


@unaffected("changes")
def cut_and_check(model: nn.Module, plan: Plan, graph: Graph, *, seed: int = 0) -> dict[str, float]:
    """Cuts a network in place and holds it against the masked one, on random tokens or on random inputs like its example.

    Where the vocabulary is cut, tokens that stay are compared, under their new numbers in the cut model.
    Gives the largest difference of outputs and what was allowed, both as shares of the outputs' standard deviation. Allowed
    is 1e-4, or a few times what rounding alone does to this model: one relative error of machine precision after every block,
    measured. Half-precision models are widened to float32 meanwhile.
    The same must hold in other situations, as far as the dense network takes them: another batch size, another length or
    resolution, padding, training.
    Raises `NumericsError` above that: discovery has missed a coupling; and `ModelError` for a network that stops where the
    dense one runs, and for a language model that cannot go on from a cache any more, though the dense one can.
    """
    keep = kept_tokens(graph, plan)
    text = tokens_alone(model, graph.witness.example)
    after = _inputs(model, graph, keep, seed)
    before = numbered(after, keep)
    writes = text and not _stopped(model, before)
    with masked(model, plan, graph), _widened(model):
        expected = _of_tokens(outputs_of(model, before), keep)
        with _rounding_errors(model, graph, seed):
            disturbed = _of_tokens(outputs_of(model, before), keep)
        elsewhere = witness(model, situations(after, text=text), keep)
    cut(model, plan, graph)
    found = _compared(model, after, expected, disturbed)
    _compare_elsewhere(model, elsewhere, found["allowed"])
    if writes and (problem := _stopped(model, after)):
        raise ModelError(
            f"The cut model cannot go on from its cache, as the dense one can, so that it would write no text: {problem}. "
            "Leave out blocks and sublayers, or protect what keeps the length of the text: the last attention."
        )
    return found


def _stopped(model: nn.Module, inputs: Inputs) -> str:
    """What stops a language model that reads some tokens into a cache and then one more; empty where nothing does.

    Two ways to compute the same token differ by more than `CACHED` of the logits' scale only where something is wrong.
    """
    tokens = inputs[1]["input_ids"]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), _widened(model):
            whole = model(input_ids=tokens, use_cache=False).logits[:, -1]
            first = model(input_ids=tokens[:, :-1], use_cache=True)
            last = model(input_ids=tokens[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    except Exception as problem:  # whatever a stranger's code raises
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    finally:
        for module in training:
            module.training = True
    off = _difference(whole, last)
    return "" if off <= CACHED else f"logits with and without it differ by {off:.1e} of their scale"


@unaffected("changes")
def gather_and_check(model: nn.Module, kept: Mapping[str, Kept], graph: Graph, *, seed: int = 0) -> dict[str, float]:
    """Takes rows and columns that are zero out of single layers, in place, and holds the network against itself before.

    Gives and raises what `cut_and_check` does.
    """
    inputs = _inputs(model, graph, None, seed)
    with _widened(model):
        expected = outputs_of(model, inputs)
        with _rounding_errors(model, graph, seed):
            disturbed = outputs_of(model, inputs)
    gather(model, kept)
    return _compared(model, inputs, expected, disturbed)


def _compare_elsewhere(model: nn.Module, elsewhere: Sequence[Witnessed], allowed: float) -> None:
    """Holds the cut network against what the masked one did in other situations. Raises as `cut_and_check` does."""
    for seen in elsewhere:
        situation = seen.situation
        try:
            with _widened(model):
                outputs = run(model, situation, situation.inputs)
                if seen.learns:
                    learn(model, situation.inputs)
        except Exception as problem:  # whatever a stranger's code raises
            raise ModelError(
                f"The cut model stops {situation.name}, where the dense one runs: {type(problem).__name__}: "
                f"{str(problem)[:200]}. Restrict the kinds that are cut to go on."
            ) from problem
        if seen.outputs is None:
            continue
        same = outputs.shape == seen.outputs.shape
        difference = _difference(seen.outputs, outputs) if same else inf
        if not difference <= ELSEWHERE * allowed:
            raise _differing(difference, ELSEWHERE * allowed, f" {situation.name}")


def _compared(model: nn.Module, inputs: Inputs, expected: Tensor, disturbed: Tensor) -> dict[str, float]:
    with _widened(model):
        difference = _difference(expected, outputs_of(model, inputs))
    allowed = max(TOLERANCE, ROUNDING * _difference(expected, disturbed))
    if not difference <= allowed:
        raise _differing(difference, allowed)
    return {"difference": difference, "allowed": allowed}


def _differing(difference: float, allowed: float, where: str = "") -> NumericsError:
    return NumericsError(
        f"The cut model does not compute what the masked model computes{where}: outputs differ by {difference:.2e} of their "
        f"scale, {allowed:.0e} is allowed. Please report the architecture; restrict the kinds that are cut to go on."
    )


def _inputs(model: nn.Module, graph: Graph, keep: Tensor | None, seed: int) -> Inputs:
    """Random inputs of the cut network: tokens have the numbers that they have in it."""
    if tokens_alone(model, graph.witness.example):
        generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        shape = (SHAPE[0], min(SHAPE[1], positions_of(model) or SHAPE[1]))
        tokens = torch.randint(_vocabulary(model) if keep is None else len(keep), shape, generator=generator)
        return (), {TOKENS: tokens.to(device), "use_cache": False}
    given = graph.witness.given
    like = inputs_like(given or graph.witness.example, model, seed, rows=None if keep is None else len(keep))
    return like if given is None or keep is not None or takes(model, like) else given


def takes(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a network runs on inputs: random ones may be no rows of a table, no lengths, no classes."""
    try:
        outputs_of(model, inputs)
    except Exception:  # whatever a stranger's code raises
        return False
    return True


def tokens_alone(model: nn.Module, example: Inputs) -> bool:
    """Whether a language model was traced with numbers of tokens and nothing else."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    named = {name for name, value in example[1].items() if isinstance(value, Tensor)}
    return bool(_vocabulary(model)) and len(tensors) == 1 and not tensors[0].is_floating_point() and named <= {"input_ids"}


def inputs_like(example: Inputs, model: nn.Module, seed: int, *, rows: int | None = None) -> Inputs:
    """Random inputs of the shapes and types of an example: numbers of tokens below `rows`, masks of ones.

    Other whole numbers are those of the example, or 0 where it has no values. Numbers of tokens are called `input_ids`,
    alone or at the end of a name; `rows` is the model's vocabulary if not given.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    most = rows or _vocabulary(model)

    def random(path: Any, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        shape, name = tuple(given.shape), key(path)
        if given.is_floating_point():
            return torch.randn(shape, generator=generator).to(device, given.dtype)
        if name.endswith(TOKENS) and most:
            return torch.randint(most, shape, generator=generator, dtype=given.dtype).to(device)
        if type(given) is not FakeTensor and not given.is_meta:
            return given.to(device)
        return torch.full(shape, int("mask" in name), dtype=given.dtype, device=device)

    like: Inputs = tree_map_with_path(random, example)
    return like


def _vocabulary(model: nn.Module) -> int:
    """How many tokens the configuration speaks of; 0 for a network without tokens."""
    return getattr(getattr(model, "config", None), "vocab_size", None) or 0


def _of_tokens(logits: Tensor, keep: Tensor | None) -> Tensor:
    """The logits of the tokens that stay."""
    return logits if keep is None else logits[..., keep.to(logits.device)]


def _difference(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    scale = expected.std() if expected.numel() > 1 else expected.abs().mean()
    return float((expected - found).abs().max() / scale.clamp_min(1e-30))


def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits, or the first tensor that a network puts out, with the same random numbers every time."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = model(*inputs[0], **inputs[1])
    finally:
        for module in training:
            module.training = True
    logits = getattr(found, "logits", None)
    tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
    floating = [leaf for leaf in tensors if leaf.is_floating_point()]
    return logits if isinstance(logits, Tensor) else (floating or tensors)[0]


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Half-precision tensors in float32 for a while; the way there and back is exact."""
    halves = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [tensor.dtype for tensor in halves]
    for tensor in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(halves, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _rounding_errors(model: nn.Module, graph: Graph, seed: int) -> Iterator[None]:
    """Disturbs what every block puts out by random relative errors of machine precision."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        noise = torch.randn(hidden.shape, generator=generator).to(hidden)
        hidden = hidden * (1 + noise * torch.finfo(hidden.dtype).eps)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handles = [model.get_submodule(paths[-1]).register_forward_hook(disturb) for paths in graph.blocks.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
