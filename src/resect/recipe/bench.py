"""Timing by name: load, trace, run in turns, and write what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from resect.checkpoint import load
from resect.errors import UsageError
from resect.evaluation import (
    Latency,
    LatencyTable,
    Spread,
    check_positions,
    entry_bytes,
    latencies,
    latency_table,
    paired_ratio,
    parameter_count,
)
from resect.explain import telling
from resect.files import claimed_directory, whole_directory
from resect.graph import Graph, trace
from resect.plan import PHASES, Workload, macs_of
from resect.ranges import whole
from resect.recipe.measure import Announce, Stages, device_of, dtype_of, weight_bytes
from resect.report import Benched, BenchReport, BenchRow, bench_markdown, machine, versions
from resect.report.results import Measurements
from resect.surroundings import unaffected

PER_TOKEN = 512
"""Tokens of the prompt whose multiply-accumulates are given for each token."""


@telling("time the models")
@unaffected()
def bench(
    names: Sequence[str],
    output: str | Path | None = None,
    *,
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (128, 512),
    decode: int = 32,
    repeats: int = 5,
    compile: bool = False,
    table: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    announce: Announce | None = None,
) -> BenchReport:
    """Prefill and decode of several models over batch and length, measured in turns in this process.

    With `output`, `bench.json` and `bench.md` are written there. `table` measures what the widths of the first model cost, at
    the first batch and length, into `prefill.json` and `decode.json`, which `prune` takes as `latency_table`.
    Raises `UsageError`, `ModelError` or `CheckpointError`.
    """
    names = list(dict.fromkeys(names))
    if table and output is None:
        raise UsageError("A latency table was asked for. Say where it goes: -o DIR.")
    if not names or not batches or not lengths:
        raise UsageError("There is nothing to time. Name a model, a batch and a length.")
    for place, counts in {"batches": batches, "lengths": lengths, "decode": [decode], "repeats": [repeats]}.items():
        for count in counts:
            whole(place, count)
    claim = nullcontext() if output is None else claimed_directory(output, overwrite=overwrite, inputs=names)
    with claim as directory:
        stages, where = Stages(announce), device_of(device)
        models: dict[str, PreTrainedModel] = {}
        graphs: dict[str, Graph] = {}
        for name in names:
            with stages("load", f"load {name}"):
                check = partial(check_positions, name, needed=max(lengths) + decode)
                trust = trust_remote_code
                models[name] = load(name, dtype=dtype_of(dtype), device=where, trust_remote_code=trust, check=check)
            with stages("trace", f"trace {name}"):
                graphs[name] = trace(models[name])
        benched = {name: described(name, models[name], graphs[name]) for name in names}
        rows: list[BenchRow] = []
        for batch in batches:
            for length in lengths:
                with stages(f"latency {batch}x{length}", f"{batch} x {length} tokens and {decode} more, in turns"):
                    found = latencies(models, prompt=length, decode=decode, repeats=repeats, batch=batch, compile=compile)
                rows += bench_rows(found, benched, graphs)
        tables = {}
        if table:
            for phase in PHASES:
                work = Workload(phase, batches[0], lengths[0])
                with stages(f"table {work}", f"what widths cost, {work}"):
                    tables[f"{phase}.json"] = latency_table(models[names[0]], graphs[names[0]], work, machine=machine())
        report = BenchReport(
            models=list(benched.values()),
            rows=rows,
            decode=decode,
            repeats=repeats,
            compiled=compile,
            device=where.type,
            dtype=dtype,
            tables=[str(directory / name) for name in tables] if directory else [],
            seconds=stages.seconds,
            versions=versions(),
            machine=machine(),
        )
        if directory is not None:
            _write(directory, report, tables, overwrite=overwrite)
            (announce or _quietly)(f"done: {directory}")
        return report


def described(name: str, model: PreTrainedModel, graph: Graph, *, file_bytes: int | None = None) -> Benched:
    """What a model is: sizes and work, as counted."""
    sizes = entry_bytes(model)
    idle = dict.fromkeys(_only_looked_up(model), 0)
    return Benched(
        name=name,
        parameters=parameter_count(model),
        weight_bytes=graph.parameter_bytes(sizes),
        read_bytes=graph.parameter_bytes({**sizes, **idle}),
        file_bytes=file_bytes if file_bytes is not None else weight_bytes(name),
        macs_per_token=round(graph.macs(tokens=PER_TOKEN) / PER_TOKEN),
        macs_tokens=PER_TOKEN,
    )


def bench_rows(
    found: Mapping[str, Latency], benched: Mapping[str, Benched], graphs: Mapping[str, Graph]
) -> list[BenchRow]:
    """Both phases of every model at one batch and length, beside the first model."""
    first = next(iter(found))
    rows = []
    for phase in PHASES:
        for name, one in found.items():
            work = Workload(phase, one.batch, one.prompt)
            seconds, macs = _seconds(one, phase), macs_of(graphs[name], work)
            ratio = paired_ratio(_seconds(found[first], phase).values, seconds.values)
            allowed = {
                "prefill": macs_of(graphs[first], work) / macs,
                "decode": benched[first].read_bytes / benched[name].read_bytes,
            }
            rows.append(
                BenchRow(
                    model=name,
                    phase=phase,  # type: ignore[arg-type]
                    batch=one.batch,
                    length=one.prompt,
                    seconds=Measurements.of(seconds),
                    tokens_per_second=one.batch * (one.prompt if phase == "prefill" else 1) / seconds.median,
                    macs=macs,
                    memory_bytes=None if one.working_bytes is None else benched[name].weight_bytes + one.working_bytes,
                    speedup=ratio.value,
                    low=ratio.low,
                    high=ratio.high,
                    ideal=allowed[phase],
                )
            )
    return rows


def _seconds(found: Latency, phase: str) -> Spread:
    return found.prefill_seconds if phase == "prefill" else found.decode_seconds


def _only_looked_up(model: nn.Module) -> set[str]:
    """The tables that no layer multiplies with."""
    others = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    read = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in read}


def _write(directory: Path, report: BenchReport, tables: Mapping[str, LatencyTable], *, overwrite: bool) -> None:
    with whole_directory(directory, overwrite=overwrite) as partial:
        (partial / "bench.json").write_text(report.to_json(), encoding="utf-8")
        (partial / "bench.md").write_text(bench_markdown(report), encoding="utf-8")
        for name, table in tables.items():
            (partial / name).write_text(table.to_json(), encoding="utf-8")


def _quietly(what: str) -> None:
    pass
