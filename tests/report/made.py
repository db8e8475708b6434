"""Reports with something in every part, made up."""

from __future__ import annotations

from typing import Any

import torch

from resect.plan import Kept, Plan
from resect.recovery.facts import Counts, Facts, Round, Trained
from resect.report import (
    Curve,
    CurvePoint,
    GroupKnowledge,
    Knowledge,
    RecoveryReport,
    Removal,
    RunReport,
    recovery_report,
    saliency,
)
from resect.report.results import ShotSizes
from tests.report.test_figures import perplexity
from tests.report.test_reports import complete

SOURCES = ("texts/a.txt", "b")
"""What a made-up recovery learned from."""


def scored() -> tuple[Plan, dict[str, torch.Tensor]]:
    """Four layers of eight channels, of which the four lowest go; unit i of layer l is worth (i + 1) 10**-l."""
    names = {layer: f"{layer}.channels" for layer in range(4)}
    kept = {name: Kept(kind="channels", layer=layer, units=8, keep=(4, 5, 6, 7)) for layer, name in names.items()}
    return Plan(groups=kept), {name: torch.arange(1, 9) * 10.0**-layer for layer, name in names.items()}


def knowledge() -> Knowledge:
    """Two kinds in three blocks, one of the groups protected."""
    groups = [
        GroupKnowledge(
            name=f"{layer}.{kind}",
            kind=kind,
            layer=layer,
            units=8,
            damage=0.25 * layer + 0.1,
            removals=[
                Removal(ratio=ratio, removed=int(8 * ratio), nats=3 + ratio * layer, perplexity=20 + 7.5 * ratio * layer)
                for ratio in (0.25, 0.5)
            ],
        )
        for kind in ("heads", "channels")
        for layer in range(3)
    ]
    return Knowledge(
        model="tiny", units="magnitude", ratios=[0.25, 0.5], gamma=0.1, seed=3, dense=perplexity(20), groups=groups,
        protected=["2.heads"], passing=True, seconds=1.5,
    )  # fmt: skip


def full_run() -> RunReport:
    """A run that did everything that a run can do."""
    report = complete(protected=["2.heads"], withheld={"heads": "60 does not divide"})
    report.saliency = saliency(*scored())
    report.shots = [
        ShotSizes(
            number=n, parameters=1000 - 85 * n, block_parameters=800 - 80 * n, macs=4000, loss=0.125 * n,
            prices={group.name: 0.75 + 0.25 * n * group.layer for group in report.groups if group.layer is not None},
        )
        for n in (1, 2)
    ]  # fmt: skip
    points = [
        CurvePoint(parameters=size, block_parameters=size - 200, macs=size * 5, perplexity=value)
        for size, value in ((1000, 20.5), (830, 31.25))
    ]
    report.curve = Curve(text="demo", window=128, tokens=1016, digest="ab" * 32, points=points)
    report.losses = [2.5, 2.25, 2.125]
    report.knowledge = knowledge().model_dump(mode="json")
    report.prompts = ["Say </script><b>bold</b> & go"]
    return report


def recovered() -> RecoveryReport:
    """A recovery with a mixture of two sources."""
    counts = [Counts(source=name, kind="text", rows=9, examples=8, held_out=1, tokens=999, predicted=900) for name in SOURCES]
    losses = [(step, 3 - step / 100) for step in range(1, 31)]
    trained = Trained(
        name="text", steps=30, examples=8, tokens=999, seconds=4, losses=losses, held_out=[(10, 2.9), (30, 2.75)], best_step=30,
        nats=dict(zip(SOURCES, (2.5, 3.0), strict=True)),
    )  # fmt: skip
    gaps = [dict(zip(SOURCES, (gap, 0.25), strict=True)) for gap in (0.5, 0.25)]
    rounds = [Round(stage="text", number=number, gaps=one, weighted=0.3) for number, one in enumerate(gaps)]
    facts = Facts(
        sources=counts, trainable=10, parameters=100, before=dict(zip(SOURCES, (3.0, 3.5), strict=True)), after=trained.nats,
        held_out_before=3.25, held_out_after=2.75, trainings=[trained], rounds=rounds,
    )  # fmt: skip
    settings = {"full": False, "rank": 8, "distillation": {"weight": 0.0, "hidden": 0.0}}
    recipe: dict[str, Any] = {"model": "small", "settings": settings, "teacher": "dense"}
    recipe |= {"device": "cpu", "dtype": "float32"}
    return recovery_report(recipe, facts)
