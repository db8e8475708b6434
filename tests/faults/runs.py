"""Whole small runs of every command that writes: what is there before, the call, and what must be there afterwards."""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.disk import Tree

KEPT = "How it came to that is in"
"""What the command line says of the traceback of an exception that is none of ours."""
OUT = "out"
"""The name that the call writes to, in the working directory."""
INPUTS = "given"
TEMPORARY = "tmp"
LEARNING = {
    "length": 12,
    "batch": 2,
    "micro_batch": 2,
    "tokens": 48,
    "held_out": 2,
    "evaluations": 2,
    "rank": 2,
}
MEASURED = (
    "seconds",
    "peak_memory_bytes",
    "timings",
    "values",
    "median",
    "memory_bytes",
    "tokens_per_second",
)
"""Keys of JSON whose values are times and memory: no two runs have the same."""
VARYING = (
    *("report.json", "report.md", "report.html", "README.md", "bench.json", "bench.md"),
    *("analysis.json", "analysis.md", "analysis.html"),
)
"""Files with times and memory in them."""


@dataclass(frozen=True)
class Run:
    """A command line, called in a folder that holds its inputs."""

    name: str
    words: Sequence[str]
    inputs: Callable[[Path], None]
    earlier: bool = False
    """Whether an earlier output is there, to be replaced."""
    resumes: bool = True
    """Whether the command knows --resume."""
    out: str = OUT
    verified: bool = False
    """Whether what was saved is loaded again by a child: once for each command is enough."""
    halved: bool = False
    """Whether it begins where a call that was killed half-way has stopped."""
    replaces: str = "--overwrite"
    """The flag that has an output replaced, if the command has one."""
    recipe: Mapping[str, Any] | None = field(default=None, hash=False)

    def first(self) -> list[str]:
        """The words of the first call."""
        return [*self.words, *([self.replaces] if self.earlier and self.replaces else [])]

    def again(self) -> list[str]:
        """The words of a call after one that did not end well."""
        return [*self.first(), *(["--resume"] if self.resumes else [])]

    def anew(self) -> list[str]:
        """The words of a call that begins from nothing, whatever is there."""
        return [*self.words, *([self.replaces] if self.replaces else [])]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    said: str
    """On stdout and stderr."""
    foreign: str = ""
    """The traceback of an exception that is none of ours."""

    @property
    def refused(self) -> bool:
        """An error of ours, in words."""
        return (
            not self.foreign
            and self.code in (1, 2)
            and ("error:" in self.said or "Error" in self.said)
        )


def called(words: Sequence[str], typed: str | None = None) -> Outcome:
    """A command in this process, with what is typed to it."""
    from typer.testing import CliRunner

    from resect.cli import app

    result = CliRunner().invoke(app, [*words], input=typed)
    foreign = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        foreign = "".join(traceback.format_exception(*result.exc_info))  # type: ignore[misc]
    elif KEPT in result.output:
        foreign = _kept(result.output)
    return Outcome(result.exit_code, result.output, foreign)


def _kept(said: str) -> str:
    """The traceback of a fault that the command line has caught and kept in a file."""
    line = next(line for line in said.splitlines() if KEPT in line)
    file = Path(line.rpartition(KEPT)[2].strip().rstrip("."))
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else line


def complete(name: str, content: bytes) -> bool:
    """Whether a text file was written to its end."""
    if name.endswith(".json"):
        try:
            json.loads(content)
        except ValueError:
            return False
    return content.rstrip().endswith(b"</html>") if name.endswith(".html") else bool(content)


def comparable(tree: Tree) -> dict[str, bytes | None]:
    """What of a tree must be the same in every run; files with times in them are reduced to what has none."""
    return {name: _comparable(name, content) for name, content in tree.items()}


def _comparable(name: str, content: bytes | None) -> bytes | None:
    last = name.rpartition("/")[2]
    if content is None or last not in VARYING:
        return content
    if last.endswith(".json") and complete(last, content):
        return json.dumps(_unmeasured(json.loads(content)), sort_keys=True).encode()
    return b"complete" if complete(last, content) else b"incomplete"


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(below) for key, below in value.items() if key not in MEASURED}
    return [_unmeasured(below) for below in value] if isinstance(value, list) else value


def part(tree: Tree, name: str) -> dict[str, bytes | None]:
    """A file or a directory with all that is in it."""
    return {
        path: content
        for path, content in tree.items()
        if path == name or path.startswith(f"{name}/")
    }


def stray(tree: Tree, expected: Tree) -> list[str]:
    """Names in the working directory that should not be there."""
    tops = {path.split("/")[0] for path in tree} - {path.split("/")[0] for path in expected}
    return sorted(tops - {TEMPORARY})


def without_temporary(tree: Tree) -> dict[str, bytes | None]:
    """A tree without the system's folder for temporary files, which the system clears."""
    return {path: content for path, content in tree.items() if path.split("/")[0] != TEMPORARY}


def dense(folder: Path, *, layers: int = 2) -> Path:
    """A model of tiny layers with a tokenizer of one token a character."""
    from tests.models import tiny, tiny_tokenizer

    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "intermediate_size": 24,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny(
        "Llama",
        **sizes,
        num_hidden_layers=layers,
        max_position_embeddings=48,
        vocab_size=101,
        **special,
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def spelling(folder: Path) -> Path:
    """A model like it with a tokenizer that GGUF can say."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.models import tiny

    words = [
        "<pad>",
        "<s>",
        "<|endoftext|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "Ġt",
        "he",
        "Ġthe",
    ]
    made = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="<|endoftext|>"
    )
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny(
        "Llama", **sizes, num_hidden_layers=2, max_position_embeddings=48, vocab_size=262, **special
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(file: Path) -> Path:
    """A few lines, no two alike."""
    from tests.recipe.dense import write_text

    return write_text(file, repeats=3)


def recipe_values(**changes: Any) -> dict[str, Any]:
    """A recipe that takes half a second."""
    values: dict[str, Any] = {
        "model": f"{INPUTS}/dense",
        "output": OUT,
        "keep": 0.7,
        "layout": "per-layer",
        "calibration": {"source": f"{INPUTS}/text.txt", "samples": 4, "length": 12},
    }
    return values | changes


def _inputs(
    recipe: Mapping[str, Any] | None = None, *, gguf: bool = False, layers: int = 2
) -> Callable[[Path], None]:
    """Writes the dense model, the text and, if there is one, the recipe."""

    def write(root: Path) -> None:
        import yaml

        given = root / INPUTS
        given.mkdir()
        if gguf:
            spelling(given / "dense")
        else:
            dense(given / "dense", layers=layers)
        text(given / "text.txt")
        if recipe is not None:
            (given / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")

    return write


def _reports(root: Path) -> None:
    """Two reports of runs that were measured alike, in place of the runs."""
    given = root / INPUTS
    _inputs()(root)
    for number, keep in enumerate((0.8, 0.6)):
        values = {"texts": [f"{INPUTS}/text.txt"], "windows": [12], "limit": 48}
        recipe = recipe_values(
            keep=keep,
            output=str(given / f"run{number}"),
            evaluation=values,
            settings={"criterion": "l2"},
        )
        _carried_out(recipe)


def _carried_out(recipe: Mapping[str, Any]) -> None:
    from resect.recipe import Recipe, run

    run(Recipe.from_mapping(dict(recipe)))


def _pruned(root: Path) -> None:
    """A pruned model, to be exported or recovered."""
    _inputs(layers=1)(root)
    _carried_out(recipe_values(output=str(root / INPUTS / "pruned"), settings={"criterion": "l2"}))


EVALUATION = {
    "texts": [f"{INPUTS}/text.txt"],
    "windows": [12],
    "limit": 48,
    "generations": ["The"],
    "new_tokens": 2,
}
PRUNER = recipe_values(evaluation=EVALUATION)
SURGEON = recipe_values(method="llm-surgeon", settings={"shots": 2})
PATTERN = recipe_values(method="llm-surgeon", settings={"mode": "2:4", "shots": 1})
SHEAR = recipe_values(
    method="lorashear",
    settings={
        "warmup_steps": 1,
        "periods": 2,
        "period_steps": 1,
        "checkpoint_steps": 1,
        "estimate_windows": 2,
        "analysis": {"ratios": [0.5], "windows": 1},
        "adapter": {"rank": 2},
    },
    recovery={
        "data": f"{INPUTS}/text.txt",
        "settings": {**LEARNING, "mixture": {"kind": "uniform"}},
        "teacher": None,
    },
)


def _of_recipe(name: str, recipe: Mapping[str, Any], *, layers: int = 1, **options: Any) -> Run:
    inputs = _inputs(recipe, layers=layers)
    return Run(name, ["run", f"{INPUTS}/recipe.yaml"], inputs, recipe=recipe, **options)


def _recover(name: str, **options: Any) -> Run:
    words = ["recover", f"{INPUTS}/pruned", "-o", OUT, "--data", f"{INPUTS}/text.txt"]
    for key, value in LEARNING.items():
        words += ["--set", f"settings.{key}={value}"]
    return Run(name, words, _pruned, **options)


RUNS: Mapping[str, Run] = {
    run.name: run
    for run in (
        _of_recipe("run: llm-pruner, evaluated", PRUNER, layers=2, verified=True),
        _of_recipe("run: llm-pruner over an earlier run", PRUNER, earlier=True),
        _of_recipe("run: llm-surgeon, 2 shots", SURGEON),
        _of_recipe("run: llm-surgeon, resumed", SURGEON, halved=True),
        _of_recipe("run: llm-surgeon, 2:4", PATTERN),
        _of_recipe("run: lorashear with recovery", SHEAR),
        Run(
            "prune: plan only",
            ["prune", f"{INPUTS}/dense", "-o", OUT, "--dry-run", "--keep", "0.7", "--data", f"{INPUTS}/text.txt",
             "--samples", "4", "--length", "12", "--layout", "per-layer"],
            _inputs(),
        ),
        _recover("recover", verified=True),
        _recover("recover, resumed", halved=True),
        Run("export: hf", ["export", f"{INPUTS}/pruned", "-o", OUT, "--format", "hf"], _pruned, resumes=False),
        Run(
            "export: hf over an earlier one",
            ["export", f"{INPUTS}/pruned", "-o", OUT, "--format", "hf", "--no-verify"],
            _pruned,
            resumes=False,
            earlier=True,
        ),
        Run(
            "export: gguf",
            ["export", f"{INPUTS}/dense", "-o", f"{OUT}.gguf", "--format", "gguf", "--no-verify"],
            _inputs(gguf=True),
            resumes=False,
            out=f"{OUT}.gguf",
        ),
        Run(
            "compare",
            ["compare", f"{INPUTS}/run0", f"{INPUTS}/run1", "-o", f"{OUT}.html"],
            _reports,
            resumes=False,
            out=f"{OUT}.html",
            replaces="",
        ),
        Run(
            "bench",
            ["bench", f"{INPUTS}/dense", "-o", OUT, "--length", "8", "--decode", "2", "--repeats", "1"],
            _inputs(),
            resumes=False,
        ),
        Run(
            "analyze",
            ["analyze", f"{INPUTS}/dense", "-o", OUT, "--text", f"{INPUTS}/text.txt", "--ratios", "0.5", "--window", "12",
             "--limit", "24"],
            _inputs(),
            resumes=False,
        ),
        Run(
            "inspect: a picture",
            ["inspect", f"{INPUTS}/dense", "--dot", f"{OUT}.dot"],
            _inputs(),
            resumes=False,
            out=f"{OUT}.dot",
            replaces="",
        ),
        Run(
            "evaluate",
            ["evaluate", f"{INPUTS}/dense", "--text", f"{INPUTS}/text.txt", "--window", "12", "--limit", "48"],
            _inputs(),
            resumes=False,
            replaces="",
        ),
    )
}  # fmt: skip


def in_process_children(*, verified: bool = True) -> None:
    """Verification starts a process of its own, seconds each; here it is a fork that runs the same program."""
    import subprocess

    if not verified:
        _unverified()
    started = subprocess.run
    if hasattr(started, "in_process"):
        return

    def run(command: Any, *rest: Any, **named: Any) -> Any:
        words = [str(word) for word in command] if isinstance(command, list | tuple) else []
        at = next(
            (
                i
                for i, word in enumerate(words)
                if re.search(r"resect[./]\w+[./](reload|consume)(\.py)?$", word)
            ),
            None,
        )
        if at is None:
            return started(command, *rest, **named)
        return _forked_program(words, at, named.get("env"))

    run.in_process = True  # type: ignore[attr-defined]
    subprocess.run = run  # type: ignore[assignment]


def _unverified() -> None:
    """What was saved is not loaded again."""
    import resect.recipe.recovery
    import resect.recipe.runs

    for module in (resect.recipe.runs, resect.recipe.recovery):
        assert hasattr(module, "verify")
        module.verify = lambda *given, **named: 0.0  # type: ignore[attr-defined]


def _forked_program(words: list[str], at: int, environment: Mapping[str, str] | None) -> Any:
    import subprocess
    import sys

    from tests.faults import injection
    from tests.faults.children import forked

    def program() -> None:
        injection.stop()  # another process: not a part of the run
        os.environ.update(environment or {})
        sys.argv = words[at:]
        if words[at].endswith("consume.py"):
            from resect.export.consume import main as consume

            consume(*words[at + 1 :])
        else:
            from resect.checkpoint.reload import main as reload

            reload(*words[at + 1 :])

    ended = forked(program)
    code = 0 if ended.how == "returned" else 1
    return subprocess.CompletedProcess(words, code, "", "" if code == 0 else str(ended.value))
