"""LLM-Pruner's best settings on the whole of two texts: the figures that are compared with other programs.

    python benchmarks/headline.py --wikitext wiki.test.raw --c4 heldout.txt --calibration c4.jsonl
"""

from __future__ import annotations

import copy
import time
from typing import Any

from record import environment, options, write

import resect
from resect.calibration import calibrate, evaluation_tokens
from resect.evaluation import perplexity
from resect.methods import LLMPruner
from resect.statistics import Data
from resect.surgery import cut_and_check


def main() -> None:
    """Runs the table."""
    parser = options(__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings to run, in the order of this file")
    parser.add_argument("--output", default="headline")
    asked = parser.parse_args()
    tokenizer = resect.load_tokenizer(asked.model)
    dense = resect.load(asked.model)
    graph = resect.trace(dense)
    calibration = calibrate(asked.calibration, tokenizer, samples=asked.samples, length=asked.length, seed=asked.seed)
    wikitext = evaluation_tokens(asked.wikitext, tokenizer, limit=65536)
    c4 = evaluation_tokens(asked.c4, tokenizer, limit=32768)
    spared: dict[str, Any] = {"selection": "local", "blocks": {"channels": (4, 28)}, "kinds": ("channels",)}
    runs = [
        (0.8, "spread 1.2, in three steps", LLMPruner(iterations=3)),
        (0.5, "spread 1.2", LLMPruner()),
        (0.8, "spread 1.2", LLMPruner()),
        (0.8, "local, channels of blocks 4..27", LLMPruner(**spared)),
        (0.8, "local, channels of blocks 4..27, in three steps", LLMPruner(**spared, iterations=3)),
        (0.5, "spread 1.2, in three steps", LLMPruner(iterations=3)),
    ]
    rows = []
    for keep, name, method in [runs[number] for number in asked.only] if asked.only else runs:
        start = time.perf_counter()
        plan, _ = method.plan(dense, graph, Data(calibration.tokens.split(1)), keep=keep, seed=asked.seed)
        seconds = time.perf_counter() - start
        model = copy.deepcopy(dense)
        checked = cut_and_check(model, plan, graph)
        kept = graph.parameter_count(plan.removed(), blocks_only=True) / graph.parameter_count(blocks_only=True)
        row = {
            "kept": kept,
            "settings": f"element2, per-layer, {name}",
            "WikiText-2@128": perplexity(model, wikitext, window=128).value,
            "C4@1024": perplexity(model, c4, window=1024).value,
            "plan_seconds": seconds,
        }
        rows.append({**row, **(checked or {})})
        print(rows[-1], flush=True)
        write(asked.output, {"asked": vars(asked) | {"calibration": dict(calibration.provenance)}, **environment()}, rows)


if __name__ == "__main__":
    main()
