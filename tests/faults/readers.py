"""Every file that a command reads, with the command that reads it, and what its damage may come to."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.children import Ended, forked
from tests.faults.disk import Tree
from tests.faults.mutations import Mutation, mutations
from tests.faults.preparation import imported_before
from tests.faults.runs import (
    INPUTS,
    LEARNING,
    OUT,
    Outcome,
    called,
    comparable,
    part,
    recipe_values,
    spelling,
    text,
    without_temporary,
)
from tests.faults.runs import dense as write_dense
from tests.faults.trials import REFUSED, SURVIVED, WRONG, Place, _last

OTHER = "another file"
"""The verdict on damage that leaves a valid file which says something else, where nothing vouches for what it said."""
SECONDS = 20
"""In which a damaged file is refused."""
LONGEST = 4_000
"""Characters that an error may have: a damaged file is not printed whole."""


@dataclass(frozen=True)
class Target:
    """A file that a command reads."""

    name: str
    file: str
    form: str
    words: Sequence[str]
    typed: str = ""
    """What stands on standard input."""
    vouched: bool = False
    """Whether something says what the file must be, so that no damage may go unnoticed."""
    output: bool = False
    """Whether what is written is what counts, not what is printed."""
    share: float = 1.0
    """Of the usual number of mutations."""


EVALUATE = [
    "--text",
    f"{INPUTS}/text.txt",
    "--window",
    "12",
    "--limit",
    "24",
    "--prompt",
    "The",
    "--set",
    "new_tokens=2",
    "--json",
]
KEEP = ["--keep", "0.7"]
CALIBRATED = ["--samples", "4", "--length", "12", "--layout", "per-layer"]
PLANNED = ["--dry-run", "-o", OUT]


def _evaluated(name: str, file: str, form: str, model: str, **more: Any) -> Target:
    return Target(
        name, f"{INPUTS}/{file}", form, ["evaluate", f"{INPUTS}/{model}", *EVALUATE], **more
    )


def _calibrated(name: str, file: str, form: str) -> Target:
    words = ["prune", f"{INPUTS}/dense", "--data", f"{INPUTS}/{file}", *CALIBRATED, *KEEP, *PLANNED]
    return Target(name, f"{INPUTS}/{file}", form, words, output=True)


def _planned(name: str, file: str, *flags: str) -> Target:
    words = [
        "prune",
        f"{INPUTS}/dense",
        "--data",
        f"{INPUTS}/text.txt",
        *CALIBRATED,
        *PLANNED,
        *flags,
    ]
    return Target(name, f"{INPUTS}/{file}", "json", words, output=True)


RECOVER = [
    "-o",
    OUT,
    "--data",
    f"{INPUTS}/text.txt",
    *(f"--set=settings.{key}={value}" for key, value in LEARNING.items()),
]


def _recovered(name: str, file: str, form: str, model: str, **more: Any) -> Target:
    return Target(
        name,
        f"{INPUTS}/{file}",
        form,
        ["recover", f"{INPUTS}/{model}", *RECOVER],
        output=True,
        **more,
    )


TARGETS: Sequence[Target] = (
    _evaluated("config.json", "dense/config.json", "json", "dense"),
    _evaluated("weights", "dense/model.safetensors", "safetensors", "dense"),
    _evaluated("weights in shards", "sharded/model-00001.safetensors", "safetensors", "sharded", share=0.5),
    _evaluated("index of shards", "sharded/model.safetensors.index.json", "json", "sharded"),
    _evaluated("tokenizer.json", "dense/tokenizer.json", "json", "dense"),
    _evaluated("tokenizer_config.json", "dense/tokenizer_config.json", "json", "dense"),
    _evaluated("generation_config.json", "dense/generation_config.json", "json", "dense"),
    _evaluated("config.json with a record of cuts", "pruned/config.json", "json", "pruned"),
    _evaluated("GGUF", "m.gguf", "gguf", "m.gguf"),
    Target(
        "chat template", f"{INPUTS}/dense/chat_template.jinja", "jinja",
        ["chat", f"{INPUTS}/dense", "--max-new-tokens", "2"], "Hi\n",
    ),
    _calibrated("text", "text.txt", "text"),
    _calibrated("texts as JSONL", "rows.jsonl", "jsonl"),
    _calibrated("texts as JSON", "rows.json", "json"),
    Target(
        "task", f"{INPUTS}/task.jsonl", "jsonl", ["evaluate", f"{INPUTS}/dense", "--tasks", f"{INPUTS}/task.jsonl", "--json"]
    ),
    Target("recipe", f"{INPUTS}/recipe.yaml", "yaml", ["run", f"{INPUTS}/recipe.yaml", "--dry-run", "-o", OUT], output=True),
    Target(
        "recipe of a recovery", f"{INPUTS}/recover.yaml", "yaml", ["recover", "--recipe", f"{INPUTS}/recover.yaml"], output=True,
        share=0.5,
    ),
    _planned("analysis.json", "analysis.json", *KEEP, "--protect", f"{INPUTS}/analysis.json"),
    _planned("latency table", "latency.json", "--budget", "latency:0.9@prefill:1x8", "--latency-table", f"{INPUTS}/latency.json"),
    Target("report.json of a run", f"{INPUTS}/run/report.json", "json", ["compare", f"{INPUTS}/run", f"{INPUTS}/run2", "--json"]),
    _recovered("plan.json beside a model", "pruned/plan.json", "json", "pruned", share=0.5),
    _recovered("pattern.json beside a model", "sparse/pattern.json", "json", "sparse", share=0.5),
    _recovered("resect.json beside a model", "pruned/resect.json", "json", "pruned", share=0.3),
    _recovered("recipe.yaml beside a model", "pruned/recipe.yaml", "yaml", "pruned", share=0.3),
    _recovered("report.json beside a model", "pruned/report.json", "json", "pruned", share=0.3),
)  # fmt: skip


@dataclass
class Damage:
    """What became of the mutations of one file."""

    target: str
    tried: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def write_inputs(root: Path, *, made: bool = True) -> None:
    """All files that are read, in one folder; with those that resect makes, if asked."""
    import yaml

    given = root / INPUTS
    given.mkdir()
    model = write_dense(given / "dense")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    text(given / "text.txt")
    lines = (given / "text.txt").read_text(encoding="utf-8").splitlines()
    rows = [{"text": line, "number": number} for number, line in enumerate(lines)]
    (given / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (given / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    tasks = [
        {"query": line[:9], "choices": [line[9:14], " tide"], "gold": number % 2}
        for number, line in enumerate(lines[:6])
    ]
    (given / "task.jsonl").write_text(
        "\n".join(json.dumps(task) for task in tasks), encoding="utf-8"
    )
    (given / "recipe.yaml").write_text(yaml.safe_dump(recipe_values()), encoding="utf-8")
    recovery = {
        "model": f"{INPUTS}/pruned",
        "output": OUT,
        "data": [f"{INPUTS}/text.txt"],
        "settings": LEARNING,
    }
    (given / "recover.yaml").write_text(yaml.safe_dump(recovery), encoding="utf-8")
    _shards(given)
    if made:
        write_made(given)


def write_made(given: Path) -> None:
    """Files that resect makes and reads again."""
    from typer.testing import CliRunner

    from resect.cli import app

    def made(*words: str) -> None:
        result = CliRunner().invoke(app, [*words], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    dense = f"{INPUTS}/dense"
    flags = [*CALIBRATED, "--data", f"{INPUTS}/text.txt", "--set", "settings.criterion=l2"]
    kept = [*flags, *KEEP]
    measured = [
        "--set",
        f"evaluation.texts={INPUTS}/text.txt",
        "--set",
        "evaluation.windows=12",
        "--set",
        "evaluation.limit=48",
    ]
    for name in ("run", "run2"):
        made(
            "prune",
            dense,
            "-o",
            f"{INPUTS}/{name}",
            *flags,
            *measured,
            "--keep",
            "0.8" if name == "run" else "0.6",
        )
    made("prune", dense, "-o", f"{INPUTS}/pruned", *kept)
    sparse = ["--method", "llm-surgeon", "--set", "settings.mode=2:4", "--set", "settings.shots=1"]
    made(
        "prune",
        dense,
        "-o",
        f"{INPUTS}/sparse",
        *CALIBRATED,
        *KEEP,
        "--data",
        f"{INPUTS}/text.txt",
        *sparse,
    )
    made(
        "analyze",
        dense,
        "-o",
        f"{INPUTS}/analysis",
        "--text",
        f"{INPUTS}/text.txt",
        "--ratios",
        "0.5",
        "--window",
        "12",
        "--limit",
        "24",
    )
    os.replace(given / "analysis" / "analysis.json", given / "analysis.json")
    made(
        "bench",
        dense,
        "-o",
        f"{INPUTS}/bench",
        "--length",
        "8",
        "--decode",
        "2",
        "--repeats",
        "1",
        "--table",
    )
    spelling(given / "spelling")
    made(
        "export",
        f"{INPUTS}/spelling",
        "-o",
        f"{INPUTS}/m.gguf",
        "--format",
        "gguf",
        "--quantize",
        "f32",
        "--no-verify",
    )
    _latency(given)


def _shards(given: Path) -> None:
    from resect.checkpoint import load, load_tokenizer

    load(given / "dense").save_pretrained(given / "sharded", max_shard_size="8KB")
    load_tokenizer(given / "dense").save_pretrained(given / "sharded")
    index = given / "sharded" / "model.safetensors.index.json"
    said = index.read_text(encoding="utf-8")
    for number, shard in enumerate(sorted((given / "sharded").glob("model-*.safetensors")), 1):
        name = f"model-{number:05}.safetensors"
        said = said.replace(shard.name, name)
        shard.rename(given / "sharded" / name)
    index.write_text(said, encoding="utf-8")


def _latency(given: Path) -> None:
    """A latency table by whose numbers time can be saved; those of so small a model are noise."""
    table = json.loads((given / "bench" / "prefill.json").read_text(encoding="utf-8"))
    table["seconds"] = 0.01
    for family in table["families"]:
        share = 0.004 / len(family["homes"]) / family["units"]
        family["seconds"] = {units: share * int(units) for units in family["seconds"]}
    (given / "latency.json").write_text(json.dumps(table), encoding="utf-8")


class Readers:
    """Damages files and has them read."""

    def __init__(self, root: Path, *, made: bool = True) -> None:
        """`made`: with the files that resect itself makes, which takes a while."""
        self.place = Place(str(root), verified=False)
        self.place.fill({})
        _returned(
            forked(lambda: self.place.inside(lambda: write_inputs(root, made=made)), seconds=300)
        )
        self.initial = without_temporary(self.place.tree())

    def warm(self) -> None:
        """Imports what reading imports."""
        self.place.fill(self.initial)
        chosen = [
            target
            for target in TARGETS
            if target.name in ("config.json", "GGUF", "recipe of a recovery")
        ]
        for target in chosen:
            imported_before(partial(self.place.inside, partial(called, list(target.words))))
        self.place.fill(self.initial)
        self.place.inside(lambda: called(list(chosen[0].words)))

    def damaged(self, target: Target, *, count: int, seed: int) -> Damage:
        """The verdicts on so many mutations of a target's file."""
        found = Damage(target.name)
        data = self.initial.get(target.file)
        self.place.fill(self.initial)
        if data is None:
            raise AssertionError(f"{target.name}: there is no {target.file}")
        meaning = self._read(target)
        if meaning.how != "returned" or meaning.value.outcome.code:
            raise AssertionError(f"{target.name} cannot even be read undamaged: {meaning}")
        number = max(4, round(count * target.share))
        for mutation in mutations(data, target.form, count=number, seed=seed):
            verdict, why = self._verdict(target, mutation, meaning.value)
            found.tried += 1
            found.counts[verdict] += 1
            if verdict == WRONG:
                found.wrong.append(
                    f"{mutation.what} (seed {seed}, {hashlib.sha256(mutation.data).hexdigest()[:8]}): {why}"
                )
        self._write(target, data)
        return found

    def _verdict(self, target: Target, mutation: Mutation, meant: Reading) -> tuple[str, str]:
        self._write(target, mutation.data)
        ended = self._read(target)
        if ended.how != "returned":
            return WRONG, f"{ended.how}: {str(ended.value)[-300:]}"
        reading: Reading = ended.value
        outcome = reading.outcome
        if reading.ran:
            return WRONG, f"it ran {reading.ran[:3]}"
        if outcome.foreign:
            return WRONG, f"a traceback: {_last(outcome.foreign)}"
        if outcome.code:
            return self._refusal(outcome)
        if not reading.finite:
            return WRONG, "ended well with numbers that are none"
        if reading.meaning == meant.meaning:
            return SURVIVED, ""
        return (WRONG, "another result, and nothing was said") if target.vouched else (OTHER, "")

    def _refusal(self, outcome: Outcome) -> tuple[str, str]:
        if not outcome.refused:
            return (
                WRONG,
                f"exit code {outcome.code} without an error of ours: {outcome.said[-200:]}",
            )
        if len(outcome.said) > LONGEST:
            return WRONG, f"an error of {len(outcome.said)} characters"
        return REFUSED, ""

    def _write(self, target: Target, data: bytes) -> None:
        with open(os.path.join(self.place.root, target.file), "wb") as file:
            file.write(data)
        for name in {path.split("/")[0] for path in self.place.tree()} - {INPUTS, "tmp"}:
            _remove(os.path.join(self.place.root, name))

    def _read(self, target: Target) -> Ended:
        return forked(lambda: self.place.inside(lambda: read(target, self.place)), seconds=SECONDS)


@dataclass(frozen=True)
class Reading:
    """What a command made of a file."""

    outcome: Outcome
    meaning: str
    finite: bool
    ran: tuple[str, ...]
    """Programs, connections and code that it should not have come to."""


def read(target: Target, place: Place) -> Reading:
    """Has the file read, here, and watches what comes of it."""
    ran: list[str] = []
    watch(place.root, ran)
    outcome = called(target.words, target.typed or None)
    if outcome.code or outcome.foreign:
        return Reading(outcome, "", True, tuple(ran))
    if target.output:
        left = comparable(part(place.tree(), OUT))
        meaning = repr(
            sorted(
                (name, hashlib.sha256(data or b"").hexdigest())
                for name, data in left.items()
                if _tells(name)
            )
        )
        return Reading(outcome, meaning, True, tuple(ran))
    said = outcome.said
    if "--json" in target.words:
        document = json.loads(said[said.index("{") :].splitlines()[0])
        return Reading(
            outcome, json.dumps(_figures(document), sort_keys=True), _finite(document), tuple(ran)
        )
    return Reading(outcome, said, "nan" not in said.lower().split(), tuple(ran))


def watch(root: str, ran: list[str]) -> None:
    """Notes programs that are started, connections that are made and code of the folder that is run; for good."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
        ):
            ran.append(f"{event} {given[:2]}"[:200])
        elif event == "exec" and getattr(given[0], "co_filename", "").startswith(root):
            ran.append(f"code of {given[0].co_filename}")
        elif event == "pickle.find_class":
            ran.append(f"unpickled {given}")

    sys.addaudithook(hook)


def _tells(name: str) -> bool:
    """Whether a file says what was decided or made, not how it went."""
    return name.rpartition("/")[2] not in ("report.json", "report.md", "report.html", "README.md")


def _figures(value: Any) -> Any:
    """A result without times, sizes of memory, versions and names of files."""
    if isinstance(value, dict):
        dropped = (
            "seconds",
            "peak_memory_bytes",
            "file_bytes",
            "versions",
            "machine",
            "sha256",
            "timings",
        )
        return {key: _figures(below) for key, below in value.items() if key not in dropped}
    return [_figures(below) for below in value] if isinstance(value, list) else value


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_finite(below) for below in value.values())
    if isinstance(value, list):
        return all(_finite(below) for below in value)
    return not isinstance(value, float) or abs(value) < float("inf")


def _remove(path: str) -> None:
    import shutil

    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _returned(ended: Ended) -> Any:
    if ended.how != "returned":
        raise AssertionError(f"{ended.how}: {ended.value}")
    return ended.value


class Journals:
    """Damages what an unfinished run has noted, file by file, and resumes it: the bytes must be those of an undisturbed run."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial
        self.place: Place = trial.place
        self.noted: Tree = {
            name: data for name, data in trial.initial.items() if ".progress/" in name and data
        }

    def damaged(self, *, count: int, seed: int) -> Damage:
        """The verdicts on so many mutations, divided among the files."""
        found = Damage(
            f"progress of {self.trial.run.name.replace(', resumed', '').replace('run: ', '')}"
        )
        each = max(2, count // max(1, len(self.noted)))
        for name, data in self.noted.items():
            assert data is not None
            form = {"json": "json", "safetensors": "safetensors"}.get(
                name.rpartition(".")[2], "bytes"
            )
            for mutation in mutations(data, form, count=each, seed=seed):
                self.place.fill({**self.trial.initial, name: mutation.data})
                verdict, why = self.trial.judge.next_call(self.place)
                found.tried += 1
                found.counts[verdict] += 1
                if verdict == WRONG:
                    found.wrong.append(f"{name}, {mutation.what}: {why}")
        return found
