"""Sizes as people state them: so many parameters, these widths, without those blocks, by this plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import resect
from resect.errors import UsageError
from resect.plan import Kept, Plan, aligned
from tests.models import FAMILIES, assert_same_function, copy_of, random_tokens


def count_parameters(model: nn.Module) -> int:
    """All of them, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


TOKENS = random_tokens(4, 12, seed=3)


def prune(**options: Any) -> resect.Result:
    """A small Llama with two KV heads, four query heads and 48 channels a block, pruned."""
    return resect.prune(FAMILIES["llama"](), data=TOKENS, **options)


def kept(result: resect.Result, kind: str) -> list[int]:
    """How many units of every group of a kind stay."""
    return [len(one.keep) for one in result.plan.groups.values() if one.kind == kind]


def test_a_number_of_parameters_is_met_from_below() -> None:
    dense = count_parameters(FAMILIES["llama"]())
    asked = dense - 3000
    found = prune(budget=f"model:{asked}", layout="per-layer")
    assert found.report["parameters"]["pruned"] == count_parameters(found.model)
    assert asked - 500 < count_parameters(found.model) <= asked


@pytest.mark.parametrize("iterations", [1, 3])
def test_widths_by_kind(iterations: int) -> None:
    found = prune(settings={"widths": {"heads": 1, "channels": 12}, "iterations": iterations})
    assert set(kept(found, "heads")) == {1}
    assert set(kept(found, "channels")) == {12}
    assert "keep" not in found.plan.notes
    assert found.plan.notes["sizes"] == "1 heads, 12 channels kept in every group"


def test_the_hidden_size() -> None:
    found = prune(settings={"widths": {"residual": 20}})
    assert found.model.get_input_embeddings().weight.shape[1] == 20  # type: ignore[operator]


def test_shares_by_kind_are_those_of_each_kind_alone() -> None:
    both = prune(settings={"share": {"heads": 0.5, "channels": 0.25}}).plan
    alone = {
        kind: prune(settings={"share": share, "kinds": [kind]}).plan
        for kind, share in (("heads", 0.5), ("channels", 0.25))
    }
    for name, one in both.groups.items():
        assert one == alone[one.kind].groups[name]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"widths": {"channels": 10_000}}, "10000 channels were asked for; model.layers.0.mlp.channels has"),
        ({"widths": {"channels": -1}}, "settings.widths"),
        ({"widths": {"channel": 8}}, "'channels'"),
        ({"widths": {"experts": 2}}, "experts were asked for, the network offers"),
        ({"widths": {"channels": 8}, "share": 0.2}, "share and widths"),
        ({"widths": {"channels": 8}, "kinds": ["heads"]}, "Leave kinds out"),
        ({"share": {"channels": 1.0}}, "less than 1"),
    ],
)
def test_sizes_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        prune(settings=settings)
    assert said in str(refused.value).replace("widths.", "settings.widths.") or said in str(refused.value)


def test_sizes_and_a_budget_are_one_too_many() -> None:
    with pytest.raises(UsageError, match="the setting widths decides"):
        prune(settings={"widths": {"channels": 8}}, budget="params:0.5")


class TestByHand:
    def test_blocks_by_number(self) -> None:
        dense = FAMILIES["llama"]()
        found = prune(method="by-hand", settings={"drop_blocks": [1]})
        assert found.model.config.num_hidden_layers == int(dense.config.num_hidden_layers) - 1  # type: ignore[union-attr]
        assert found.report["calibration"] is None
        assert found.report["cut_equals_mask"]["difference"] <= 1e-4

    def test_a_file_and_blocks(self, tmp_path: Path) -> None:
        first = prune(settings={"widths": {"heads": 1, "channels": 12}}, plan_only=True).plan
        (tmp_path / "plan.json").write_text(first.to_json())
        found = prune(method="by-hand", settings={"file": str(tmp_path / "plan.json"), "drop_blocks": [0]})
        again = copy_of(FAMILIES["llama"]())
        resect.cut(again, found.plan)
        assert_same_function(found.model, again, random_tokens(2, 9))
        assert found.plan.removed() == {**first.removed(), "model.layers.0": 1}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"units": 7, "keep": (0,)}, "the plan is for another network"),
            ({"kind": "channels"}, "the plan is for another network"),
        ],
    )
    def test_a_plan_that_does_not_fit(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        name = "model.layers.0.self_attn.heads"
        groups = {name: Kept(kind="heads", layer=0, units=2, keep=(0,)).model_copy(update=change)}
        (tmp_path / "plan.json").write_text(Plan(groups=groups).to_json())
        with pytest.raises(UsageError, match=f"(?i){said}"):
            prune(method="by-hand", settings={"file": str(tmp_path / "plan.json")}, layout="per-layer")

    def test_other_sizes_in_some_blocks_are_not_uniform(self, tmp_path: Path) -> None:
        name = "model.layers.0.self_attn.heads"
        groups = {name: Kept(kind="heads", layer=0, units=2, keep=(0,))}
        (tmp_path / "plan.json").write_text(Plan(groups=groups).to_json())
        with pytest.raises(UsageError, match="Use layout=per-layer"):
            prune(method="by-hand", settings={"file": str(tmp_path / "plan.json")})

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"settings": {"drop_blocks": [9]}}, "Block 9 was to go"),
            ({"settings": {"drop_blocks": [0, 1, 2]}}, "one has to stay"),
            ({"settings": {}}, "Name one"),
            ({"settings": {"drop_blocks": [0]}, "budget": "params:0.5"}, "a plan by hand decides"),
            ({"settings": {"file": "nowhere.json"}}, "nowhere.json"),
        ],
    )
    def test_what_cannot_be_meant(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            prune(method="by-hand", **options)


def test_multiples_by_kind() -> None:
    found = prune(keep=0.6, align={"heads": 1, "channels": 8}, layout="per-layer")
    assert all(count % 8 == 0 for count in kept(found, "channels"))
    with pytest.raises(UsageError, match="'channels'"):
        aligned({"channel": 8})
    with pytest.raises(UsageError, match=r"align\.heads"):
        aligned({"heads": 0})
