"""Discovery: run a network once on fake tensors and read off which slices of which parameters belong together."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from resect.errors import ModelError
from resect.graph import rare_rules as _rare_rules  # noqa: F401 - registers rules
from resect.graph import rules
from resect.graph.atoms import Atom, Axis, Contest, freeze, fresh, kept_length, length, mark
from resect.graph.couple import Run, couple
from resect.graph.depth import Flow, Step, Visit
from resect.graph.fakes import operate
from resect.graph.groups import Frame, Graph, Loop, Operation
from resect.graph.parts import RESTRIDING, Steady, in_parts
from resect.graph.sizes import Sizes, uncached
from resect.graph.vocabulary import Vocabulary
from resect.graph.zeros import Zeros, memory
from resect.surroundings import unaffected

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a network."""

EXAMPLE_SHAPE = (2, 7)
"""Batch and sequence length of the example text: primes that no model dimension is likely to share."""

REAL_SHAPE = (2, 61)
"""The same for networks that must run on real numbers: enough tokens for every expert of a mixture to get some."""

DATA_DEPENDENT = ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")
"""What fake tensors raise when the program asks for their values."""

EXPERTS = "_experts_implementation_internal"
"""Where transformers keeps which kernel runs a mixture of experts: most look at the data, `batched_mm` does not."""

CACHE = "DynamicCache"
"""What transformers calls the cache that a model makes for itself."""

PADDING_WARNING = "warn_if_padding_and_no_attention_mask"
"""A method of transformers' models that looks at the text to warn, and computes nothing."""

TELLING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.allclose.default)
"""Operators that put out plain values."""

PLAIN = (str, bytes, int, float, complex, type, torch.dtype, torch.device, nn.Module, ModuleType, FunctionType, MethodType)
"""What holds no tensors that a network puts out."""

SCALING = ("aten.mul_", "aten.div_")
"""Operators that write into a tensor and leave zeros in it what they are."""
LIFTED = "aten.lift_fresh"
"""The operator behind `torch.tensor`."""
LONGEST_CONSTANT = 64
"""Numbers of a tensor made by `torch.tensor` that are compared between runs."""
FILLING = ("full", "full_like", "fill", "fill_", "new_full", "scalar_tensor")
"""Operators that are given a number to fill a tensor with."""

COUNTING = frozenset(f"aten::{name}_batch_norm" for name in ("native", "cudnn", "miopen"))
"""Operators that write statistics in training, though their schemas do not say so."""

UNSEEN = {f"aten.{name}" for name in ("detach", "alias", "lift_fresh", "clone", "_to_copy", "expand", "view", "_unsafe_view")}
"""Operators that come and go with memory layouts and caches, and whose results the next operator shows anyway."""


@unaffected("shapes")
def trace(model: nn.Module, example_inputs: Any = None) -> Graph:
    """The coupled groups of a network, found by running it once on fake tensors.

    The model may be real or on the meta device; no weight is read and the model is left as it was. A network whose code
    looks at the values of tensors is run on real ones instead, its own or random numbers. `example_inputs` are
    the keyword arguments (or positional ones, as a tuple) of one forward call; language models need none.
    Raises `ModelError` when the network cannot run.
    """
    try:
        return _traced(model, example_inputs, fake=True)
    except _LooksAtData:
        return _traced(model, example_inputs, fake=False)
    except ModelError as problem:
        return _traced_for_real(model, example_inputs, problem)


def _traced_for_real(model: nn.Module, example_inputs: Any, problem: ModelError) -> Graph:
    """The graph of a network that runs, but not on fake tensors: its code asks for memory, or calls what knows no fakes.

    Raises the first problem again where the network has no values to run on, or does not run on these either.
    """
    if any(tensor.is_meta for _, tensor in _state(model)):
        raise problem
    try:
        return _traced(model, example_inputs, fake=False)
    except ModelError as other:
        raise (problem if str(other) == str(problem) else other) from problem


def retrace(model: nn.Module, graph: Graph) -> Graph:
    """The graph of a network that changed itself since it was traced, from the same example."""
    args, kwargs = graph.witness.given or torch.utils._pytree.tree_map_only(
        FakeTensor, lambda given: torch.zeros(tuple(given.shape), dtype=given.dtype), graph.witness.example
    )
    return trace(model, kwargs or args)


def _traced(model: nn.Module, example_inputs: Any, *, fake: bool) -> Graph:
    recorder = Recorder({id(module): name for name, module in model.named_modules()}, fake=fake)
    recorder.mode = mode = _fake_mode() if fake else None
    with mode or nullcontext(), torch.no_grad():
        state = {name: _fake(tensor) if fake else _real(tensor) for name, tensor in _state(model)}
        args, kwargs = _example(example_inputs, mode)
    parameters = {name: recorder.parameter(state[name]) for name, _ in model.named_parameters()}
    saved = model.state_dict().keys()
    numbers = [name for name, tensor in model.named_buffers() if name in saved and tensor.is_floating_point() and tensor.ndim]
    buffers = {name: recorder.parameter(state[name]) for name in numbers}
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    recorder.inputs(inputs)
    recorder.vocabulary.follow(*_text(inputs, kwargs))
    if not fake:
        recorder.vocabulary.refuse("the network's code looks at the values of tensors")
    try:
        with mode or nullcontext(), torch.no_grad(), _traceable(model) as changes, recorder.watching():
            given = {id(tensor) for tensor in (*state.values(), *reachable(args, kwargs))}
            with recorder, uncached(), recorder.functions:
                output = torch.func.functional_call(model, state, args, kwargs)
            left_on = changes.left_on()
    except Exception as problem:
        if fake and any(type(cause).__name__ in DATA_DEPENDENT for cause in _causes(problem)):
            raise _LooksAtData from problem
        raise ModelError(
            f"Tracing {type(model).__name__} stopped in {recorder.where or 'the model'}: {type(problem).__name__}: "
            f"{problem}. Pass example_inputs that the network accepts, or an eager attention implementation."
        ) from problem
    stateful = _Stateful(model, state, (args, kwargs), left_on, mode) if fake else None
    handed = reachable(args, kwargs, *(left_on if stateful is None else stateful.written_only()).values())
    recorder.outputs(output, [tensor for tensor in handed if id(tensor) not in given])
    recorder.decide()
    if fake and any(id(state[name]) not in recorder.used for name in parameters):
        _follow_training(model, recorder, state, (args, kwargs))
    for axis in _ranks(parameters):
        freeze(axis, "the rank of an adapter")
    for name, axes in (*parameters.items(), *buffers.items()):
        if id(state[name]) not in recorder.used:
            freeze([atom for axis in axes for atom in axis], "not used in the traced run")
    order = {key: place for place, key in enumerate(recorder.used)}
    names = sorted(parameters, key=lambda name: order.get(id(state[name]), len(order)))
    run = Run(
        {name: parameters[name] for name in names},
        buffers,
        recorder.operations,
        {rows.number: loop for rows in recorder.loops if (loop := rows.loop(recorder.operations))},
        recorder.contractions,
        recorder.contests,
        recorder.statistics,
        recorder.flow,
        recorder.tokens,
        recorder.frames,
        (args, kwargs),
        fake,
        frozenset((name, axis) for tensor, axis in recorder.spared for name, given in state.items() if given is tensor),
        recorder.lifted,
        frozenset(left_on) if stateful is None else stateful.read_by_others(),
        _with_values(example_inputs),
    )
    return couple(model, run)


@dataclass
class _Stateful:
    """What a run left on modules, a counter or a cache, and who reads it: found by runs with and without it."""

    model: nn.Module
    state: Mapping[str, Tensor]
    example: Inputs
    left_on: Mapping[str, Mapping[str, Any]]
    mode: FakeTensorMode | None

    def read_by_others(self) -> frozenset[str]:
        """The modules whose notes change what the rest of the network does.

        A module that cannot go on from its own notes says nothing about the rest.
        """
        return frozenset(path for path in self.left_on if path and self._differs(path, beside=path))

    def written_only(self) -> dict[str, Mapping[str, Any]]:
        """The notes that nothing in the network reads again, which are for code outside."""
        return {path: notes for path, notes in self.left_on.items() if not self._is_read(path)}

    def _is_read(self, path: str) -> bool:
        """Whether the next text is computed in another way than the first: as long, or a single token, with a cache too."""
        with self.mode or nullcontext():
            args, kwargs = torch.utils._pytree.tree_map_only(
                Tensor, lambda one: one[:, :1] if _is_text(one) else one, self.example
            )
        caching = (False, True) if "use_cache" in kwargs else ()
        tokens = [(args, kwargs), *((args, {**kwargs, "use_cache": cached}) for cached in caching)]
        if any(self._differs(path, beside=None, example=example) for example in (self.example, *tokens)):
            return True
        return bool(caching) and self._reads_on(path, tokens[-1])

    def _reads_on(self, path: str, token: Inputs) -> bool:
        """Whether a token after the example takes in what the module noted of it, with a cache."""
        module, (args, kwargs) = self.model.get_submodule(path), self.example
        watch = _Taken({id(one): name for name, one in self.model.named_modules()})
        watch.mode = self.mode
        try:
            with self.mode or nullcontext(), torch.no_grad(), _traceable(self.model), _silent(), watch.watching():
                cache = {"past_key_values": _cache_of(self.model)}
                with watch:
                    torch.func.functional_call(self.model, dict(self.state), args, {**kwargs, **cache, "use_cache": True})
                held = [value for key, value in vars(module).items() if key not in TABLES_OF_MODULES]
                watch.noted = {memory(tensor) for tensor in reachable(*held)}
                with watch:
                    torch.func.functional_call(self.model, dict(self.state), token[0], {**token[1], **cache})
        except Exception:  # another kind of cache, or none
            return False
        return watch.hit

    def _differs(self, path: str, *, beside: str | None, example: Inputs | None = None) -> bool:
        before, _ = self._log({}, path, beside, example or self.example)
        after, whole = self._log(self.left_on[path], path, beside, example or self.example)
        return after != (before if whole else before[: len(after)])

    def _log(
        self, notes: Mapping[str, Any], path: str, beside: str | None, example: Inputs
    ) -> tuple[list[Any], bool]:
        """What runs, and whether that is all that there is to compare: not where what stands `beside` fails."""
        watch = _Log({id(module): name for name, module in self.model.named_modules()}, beside)
        watch.mode = self.mode
        try:
            with self.mode or nullcontext(), torch.no_grad(), _traceable(self.model), _silent(), watch.watching():
                vars(self.model.get_submodule(path)).update(notes)
                with watch:
                    torch.func.functional_call(self.model, dict(self.state), *example)
        except Exception as problem:
            inside = beside is not None and f"{watch.where}.".startswith(f"{beside}.")
            return watch.lines if inside else [*watch.lines, repr(problem)], not inside
        return watch.lines, True


def _cache_of(model: nn.Module) -> Any:
    """A cache of the kind that a language model's own code makes where it is given none."""
    config = getattr(model, "config", None)
    spaces = (vars(sys.modules[type(module).__module__]) for module in model.modules())
    return next(space[CACHE](config=config) for space in spaces if CACHE in space)


def _follow_training(
    model: nn.Module, recorder: Recorder, state: Mapping[str, Tensor], example: tuple[tuple[Any, ...], dict[str, Any]]
) -> None:
    """Runs the network in training mode, too: what only that mode reads is coupled with what it reads.

    The run says nothing else, and one that stops counts as far as it went.
    """
    args, kwargs = example
    other = Recorder({id(module): name for name, module in model.named_modules()}, fake=True)
    other.mode = recorder.mode
    for tensor in state.values():
        other.parameter(tensor, recorder.known(tensor))
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    other.inputs(inputs)
    other.vocabulary.follow(*_text(inputs, kwargs))
    try:
        with ExitStack() as stack:
            for context in (recorder.mode or nullcontext(), torch.no_grad(), _traceable(model, training=True)):
                stack.enter_context(context)
            stack.enter_context(other.watching())
            stack.enter_context(other)
            stack.enter_context(uncached())
            stack.enter_context(other.functions)
            output = torch.func.functional_call(model, dict(state), args, kwargs)
        other.outputs(output)
    except Exception as problem:  # a loss without labels, layers that are left out by chance
        logging.getLogger(__name__).debug("in training mode the network stops: %s", problem)
    recorder.adopt(other)


class Replay:
    """Runs a cut network beside the witness of the dense one. Nothing is computed, no weight is read.

    `removed` counts the units that each group loses, `shapes` gives the parameters their new sizes.
    """

    def __init__(self, model: nn.Module, graph: Graph, removed: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
        self._model, self._graph, self._shapes = model, graph, shapes
        self._kept = {atom: atom.size - removed.get(name, 0) for atom, name in graph.witness.groups.items()}
        self._demanded: dict[int, list[tuple[int, ...]]] = {}
        self._mode = _fake_mode() if graph.witness.fake else None
        self._blank = self._tensors() if self._mode else None  # fake tensors have no values that a run could change

    def run(
        self, prepare: Callable[[nn.Module], Collection[nn.Module]] | None = None, *, gone: Collection[str] = ()
    ) -> tuple[float, str, str]:
        """How far the network agrees with its coupling: operators that agree, then where the first does not, and why.

        All agree: `(inf, "", "")`. `prepare` may change modules for the time being and gives stand-ins, whose operators do
        not count; `gone` are modules of the dense network whose operators are not expected any more.
        """
        model, mode, tensors = self._model, self._mode, self._blank or self._tensors()
        args, kwargs = self._graph.witness.example
        if mode:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: _within(mode, t), (args, kwargs))
        with _traceable(model):
            try:
                ignored = set(map(id, prepare(model))) if prepare else set()
            except Exception as problem:
                return -1, "", str(problem)
            names = {id(module): name for name, module in model.named_modules()}
            state = {name: tensors[id(tensor)] for name, tensor in _state(model) if id(tensor) in tensors}
            stand_ins = {names[key] for key in ignored}
            replayer = Replayer(names, self._graph, self._kept, self._demanded, gone=gone, ignored=stand_ins)
            replayer.mode = mode
            try:
                with mode or nullcontext(), torch.no_grad(), _silent(), replayer.watching(), replayer:
                    torch.func.functional_call(model, state, args, kwargs)
                replayer.end()
            except Exception as problem:
                return replayer.reached, replayer.where, str(problem).splitlines()[0] if str(problem) else repr(problem)
        return inf, "", ""

    def sizes(self, number: int) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
        """What an operator of the dense run put out, in sizes that change, and what the coupling demands of the cut one.

        Whole shapes, single axes, what several results have of one axis and the sum of it, and the positions that are left
        out in front of a run of them.
        """
        witness = self._graph.witness
        if not 0 <= number < len(witness.operations):
            return {}
        operation = witness.operations[number]
        before, after = witness.shapes(operation, {}), witness.shapes(operation, self._kept)
        pairs = list(zip(before, after, strict=True))
        if len(before) > 1 and len({len(shape) for shape in before}) == 1:
            across = list(zip(zip(*before, strict=True), zip(*after, strict=True), strict=True))
            pairs += [*across, *(((sum(have),), (sum(want),)) for have, want in across)]
        pairs += [((a,), (b,)) for have, want in pairs for a, b in zip(have, want, strict=True)]
        pairs.append(((length(operation.before),), (kept_length(operation.before, self._kept),)))
        found = defaultdict[tuple[int, ...], set[tuple[int, ...]]](set)
        for have, want in pairs:
            if have != want:
                found[have].add(want)
        return found

    def _tensors(self) -> dict[int, Tensor]:
        blank = _fake if self._mode else _real
        with self._mode or nullcontext(), torch.no_grad():
            return {id(tensor): blank(tensor, self._shapes.get(name)) for name, tensor in _state(self._model)}


class _LooksAtData(Exception):
    """The network's own code asks for the values of tensors, which fake ones do not have."""


class Watcher(TorchDispatchMode):
    """Sees every operator and follows which module is running, through hooks on no module in particular."""

    mode: FakeTensorMode | None = None
    """The mode of the fake tensors that operators run on, if they do."""
    supports_higher_order_operators = True
    strides: tuple[int, ...] = ()
    """Those that a tensor had before the operator that gave it others in place."""

    def __init__(self, names: Mapping[int, str], path: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = path or ""
        self.turns = defaultdict[str, Counter[str]](Counter)
        self._names = names
        self._path = [] if path is None else [path]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follows the running module while the context lasts; `where` stays at the module that raised."""
        hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave, with_kwargs=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seen(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Called with every operator and the tensors it put out."""

    def seen_empty(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Called with every operator that put out tensors without positions."""

    def told(self, args: tuple[Any, ...], value: Any) -> None:
        """Called with what an operator took in and the plain value it put out."""

    def entered(self, path: str) -> None:
        """Called when a module begins."""

    def left(self, path: str, inputs: Any, output: Any) -> None:
        """Called when a module is done."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs one operator."""
        kwargs = kwargs or {}
        if (parts := in_parts(func)) is not None:
            with self:
                return parts(*args, **kwargs)
        self.strides = args[0].stride() if func in RESTRIDING else ()
        result = operate(func, args, kwargs, self.mode) if self.mode else func(*args, **kwargs)
        outputs = _tensors(result)
        if func in TELLING:
            self.told(args, result)
        if any(output.numel() for output in outputs):
            name = func.overloadpacket._qualified_op_name.replace("::", ".")
            self.seen(name, args, kwargs, func, outputs)
            self.turns[self.where][name] += 1
        elif outputs:
            self.seen_empty(func.overloadpacket._qualified_op_name.replace("::", "."), args, kwargs, func, outputs)
        return result

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.where = self._names.get(id(module), self.where)
        self._path.append(self.where)
        self.turns.pop(self.where, None)
        self.entered(self.where)

    def _leave(self, module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        self.left(self._path.pop(), (inputs, keywords), output)
        self.where = self._path[-1] if self._path else ""


class _Taken(Watcher):
    """Sees whether an operator takes in one of some tensors, by their memory."""

    noted: Collection[int] = ()
    hit = False

    def seen(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Looks at what one operator takes in."""
        self.hit = self.hit or any(memory(tensor) in self.noted for tensor in _tensors([args, kwargs]))


class _Log(Watcher):
    """Notes what runs, but in the module `beside`: operators, their numbers, and the shapes of their results."""

    def __init__(self, names: Mapping[int, str], beside: str | None) -> None:
        super().__init__(names)
        self.lines: list[Any] = []
        self._beside = beside

    def seen(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Notes one operator."""
        own = self._beside is not None and f"{self.where}.".startswith(f"{self._beside}.")
        if own or name in UNSEEN:
            return
        numbers = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, int | float)]
        self.lines.append((name, self.where, [tuple(output.shape) for output in outputs], numbers))


class Replayer(Watcher):
    """Holds every operator of a cut network against the dense run.

    `demanded` keeps the shapes that operators must put out, by number, for the next replay of the same cut.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        graph: Graph,
        kept: Mapping[Atom, int],
        demanded: dict[int, list[tuple[int, ...]]],
        *,
        gone: Collection[str] = (),
        ignored: Collection[str] = (),
    ) -> None:
        super().__init__(names)
        self.reached = 0
        inside = tuple(f"{path}." for path in gone)
        left = [
            number
            for number, operation in enumerate(graph.witness.operations)
            if not gone or not f"{operation.where}.".startswith(inside)
        ]
        self._expected = left
        self._next = 0
        self._loop: Loop | None = None
        self._times = 0
        self._bodies: list[range] = []
        self._witness = graph.witness
        self._kept = kept
        self._demanded = demanded
        self._blocks = graph.blocks
        self._gone = gone
        self._ignored = ignored

    def seen(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Raises at the first operator that differs from the dense run in more than the sizes that were cut."""
        if name == LIFTED and self.where not in self._ignored:
            before = self._witness.lifted.get((self.where, self.turns[self.where][name]))
            if before is not None and _small_values(args[0]) != before:
                raise ModelError(f"a tensor is made of {before}, now of {_small_values(args[0])}: numbers that follow a size")
        if name in UNSEEN or self.where in self._ignored:
            return
        if self._bodies:
            self._iterate(name, args, kwargs, func, outputs)
            return
        problem = f"{name} runs where nothing ran before"
        for place in range(self._next, len(self._expected)):
            number = self._expected[place]
            operation = self._witness.operations[number]
            loop = self._witness.loops.get(number)
            if loop and operation.name == name:
                self._begin(loop, place, len(outputs))
                return
            disagreement = self._disagreement(number, name, args, kwargs, func, outputs)
            if not disagreement:
                self._next, self.reached = place + 1, max(self.reached, number + 1)
                return
            problem = problem if place > self._next else disagreement
            if not self._gone or self._blocks.layer_of(operation.where) is not None:
                break  # what the network did outside of its blocks for blocks that are gone may be gone, too
        raise ModelError(problem)

    def seen_empty(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """What the data leaves nothing to do for counts like anything else."""
        if not self._witness.fake:
            self.seen(name, args, kwargs, func, outputs)

    def end(self) -> None:
        """Raises where the dense run went on."""
        if self._next < len(self._expected) and not self._gone:
            operation = self._witness.operations[self._expected[self._next]]
            raise ModelError(f"nothing runs where {operation.name} ran before")

    def _begin(self, loop: Loop, place: int, times: int) -> None:
        """Expects, for each of the rows that there are now, what was done with any row."""
        self.reached = max(self.reached, self._expected[place] + 1)
        self._next = place + sum(number < loop.stop for number in self._expected[place:])
        self._loop, self._times, self._bodies = loop, times, list(loop.bodies)

    def _iterate(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Follows the iterations that agree so far."""
        assert self._loop is not None
        found = [self._disagreement(body[0], name, args, kwargs, func, outputs) for body in self._bodies]
        fitting = [body for body, disagreement in zip(self._bodies, found, strict=True) if not disagreement]
        if not fitting:
            raise ModelError(found[0])
        self.reached = max(self.reached, fitting[0][0] + 1)
        self._bodies = [body[1:] for body in fitting]
        if not all(self._bodies):
            self._times -= 1
            self._bodies = list(self._loop.bodies) if self._times else []

    def _disagreement(
        self, number: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]
    ) -> str:
        operation = self._witness.operations[number]
        if operation.name != name:
            return f"{name} runs where {operation.name} ran before"
        found = [tuple(output.shape) for output in outputs]
        if number not in self._demanded:
            self._demanded[number] = self._witness.shapes(operation, self._kept)
        if not self._witness.fits(operation, found, self._demanded[number]):
            return f"{name} puts out {found}, the coupling demands {self._demanded[number]}"
        constants = () if name == "aten.eq" and operation.before else _constants(args, kwargs, func)
        if constants != operation.constants:
            return f"{name} is given {constants}, it was {operation.constants}: a constant that follows a size"
        if operation.before:
            start = rules.run_of_positions(name, args, kwargs)
            demanded = kept_length(operation.before, self._kept)
            if start is None or start[1] != demanded:
                return f"{name} starts at position {start and start[1]}, the coupling demands {demanded}"
        return ""


@dataclass
class _Rows:
    """The rows that an operator took apart, by identity, and the operators at which each was used first."""

    number: int
    rows: dict[int, int]
    starts: list[int] = field(default_factory=list)

    def loop(self, operations: Sequence[Operation]) -> Loop | None:
        """The iterations over them, each by what is done in it, if that shows where the last one ends."""
        if len(self.starts) < 2 or len(self.starts) < len(self.rows) or self.starts[0] != self.number + 1:
            return None
        bodies: dict[tuple[Any, ...], range] = {}
        for start, stop in pairwise(self.starts):
            bodies.setdefault(_done(operations, range(start, stop)), range(start, stop))
        last = self.starts[-1]
        ends = [last + len(body) for done, body in bodies.items() if _done(operations, range(last, last + len(body))) == done]
        return Loop(max(ends), tuple(bodies.values())) if ends else None


def _done(operations: Sequence[Operation], body: range) -> tuple[Any, ...]:
    """What operators do, but for the shapes of their results."""
    return tuple((one.name, one.where, one.constants) for one in operations[body.start : body.stop])


class Recorder(Watcher):
    """Keeps the axes of every tensor seen while the network runs."""

    def __init__(self, names: Mapping[int, str], *, fake: bool) -> None:
        super().__init__(names)
        self._fake = fake
        self.operations: list[Operation] = []
        self.contractions: list[tuple[str, tuple[Axis, ...]]] = []
        self.used: dict[int, None] = {}
        self.statistics: dict[str, list[Axis]] = {}
        self.flow = Flow()
        self.tokens: dict[str, Atom] = {}
        self.vocabulary = Vocabulary()
        self.zeros = Zeros()
        self.frames: dict[str, list[Frame]] = {}
        self._axes: dict[int, tuple[Tensor, rules.Axes]] = {}
        self._numbers: dict[int, Axis] = {}
        self._values: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._starts: list[int] = []
        self._count = 0
        self._counted: set[int] = set()
        self._told: rules.Told | None = None
        self.functions = Sizes(self.known, self._left_tensors, lambda tensor, axis: self.spared.append((tensor, axis)))
        self.loops: list[_Rows] = []
        self.contests: dict[Contest, Axis] = {}
        self._masks: dict[int, tuple[Axis, int]] = {}
        self.spared: list[tuple[Tensor, int]] = []
        self._effects: dict[int, list[Callable[[], Any]]] = {}
        self.lifted: dict[tuple[str, int], tuple[Any, ...]] = {}
        self._decisions: list[tuple[int, str, frozenset[int]]] = []

    def adopt(self, other: Recorder) -> None:
        """Takes over what another run over the same parameters shows of those that this one did not use."""
        self.used.update(other.used)
        self.statistics = {**other.statistics, **self.statistics}
        self.contests = {**other.contests, **self.contests}

    def parameter(self, tensor: Tensor, axes: rules.Axes | None = None) -> rules.Axes:
        """Gives a parameter axes of its own, or those that it has in another run."""
        axes = [fresh(size) for size in tensor.shape] if axes is None else axes
        self._axes[id(tensor)] = (tensor, axes)
        self.zeros.masked(tensor, axes)
        return axes

    def inputs(self, tensors: Sequence[Tensor]) -> None:
        """Gives the example its batch and sequence axes, which no plan can touch."""
        shape = next((tensor.shape for tensor in tensors if _is_text(tensor)), EXAMPLE_SHAPE)
        batch, tokens = Atom(shape[0], "the batch"), Atom(shape[1], "the sequence")
        batch.marks.add("batch")
        tokens.marks.add("tokens")
        for tensor in tensors:
            axes = [fresh(size, "an input of the network") for size in tensor.shape]
            for axis in axes:
                mark(axis, label="input")
            if _is_text(tensor) and tensor.shape == shape:
                axes[:2] = [(batch,), (tokens,)]
            if _is_image(tensor):
                self._chained = True
                for axis in axes[2:]:
                    mark(axis, label="tokens")
            self._axes[id(tensor)] = (tensor, axes)
        self.tokens = {"batch": batch, "tokens": tokens}

    def read(self, *tensors: Tensor) -> None:
        """Something takes these tensors in: what that demands holds from now on."""
        for tensor in tensors:
            effects = self._effects.pop(id(tensor), [])
            while effects:
                effects.pop()()

    def outputs(self, value: Any, handed: Sequence[Tensor] = ()) -> None:
        """Keeps whole whatever the network puts out, but for the positions of logits that go with rows of the vocabulary.

        `handed` are tensors that it left elsewhere: in containers that it was given, or as attributes.
        """
        self._forget()
        out = reachable(value)
        tensors = [*out, *(tensor for tensor in handed if id(tensor) in self._axes)]
        for tensor in tensors:
            if (numbers := self._numbers.get(id(tensor))) is not None:
                freeze(numbers, "numbers of positions are put out by the network")
        self.read(*tensors)
        self.flow.results.update(number for tensor in tensors for number in self._values_of(tensor))
        if any(self.vocabulary.holds(tensor) for tensor in tensors):
            self.vocabulary.refuse("the network puts the text's numbers out")
        logits = _logits(value)
        found = [(tensor, self.axes_of(tensor)) for tensor in tensors]
        over = next((axes[-1] for tensor, axes in found if tensor is logits and axes), None)
        free = self.vocabulary.settle(over)
        for tensor, axes in found:
            for axis in axes[:-1] if free and tensor is logits else axes:
                freeze(axis, "an output of the network")

    def axes_of(self, tensor: Tensor) -> rules.Axes:
        """The axes of a tensor; one that was never seen is a constant."""
        if id(tensor) not in self._axes:
            reason = f"a constant in {self.where or 'the model'}"
            self._axes[id(tensor)] = (tensor, [fresh(size, reason) for size in tensor.shape])
        return list(self._axes[id(tensor)][1])

    def seen(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Applies the operator's rule."""
        inputs = _tensors([args, kwargs])
        self.read(*inputs)
        self.used.update((id(tensor), None) for tensor in inputs)
        call = rules.Call(name, self.where, args, kwargs, outputs, self.axes_of, self.contractions)
        call.numbers, call.statistics, call.vocabulary, call.zeros = self._numbers, self.statistics, self.vocabulary, self.zeros
        call.masks, call.contests, call.strides = self._masks, self.contests, self.strides
        call.turn, call.function = self.turns[self.where][name], self.functions.running
        call.told, self._told = self._told, None
        if call.told is not None and (name != "aten.select" or args[2] != call.told.value):
            freeze(call.told.numbers, f"numbers of positions leave the tensors in {self.where or 'the model'}")
        contractions = len(self.contractions)
        found = rules.apply(call, func)
        self._effects.update((id(tensor), call.effects) for tensor in outputs if call.effects)
        taken = tuple(value for tensor in inputs for value in self._values_of(tensor))
        before = call.before()
        for tensor, axes in zip(outputs, found, strict=True):
            self._axes[id(tensor)] = (tensor, axes)
            self._values[id(tensor)] = self._new_value()
            if func._schema.is_mutable:
                self._written[memory(tensor)] = self._values[id(tensor)]
                if name not in SCALING:
                    self.zeros.wrote(tensor)
        self.zeros.follow(name, args, zip(outputs, found, strict=True), self.axes_of)
        for tensor, axes in zip(outputs, found, strict=True):
            if id(tensor) in call.chosen:
                self.zeros.chosen(tensor, axes, call.chosen[id(tensor)])
        given = tuple(self._values[id(tensor)] for tensor in outputs)
        self.flow.steps.append(Step(name, taken, given, tuple(found[0]), len(self.contractions) > contractions))
        if name == LIFTED and (values := _small_values(args[0])) is not None:
            self.lifted[self.where, self.turns[self.where][name]] = values
        if name not in UNSEEN:
            self._begin_row(args)
            self._take_apart(name, args, outputs)
            constants = () if name == "aten.eq" and before else _constants(args, kwargs, func)
            self.operations.append(Operation(name, self.where, tuple(map(tuple, found)), constants, before))

    def seen_empty(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], func: Any, outputs: list[Tensor]) -> None:
        """Notes what the data left nothing to do for: another time there may be something."""
        if not self._fake and name not in UNSEEN:
            axes = tuple(tuple(fresh(size, "nothing to see") for size in output.shape) for output in outputs)
            self.operations.append(Operation(name, self.where, axes, _constants(args, kwargs, func)))

    def told(self, args: tuple[Any, ...], value: Any) -> None:
        """Numbers of positions that become plain numbers: indexing has read them to pick these positions, or they are lost."""
        self._begin_row(args)
        self.read(*_tensors(args))
        numbers = next((self._numbers[id(given)] for given in _tensors(args) if id(given) in self._numbers), None)
        if numbers is None:
            self._decide_by(args, value)
            return
        self._forget()
        self._told = rules.Told(numbers, value)
        if self.functions.running != "__getitem__":
            self._forget()

    def _decide_by(self, args: tuple[Any, ...], value: Any) -> None:
        """Notes that code was told whether something holds, or how large it is; whole numbers are counts, or places."""
        asked = self.functions.running == "__bool__" or isinstance(value, bool | float)
        if asked and not self._fake:
            values = [number for tensor in _tensors(args) for number in self._values_of(tensor)]
            self._decisions.append((len(self.flow.steps), self.where, frozenset(values)))

    def decide(self) -> None:
        """Keeps whole what lives across a choice by a value, since only one way of it was seen: the other may see all of it.

        Choices by the text and its padding alone are the same for every weight, and pass.
        """
        made = {value: number for number, step in enumerate(self.flow.steps) for value in step.given}
        last = dict(self.flow.last_use) | dict.fromkeys(self.flow.results, len(self.flow.steps))
        for step, where, asked in self._decisions:
            if not self._weighs(asked, made):
                continue
            reason = f"code in {where or 'the model'} looks at a value, and one of its ways was seen"
            for key, value in self._values.items():
                if made.get(value, step) < step <= last.get(value, -1) and key in self._axes:
                    for axis in self._axes[key][1]:
                        freeze(axis, reason)

    def _weighs(self, asked: Collection[int], made: Mapping[int, int]) -> bool:
        """Whether some values are computed from weights, or from numbers that the network was given."""
        known_axes = ((self._values[key], tensor) for key, (tensor, _) in self._axes.items() if key in self._values)
        floats = {value for value, tensor in known_axes if tensor.is_floating_point()}
        waiting, known = list(asked), set(asked)
        while waiting:
            value = waiting.pop()
            if value not in made:
                if value in floats:
                    return True
                continue
            step = self.flow.steps[made[value]]
            waiting += [other for other in step.taken if other not in known]
            known.update(step.taken)
        return False

    def _forget(self) -> None:
        """Keeps whole what a number counts that nothing has picked."""
        if self._told is not None:
            freeze(self._told.numbers, f"numbers of positions leave the tensors in {self.where or 'the model'}")
        self._told = None

    def _left_tensors(self, tensor: Tensor) -> None:
        """Keeps whole what a list of values is about: nothing shows what becomes of it."""
        self.read(tensor)
        for axis in (*self.axes_of(tensor), self._numbers.get(id(tensor), ())):
            freeze(axis, f"values leave the tensors in {self.where or 'the model'}")

    def _take_apart(self, name: str, args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """Notes where as many rows as the data says are taken apart, to go through them."""
        if name == "aten.nonzero":
            self._counted.add(id(outputs[0]))
        if name == "aten.unbind" and id(args[0]) in self._counted and not (args[1:] and args[1]):
            self.loops.append(_Rows(len(self.operations), {id(output): place for place, output in enumerate(outputs)}))

    def _begin_row(self, args: tuple[Any, ...]) -> None:
        """Notes where the next row is used first: there its iteration begins."""
        if self.loops:
            loop = self.loops[-1]
            places = [loop.rows[id(tensor)] for tensor in _tensors(args) if id(tensor) in loop.rows]
            if len(loop.starts) in places:
                loop.starts.append(len(self.operations))

    def entered(self, path: str) -> None:
        """Notes where in the flow of data a module begins."""
        self._starts.append(len(self.flow.steps))

    def known(self, tensor: Tensor) -> rules.Axes | None:
        """The axes of a tensor that was seen already."""
        return self._axes[id(tensor)][1] if id(tensor) in self._axes else None

    def _frame(self, inputs: Any, output: Any) -> Frame:
        """The axes of the tensors that go into a module and come out, none for anything else."""
        entering, leaving = (torch.utils._pytree.tree_leaves(value) for value in (inputs, output))
        return Frame(*([self._tuple(value) for value in values] for values in (entering, leaving)))

    def _tuple(self, value: Any) -> tuple[Axis, ...]:
        return tuple(self.axes_of(value)) if isinstance(value, Tensor) else ()

    def left(self, path: str, inputs: Any, output: Any) -> None:
        """Notes what went into a module and what came out."""
        self.frames.setdefault(path, []).append(self._frame(inputs, output))
        entering, leaving = _tensors(inputs), _tensors(output)
        self.flow.visits.append(
            Visit(
                path,
                taken=tuple(value for tensor in entering for value in self._values_of(tensor)),
                given=tuple(value for tensor in leaving for value in self._values_of(tensor)),
                start=self._starts.pop(),
                stop=len(self.flow.steps),
                entering=tuple(self.axes_of(entering[0])) if entering else (),
                leaving=tuple(self.axes_of(leaving[0])) if leaving else (),
                returns=_returns(output),
            )
        )

    def _new_value(self) -> int:
        self._count += 1
        return self._count

    def _values_of(self, tensor: Tensor) -> tuple[int, ...]:
        """The number of a tensor's value, and of the last one written into its memory through another view of it."""
        value = self._values.setdefault(id(tensor), self._new_value())
        written = self._written.get(memory(tensor), value)
        return (value,) if written == value else (value, written)


def _returns(output: Any) -> int:
    """Items of a tuple that begins with a tensor; 0 for a tensor by itself, -1 for anything else."""
    if isinstance(output, Tensor):
        return 0
    return len(output) if type(output) is tuple and output and isinstance(output[0], Tensor) else -1


def _constants(args: tuple[Any, ...], kwargs: dict[str, Any], func: Any) -> tuple[float, ...]:
    """The numbers that an operator computes with: of element-wise ones all, of others those that are no sizes."""
    numeric = torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in FILLING
    kinds = (int, float) if numeric else (float,)
    return tuple(value for value in (*args, *kwargs.values()) if type(value) in kinds)


def _small_values(tensor: Tensor) -> tuple[Any, ...] | None:
    """What a tensor that code made of plain numbers holds; None for long ones and for those that have no values."""
    if tensor.numel() > LONGEST_CONSTANT or tensor.is_meta or isinstance(tensor, FakeTensor):
        return None
    with _disable_current_modes():
        return tuple(tensor.flatten().tolist())


def _is_text(tensor: Tensor) -> bool:
    """Whether a tensor looks like token numbers [batch, tokens]."""
    return tensor.dtype == torch.long and tensor.ndim == 2


def _ranks(parameters: Mapping[str, rules.Axes]) -> Iterator[Axis]:
    """The rank axes of low-rank adapters, by the names that PEFT gives their two matrices."""
    for name, axes in parameters.items():
        if found := re.search(r"\.lora_(?:embedding_)?([AB])\.", name):
            yield axes["AB".index(found[1])]


def _text(inputs: Sequence[Tensor], named: Mapping[str, Any]) -> list[Tensor]:
    """The input that holds the numbers of the text: the one of that name, or the only one that looks like it."""
    if isinstance(named.get("input_ids"), Tensor):
        return [named["input_ids"]]
    alike = [tensor for tensor in inputs if _is_text(tensor)]
    return alike if len(alike) == 1 else []


def _logits(value: Any) -> Tensor | None:
    """What a network puts out for every token of a vocabulary: the field of that name, or all that it puts out."""
    if isinstance(value, Mapping) and isinstance(value.get("logits"), Tensor):
        logits: Tensor = value["logits"]
        return logits
    tensors = _tensors(value)
    return tensors[0] if len(tensors) == 1 else None


def _is_image(tensor: Tensor) -> bool:
    """Whether a tensor looks like images [batch, channels, height, width]."""
    return tensor.is_floating_point() and tensor.ndim == 4


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [_unwrapped(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def reachable(*values: Any) -> list[Tensor]:
    """Every tensor inside nested containers and plain objects: data classes, namespaces, records."""
    found: dict[int, Tensor] = {}
    known: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.setdefault(id(value), _unwrapped(value))
            continue
        if id(value) in known or isinstance(value, PLAIN):
            continue
        known.add(id(value))
        if isinstance(value, Mapping):
            waiting += reversed(list(value.values()))
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting += reversed(list(value))
        waiting += reversed(list(_fields(value).values()))
    return list(found.values())


def _fields(value: Any) -> Mapping[str, Any]:
    """What an object holds under names; nothing of classes, functions and modules."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    held = {name: getattr(value, name, None) for name in slots}
    return {**held, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that operators see where the network sees a row of it, in `torch.vmap`, or one that is differentiated."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _fake(tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    return torch.empty(tensor.shape if shape is None else tuple(shape), dtype=tensor.dtype)


def _real(tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """The tensor itself, or random numbers where it has no values or another shape is asked for."""
    if not tensor.is_meta and shape is None:
        return tensor.detach()
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape if shape is None else tuple(shape), dtype=tensor.dtype)
    return torch.randn(tensor.shape if shape is None else tuple(shape), dtype=tensor.dtype) * 0.02


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def _within(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    with mode:
        return _fake(tensor)


def _example(given: Any, mode: FakeTensorMode | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given is None:
        shape = REAL_SHAPE if mode is None else EXAMPLE_SHAPE
        numbers = torch.arange(shape[0] * shape[1]).view(shape) % 31
        return (), {"input_ids": numbers, "use_cache": False}
    return _arguments(torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given) if mode else given)


def _arguments(given: Any) -> Inputs:
    """Positional and named arguments out of an example."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def _with_values(given: Any) -> Inputs | None:
    """A copy of an example whose tensors have values; None for others."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    if not tensors or any(type(tensor) is FakeTensor or tensor.is_meta for tensor in tensors):
        return None
    return _arguments(torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), given))


@contextmanager
def _silent() -> Iterator[None]:
    """Operators that refuse a shape are the question that a replay asks, not an error to report."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Changes:
    """What a network notes on itself while it runs: attributes, tables, fields of its configuration; all of it is undone."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(name, vars(module)) for name, module in model.named_modules()]
        found = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
        self._configs = [vars(config) for config in found.values() if hasattr(config, "__dict__")]
        own = [values for _, values in self._modules]
        tables = [value for values in own for value in values.values() if isinstance(value, dict)]
        self._before = [(values, dict(values)) for values in (*own, *self._configs, *tables)]
        self._lists = [(value, list(value)) for values in own for value in values.values() if isinstance(value, list)]
        self._sets = [(value, set(value)) for values in own for value in values.values() if isinstance(value, set)]
        self._started: dict[str, dict[str, Any]] = {}
        self._made = {name: _made_anew(module) for name, module in model.named_modules()}

    def start(self) -> None:
        """The run begins."""
        self._started = {name: dict(values) for name, values in self._modules}

    def left_on(self) -> dict[str, dict[str, Any]]:
        """What the run left on modules in the place of what it found there: counters, caches."""
        noted = {
            name: {key: value for key, value in self._noted(name, values).items() if not isinstance(value, str | bool | None)}
            for name, values in self._modules
        }
        return {name: values for name, values in noted.items() if values}

    def _noted(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        before, passed = self._started.get(name, {}), (*TABLES_OF_MODULES, *self._made[name])
        return {
            key: value
            for key, value in values.items()
            if key not in passed and "warn" not in key and not _is_same(before.get(key, _MISSING), value)
        }

    def undo(self) -> None:
        """Puts everything back that is not as it was; what was not changed is not written, for it may not be writable."""
        for values, fields in self._before:
            if values.keys() != fields.keys() or any(values[name] is not fields[name] for name in fields):
                values.clear()
                values.update(fields)
        for items, before in self._lists:
            if len(items) != len(before) or any(one is not other for one, other in zip(items, before, strict=True)):
                items[:] = before
        for members, were in self._sets:
            if members != were:
                members.clear()
                members.update(were)


_MISSING = object()
TABLES_OF_MODULES = ("_parameters", "_buffers", "_modules", "_flat_weights", "training")
"""Attributes of modules that torch changes itself while a network is called with other weights."""


def _is_same(before: Any, after: Any) -> bool:
    return before is after or (type(before) is type(after) and isinstance(after, int | float | str) and before == after)


@contextmanager
def _traceable(model: nn.Module, *, training: bool = False) -> Iterator[_Changes]:
    """Evaluation mode, or that of training, and the implementations that fake tensors can run; all as it was afterwards."""
    changes = _Changes(model)
    keeper = Unwritten(model)
    try:
        with _disable_current_modes(), keeper, torch.no_grad():
            model.train()  # what networks keep from one evaluation to the next is dropped
            if not training:
                model.eval()
        for module in model.modules():
            if hasattr(module, PADDING_WARNING):
                vars(module)[PADDING_WARNING] = lambda *args, **kwargs: None
        for values in changes._configs:
            if EXPERTS in values:
                values[EXPERTS] = "batched_mm"
        changes.start()
        with sdpa_kernel(SDPBackend.MATH), _one_operator_at_a_time(), torch.compiler.set_stance("force_eager"), keeper, Steady():
            yield changes
    finally:
        changes.undo()
        keeper.undo()
        for module in model.modules():
            _without_history(module)


class Unwritten(TorchDispatchMode):
    """Notes what is written into the weights and buffers of a network, and puts it back."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = [value for module in model.modules() for key, value in vars(module).items() if key not in TABLES_OF_MODULES]
        with _disable_current_modes():
            self._state = [(tensor, tensor.data) for _, tensor in _state(model)]
            noted = [(tensor, tensor.data) for tensor in reachable(*held)]  # tensors that are no buffers
        self._own = {memory(data): data for _, data in (*self._state, *noted) if not data.is_sparse}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs one operator; before the first that writes into a weight, its values are kept."""
        if not isinstance(func, HigherOrderOperator) and (func._schema.is_mutable or func._schema.name in COUNTING):
            for tensor in _tensors([args, kwargs or {}]):
                if type(tensor) is not FakeTensor and (number := memory(tensor)) in self._own and number not in self._written:
                    with _disable_current_modes():
                        self._written[number] = (self._own[number], self._own[number].clone())
        return func(*args, **kwargs or {})

    def undo(self) -> None:
        """Gives every tensor the memory and the values that it had."""
        with _disable_current_modes(), torch.no_grad():
            for tensor, data in self._state:
                if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                    tensor.data = data
            for data, values in self._written.values():
                data.copy_(values)
        self._written.clear()


def _without_history(module: nn.Module) -> None:
    """Weights that a hook makes anew before every run are plain values between runs, so that the network can be copied."""
    for name in _made_anew(module):
        if isinstance(made := vars(module).get(name), Tensor) and not made.is_leaf:
            vars(module)[name] = made.detach()


def _made_anew(module: nn.Module) -> list[str]:
    """Weights that torch's older weight norms make of others before every run: nothing that a run hands out."""
    hooks = module._forward_pre_hooks.values()
    return [hook.name for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)]


@contextmanager
def _one_operator_at_a_time() -> Iterator[None]:
    """No kernels that run a whole layer, an encoder's or a recurrent one, as a single operator."""
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch._C._set_mkldnn_enabled(before[1])
