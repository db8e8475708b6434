"""Networks of other libraries: what is found, whether cut equals mask, at another size and in training, and whether it is saved.

    python benchmarks/networks.py                 # all of strangers.py
    python benchmarks/networks.py monai/UNet ...  # these, put into the table that is there

Into docs/libraries.md and benchmarks/results/networks.json, which is written as the rows come in. A process each, forked
from one that has imported torch; it may take five minutes of a processor. `make networks` installs what it needs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import tests.vision.operators  # noqa: E402, F401, I001  # before anything that imports torchvision
import torch  # noqa: E402
from record import RESULTS, environment  # noqa: E402
from strangers import NETWORKS, Inputs, Stranger  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

import resect  # noqa: E402
from resect.errors import ModelError, ResectError  # noqa: E402
from resect.graph import Graph  # noqa: E402
from resect.plan import Plan  # noqa: E402
from tests.models import random_plan  # noqa: E402
from tests.vision.examine import describe  # noqa: E402
from tests.vision.images import lively  # noqa: E402

LIMIT = 300
"""Seconds of a processor for one network."""
TOLERANCE = 1e-8
"""Largest difference of the outputs as a share of their standard deviation, in float64."""
SINGLE = 1e-4
"""The same for networks that compute in float32 whatever their weights are."""
TRAINED = 1e-6
"""The same for weights after loading, which were written in float64, too, but whose outputs are compared as float32."""
KINDS = ("heads", "channels", "experts", "residual", "sublayers", "blocks")
HEAD = ("network", "parameters", *KINDS, "prunable", "verified", "other size", "training", "saved", "trace", "notes")
EVERYTHING = "everything"
ABOUT = """\
Networks of libraries that nothing here was written for, as small as their settings allow. `resect.trace(model, inputs)` finds
what can be cut. *Prunable*: the share of all parameters in the units of all groups together.

*Verified*: a random plan for each kind that is found, and one for all kinds at once; weights, biases and the running statistics
of norms are random; the largest difference between what the cut and the masked network put out is at most 1e-8 of its standard
deviation, in float64 (1e-4 for networks that compute in float32 whatever their weights are). *Other size*: the same with another
batch size, and another length or resolution where the network takes one. *Training*: the same in training mode, without
dropout; *random* where the dense network puts out something else every time. *Saved*: `resect.save`, and `resect.load_into`
into a dense network that was built anew, puts out the same.
*Trace*: seconds. *Left out*: groups whose new sizes the network's own code does not take, as surgery says.
"""


@dataclass
class Row:
    """One line of the table."""

    name: str
    version: str = ""
    parameters: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    prunable: float = 0.0
    """The share of all parameters that goes with all units of all groups but blocks."""
    frozen: dict[str, int] = field(default_factory=dict)
    """Positions that are kept whole, by reason."""
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    """By kind, then by what was compared, the largest difference between cut and masked outputs."""
    random: bool = False
    """Whether the dense network puts out something else every time in training mode."""
    left_out: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Kinds that could not be cut at all, and why."""
    saved: float | str = "nothing was cut"
    """The difference after saving and loading, or what stopped it."""
    problem: str = ""
    traced: float = 0.0
    """Seconds of the trace."""
    seconds: float = 0.0

    @property
    def verified(self) -> bool:
        """Whether something was cut, and all of it as the mask says."""
        return bool(self.differences) and not self.wrong and not self.problem and not self.refused

    single: bool = False
    """Whether the network computes in float32 whatever its weights are."""

    @property
    def wrong(self) -> bool:
        """Whether something computes what the mask doesn't."""
        allowed = SINGLE if self.single else TOLERANCE
        return any(not value <= allowed for found in self.differences.values() for value in found.values())


def row_of(name: str, seed: int) -> dict[str, Any]:
    """The row of one network, within the time limit."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    row, start = Row(name, _version(name)), time.perf_counter()
    try:
        _examine(row, seed)
    except _Late:
        row.problem = f"not done after {LIMIT} s"
    except Exception as problem:  # the table says what went wrong
        row.problem = _said(problem)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    row.seconds = time.perf_counter() - start
    return {**asdict(row), "verified": row.verified, "wrong": row.wrong}


def _examine(row: Row, seed: int) -> None:
    network = _built(row.name, seed)
    row.single = network.single
    row.parameters = sum(parameter.numel() for parameter in network.model.parameters())
    before = time.perf_counter()
    graph = resect.trace(network.model, network.inputs)
    row.traced = time.perf_counter() - before
    describe(row, graph)
    dense = [_outputs(copy.deepcopy(network.model).train(), network.inputs, seed=number) for number in (1, 2)]
    row.random = not dense[0].equal(dense[1])
    kinds = [kind for kind in row.groups if kind != "vocabulary"]  # its tokens have other numbers after the cut
    for kind in kinds:
        _cut(row, network, graph, kind, [kind], seed)
    cut = _cut(row, network, graph, EVERYTHING, [kind for kind in kinds if kind not in row.refused], seed)
    if cut is not None:
        plan, small = cut
        row.saved = _loaded_again(row.name, seed, small, plan, network.inputs)


def _built(name: str, seed: int) -> Stranger:
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    torch.set_default_dtype(torch.float32 if network.single else torch.float64)
    model = lively(network.model.eval(), seed).to(torch.get_default_dtype())
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return Stranger(model, _as_default(network.inputs), _as_default(network.other), network.single)


def _as_default(inputs: Inputs) -> Any:
    dtype = torch.get_default_dtype()
    return tree_map(lambda one: one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one, inputs)


def _plans(graph: Graph, kinds: Sequence[str], seed: int) -> Iterator[Plan]:
    """Plans that remove random units: first of every group another number, then of likes the same."""
    for uniform, number in product((False, True), range(seed, seed + 3)):
        plan = random_plan(graph, number, uniform=uniform, kinds=kinds)
        if any(kept.removed for kept in plan.groups.values()):
            yield plan


def _cut(row: Row, network: Stranger, graph: Graph, kind: str, kinds: Sequence[str], seed: int) -> tuple[Plan, nn.Module] | None:
    """Cuts, and compares.

    Groups whose new sizes the network's code does not take are left out, where surgery names them and no plan does it.
    """
    plans = list(_plans(graph, kinds, seed))
    for plan in plans:
        try:
            small = resect.cut(copy.deepcopy(network.model), plan, graph)
        except ModelError as problem:
            row.refused[kind] = _said(problem)
        else:
            row.refused.pop(kind, None)
            row.differences[kind] = _compared(row, network, small, plan, graph)
            return plan, small
    plan = plans[-1] if plans else Plan(groups={})
    while any(kept.removed for kept in plan.groups.values()):
        try:
            small = resect.cut(copy.deepcopy(network.model), plan, graph)
        except ModelError as problem:
            left = {name: kept for name, kept in plan.groups.items() if name not in problem.groups}
            if len(left) == len(plan.groups):
                return None
            row.left_out[kind] = row.left_out.get(kind, 0) + len(plan.groups) - len(left)
            plan = Plan(groups=left)
        else:
            row.refused.pop(kind, None)
            row.differences[kind] = _compared(row, network, small, plan, graph)
            return plan, small
    return None


def _compared(row: Row, network: Stranger, small: nn.Module, plan: Plan, graph: Graph) -> dict[str, float]:
    found = {}
    modes = {"example": (network.inputs, False), "other": (network.other, False), "training": (network.inputs, True)}
    for name, (inputs, training) in modes.items():
        if training and row.random:
            continue
        model, cut = copy.deepcopy(network.model).train(training), copy.deepcopy(small).train(training)
        with resect.masked(model, plan, graph):
            expected = _outputs(model, inputs)
        found[name] = _difference(expected, _outputs(cut, inputs))
    return found


def _loaded_again(name: str, seed: int, small: nn.Module, plan: Plan, inputs: Inputs) -> float | str:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "small"
        try:
            resect.save(small, place, plan=plan, inputs=inputs)
            fresh = resect.load_into(_built(name, seed).model, place)
        except ResectError as problem:
            return _said(problem)
        return _difference(_outputs(small, inputs), _outputs(fresh.eval(), inputs))


def _outputs(model: nn.Module, inputs: Inputs, *, seed: int = 1) -> Tensor:
    """All that a network puts out, in one row."""
    torch.manual_seed(seed)
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    found = vars(found) if hasattr(found, "__dict__") and not isinstance(found, Tensor | dict | tuple | list) else found
    return torch.cat([value.flatten().double() for value in tree_leaves(found) if isinstance(value, Tensor)])


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    scale = expected.std() if expected.numel() > 1 else expected.abs().mean()  # a loss
    return float((expected - found).abs().max() / scale.clamp_min(1e-30))


def _version(name: str) -> str:
    library = name.partition("/")[0]
    known = {"fair-esm": "fair-esm", "open-clip": "open-clip-torch"}
    try:
        return importlib.metadata.version(known.get(library, library))
    except importlib.metadata.PackageNotFoundError:
        return ""


class _Late(BaseException):
    """No `except Exception` on the way catches it."""


def _out_of_time(*_: Any) -> None:
    raise _Late


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page."""
    verified = [row for row in rows if row["verified"]]
    halved = [row for row in verified if row["prunable"] >= 0.5]
    wrong = [row["name"] for row in rows if row["wrong"]]
    rest = [row["name"] for row in rows if not row["verified"] or row["prunable"] < 0.5]
    libraries = len({row["name"].partition("/")[0] for row in rows})
    share = len(halved) / max(len(rows), 1)
    facts = [
        f"{len(rows)} networks of {libraries} libraries; {len(verified)} cut and verified, {len(halved)} of all ({share:.0%}) in "
        f"at least half of their parameters; wrong: {len(wrong)}{' (' + ', '.join(wrong) + ')' if wrong else ''}."
    ]
    facts += [f"The rest: {', '.join(rest)}."] if rest else []
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD), *map(_line, rows)]
    head = ["# Networks of other libraries", "", "Generated by `benchmarks/networks.py`.", "", ABOUT]
    return "\n".join([*head, *facts, "", *lines, ""])


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['name']} {row['version']}".strip(), f"{row['parameters']:,}"]
    cells += [str(row["groups"].get(kind, "")) for kind in KINDS]
    saved = row["saved"] if isinstance(row["saved"], str) else "yes" if row["saved"] <= TRAINED else f"off by {row['saved']:.0e}"
    cells += [f"{row['prunable']:.0%}", "yes" if row["verified"] else "no", _mode(row, "other")]
    cells += ["random" if row["random"] else _mode(row, "training"), "yes" if saved == "yes" else "no"]
    cells += [f"{row['traced']:.1f}", _notes(row, saved)]
    return "| " + " | ".join(cells) + " |"


def _mode(row: dict[str, Any], mode: str) -> str:
    values = [found[mode] for found in row["differences"].values() if mode in found]
    return ("yes" if all(value <= _allowed(row) for value in values) else "no") if values else ""


def _allowed(row: dict[str, Any]) -> float:
    return SINGLE if row["single"] else TOLERANCE


def _notes(row: dict[str, Any], saved: str) -> str:
    notes = [row["problem"][:160]] if row["problem"] else []
    notes += [f"{kind} refused: {why[:160]}" for kind, why in row["refused"].items()]
    off = {f"{kind}, {mode}": value for kind, found in row["differences"].items() for mode, value in found.items()}
    notes += [f"{where} differ by {value:.0e}" for where, value in off.items() if not value <= _allowed(row)]
    notes += [f"{count} groups of {kind} left out" for kind, count in row["left_out"].items()]
    notes += [f"not saved: {saved[:160]}"] if saved not in ("yes", "nothing was cut") else []
    frozen = [why for why, _ in Counter(row["frozen"]).most_common() if "of the network" not in why][:2]
    notes += ["frozen: " + "; ".join(frozen)] if frozen and row["prunable"] < 0.9 else []
    return "; ".join(notes).replace("|", "\\|")


def _said(problem: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(problem).__name__}: {problem}")[:400]


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--one", default="", help="print the row of one network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(row_of(asked.one, asked.seed), indent=1))
        return
    wanted = asked.networks or list(NETWORKS)
    found = RESULTS / "networks.json"
    stored = json.loads(found.read_text())["rows"] if asked.networks and found.exists() else []
    rows = {row["name"]: row for row in stored}
    with multiprocessing.get_context("fork").Pool(asked.jobs, maxtasksperchild=1) as pool:
        for row in tqdm(pool.imap_unordered(partial(row_of, seed=asked.seed), wanted), total=len(wanted), unit="network"):
            rows[row["name"]] = row
            ordered = sorted(rows.values(), key=lambda row: row["name"])
            found.write_text(json.dumps({"about": {**environment(), "seed": asked.seed}, "rows": ordered}, indent=1) + "\n")
            (ROOT / "docs" / "libraries.md").write_text(page(ordered))


if __name__ == "__main__":
    main()
