"""Recovery: perplexity and zero-shot accuracy of pruned models before and after, by what is trained, on what, and how long.

    python benchmarks/recovery.py --wikitext wiki.test.raw --c4 heldout.txt --calibration c4.jsonl --sources c4.jsonl wiki.txt
    python benchmarks/recovery.py ... --only lora-0.1M full-0.1M --keep 0.8     # some rows, put into the table that is there

The models are what `llm-pruner` leaves. All but the mixtures learn from the calibration text. A gap is log perplexity less that
of the dense model; what is left of it is a share of the untrained model's.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, computing, environment, options, write

import resect
from resect.calibration import evaluation_tokens
from resect.evaluation import mean_accuracy, perplexity, tasks_named
from resect.recovery import Distillation, Mixture, Recovery, recover

MEASURE_ONLY = Distillation(weight=0)
"""A teacher that is only compared with."""
DYNAMIC = Mixture(kind="dynamic", rounds=5)
LENGTHS = {"0.1M": 100_000, "0.3M": 300_000, "1M": 1_000_000}
WAYS: dict[str, dict[str, Any]] = {
    "untrained": {},
    **{f"lora-{name}": {"tokens": tokens} for name, tokens in LENGTHS.items()},
    **{f"full-{name}": {"tokens": tokens, "full": True} for name, tokens in LENGTHS.items()},
    **{f"lora, teacher-{name}": {"tokens": tokens, "teacher": True} for name, tokens in LENGTHS.items()},
    "full, teacher-0.3M": {"tokens": 300_000, "full": True, "teacher": True},
    **{f"uniform mixture-{name}": {"tokens": LENGTHS[name], "mixed": True} for name in ("0.3M", "1M")},
    **{f"dynamic mixture-{name}": {"tokens": LENGTHS[name], "mixed": True, "mixture": DYNAMIC} for name in ("0.3M", "1M")},
}
"""Settings of recovery by name; `mixed` learns from all sources, `teacher` from the dense model too."""


class Table:
    """Measures models and writes rows as they come."""

    def __init__(self, asked: Any) -> None:
        self.asked = asked
        self.tokenizer = resect.load_tokenizer(asked.model)
        wikitext = evaluation_tokens(asked.wikitext, self.tokenizer, limit=asked.limit)
        c4 = evaluation_tokens(asked.c4, self.tokenizer, limit=min(asked.limit, 32768))
        self.texts = {"WikiText-2@128": (wikitext, 128), "C4@1024": (c4, 1024)}
        self.tasks = tasks_named(asked.tasks)
        about = {key: value for key, value in vars(asked).items() if key not in ("only", "keep", "work", "output")}
        self.about = {"asked": about, **environment()}
        stored = RESULTS / f"{asked.output}.json"
        self.rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if stored.exists() else []

    def found(self, way: str, keep: float, seed: int) -> dict[str, Any] | None:
        """A row that is there."""
        return next((row for row in self.rows if (row["settings"], row["kept"], row["seed"]) == (way, keep, seed)), None)

    def row(self, way: str, keep: float, seed: int, model: Any, **facts: Any) -> None:
        """Measures a model."""
        with computing(self.asked.bf16):
            values = {key: perplexity(model, tokens, window=window).value for key, (tokens, window) in self.texts.items()}
        dense, before = self.found("dense", 1.0, self.asked.seed), self.found("untrained", keep, seed)
        if dense and before:
            for key, value in values.copy().items():
                left = math.log(value / dense[key]) / math.log(before[key] / dense[key])
                values[f"gap left, {key}"] = left
        if self.tasks:
            with computing(self.asked.bf16):
                answers = [task.answered(model, self.tokenizer, limit=self.asked.task_limit) for task in self.tasks]
            values |= {one.task: one.accuracy for one in answers}
            values["mean accuracy"], values["standard error"] = mean_accuracy(answers)
        computed = "bfloat16" if self.asked.bf16 else "float32"
        self.rows.append({"settings": way, "kept": keep, "seed": seed, "computed in": computed, **values, **facts})
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in self.rows[-1].items()}, flush=True)
        order = ["dense", *WAYS]
        self.rows.sort(key=lambda row: (-row["kept"], order.index(row["settings"]), row["seed"]))
        write(self.asked.output, self.about, self.rows)


def pruned(table: Table, keep: float) -> Path:
    """The model that is recovered, made once."""
    asked = table.asked
    place = Path(asked.work) / f"pruned-{keep:g}"
    if not place.exists():
        model = resect.load(asked.model)
        result = resect.prune(
            model, table.tokenizer, keep=keep, layout="per-layer", data=asked.calibration, samples=asked.samples,
            length=asked.length, seed=asked.seed, settings={"bf16": asked.bf16},
        )
        resect.save(result.model, place, tokenizer=table.tokenizer, plan=result.plan)
    return place


def trained(table: Table, way: str, keep: float, seed: int) -> None:
    """One row: a pruned model, recovered in one way."""
    asked, settings = table.asked, dict(WAYS[way])
    model = resect.load(str(pruned(table, keep)))
    torch.manual_seed(seed)
    start = time.perf_counter()
    facts: dict[str, Any] = {"tokens": 0}
    if settings:
        teacher = resect.load(asked.model) if settings.pop("teacher", False) or "mixture" in settings else None
        data = asked.sources if settings.pop("mixed", False) else asked.calibration
        if "mixture" in settings:
            settings["distillation"] = MEASURE_ONLY
            facts["rate of instructions"] = settings["mixture"].instructions_rate
        rate = asked.full_rate if settings.get("full") else asked.rate
        settings |= {"length": 256, "held_out": 32, "evaluations": 5, "batch": asked.batch, "bf16": asked.bf16}
        settings |= {"learning_rate": rate} if rate else {}
        found = recover(
            model, table.tokenizer, data=data, settings=Recovery(**settings), teacher=teacher, seed=seed,
            progress=Path(asked.work) / f"{way}-{keep:g}-{seed}", resume=True, say=print,
        )
        facts["tokens"] = sum(one.tokens for one in found.facts.trainings)
    table.row(way, keep, seed, model, **facts, seconds=time.perf_counter() - start)


def main() -> None:
    """Runs the table."""
    parser = options(__doc__, bf16=True)
    parser.add_argument("--sources", nargs="+", required=True, help="texts that mixtures are made of")
    parser.add_argument("--only", nargs="*", default=list(WAYS), help="names of settings, as in this file")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.5])
    parser.add_argument("--rate", type=float, help="learning rate of low-rank terms, instead of the default")
    parser.add_argument("--full-rate", type=float, help="learning rate of all weights, instead of the default")
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens a step")
    parser.add_argument("--limit", type=int, default=65536, help="tokens of each evaluation text")
    parser.add_argument("--tasks", nargs="*", default=["demo"])
    parser.add_argument("--task-limit", type=int, default=100, help="items of every task")
    parser.add_argument("--work", default="runs/recovery-benchmark", help="where models and states are kept")
    parser.add_argument("--output", default="recovery")
    table = Table(asked := parser.parse_args())
    if not table.found("dense", 1.0, asked.seed):
        table.row("dense", 1.0, asked.seed, resect.load(asked.model), tokens=0, seconds=0.0)
    for keep in asked.keep:
        for way in dict.fromkeys(["untrained", *asked.only]):
            if not table.found(way, keep, asked.seed):
                trained(table, way, keep, asked.seed)


if __name__ == "__main__":
    main()
