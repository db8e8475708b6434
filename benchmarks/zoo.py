"""Every causal language model type that transformers can build: what is found, and whether cut equals mask.

    python benchmarks/zoo.py            # all types, into docs/zoo.md and benchmarks/results/zoo.json

Each type is made small by rules (tests/zoo/shrink.py) and examined on one thread, at most two and a half minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

from record import RESULTS, environment
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
LIMIT = 150
"""Processor seconds for one type, so that a busy machine gives the same table."""


def some(types: Sequence[str], seed: int) -> None:
    """Prints the row of each type as a line of JSON."""
    import torch
    import transformers

    from tests.zoo.examine import Row, examine

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _late)
    for name in types:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        start = time.perf_counter()
        row = Row(name)
        try:
            examine(name, seed=seed, row=row)
        except _Late:
            row.problem = f"not done after {LIMIT} s"
        signal.setitimer(signal.ITIMER_PROF, 0)
        found = {**asdict(row), "verified": row.verified, "all_seconds": time.perf_counter() - start}
        print(json.dumps(found), flush=True)


EXACT = 1e-10
"""A difference in float64 that is rounding alone, as a share of the logits' standard deviation."""


class _Late(BaseException):
    """No `except Exception` on the way catches it."""


def _late(number: int, frame: Any) -> None:
    raise _Late


def rows_of(types: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """The rows of some types, from a process of their own; when it dies of one, another goes on behind it."""
    surroundings = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    left = list(types)
    while left:
        command = [sys.executable, __file__, "--some", *left, "--seed", str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings) as process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("{"):
                    left.pop(0)
                    yield json.loads(line)
        if left:
            yield {"type": left.pop(0), "problem": f"the process ended with {process.returncode}"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The page."""
    kinds = ("heads", "channels", "experts", "residual", "sublayers", "blocks", "vocabulary")
    traced = [row for row in rows if row.get("groups")]
    both = [row for row in traced if row["groups"].get("heads") and row["groups"].get("channels")]
    facts = [
        f"{len(rows)} types; {len(traced)} traced; {len(both)} with heads and channels; "
        f"{sum(bool(row['groups'].get('experts')) for row in traced)} with experts; "
        f"{sum(row['prunable'] >= 0.9 for row in traced)} with 90 % or more prunable; "
        f"{sum(row['verified'] for row in traced)} verified in every kind that is offered, "
        f"{sum(row['verified'] and _exact(row) <= EXACT for row in traced)} of them to {EXACT:.0e} in float64.",
        "",
        "*Verified*: a random plan for each kind on a small model with random weights; the largest difference between cut and",
        "masked logits is at most 1e-4 of their standard deviation, in float32. *float64*: the largest there, which is rounding",
        "alone unless the network's own code computes in float32 on the way; empty where it does not run in float64. *Refused*:",
        "the network's own code cannot take the new sizes, and surgery says so; *left out*: the same of single groups, the",
        "others of their kind were cut.",
        "*Prunable*: the share of the block parameters in use that heads, channels and experts hold together; decoders of",
        "encoder-decoders do not use their cross-attention when they run alone. Each type is made small by rules",
        "(tests/zoo/shrink.py).",
    ]
    head = ["type", *kinds, "prunable", "verified", "float64", "seconds", "notes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        groups = row.get("groups", {})
        cells = [row["type"], *(str(groups.get(kind, "")) for kind in kinds)]
        if groups:
            found = f"{_exact(row):.0e}" if _exact(row) < inf else ""
            cells += [f"{row['prunable']:.0%}", "yes" if row["verified"] else "no", found, f"{row['seconds']:.1f}"]
        else:
            cells += ["", "", "", ""]
        lines.append("| " + " | ".join([*cells, _notes(row)]) + " |")
    return "\n".join(["# The zoo", "", "Generated by `make zoo`.", "", *facts, "", *lines, ""])


def _exact(row: dict[str, Any]) -> float:
    """The largest difference in float64 over all kinds, infinite where one could not be compared in it."""
    found = [row.get("exact", {}).get(kind) for kind in row.get("differences", {})]
    return max((inf if value is None else value for value in found), default=inf)


def _notes(row: dict[str, Any]) -> str:
    notes = [row["problem"][:160]] if row.get("problem") else []
    notes += [f"{kind} refused: {_brief(why)}" for kind, why in row.get("refused", {}).items()]
    notes += [f"{group} left out: {_brief(why)}" for group, why in row.get("left_out", {}).items()]
    notes += [f"{kind} differ by {value:.0e}" for kind, value in row.get("differences", {}).items() if value > 1e-4]
    common = [why for why, _ in Counter(row.get("frozen", {})).most_common() if "output of the network" not in why][:3]
    if row.get("unused", 0) > 0.005:
        notes.append(f"{row['unused']:.0%} of the block parameters not used")
    if row.get("prunable", 1) < 0.9 and common:
        notes.append("frozen: " + "; ".join(common))
    return "; ".join(notes).replace("|", "\\|")


def _brief(why: str) -> str:
    """What is particular to a refusal."""
    why = re.sub(r"^\w+Error: |\w+ cannot be cut this way: its code |does not take the new sizes |\. Leave out .*$", "", why)
    return f"{why[:160]} ..." if len(why) > 160 else why


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--some", nargs="+", default=())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    if asked.some:
        some(asked.some, asked.seed)
        return
    sys.path.insert(0, str(ROOT))
    from tests.zoo.shrink import TYPES

    types = asked.types or TYPES
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(asked.jobs) as pool, tqdm(total=len(types), unit="type") as bar:

        def collect(number: int) -> None:
            for row in rows_of(types[number :: asked.jobs], asked.seed):
                rows.append(row)
                bar.update()

        for done in [pool.submit(collect, number) for number in range(asked.jobs)]:
            done.result()
    rows.sort(key=lambda row: types.index(row["type"]))
    if asked.types:
        print(table(rows))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "zoo.json").write_text(json.dumps({"about": {**environment(), "seed": asked.seed}, "rows": rows}, indent=1) + "\n")
    (ROOT / "docs" / "zoo.md").write_text(table(rows))


if __name__ == "__main__":
    main()
