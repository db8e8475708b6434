"""Types beyond the dense families of tests/models.py: what is offered is cut, and cut equals mask."""

from __future__ import annotations

import pytest

from tests.zoo.examine import TOLERANCE, examine

OFFERED = {
    "mixtral": {"heads", "channels", "experts", "residual", "blocks"},
    "qwen3_moe": {"heads", "channels", "experts", "residual", "blocks"},
    "gpt_oss": {"heads", "channels", "experts", "residual", "blocks"},
    "deepseek_v3": {"heads", "channels", "experts", "residual", "blocks"},  # latent attention, shared experts, a correction
    "afmoe": {"heads", "channels", "experts", "residual", "blocks"},
    "mamba": {"channels", "residual", "blocks"},
    "llama4_text": {"heads", "channels", "residual", "blocks"},  # a base_model_prefix that is no attribute
    "bert": {"heads", "channels", "residual", "blocks"},  # norms after the sum
    "bart": {"heads", "channels", "residual", "blocks"},  # cross-attention is there and not used
}


@pytest.mark.parametrize("model_type", OFFERED)
def test_cut_equals_mask(model_type: str) -> None:
    row = examine(model_type)
    assert not row.problem
    assert not row.refused
    assert row.differences.keys() == OFFERED[model_type]
    assert max(row.differences.values()) <= TOLERANCE
