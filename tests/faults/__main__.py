"""The whole campaign: `make faults`. Writes docs/reliability.md; fails if anything is wrong.

    python -m tests.faults --only compare --most 10

takes a part of it, and writes nothing. With --most alone, the page says that it is of a selection.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.preparation import quiet_process

quiet_process()

from tests.faults import injection, table  # noqa: E402
from tests.faults.children import forked  # noqa: E402
from tests.faults.readers import TARGETS, Journals, Readers  # noqa: E402
from tests.faults.runs import RUNS  # noqa: E402
from tests.faults.trials import Trial  # noqa: E402

SEED = 24
MUTATIONS = 60
"""Of each file that is read."""
EXAMPLES = 400
"""Of each property."""
STEPS = 40
"""Sequences of the machine."""
HOME = Path(__file__).parents[2]


@dataclass(frozen=True)
class Work:
    """A part of the campaign that one process does."""

    sort: str
    name: str


def main() -> int:
    """Does all of it, or the part that was asked for."""
    asked = _arguments()
    started = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="resect-faults-"))
    try:
        rows = list(_rows(asked, base))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    rows.sort(key=lambda row: (table.SORTS.index(row["sort"]), row["order"]))
    for row in rows:
        for line in row["wrong"]:
            print(f"WRONG  {row['sort']}, {row['name']}: {line[-900:]}")
    facts = table.facts(seed=asked.seed, seconds=time.monotonic() - started, most=asked.most)
    if not asked.only:
        results = HOME / "benchmarks" / "results" / "reliability.json"
        results.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        (HOME / "docs" / "reliability.md").write_text(table.page(facts, rows), encoding="utf-8")
    print(table.summary(rows, facts))
    return 1 if any(row["counts"].get("wrong") for row in rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="parts whose sort or name has this in it")
    parser.add_argument(
        "--most", type=int, help="at most so many faults of a sort in a run; default: all"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--mutations", type=int, default=MUTATIONS, help="of each file")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each property")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    return parser.parse_args()


def _works(asked: argparse.Namespace) -> list[Work]:
    """The parts, the longest first."""
    works = [
        Work("values", "properties"),
        Work("machine", "a run directory in the hands of chance"),
    ]
    works += [Work("run", name) for name in RUNS]
    works += [Work("journal", name) for name, run in RUNS.items() if run.halved]
    works += [Work("file", target.name) for target in TARGETS]
    return [work for work in works if asked.only in f"{work.sort}: {work.name}"]


def _rows(asked: argparse.Namespace, base: Path) -> Iterator[dict[str, Any]]:
    """The rows of the table, as they come."""
    import peft  # noqa: F401 - what every worker needs is imported once
    import transformers  # noqa: F401

    import resect.cli  # noqa: F401

    injection.install()
    works = _works(asked)
    context = multiprocessing.get_context("fork")
    with context.Pool(asked.workers, initializer=_begin, initargs=(asked, base)) as pool:
        for number, rows in pool.imap_unordered(_done, enumerate(works)):
            for row in rows:
                print(table.line(row), flush=True)
                yield {**row, "order": number}


_asked: argparse.Namespace
_root: Path
_readers: list[Readers] = []


def _begin(asked: argparse.Namespace, base: Path) -> None:
    """In each worker: a folder of its own."""
    global _asked, _root
    _asked, _root = asked, base / str(os.getpid())
    _root.mkdir()


def _done(numbered: tuple[int, Work]) -> tuple[int, list[dict[str, Any]]]:
    """The rows of one part; each is done in a child, so that one leaves nothing to the next."""
    number, work = numbered
    if work.sort == "file" and not _readers:
        _readers.append(Readers(_root / "files"))
        _readers[0].warm()
    ended = forked(lambda: PARTS[work.sort](work.name), seconds=3600)
    if ended.how == "returned":
        return number, ended.value
    broken = f"the harness itself: {ended.how}: {str(ended.value)[-1500:]}"
    return number, [
        table.row(table.SORTS[0], work.name, tried=1, counts={"wrong": 1}, wrong=[broken])
    ]


def _run(name: str) -> list[dict[str, Any]]:
    trial = Trial(RUNS[name], _root / "work", most=_asked.most)
    trial.warm()
    return [
        table.row(
            found.sort,
            name,
            tried=found.tried,
            distinct=found.distinct,
            counts=found.counts,
            wrong=found.wrong,
        )
        for found in trial.all()
    ]


def _file(name: str) -> list[dict[str, Any]]:
    target = next(one for one in TARGETS if one.name == name)
    found = _readers[0].damaged(target, count=_asked.mutations, seed=_asked.seed)
    return [
        table.row("damaged file", name, tried=found.tried, counts=found.counts, wrong=found.wrong)
    ]


def _journal(name: str) -> list[dict[str, Any]]:
    trial = Trial(RUNS[name], _root / "work")
    trial.warm()
    found = Journals(trial).damaged(count=2 * _asked.mutations, seed=_asked.seed)
    return [
        table.row(
            "damaged file", found.target, tried=found.tried, counts=found.counts, wrong=found.wrong
        )
    ]


def _values(name: str) -> list[dict[str, Any]]:
    return _tests("value", "tests/faults/test_values.py", _asked.examples)


def _machine(name: str) -> list[dict[str, Any]]:
    return _tests(
        "sequence of events",
        "tests/faults/test_campaign.py::test_a_run_directory_in_the_hands_of_chance",
        STEPS,
    )


def _tests(sort: str, file: str, examples: int) -> list[dict[str, Any]]:
    """Tests by hypothesis with more examples; they count what was accepted and what was refused."""
    counts = _root / "counts.json"
    environment = os.environ | {"RESECT_EXAMPLES": str(examples), "RESECT_COUNTS": str(counts)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    ran = subprocess.run(
        command, cwd=HOME, env=environment, capture_output=True, text=True, check=False
    )
    found: dict[str, dict[str, int]] = (
        json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
    )
    said = ran.stdout.splitlines()
    why = " ".join(line[1:].strip() for line in said if line.startswith("E  "))
    failed = [f"{line}: {why}" for line in said if line.startswith("FAILED")]
    rows = [
        table.row(sort, _words(name), tried=sum(one.values()), counts=one, wrong=[])
        for name, one in found.items()
    ]
    if ran.returncode:
        wrong = failed or [ran.stdout[-1000:] + ran.stderr[-1000:]]
        rows.append(
            table.row(sort, "failed", tried=len(wrong), counts={"wrong": len(wrong)}, wrong=wrong)
        )
    return rows


def _words(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


PARTS = {"run": _run, "file": _file, "journal": _journal, "values": _values, "machine": _machine}
__all__: Sequence[str] = ("main",)

if __name__ == "__main__":
    sys.exit(main())
