"""How fast the demo model is when half of its blocks' parameters are gone, and whether a latency budget of 0.7 is met.

    python benchmarks/speed.py            # ten minutes on two quiet cores
    python benchmarks/speed.py --batches 1 --lengths 32 --repeats 1 --decode 4 --works prefill:1x32 --rounds 1      # a trial

All models run in this process in turns. `ideal` is the speed-up that the multiply-accumulates (prefill) or the bytes of weights
that a token reads (decode) allow, `reached` the share of it that is there, `low` and `high` are 95 % of a bootstrap of the
rounds. Units go by weight magnitude: which ones they are does not matter to a clock. `half` has whatever width the budget gives,
`half, aligned` multiples of 64; `latency:...` are the plans for a share of the dense model's seconds, each measured once more
after it was made, in a copy of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from record import RESULTS, environment, write
from transformers import PreTrainedModel

import resect
from resect.evaluation import latencies, latency_table
from resect.graph import Graph
from resect.methods import Result
from resect.methods.budget import timed_share
from resect.plan import Workload
from resect.recipe.bench import bench_rows, described
from resect.report import Benched, BenchRow

HALVES: Mapping[str, Mapping[str, Any]] = {"half": {"keep": 0.5}, "half, aligned": {"keep": 0.5, "align": 64}}
REACHED = 0.9
"""The share of the ideal speed-up that is asked for where work or bytes dominate."""


def pruned(model: PreTrainedModel, **options: Any) -> Result:
    """A copy of the dense model, cut by weight magnitude, every layer alike."""
    return resect.prune(copy.deepcopy(model), settings={"criterion": "l2"}, layout="uniform", **options)


def widths(result: Result) -> str:
    """What every layer keeps."""
    return ", ".join(sorted({f"{len(kept.keep)} of {kept.units} {kept.kind}" for kept in result.plan.groups.values()}))


def budget(model: PreTrainedModel, graph: Graph, share: float, work: str, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A plan for a share of the seconds: what was predicted, measured while it was chosen, and measured afterwards."""
    table = latency_table(model, graph, Workload.parse(work), rounds=rounds)
    result = pruned(model, budget=f"latency:{share}@{work}", latency_table=table)
    after = timed_share(model, graph, result.plan, table.workload)
    facts = result.report["budget"]
    off = after["measured"] / share - 1
    said = {
        "widths": widths(result),
        "predicted": round(facts["predicted"], 4),
        "measured": round(facts["measured"], 4),
        "measured afterwards": f"{after['measured']:.4f} [{after['low']:.4f}, {after['high']:.4f}]",
        "off": f"{100 * off:+.1f} % ({'met within' if abs(off) <= 0.05 else 'not met within'} 5 %)",
        "plans tried": len(facts["tried"]),
    }
    return said, {**table.model_dump(mode="json"), "edges": {steps.kind: steps.edges for steps in table.families}}


def line(row: BenchRow, first: str) -> dict[str, Any]:
    """A row of the table."""
    found: dict[str, Any] = {
        "work": row.work,
        "model": row.model,
        "ms": 1e3 * row.seconds.median,
        "low ms": 1e3 * row.seconds.low,
        "high ms": 1e3 * row.seconds.high,
        "tokens/s": row.tokens_per_second,
    }
    if row.model == first:
        return found
    reached = {"ideal": row.ideal, "reached": f"{row.reached:.0%}", "verdict": "" if row.reached >= REACHED else "below 90 %"}
    return found | {"speed-up": row.speedup, "low": row.low, "high": row.high, **reached}


def verdicts(rows: Sequence[BenchRow], first: str) -> dict[str, str]:
    """Where the ideal is reached, and where not."""
    found = {}
    for phase in ("prefill", "decode"):
        here = [row for row in rows if row.phase == phase and row.model != first]
        good = [f"{row.model} at {row.batch}x{row.length} ({row.reached:.0%})" for row in here if row.reached >= REACHED]
        short = [f"{row.model} at {row.batch}x{row.length} ({row.reached:.0%})" for row in here if row.reached < REACHED]
        found[f"{phase}, 90 % of the ideal or more"] = "; ".join(good) or "nowhere"
        found[f"{phase}, less"] = "; ".join(short) or "nowhere"
    return found


def main() -> None:
    """Runs everything and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--works", nargs="*", default=["prefill:1x512", "decode:1x512"], help="of latency budgets")
    parser.add_argument("--rounds", type=int, default=3, help="for every pass of a latency table, at least")
    parser.add_argument("--output", default="speed")
    asked = parser.parse_args()
    torch.manual_seed(0)
    dense = resect.load(asked.model)
    graph = resect.trace(dense)
    results = {name: pruned(dense, **options) for name, options in HALVES.items()}
    models = {"dense": dense, **{name: result.model for name, result in results.items()}}
    graphs = {name: graph if model is dense else resect.trace(model) for name, model in models.items()}
    benched: dict[str, Benched] = {name: described(name, models[name], graphs[name]) for name in models}
    rows: list[BenchRow] = []
    for batch in asked.batches:
        for length in asked.lengths:
            found = latencies(models, prompt=length, decode=asked.decode, repeats=asked.repeats, batch=batch)
            rows += bench_rows(found, benched, graphs)
            print(*(line(row, "dense") for row in rows[-2 * len(models) :]), sep="\n", flush=True)
    about = {"asked": vars(asked), **environment(), "dtype": "float32"}
    about |= {name: f"{widths(result)}; {benched[name].parameters:,} parameters" for name, result in results.items()}
    about |= verdicts(rows, "dense")
    tables = {}
    for work in asked.works:
        said, tables[work] = budget(dense, graph, asked.share, work, asked.rounds)
        about[f"latency:{asked.share}@{work}"] = ", ".join(f"{key}: {value}" for key, value in said.items())
        print(work, said, flush=True)
    write(asked.output, about, [line(row, "dense") for row in rows])
    write_tables(asked.output, tables)


def write_tables(name: str, tables: Mapping[str, Any]) -> None:
    """Puts the latency tables beside the rows in the JSON file."""
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
