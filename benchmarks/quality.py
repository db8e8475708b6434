"""Every criterion and layout on a model: perplexity at equal size, seconds and memory, in one generated table.

    python benchmarks/quality.py --wikitext wiki.test.raw --c4 heldout.txt --calibration c4.jsonl --device cuda

Each criterion's statistics are collected once and serve every layout and size. What is scored is the model that was really cut.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator

import torch
from record import environment, options, peak_memory, reset_peak_memory, write
from torch import nn

import resect
from resect.calibration import calibrate, evaluation_tokens
from resect.evaluation import perplexity
from resect.graph import Graph
from resect.plan import Plan, select
from resect.saliency import score
from resect.statistics import CRITERIA, collect
from resect.surgery import cut_and_check

SHARES = (0.8, 0.5)
KINDS = ("heads", "channels")


def plans(graph: Graph, scores: dict[str, torch.Tensor]) -> Iterator[tuple[float, str, Plan]]:
    """A plan per share and layout. The paper spares the first and last blocks; heads, of which there are few here, go at 0.5."""
    count = graph.blocks.count
    inner = (-(-count // 8), count - max(1, count // 16) - 1)
    for share in SHARES:
        kinds = KINDS if share < 0.8 else ("channels",)
        paper = {"selection": "local", "ranges": dict.fromkeys(KINDS, inner), "kinds": kinds}
        yield share, "uniform", select(graph, scores, keep=share, layout="uniform")
        yield share, "per-layer, global", select(graph, scores, keep=share)
        yield share, "per-layer, global, spread 1.2", select(graph, scores, keep=share, spread=1.2)
        yield (
            share,
            f"per-layer, local, {'+'.join(kinds)} of blocks {inner[0]}..{inner[1] - 1}",
            select(graph, scores, keep=share, **paper),
        )


def measure(model: nn.Module, texts: dict[str, tuple[torch.Tensor, int]]) -> dict[str, float]:
    """Perplexity by text and window."""
    return {name: perplexity(model, tokens, window=window).value for name, (tokens, window) in texts.items()}


def main() -> None:
    """Runs the table."""
    parser = options(__doc__)
    parser.add_argument("--limit", type=int, default=65536, help="tokens of each evaluation text")
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="quality")
    asked = parser.parse_args()
    tokenizer = resect.load_tokenizer(asked.model)
    dense = resect.load(asked.model).to(asked.device)
    graph = resect.trace(dense)
    calibration = calibrate(asked.calibration, tokenizer, samples=asked.samples, length=asked.length, seed=asked.seed)
    wikitext = evaluation_tokens(asked.wikitext, tokenizer, limit=asked.limit)
    c4 = evaluation_tokens(asked.c4, tokenizer, limit=min(32768, asked.limit))
    texts = {"WikiText-2@128": (wikitext, 128), "WikiText-2@2048": (wikitext, 2048), "C4@1024": (c4, 1024)}
    rows = [{"kept": 1.0, "criterion": "dense", "layout": "", **measure(dense, texts), "collect_seconds": 0.0, "peak_GiB": 0.0}]
    for criterion in asked.criteria:
        reset_peak_memory(asked.device)
        start = time.perf_counter()
        statistics = collect(dense, calibration.tokens, graph, criterion, kinds=KINDS)
        seconds, peak = time.perf_counter() - start, peak_memory(asked.device)
        for share, layout, plan in plans(graph, score(graph, statistics, seed=asked.seed)):
            model = copy.deepcopy(dense)
            checked = cut_and_check(model, plan, graph)
            kept = sum(p.numel() for n, p in model.named_parameters() if graph.blocks.layer_of(n) is not None)
            row = {"kept": kept / graph.parameter_count(blocks_only=True), "criterion": criterion, "layout": layout}
            assert row["kept"] <= share
            rows.append({**row, **measure(model, texts), "collect_seconds": seconds, "peak_GiB": peak, **checked})
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            del model
            gc.collect()
            write(asked.output, {"asked": vars(asked) | {"calibration": dict(calibration.provenance)}, **environment()}, rows)


if __name__ == "__main__":
    main()
