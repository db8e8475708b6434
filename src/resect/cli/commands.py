"""The commands. Torch is imported inside them, so that help is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from resect.cli.answer import answering
from resect.cli.words import by_kind, given, nested, number_or_by_kind, numbers, shares, version_of_resect

app = typer.Typer(
    name="resect",
    help="Cut whole heads, channels and blocks out of language models; what is left is an ordinary, smaller model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model. Read it first.")]
Dot = Annotated[str | None, typer.Option("--dot", metavar="FILE", help="Write the picture for Graphviz here too.")]
Output = Annotated[str | None, typer.Option("-o", "--output", metavar="DIR", help="The run directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what DIR holds, once the new result is whole.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Stop at plan.json: nothing is cut.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run of many shots that was cut short.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any value of the recipe, like settings.criterion=l2.")
]
Device = Annotated[str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:1, mps. Default: cpu.")]
StoreDtype = Annotated[
    str | None, typer.Option(metavar="T", help="Store weights in this type. Default: auto, that of the model's own files.")
]
Dtype = Annotated[str | None, typer.Option(metavar="T", help="float32, bfloat16, float16. Default: float32.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a directory, a .gguf file, or demo.")]

IN_PARTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "align": ("--align", number_or_by_kind),
    "settings.widths": ("--units", by_kind),
    "settings.drop_blocks": ("--drop-blocks", numbers),
}
"""Flags whose words stand for several numbers, by their places in a recipe."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"resect {version_of_resect()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Cut whole heads, channels and blocks out of language models; what is left is an ordinary, smaller model."""


@app.command()
def inspect(model: Model, dot: Dot = None, json: Json = False, trust_remote_code: Trust = False) -> None:
    """Show what could be cut out of MODEL, and what not and why. No weights are loaded."""
    with answering(as_json=json) as answer:
        answer.announce(f"trace {model}, no weights are read")
        from resect.checkpoint import skeleton
        from resect.files import check_file, whole_file
        from resect.graph import trace
        from resect.report import inspection, inspection_dot, inspection_tables, is_picture

        if dot:
            check_file(dot, overwrite=True, alike=is_picture, inputs=[model])
        network = skeleton(model, trust_remote_code=trust_remote_code)
        found = inspection(trace(network), model=model, architecture=type(network).__name__)
        if dot:
            with whole_file(dot, overwrite=True, alike=is_picture, inputs=[model]) as partial:
                partial.write_text(inspection_dot(found), encoding="utf-8")
        answer.give(found.to_json(), inspection_tables(found))


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A hub id, a directory, a .gguf file, or demo.")] = None,
    output: Output = None,
    method: Annotated[str | None, typer.Option(help="What decides. Default: llm-pruner.")] = None,
    keep: Annotated[float | None, typer.Option(help="The share that stays, in (0, 1]. Default: 0.8.")] = None,
    of: Annotated[str | None, typer.Option(help="What it is a share of: blocks, model, macs. Default: blocks.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:SHARE",
            help="In the place of --keep and --of: latency:0.7@prefill, latency:0.7@decode:1x512, bytes:200MB, macs:0.7, "
            "model:1.5B (parameters), params:250k (those in blocks).",
        ),
    ] = None,
    latency_table: Annotated[
        str | None, typer.Option(metavar="FILE", help="What widths cost, from bench --table. Default: measured anew.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Calibration text, repeatable: a file, wikitext2, c4, ptb, bookcorpus, "
            "NAME:CONFIG:SPLIT:COLUMN, demo, self. Default: self: the model writes it.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples. Default: 128.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in each. Default: 128.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="uniform (same sizes in every layer, loads anywhere) or per-layer. Default: uniform.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(metavar="N", help="Channels that stay are a multiple of this; by kind: heads=4,channels=64. Default: 1."),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(metavar="KIND=N", help="In the place of a budget: what stays of every group, channels=1024,heads=2."),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(metavar="FILE", help="In the place of a method: cut by this plan.json, as --dry-run writes it.")
    ] = None,
    drop_blocks: Annotated[
        str | None, typer.Option(metavar="N,N", help="Take these blocks out, numbered from 0; no method decides.")
    ] = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text whose tokens stay, repeatable: other tokens go, out of embedding, head and tokenizer. Default: all stay.",
        ),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Groups that stay whole, repeatable: an analysis.json, or a group's name."),
    ] = None,
    recover: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Train what is left on this before it is saved, repeatable: as resect recover does."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="A recipe that the flags are laid over.")] = None,
    set_: Set = None,
    seed: Annotated[int | None, typer.Option(help="For text and for random choices. Default: 42.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    store_dtype: StoreDtype = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Prune MODEL into DIR: weights, plan.json, recipe.yaml and a report."""
    if method is None and (plan is not None or drop_blocks is not None):
        method = "by-hand"
    flags = {
        "model": model,
        "output": output,
        "method": method,
        "keep": keep,
        "of": of,
        "budget": budget,
        "latency_table": latency_table,
        "layout": layout,
        "align": align,
        "settings.widths": units,
        "settings.file": plan,
        "settings.drop_blocks": drop_blocks,
        "calibration.source": data or None,
        "calibration.samples": samples,
        "calibration.length": length,
        "vocabulary.source": vocabulary or None,
        "protect": protect or None,
        "recovery.data": recover or None,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "store_dtype": store_dtype,
        "trust_remote_code": trust_remote_code or None,
    }
    _run(recipe, given(flags), set_, overwrite=overwrite, dry_run=dry_run, resume=resume, json=json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file; every run directory holds its own.")],
    output: Output = None,
    set_: Set = None,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Carry out a recipe: evaluate, prune, save, verify, evaluate again, report."""
    flags = {"output": output, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code or None}
    _run(recipe, given(flags), set_, overwrite=overwrite, dry_run=dry_run, resume=resume, json=json)


@app.command()
def recover(
    model: Annotated[
        str | None, typer.Argument(metavar="DIR", help="A pruned model's directory; a hub id, a .gguf file or demo will do.")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="DIR2", help="Where the recovered model goes.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Repeatable: JSON or JSONL with instruction and output (Alpaca), messages or text; a text file; "
            "alpaca, wikitext2, c4, NAME:CONFIG:SPLIT, demo.",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Train on about so many tokens.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Or so many times on everything. Default: 1.")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="DENSE", help="Learn from this model's logits too.")] = None,
    mixture: Annotated[
        str | None,
        typer.Option(help="uniform, or dynamic: more of where the model lags behind the teacher. Default: uniform."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights, not low-rank terms.")] = False,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="A recipe that the flags are laid over.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any value, like settings.rank=16.")] = None,
    seed: Annotated[int | None, typer.Option(help="For what is held out and for the order. Default: 42.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    store_dtype: StoreDtype = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a recovery that was cut short.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Train what is left of a pruned model, and write it merged into DIR2, with the low-rank terms and a report."""
    flags = {
        "model": model,
        "output": output,
        "data": data or None,
        "teacher": teacher,
        "settings.tokens": tokens,
        "settings.epochs": epochs,
        "settings.full": full or None,
        "settings.mixture.kind": mixture,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "store_dtype": store_dtype,
        "trust_remote_code": trust_remote_code or None,
    }
    with answering(as_json=json) as answer:
        answer.announce("read the recipe")
        from resect.recipe import read_recovery_recipe, run_recovery
        from resect.report import recovery_tables

        asked = read_recovery_recipe(recipe, nested(given(flags)), assignments=set_ or ())
        result = run_recovery(asked, overwrite=overwrite, resume=resume, announce=answer.announce)
        if not result.main:
            answer.announce(f"this process trained along; the first one writes {result.directory}")
            raise typer.Exit
        answer.announce(f"done: {result.directory}")
        answer.give(result.report.to_json(), recovery_tables(result.report))


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Hub ids, directories, .gguf files, demo.")],
    text: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Held-out text, repeatable: a file or a data set's name.")
    ] = None,
    window: Annotated[str, typer.Option(metavar="N,N", help="Tokens a window.")] = "128,2048",
    bos: Annotated[bool, typer.Option("--bos", help="Begin-of-text before every window. Default: nothing is added.")] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Multiple-choice tasks: demo or demo:piqa (offline), a .jsonl file of query, choices, gold; "
            "seven, or names of lm-evaluation-harness.",
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before every item. Default: 0.")] = None,
    limit_items: Annotated[int | None, typer.Option(help="At most so many items of each task.")] = None,
    beside: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Measure this first; the others differ from it, and agree so far.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many tokens of each text.")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure prefill 1 x 512 and decode 32, in turns.")] = False,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Continue this greedily, repeatable.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=C", help="Any value of the evaluation, like latency.prompt=128.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure models side by side: perplexity, tasks, agreement with a dense model, parameters, file size, latency."""
    with answering(as_json=json) as answer:
        windows = numbers(window, flag="--window")
        answer.announce("wake up")
        from resect.recipe import evaluate, evaluation_section
        from resect.report import comparison_table

        flags = {
            "texts": text,
            "windows": windows,
            "bos": bos or None,
            "tasks": [name for names in tasks or () for name in names.split(",")] or None,
            "shots": shots,
            "task_limit": limit_items,
            "reference": beside,
            "limit": limit,
            "latency": latency or None,
            "generations": prompt,
        }
        found = evaluate(
            models,
            asked=evaluation_section(given(flags), assignments=set_ or ()),
            dtype=dtype or "float32",
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
            announce=answer.announce,
        )
        answer.give(found.to_json(), comparison_table(found))


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run directories, or what resect evaluate --json printed, as files.")
    ],
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Write a page here: compare.html.")] = None,
    json: Json = False,
) -> None:
    """Put finished runs side by side: every figure, and which of them no other beats in size and quality at once."""
    with answering(as_json=json) as answer:
        from resect.recipe import compare as put_side_by_side
        from resect.report import comparison_tables

        found = put_side_by_side(runs, output)
        if output:
            answer.announce(f"done: {output}")
        answer.give(found.to_json(), comparison_tables(found))


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Hub ids, directories, .gguf files, demo; the dense one first.")
    ],
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="DIR", help="Where figures and tables go.")] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences at a time.")] = "1",
    length: Annotated[str, typer.Option(metavar="N,N", help="Tokens of each prompt.")] = "128,512",
    decode: Annotated[int, typer.Option(help="Tokens written after it.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds, in which all models take turns.")] = 5,
    compile: Annotated[bool, typer.Option("--compile", help="Run what torch.compile makes of them.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Measure what widths of the first model cost too, for prune --latency-table.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Time models side by side over batch and length: prefill, decode, memory, sizes, and the share of the ideal speed-up."""
    with answering(as_json=json) as answer:
        batches, lengths = numbers(batch, flag="--batch"), numbers(length, flag="--length")
        answer.announce("wake up")
        from resect.recipe import bench
        from resect.report import bench_table

        found = bench(
            models,
            output,
            batches=batches,
            lengths=lengths,
            decode=decode,
            repeats=repeats,
            compile=compile,
            table=table,
            dtype=dtype or "float32",
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            announce=answer.announce,
        )
        answer.give(found.to_json(), bench_table(found))


@app.command()
def analyze(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Where figures and pictures go.")],
    text: Annotated[str, typer.Option(metavar="TEXT", help="Held-out text: a file or a data set's name.")] = "demo",
    ratios: Annotated[str, typer.Option(metavar="R,R", help="Shares of a group that go, each in (0, 1].")] = "0.25,0.5,0.75",
    kinds: Annotated[
        str, typer.Option(metavar="K,K", help="Of heads, channels, experts, residual, sublayers, blocks.")
    ] = "heads,channels,experts",
    gamma: Annotated[float, typer.Option(help="The share of groups, the worst, that counts as unprunable.")] = 0.1,
    units: Annotated[
        str, typer.Option(metavar="U", help="Which units of a group go: the lowest by weight magnitude, or random.")
    ] = "magnitude",
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 128,
    limit: Annotated[int, typer.Option(help="At most so many tokens of the text.")] = 2048,
    seed: Annotated[int, typer.Option(help="For random units.")] = 42,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure what every group of MODEL is worth by removing parts of it alone: perplexity by block, and what to protect."""
    with answering(as_json=json) as answer:
        asked = shares(ratios, flag="--ratios")
        answer.announce("wake up")
        from resect.recipe import analysis
        from resect.report import knowledge_table

        found = analysis(
            model,
            output,
            text=text,
            kinds=kinds.split(","),
            ratios=asked,
            gamma=gamma,
            units=units,
            window=window,
            limit=limit,
            seed=seed,
            dtype=dtype or "float32",
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            announce=answer.announce,
        )
        answer.give(found.to_json(), knowledge_table(found))


@app.command()
def export(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="A directory; for gguf and pt2 a file.")],
    format: Annotated[str, typer.Option("--format", metavar="F", help="hf, hf-padded, gguf, onnx, pt2.")] = "hf",
    quantize: Annotated[
        str | None,
        typer.Option(metavar="T", help="gguf: f16 (default), f32, bf16, q8_0, q4_0, q4_1. hf: int8. Default otherwise: none."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Whether the format's own reader, in a fresh process, must agree.")
    ] = True,
    push_to_hub: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Put it on the hub too.")] = None,
    public: Annotated[bool, typer.Option("--public", help="For everyone; else a new repository there is private.")] = False,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Write MODEL for transformers, llama.cpp, onnxruntime or torch.export, and check it there."""
    with answering(as_json=json) as answer:
        answer.announce("wake up")
        from resect.export import export
        from resect.report import export_table

        found = export(
            model,
            format=format,
            output=output,
            quantize=quantize,
            verify=verify,
            push_to_hub=push_to_hub,
            private=not public,
            dtype=dtype or "float32",
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            announce=answer.announce,
        )
        answer.give(found.to_json(), export_table(found))


@app.command()
def chat(
    model: Model,
    beside: Annotated[str | None, typer.Option(metavar="MODEL", help="Another model that answers after it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, others draw.")] = 0.0,
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is told before all else.")] = "",
    seed: Annotated[int, typer.Option(help="For draws.")] = 42,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to MODEL, or to two models at once. A line is a message; lines may be piped in."""
    out = sys.stdout
    with answering(as_json=False) as answer:
        answer.announce("wake up")
        from resect.cli.talk import talk
        from resect.recipe import conversations

        found = conversations(
            [model, beside] if beside else [model],
            new_tokens=max_new_tokens,
            temperature=temperature,
            system=system,
            seed=seed,
            dtype=dtype or "float32",
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
            announce=answer.announce,
        )
        talk(found, out)


def _run(
    recipe: str | None,
    flags: dict[str, Any],
    assignments: list[str] | None,
    *,
    overwrite: bool,
    dry_run: bool,
    resume: bool,
    json: bool,
) -> None:
    with answering(as_json=json) as answer:
        answer.announce("read the recipe")
        from resect.recipe import read_recipe, run
        from resect.report import run_tables

        for place, (flag, read) in IN_PARTS.items():
            if place in flags:
                flags[place] = read(flags[place], flag=flag)
        asked = read_recipe(recipe, nested(flags), assignments=assignments or ())
        result = run(asked, overwrite=overwrite, dry_run=dry_run, resume=resume, announce=answer.announce)
        answer.announce(f"done: {result.directory}")
        answer.give(result.report.to_json(), run_tables(result.report))
