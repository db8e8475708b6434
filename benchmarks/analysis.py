"""What passing over blocks saves when every coupled group is tested: the same analysis with it and without, in one process.

    python benchmarks/analysis.py            # the demo model on 512 tokens, a quarter of an hour on one core

`seconds` are wall clock, `cpu_seconds` the process's processor time, which other work on the machine disturbs less. `whole_runs`
is how many runs of the whole model over the text would have taken `cpu_seconds`. `difference` is the largest between the two
ways' cross-entropies, in nats per token; `same_protected` says whether both protect the same groups.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from record import environment, write

import resect
from resect.evaluation import perplexity
from resect.report import Knowledge


def timed(asked: argparse.Namespace, *, passing: bool) -> tuple[dict[str, Any], Knowledge]:
    """An analysis, and what it took."""
    model, tokenizer = resect.load(asked.model), resect.load_tokenizer(asked.model)
    start, worked = time.perf_counter(), time.process_time()
    found = resect.analyze(
        model,
        tokenizer,
        text=asked.text,
        kinds=asked.kinds,
        ratios=asked.ratios,
        window=asked.window,
        limit=asked.tokens,
        passing=passing,
        name=asked.model,
    )
    row = {
        "blocks passed over": found.passing,
        "groups": len(found.groups),
        "removals": sum(len({removal.removed for removal in group.removals}) for group in found.groups),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - worked,
    }
    return row, found


def one_run(asked: argparse.Namespace) -> float:
    """Processor seconds of one run of the whole model over the text."""
    from resect.calibration import evaluation_tokens

    model, tokenizer = resect.load(asked.model), resect.load_tokenizer(asked.model)
    tokens = evaluation_tokens(asked.text, tokenizer, limit=asked.tokens)
    perplexity(model, tokens, window=asked.window)
    start = time.process_time()
    perplexity(model, tokens, window=asked.window)
    return time.process_time() - start


def all_nats(found: Knowledge) -> torch.Tensor:
    """Every cross-entropy that was measured."""
    return torch.tensor([removal.nats for group in found.groups for removal in group.removals], dtype=torch.float64)


def main() -> None:
    """Runs both and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", default=["heads", "channels", "experts"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run = one_run(asked)
    rows, found = zip(*(timed(asked, passing=passing) for passing in (False, True)), strict=True)
    difference = float((all_nats(found[0]) - all_nats(found[1])).abs().max())
    for row in rows:
        row["whole_runs"] = row["cpu_seconds"] / run
        row["difference"] = difference
        row["same_protected"] = found[0].protected == found[1].protected
    about = {"asked": vars(asked), "one run of the whole model, cpu_seconds": round(run, 3), **environment()}
    write("analysis", about, rows)


if __name__ == "__main__":
    main()
