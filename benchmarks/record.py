"""What every benchmark records: the machine, the versions, and a table that was generated.

    python benchmarks/record.py quality quality-a quality-b

joins the tables of runs that were made apart, of one script with the same settings but other criteria.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
KEYS = ("share", "kept", "criterion", "layout", "settings", "steps", "seed", "computed in")
"""What tells the rows of a table apart."""


def options(description: str | None, *, bf16: bool = False) -> argparse.ArgumentParser:
    """What is asked of every benchmark that measures quality: model, evaluation texts, calibration; of some, `--bf16`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--wikitext", required=True, help="WikiText-2 test, raw")
    parser.add_argument("--c4", required=True, help="C4 text that is not in the calibration set")
    parser.add_argument("--calibration", nargs="+", default=["demo"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=42)
    if bf16:
        parser.add_argument("--bf16", action="store_true", help="what torch.autocast deems safe is computed in bfloat16")
    return parser


def computing(bf16: bool) -> AbstractContextManager[Any]:
    """Whether networks compute in bfloat16 where torch.autocast deems it safe; weights may change meanwhile."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()


def environment() -> dict[str, Any]:
    """Processor, accelerator, threads and versions."""
    return {
        "script": Path(sys.argv[0]).name,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def apart(work: Callable[..., Any], *given: Any, limit: float = 600) -> Any:
    """What a function gives in a process of its own, forked from this one so that nothing is imported again.

    Raises what the function raises, and `TimeoutError` after so many seconds.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(work, given).get(limit)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"not done after {limit:.0f} s") from None


def reset_peak_memory(device: str) -> None:
    """Starts measuring peak memory anew, where that can be done."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator holds back from earlier runs is not in use
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> float:
    """Peak memory since the last reset, GiB: of the accelerator, or of the process."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated()) / 2**30
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds(run: Callable[[], object]) -> float:
    """Wall clock of one call."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(device: str, run: Callable[[], object]) -> float:
    """Peak memory of the process or the accelerator during one call, GiB."""
    gc.collect()
    reset_peak_memory(device)
    run()
    return peak_memory(device)


def write(name: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """`results/<name>.json` with everything, `results/<name>.md` with the table, under what `<name>.notes.md` says of it."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1, default=str) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    script = about.get("script", f"{name}.py")
    facts = [f"- {key}: {value}" for key, value in about.items() if key != "script"]
    notes = RESULTS / f"{name}.notes.md"
    said = ["", notes.read_text().strip()] if notes.exists() else []
    (RESULTS / f"{name}.md").write_text(
        f"# {name}\n\nGenerated by `benchmarks/{script}`.\n\n" + "\n".join([*facts, *said, "", *lines]) + "\n"
    )


PARTS = ("criteria", "only", "output", "work", "bf16")
"""What processes that divide a table are asked for each."""


def join(name: str, parts: Sequence[str]) -> None:
    """One table from several; of rows that occur in each, such as the dense model's, the last stays."""
    read = [json.loads((RESULTS / f"{part}.json").read_text()) for part in parts]
    processors = dict.fromkeys(name for part in read for name in str(part["about"]["processor"]).split(", "))
    about = {**read[0]["about"], "processor": ", ".join(processors), "runs": len(read)}
    asked = [{k: v for k, v in part["about"]["asked"].items() if k not in PARTS} for part in read]
    if any(other != asked[0] for other in asked):
        raise SystemExit(f"These runs were not made with the same settings: {asked}")
    rows = {tuple(row.get(key) for key in KEYS): row for part in read for row in part["rows"]}
    ordered = list(rows.values())
    if "share" in ordered[0]:
        ordered.sort(key=lambda row: (-row["share"], row["settings"], row.get("computed in", "")))
    write(name, {**about, "asked": asked[0]}, ordered)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    join(sys.argv[1], sys.argv[2:])
