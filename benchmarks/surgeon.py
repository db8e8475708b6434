"""LLM Surgeon: perplexity by what stays, shots, structure and compensation, beside other ways, in one generated table.

    python benchmarks/surgeon.py --wikitext wiki.test.raw --c4 heldout.txt --calibration c4.jsonl wiki.train.raw
    python benchmarks/surgeon.py ... --only coupled-1 coupled-5     # some rows, put into the table that is there

A run of many shots is measured on its way, wherever a share of the table is reached. Rows are written as they come, and a run
that was cut short goes on from its last shot (`--work`). What is measured is the masked network, which the cut one equals, on
two texts that it has not seen and on the one it was calibrated on. Settings that begin with the same moments share them, and
their seconds do not count those. Several processes divide the settings among them with `--only`, each with its own `--work` and
`--output`; `python benchmarks/record.py surgeon PART PART` joins them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, computing, environment, options, write

import resect
from resect.calibration import calibrate, evaluation_tokens
from resect.checkpoint import Progress
from resect.evaluation import perplexity
from resect.methods import Compensation, LLMPruner, LLMSurgeon, Method, Trials
from resect.methods.compensation import compensate
from resect.methods.sparsity import matrices as matrices_of
from resect.plan import Plan, select
from resect.statistics import Data, Moments, readers
from resect.surgery import masked

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
KINDS = ("heads", "channels")
PRUNED = Compensation(inputs="pruned")
SURGEONS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"coupled-{shots}": (shots, {}) for shots in (1, 5, 20)},
    **{f"coupled-{shots}, no updates": (shots, {"compensation": None}) for shots in (1, 5, 20)},
    "coupled-1, inputs of the pruned prefix": (1, {"compensation": PRUNED}),
    "coupled-1, activations alone": (1, {"fisher": "activations"}),
    "coupled-1, sampled labels": (1, {"fisher": "sampled"}),
    "coupled-1, damping 0.03 and 0.1": (1, {"damping": 0.03, "damping_gradients": 0.1}),
    "coupled-1, spread 1.5": (1, {"spread": 1.5}),
    "coupled-1, trials": (1, {"trials": Trials()}),
    "coupled-5, trials": (5, {"trials": Trials()}),
    "coupled-5, spread 1.5": (5, {"spread": 1.5}),
    **{f"rows-columns-{shots}": (shots, {"mode": "rows-columns"}) for shots in (1, 5, 20)},
    **{f"rows-columns-{shots}, no updates": (shots, {"mode": "rows-columns", "compensation": None}) for shots in (1, 5, 20)},
    **{f"rows-columns-{shots}, priced alone": (shots, {"mode": "rows-columns", "ladders": False}) for shots in (1, 5, 20)},
    **{f"unstructured-{shots}": (shots, {"mode": "unstructured"}) for shots in (1, 5)},
    "unstructured-1, chunks of 500": (1, {"mode": "unstructured", "max_correlate": 500}),
    "unstructured-1, no updates": (1, {"mode": "unstructured", "compensation": None}),
    "unstructured-1, a share of each": (1, {"mode": "unstructured", "selection": "local"}),
    "unstructured-1, activations alone": (1, {"mode": "unstructured", "fisher": "activations"}),
    "unstructured-1, activations alone, a share of each": (
        1, {"mode": "unstructured", "fisher": "activations", "selection": "local"}
    ),
    "unstructured-1, magnitude": (1, {"mode": "unstructured", "fisher": "identity", "compensation": None}),
    "2:4-1": (1, {"mode": "2:4"}),
    "2:4-1, chunks of 500": (1, {"mode": "2:4", "max_correlate": 500}),
    "2:4-1, no updates": (1, {"mode": "2:4", "compensation": None}),
    "2:4-1, activations alone": (1, {"mode": "2:4", "fisher": "activations"}),
    "2:4-1, magnitude": (1, {"mode": "2:4", "fisher": "identity", "compensation": None}),
}
"""Settings by name, and the shots in which half of the parameters go."""
PRUNERS: dict[str, Method] = {
    "llm-pruner element2, spread 1.2": LLMPruner(),
    "llm-pruner element2, spread 1.2, updates": LLMPruner(compensation=Compensation()),
    "llm-pruner l2, spread 1.2": LLMPruner(criterion="l2"),
    "llm-pruner l2, spread 1.2, updates": LLMPruner(criterion="l2", compensation=Compensation()),
    "llm-pruner random": LLMPruner(criterion="random", selection="local"),
}


class Table:
    """Measures models and writes rows as they come."""

    def __init__(self, asked: Any) -> None:
        tokenizer = resect.load_tokenizer(asked.model)
        self.model = resect.load(asked.model)
        self.graph = resect.trace(self.model)
        calibration = calibrate(asked.calibration, tokenizer, samples=asked.samples, length=asked.length, seed=asked.seed)
        self.data = Data(calibration.tokens.split(1))
        self.dense = {name: value.clone() for name, value in self.model.state_dict().items()}
        wikitext = evaluation_tokens(asked.wikitext, tokenizer, limit=asked.limit)
        c4 = evaluation_tokens(asked.c4, tokenizer, limit=min(asked.limit, 32768))
        fitted = calibration.tokens[:: math.ceil(calibration.tokens.numel() / asked.limit)]
        self.texts = {"WikiText-2@128": (wikitext, 128), "C4@1024": (c4, 1024)}
        self.texts[f"calibration@{asked.length}"] = (fitted.flatten(), asked.length)
        self.about = {"asked": vars(asked) | {"calibration": dict(calibration.provenance)}, **environment()}
        self.work = Path(asked.work)
        self.shares = tuple(asked.shares)
        self.computed = "bfloat16" if asked.bf16 else "float32"
        stored = RESULTS / f"{asked.output}.json"
        self.rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if stored.exists() else []
        self.output = asked.output

    def has(self, name: str, share: float) -> bool:
        """Whether a row is there."""
        return any(row["settings"] == name and row["share"] == share for row in self.rows)

    def row(self, name: str, share: float, kept: float, **facts: Any) -> None:
        """Measures the model as it is now."""
        found = {key: perplexity(self.model, tokens, window=window).value for key, (tokens, window) in self.texts.items()}
        self.rows.append({"settings": name, "share": share, "kept": kept, **found, **facts, "computed in": self.computed})
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in self.rows[-1].items()}, flush=True)
        self.rows.sort(key=lambda row: (row["settings"] != "dense", -row["share"], row["settings"]))
        write(self.output, self.about, self.rows)

    def fresh(self) -> None:
        """Dense weights again."""
        self.model.load_state_dict(self.dense)

    def progress(self, name: str, method: LLMSurgeon | None = None) -> Progress:
        """Where a setting notes its shots, the first with moments that others have begun with."""
        place = self.place(name)
        known = self.moments(method) if method and method.fisher != "identity" and not place.exists() else None
        found = Progress(place, [name, self.about["asked"]["calibration"]], resume=True)
        if known:
            shutil.copytree(known.directory / "shot-1", place / "shot-1", copy_function=os.link)
        return found

    def place(self, name: str) -> Path:
        """The folder of a setting's notes."""
        return self.work / name.replace(":", " of ")

    def moments(self, method: LLMSurgeon) -> Progress:
        """Moments of the dense network, collected once for all settings of a kind."""
        kind = "units" if method.coupled else "matrices"
        found = Progress(self.work / f"moments of {kind}, {method.fisher}", [self.about["asked"]["calibration"]], resume=True)
        if method.coupled:
            of_kind = [readers(self.model, self.graph, group) for group in self.graph.of_kind(*KINDS)]
            layers = list({layer.path: layer for pairs in of_kind for layer, _ in pairs}.values())
        else:
            layers = matrices_of(self.model, self.graph)
        method.collect(self.model, self.graph, layers, self.data, shot=1, seed=42, progress=found)
        return found

    def kept(self, plan: Plan) -> float:
        """The share of block parameters that a plan keeps."""
        return self.graph.parameter_count(plan.removed(), blocks_only=True) / self.graph.parameter_count(blocks_only=True)


def one_shot(table: Table, name: str, method: LLMSurgeon) -> None:
    """Scores once, or for every share where trials depend on it; a plan and an update for every share."""
    for shares in [[share] for share in table.shares] if method.trials else [list(table.shares)]:
        if missing := [share for share in shares if not table.has(name, share)]:
            _one_shot(table, name, method, missing)


def _one_shot(table: Table, name: str, method: LLMSurgeon, shares: list[float]) -> None:
    progress = table.progress(f"{name} {shares[0]}" if method.trials else name, method)
    asked, start = {"keep": min(shares), "of": "blocks", "layout": "per-layer", "align": 1}, time.perf_counter()
    _, _, scores = next(method.shots_of(table.model, table.graph, table.data, asked, progress=progress))
    scored = time.perf_counter() - start

    def known(path: str) -> Moments | None:
        found = progress.get(f"shot-1/moments/{path}")
        return Moments.of(found) if found else None

    for share in shares:
        plan = select(table.graph, scores, keep=share, kinds=KINDS, spread=method.spread)
        start = time.perf_counter()
        if made := method.compensation:
            given = known if made.inputs == "dense" else lambda path: None
            compensate(table.model, table.graph, plan, table.data, made, known=given)
        with masked(table.model, plan, table.graph):
            table.row(name, share, table.kept(plan), seconds=scored + time.perf_counter() - start)
        table.fresh()


def many_shots(table: Table, name: str, method: LLMSurgeon) -> None:
    """One run down to the smallest share, measured on its way."""
    least = min(table.shares)
    if all(table.has(name, share) for share in table.shares if _reachable(share, method.shots, least)):
        return
    progress, asked = table.progress(name, method), {"keep": least, "of": "blocks", "layout": "per-layer", "align": 1}
    start = time.perf_counter()
    for shot, plan, _ in method.shots_of(table.model, table.graph, table.data, asked, progress=progress):
        method.make_up(table.model, table.graph, plan, table.data, progress, shot=shot)
        for share in _reached(table, shot, method.shots, least):
            if not table.has(name, share):
                with masked(table.model, plan, table.graph):
                    table.row(name, share, table.kept(plan), seconds=time.perf_counter() - start)


def matrices(table: Table, name: str, method: LLMSurgeon) -> None:
    """Parts of single matrices, measured on the way down; one run for each share where there is one shot."""
    total = table.graph.parameter_count(blocks_only=True)
    several = method.shots == 1 and method.mode == "rows-columns"
    lines: Path | None = None
    for last in table.shares if several else [0.5]:
        if method.shots == 1 and table.has(name, last):
            continue
        progress = table.progress(f"{name} {last}" if several else name, method)
        if lines:  # what they cost does not depend on how many go
            shutil.copytree(lines, progress.directory / "shot-1" / "lines", copy_function=os.link, dirs_exist_ok=True)
        start = time.perf_counter()
        for shot, pattern in method.patterns(table.model, table.graph, table.data, keep=last, progress=progress):
            zeros = sum(matrix.zeros for matrix in pattern.layers.values())
            for share in [last] if method.shots == 1 else _reached(table, shot, method.shots, last):
                if not table.has(name, share):
                    table.row(name, share, 1 - zeros / total, seconds=time.perf_counter() - start)
        table.fresh()
        lines = progress.directory / "shot-1" / "lines" if several else None


def pruner(table: Table, name: str, method: Method) -> None:
    """Another method, with its scores, for every share."""
    if all(table.has(name, share) for share in table.shares):
        return
    start = time.perf_counter()
    tokens = torch.cat(list(table.data.batches))
    data = Data(tokens.reshape(-1, min(128, tokens.shape[1])).split(8))  # the same text in the windows it usually has
    _, scores = method.plan(table.model, table.graph, data, keep=0.5, progress=table.progress(name))
    scored = time.perf_counter() - start
    for share in table.shares:
        if not table.has(name, share):
            options: dict[str, Any] = {"spread": 1.2} if "spread" in name else {"selection": "local"}
            plan = select(table.graph, scores, keep=share, kinds=KINDS, **options)
            start = time.perf_counter()
            if method.compensation:
                compensate(table.model, table.graph, plan, table.data, method.compensation)
            with masked(table.model, plan, table.graph):
                table.row(name, share, table.kept(plan), seconds=scored + time.perf_counter() - start)
            table.fresh()


def _reached(table: Table, shot: int, shots: int, least: float) -> list[float]:
    """The shares of the table that a shot reaches."""
    return [share for share in table.shares if abs(1 - (1 - least) * shot / shots - share) < 1e-9]


def _reachable(share: float, shots: int, least: float) -> bool:
    """Whether a run down to the smallest share meets this one on its way."""
    return any(abs(1 - (1 - least) * shot / shots - share) < 1e-9 for shot in range(1, shots + 1))


def main() -> None:
    """Runs the table."""
    parser = options(__doc__, bf16=True)
    parser.set_defaults(samples=32, length=1024)
    parser.add_argument("--only", nargs="*", help="names of settings, as in this file")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--limit", type=int, default=65536, help="tokens of each evaluation text")
    parser.add_argument("--work", default="runs/surgeon-benchmark", help="where shots are noted")
    parser.add_argument("--output", default="surgeon")
    asked = parser.parse_args()
    with computing(asked.bf16):
        table = Table(asked)
        if not table.has("dense", 1.0):
            table.row("dense", 1.0, 1.0, seconds=0.0)
        for name in asked.only or [*SURGEONS, *PRUNERS]:
            run(table, name)


def run(table: Table, name: str) -> None:
    """All rows of one setting."""
    if name in PRUNERS:
        pruner(table, name, PRUNERS[name])
    else:
        shots, settings = SURGEONS[name]
        method = LLMSurgeon(shots=shots, **settings)
        way = matrices if not method.coupled else one_shot if shots == 1 else many_shots
        way(table, name, method)
    table.fresh()
    for noted in (name, *(f"{name} {share}" for share in table.shares)):
        shutil.rmtree(table.place(noted), ignore_errors=True)


if __name__ == "__main__":
    main()
