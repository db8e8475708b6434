"""The scores of a run, folded: quantiles of every group, a histogram of every kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resect.plan import Kept, Plan
from resect.report.results import GroupScores, Saliency, ScoreHistogram

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 40


def saliency(plan: Plan, scores: Mapping[str, Tensor]) -> Saliency | None:
    """What the scores of the groups of a plan look like, beside what stayed; None where none were scored."""
    scored = {name: values.detach().double().cpu() for name, values in scores.items() if name in plan.groups and len(values)}
    if not scored:
        return None
    kinds = dict.fromkeys(plan.groups[name].kind for name in scored)
    return Saliency(
        levels=list(LEVELS),
        groups=[_group(name, plan.groups[name], values) for name, values in scored.items()],
        histograms=[_histogram(kind, plan, scored) for kind in kinds],
    )


def _group(name: str, kept: Kept, scores: Tensor) -> GroupScores:
    quantiles = scores.quantile(torch.tensor(LEVELS, dtype=scores.dtype)).tolist()
    both = bool(kept.keep) and kept.removed
    threshold = _rounded(float(scores[list(kept.keep)].min())) if both else None
    return GroupScores(
        name=name, kind=kept.kind, layer=kept.layer, quantiles=[_rounded(value) for value in quantiles], threshold=threshold
    )


def _histogram(kind: str, plan: Plan, scores: Mapping[str, Tensor]) -> ScoreHistogram:
    """Of all groups of a kind, those that stay and those that go apart."""
    named = [name for name in scores if plan.groups[name].kind == kind]
    values = torch.cat([scores[name] for name in named])
    stays = torch.cat([_stays(plan.groups[name]) for name in named])
    positive = values > 0
    low, high = _ends(values[positive].log10())
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = [values[positive & of].log10().histogram(edges).hist.long().tolist() for of in (stays, ~stays)]
    nothing = int((~positive).sum())
    return ScoreHistogram(
        kind=kind, edges=[round(edge, 4) for edge in edges.tolist()], kept=counts[0], removed=counts[1], nothing=nothing
    )


def _ends(logarithms: Tensor) -> tuple[float, float]:
    """Where a histogram begins and ends: a little outside the values, so that rounding loses none."""
    if not len(logarithms):
        return 0.0, 1.0
    low, high = float(logarithms.min()), float(logarithms.max())
    margin = max(high - low, 0.1) * 1e-3
    return low - margin, high + margin


def _stays(kept: Kept) -> Tensor:
    stays = torch.zeros(kept.units, dtype=torch.bool)
    stays[list(kept.keep)] = True
    return stays


def _rounded(value: float) -> float:
    """Six digits say enough."""
    return float(f"{value:.6g}")
