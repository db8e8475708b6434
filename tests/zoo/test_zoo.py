"""Types beyond the dense families of tests/models.py: what is offered is cut, and cut equals mask."""

from __future__ import annotations

import pytest

from tests.zoo.examine import TOLERANCE, examine

DENSE = {"heads", "channels", "residual", "sublayers", "blocks", "vocabulary"}
OFFERED = {
    "mixtral": DENSE | {"experts"},
    "qwen3_moe": DENSE | {"experts"},
    "gpt_oss": DENSE | {"experts"},
    "deepseek_v3": DENSE | {"experts"},  # latent attention, shared experts, a correction
    "afmoe": DENSE | {"experts"},
    "mamba": DENSE - {"heads"},
    "llama4_text": DENSE,  # a base_model_prefix that is no attribute
    "bert": DENSE,  # norms after the sum
    "bart": DENSE,  # cross-attention is there and not used
}


@pytest.mark.parametrize("model_type", OFFERED)
def test_cut_equals_mask(model_type: str) -> None:
    row = examine(model_type)
    assert not row.problem
    assert not row.refused
    assert row.differences.keys() == OFFERED[model_type]
    assert max(row.differences.values()) <= TOLERANCE
