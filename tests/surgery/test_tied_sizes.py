"""Groups of which one number of the code holds the sizes together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.surgery import equal_sizes, plan_record, tied_sizes
from tests.models import FAMILIES


class Halves(nn.Module):
    """A layer split in two by one number, as in C2PSA of YOLO11."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.first, self.mix = nn.Conv2d(8, 2 * width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(2 * width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).split((self.width, self.width), 1)
        out: Tensor = self.last(torch.cat((left, right + self.mix(right)), 1))
        return out


def network(*halves: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *map(Halves, halves), nn.Conv2d(8, 5, 1)).eval()


INPUTS = (torch.randn(2, 3, 9, 9),)


def test_two_halves_are_held_together() -> None:
    model = network(16)
    graph = resect.trace(model, INPUTS)
    found = equal_sizes(model, graph, ["channels"])
    assert len(found) == 1
    assert [graph.group(name).units for name in found[0]] == [16, 16]
    left, right = found[0]
    assert tied_sizes._refused(model, graph, {left: 3}) is not None
    assert tied_sizes._refused(model, graph, {left: 3, right: 3}) is None


def test_likes_are_found_with_the_first() -> None:
    model = network(16, 12, 12)
    graph = resect.trace(model, INPUTS)
    found = equal_sizes(model, graph, ["channels"])
    assert sorted(graph.group(name).units for names in found for name in names) == [12, 12, 12, 12, 16, 16]
    assert all(len({name.partition(".")[0] for name in names}) == 1 for names in found)


@pytest.mark.parametrize("protect", [[], ["right"]])
def test_a_plan_respects_it(protect: list[str]) -> None:
    model = network(16)
    graph = resect.trace(model, INPUTS)
    left, right = equal_sizes(model, graph, ["channels"])[0]
    options: dict[str, Any] = {"layout": "per-layer", "protect": [right] if protect else []}
    settings = {"criterion": "l2", "kinds": ["channels"]}
    plan = resect.prune(model, inputs=INPUTS, keep=0.8, of="model", settings=settings, **options).plan
    left_kept, right_kept = (len(plan.groups[name].keep) if name in plan.groups else 16 for name in (left, right))
    assert left_kept == right_kept
    assert (left_kept == 16) is bool(protect)


def test_groups_of_their_own_take_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[Any] = []

    def tried(*given: Any) -> Any:
        trials.append(given)
        return plan_record(*given)

    monkeypatch.setattr("resect.surgery.tied_sizes.plan_record", tried)
    model = FAMILIES["llama"]()
    assert equal_sizes(model, resect.trace(model), ["heads", "channels"]) == ()
    assert len(trials) == 1
