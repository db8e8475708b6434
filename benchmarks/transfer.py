"""Knowledge transfer: units that fade while adapters train, beside units that are cut first and adapters that train afterwards.

    python benchmarks/transfer.py --wikitext wiki.test.raw --c4 heldout.txt --calibration c4.jsonl --seeds 0 1 2

Both remove the same number of parameters and train on as many tokens of the same text in the same order; scores are given by
`--criterion`. Rows are written as they come, and those that are there are not measured again.
"""

from __future__ import annotations

import json
import time
from typing import Any

from record import RESULTS, computing, environment, options, write

import resect
from resect.calibration import calibrate, evaluation_tokens
from resect.evaluation import perplexity


def ways(steps: int) -> dict[str, dict[str, int]]:
    """The settings that are compared, each of so many gradient steps; what is not trained has the fewest there can be."""
    warmup, periods, fading = steps // 10, 4, steps * 6 // 10

    def faded(*, warmup: int, periods: int, fading: int) -> dict[str, int]:
        each = fading // periods
        settled = steps - warmup - periods * each
        return {"warmup_steps": warmup, "periods": periods, "period_steps": each, "settle_steps": settled}

    return {
        "untrained": {"warmup_steps": 0, "periods": 1, "period_steps": 1, "settle_steps": 0},
        "cut, then trained": faded(warmup=0, periods=1, fading=1),
        "faded in a fifth of the steps": faded(warmup=0, periods=1, fading=steps // 5),
        "faded in one period": faded(warmup=warmup, periods=1, fading=fading),
        "faded in four periods": faded(warmup=warmup, periods=periods, fading=fading),
    }


def main() -> None:
    """Runs the table."""
    parser = options(__doc__, bf16=True)
    parser.set_defaults(samples=256, length=256)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.5])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--criterion", default="element2")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--limit", type=int, default=65536, help="tokens of each evaluation text")
    parser.add_argument("--output", default="transfer")
    asked = parser.parse_args()
    tokenizer = resect.load_tokenizer(asked.model)
    wikitext = evaluation_tokens(asked.wikitext, tokenizer, limit=asked.limit)
    c4 = evaluation_tokens(asked.c4, tokenizer, limit=min(asked.limit, 32768))
    stored = RESULTS / f"{asked.output}.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if stored.exists() else []
    about = {"asked": {k: v for k, v in vars(asked).items() if k not in ("only", "seeds", "keep", "steps")}, **environment()}
    for seed in asked.seeds:
        calibration = calibrate(asked.calibration, tokenizer, samples=asked.samples, length=asked.length, seed=seed)
        for keep in asked.keep:
            for way, settings in ways(asked.steps).items():
                place = {"settings": way, "criterion": asked.criterion, "kept": keep, "steps": asked.steps, "seed": seed}
                if any(place.items() <= row.items() for row in rows) or (asked.only and way not in asked.only):
                    continue
                model, start = resect.load(asked.model), time.perf_counter()
                given = {**settings, "learning_rate": asked.rate, "criterion": asked.criterion}
                given |= {"analysis": None, "estimate_windows": 16, "bf16": asked.bf16}
                if way == "untrained":
                    given["learning_rate"] = 1e-30  # AdamW's first step is as long as its rate
                result = resect.prune(
                    model, method="lorashear", layout="per-layer", keep=keep, data=calibration.tokens, seed=seed, settings=given
                )
                sizes = result.report["block_parameters"]
                facts = {"share": sizes["pruned"] / sizes["dense"], "last losses": _tail(result.report["losses"])}
                facts["seconds"] = time.perf_counter() - start
                with computing(asked.bf16):
                    found = {"WikiText-2@128": perplexity(model, wikitext, window=128).value}
                    found["C4@1024"] = perplexity(model, c4, window=1024).value
                rows.append({**place, **found, **facts})
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
                order = list(ways(asked.steps))
                rows.sort(
                    key=lambda row: (-row["kept"], row["criterion"], row["steps"], order.index(row["settings"]), row["seed"])
                )
                write(asked.output, about, rows)


def _tail(losses: list[float]) -> float:
    """The mean of the last tenth, at least one."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    main()
