"""Runs side by side: what may be compared, which of them no other beats, and how that looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from resect.errors import UsageError
from resect.report.charts import MARKS, colour
from resect.report.figures import agreement_figures, brief, figures, mean_of, metric, percent, whole
from resect.report.parts import Chart, Section, Table
from resect.report.results import SCHEMA, EvaluationReport, Measured, Record, RunReport, TextPerplexity
from resect.report.tables import comparison_table
from resect.report.words import asked

SAME_MACHINE = ("processor", "cores", "memory_bytes", "accelerators", "system")
"""What decides whether two machines are one."""
WIDE = 20
"""Perplexities that differ by more than this factor are drawn by their logarithm."""
SIZES = {"parameters": "parameters", "macs": "MACs", "seconds": "prefill, seconds"}


class Candidate(Record):
    """A model of one of the runs."""

    run: str
    """As it was named."""
    asked: str
    dense: bool
    machine: str | None = None
    """The letter of the machine that it was timed on."""
    figures: Measured


class Front(Record):
    """A size and a quality that all candidates have, and those that no other beats in both."""

    size: Literal["parameters", "macs", "seconds"]
    quality: str
    better: Literal["lower", "higher"]
    sizes: list[float]
    qualities: list[float]
    front: list[int]
    """Places of the candidates, by size."""


class Comparison(Record):
    """Runs side by side."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["comparison"] = "comparison"
    candidates: list[Candidate]
    fronts: list[Front]
    machines: dict[str, dict[str, Any]]
    """Machines that models were timed on, by letter."""


def comparison(reports: Mapping[str, RunReport | EvaluationReport]) -> Comparison:
    """Runs by name, side by side; dense models that are the same appear once.

    Raises `UsageError` where two runs measured what has the same name in different ways, and where no quality is measured in all.
    """
    candidates, letters = [], dict[str, dict[str, Any]]()
    for name, report in reports.items():
        letter = _letter(letters, report)
        candidates += [_lettered(one, letter) for one in _candidates(name, report)]
    candidates = _once(candidates)
    if len(candidates) < 2:
        raise UsageError(f"There is one model in {', '.join(reports)}; name two runs or more.")
    _check_alike(candidates)
    timed = {one.machine for one in candidates if one.machine}
    machines = {letter: facts for letter, facts in letters.items() if letter in timed}
    return Comparison(candidates=candidates, fronts=_fronts(candidates), machines=machines)


def _candidates(name: str, report: RunReport | EvaluationReport) -> list[Candidate]:
    if isinstance(report, EvaluationReport):
        return [
            Candidate(run=name, asked=model.name, dense=model.name == report.reference, figures=model) for model in report.models
        ]
    if report.status != "complete":
        raise UsageError(f"{name} was not measured to the end ({report.status}); there is nothing to compare.")
    pruned, dense = report.pruned.model_copy(update={"name": name}), report.dense
    pruned.perplexities = [_as_read(name, report, one) for one in pruned.perplexities]
    model = str(report.recipe["model"])
    found = [Candidate(run=name, asked=asked(report), dense=False, figures=pruned)]
    if dense.perplexities or dense.tasks:
        named = dense.model_copy(update={"name": f"{model} (dense)"})
        found.insert(0, Candidate(run=name, asked=f"{model}, as it is", dense=True, figures=named))
    return found


def _as_read(name: str, report: RunReport, found: TextPerplexity) -> TextPerplexity:
    """A perplexity under the digest of the text as the dense model read it: a cut vocabulary renumbers tokens.

    Raises `UsageError` where it spells the text with others.
    """
    if report.vocabulary is None:
        return found
    if any(text.missing for text in report.vocabulary.texts if text.text == found.text):
        raise UsageError(
            f"{name} spells {_cut(found.text)} with other tokens since its vocabulary was cut; its perplexity compares "
            "with no other. Compare bits per byte: resect evaluate."
        )
    digests = [one.digest for one in report.dense.perplexities if one.text == found.text]
    return found.model_copy(update={"digest": digests[0]}) if digests else found


def _letter(letters: dict[str, dict[str, Any]], report: RunReport | EvaluationReport) -> str:
    facts = {key: report.machine.get(key) for key in SAME_MACHINE}
    for letter, known in letters.items():
        if known == facts:
            return letter
    letter = chr(ord("A") + len(letters))
    letters[letter] = facts
    return letter


def _lettered(one: Candidate, letter: str) -> Candidate:
    return one.model_copy(update={"machine": letter}) if one.figures.timings else one


def _once(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Dense models with the same sizes and qualities once, the first; times may differ."""
    found: dict[Any, Candidate] = {}
    for place, one in enumerate(candidates):
        qualities = [(p.text, p.window, p.digest, round(p.nats, 6)) for p in one.figures.perplexities]
        answers = [(t.task, t.accuracy) for t in one.figures.tasks]
        key = (one.figures.name, one.figures.parameters, str(qualities), str(answers)) if one.dense else place
        found.setdefault(key, one)
    return list(found.values())


def _check_alike(candidates: Sequence[Candidate]) -> None:
    """Raises where the same name stands for different measurements."""
    seen: dict[str, tuple[Any, Candidate]] = {}
    for one in candidates:
        for name, how in _protocols(one.figures):
            known, first = seen.setdefault(name, (how, one))
            if known != how:
                raise UsageError(
                    f"{_cut(name)} was measured differently in {first.run} ({_cut(_said(known))}) and "
                    f"{one.run} ({_cut(_said(how))}). "
                    "Measure both alike: resect evaluate."
                )


def _protocols(model: Measured) -> list[tuple[str, dict[str, Any]]]:
    """What was measured, and everything about how that has to be the same."""
    found: list[tuple[str, dict[str, Any]]] = []
    for p in model.perplexities:
        found.append((f"perplexity {p.text} @{p.window}", {"digest": p.digest[:12], "tokens": p.tokens, "begin-of-text": p.bos}))
    found += [(t.task, {"items": t.items, "examples": t.shots, "metric": t.metric}) for t in model.tasks]
    if model.timings:
        found.append(("latency", {"prompt": model.timings.prompt, "decode": model.timings.decode}))
    return found


def _cut(text: str, limit: int = 1000) -> str:
    """What a report says, as an error may repeat it."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def _said(how: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in how.items())


@dataclass(frozen=True)
class Quality:
    """What all candidates are worth by one measure."""

    name: str
    better: Literal["lower", "higher"]
    values: list[float]


def _qualities(candidates: Sequence[Candidate]) -> list[Quality]:
    """Perplexities, and the mean accuracy (the accuracy where there is one task), that all have."""
    perplexities = [{f"perplexity {p.text} @{p.window}": p.value for p in one.figures.perplexities} for one in candidates]
    found = [
        Quality(name, "lower", [row[name] for row in perplexities])
        for name in perplexities[0]
        if all(name in row for row in perplexities)
    ]
    tasks = {tuple(sorted(t.task for t in one.figures.tasks)) for one in candidates}
    if len(tasks) == 1 and (names := tasks.pop()):
        means = [sum(t.accuracy for t in one.figures.tasks) / len(names) for one in candidates]
        found.append(Quality(mean_of(len(names)) if len(names) > 1 else names[0], "higher", means))
    if not found:
        measured = {one.figures.name: [name for name, _ in _protocols(one.figures)] for one in candidates}
        have = "; ".join(f"{name}: {', '.join(names) or 'nothing'}" for name, names in measured.items())
        raise UsageError(f"No quality is measured in all of them ({_cut(have)}). Measure them alike: resect evaluate.")
    return found


def _fronts(candidates: Sequence[Candidate]) -> list[Front]:
    found = []
    for quality in _qualities(candidates):
        for size, sizes in _sizes(candidates):
            sign = 1 if quality.better == "lower" else -1
            best = front([(x, sign * y) for x, y in zip(sizes, quality.values, strict=True)])
            found.append(
                Front(size=size, quality=quality.name, better=quality.better, sizes=sizes, qualities=quality.values, front=best)
            )
    return found


def _sizes(candidates: Sequence[Candidate]) -> list[tuple[Literal["parameters", "macs", "seconds"], list[float]]]:
    found: list[tuple[Literal["parameters", "macs", "seconds"], list[float]]] = []
    models = [one.figures for one in candidates]
    found.append(("parameters", [float(model.parameters) for model in models]))
    macs = [model.macs for model in models if model.macs is not None]
    if len(macs) == len(models) and len({model.macs_tokens for model in models}) == 1:
        found.append(("macs", [float(value) for value in macs]))
    timings = [model.timings for model in models if model.timings]
    if len(timings) == len(models) and len({one.machine for one in candidates}) == 1:  # times of two machines do not compare
        found.append(("seconds", [one.prefill_seconds.median for one in timings]))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other beats: lower in one coordinate and no higher in the other."""
    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)

    return sorted((place for place, point in enumerate(points) if not beaten(*point)), key=lambda place: points[place])


def comparison_tables(found: Comparison) -> Group:
    """A row per model, what no other beats, and where times do not compare."""
    parts: list[RenderableType] = [comparison_table(EvaluationReport(models=[one.figures for one in found.candidates]))]
    parts += [Text(line) for line in comparison_lines(found)]
    return Group(*parts)


def comparison_lines(found: Comparison) -> list[str]:
    """What no other model beats, and where times do not compare."""
    lines = []
    for one in found.fronts:
        names = ", ".join(found.candidates[place].figures.name for place in one.front)
        lines.append(f"{one.quality} over {SIZES[one.size]}: not beaten are {names}.")
    if len(found.machines) > 1:
        for letter, facts in found.machines.items():
            names = ", ".join(one.figures.name for one in found.candidates if one.machine == letter)
            lines.append(f"Timed on machine {letter} ({facts['processor']}, {facts['cores']} cores): {names}.")
        lines.append("Times of different machines do not compare.")
    return lines


def comparison_sections(found: Comparison) -> list[Section]:
    """The parts of a page: a picture for each size and quality, then all figures."""
    charts = [_chart(found, place, one) for place, one in enumerate(found.fronts)]
    lead = "Down and to the left is better (accuracy: up). The line joins models that no other beats in both; the star is dense."
    models = [one.figures for one in found.candidates]
    rows = figures(models) + agreement_figures(models)
    header = ["", *(one.figures.name for one in found.candidates)]
    table = Table("Everything that was measured", header, [[row.name, *row.texts()] for row in rows if row.kind != "bits"])
    made = [[one.figures.name, one.asked, one.machine or "-"] for one in found.candidates]
    return [
        Section("fronts", "Quality over size", lead, charts=charts, lines=comparison_lines(found)),
        Section("figures", "Side by side", tables=[table]),
        Section("asked", "What each was asked for", tables=[Table("Models", ["model", "asked for", "machine"], made, words=3)]),
    ]


def _chart(found: Comparison, number: int, one: Front) -> Chart:
    show = percent if one.better == "higher" else brief
    size_text = {"parameters": whole, "macs": lambda value: metric(value).strip(), "seconds": brief}[one.size]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [one.sizes[place] for place in one.front],
            "y": [one.qualities[place] for place in one.front],
            "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    rows = []
    for place, (candidate, x, y) in enumerate(zip(found.candidates, one.sizes, one.qualities, strict=True)):
        name = candidate.figures.name
        shape = "star" if candidate.dense else MARKS[place % 5]
        paint, size = ("var(--ink)", 13) if candidate.dense else (colour(place), 11)
        look = {"color": paint, "symbol": shape, "size": size}
        text = f"{name}<br>{size_text(x)} {SIZES[one.size]}<br>{one.quality} {show(y)}"
        point = {"type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": name, "marker": look}
        traces.append(point | {"hovertext": [text], "hoverinfo": "text"})
        rows.append([name, size_text(x), show(y), "yes" if place in one.front else "no"])
    ahead = ", ".join(found.candidates[place].figures.name for place in one.front)
    titles = {"xaxis": SIZES[one.size], "yaxis": one.quality}
    layout: dict[str, Any] = {axis: {"title": {"text": title}} for axis, title in titles.items()}
    if one.better == "higher":
        layout["yaxis"]["tickformat"] = ".0%"
    elif max(one.qualities) > WIDE * min(one.qualities) > 0:
        layout["yaxis"] |= {"type": "log", "nticks": 6}
    says = f"{one.quality} over {SIZES[one.size]} of {len(found.candidates)} models; not beaten are {ahead}."
    table = Table(f"{one.quality} over {SIZES[one.size]}", ["model", SIZES[one.size], one.quality, "not beaten"], rows)
    return Chart(f"front-{number}", says, traces, layout, table, 380)
