"""Types beyond the dense families of tests/models.py: what is offered is cut, and cut equals mask.

Twenty-one types are examined every time, a quarter of the rest in turn, another every day (RESECT_ZOO=0..3 picks one); `make zoo`
examines all of them and writes the record that this is held against.
"""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.zoo.examine import TOLERANCE, examine
from tests.zoo.shrink import TYPES

DENSE = {"heads", "channels", "residual", "sublayers", "blocks", "vocabulary"}
OFFERED = {
    "mixtral": DENSE | {"experts"},
    "qwen3_moe": DENSE | {"experts"},
    "gpt_oss": DENSE | {"experts"},
    "deepseek_v3": DENSE | {"experts"},  # latent attention, shared experts, a correction
    "afmoe": DENSE | {"experts"},
    "mamba": DENSE - {"heads"},
    "llama4_text": DENSE | {"experts"},  # a base_model_prefix that is no attribute, experts that are summed
    "phimoe": DENSE | {"experts"},  # chosen one after another
    "bert": DENSE,  # norms after the sum
    "bart": DENSE,  # cross-attention is there and not used
    "olmo": DENSE,  # norms without weights
    "gpt_neox": DENSE,
    "phi3": DENSE,  # fused projections
    "gemma2": DENSE,  # norms behind sub-layers
    "exaone4": DENSE,
    "granitemoe": DENSE | {"experts"},
    "olmoe": DENSE | {"experts"},
    "mamba2": DENSE - {"channels"},
    "bamba": DENSE,  # state space and attention in turn
    "recurrent_gemma": DENSE,
    "lfm2": DENSE,  # convolutions and attention in turn
}
RECORD: dict[str, dict[str, Any]] = {
    row["type"]: row for row in json.loads((Path(__file__).parents[2] / "benchmarks/results/zoo.json").read_text())["rows"]
}
SLOW = 30
"""Seconds in the record above which a type is left to `make zoo`."""
REST = [name for name in TYPES if name not in OFFERED and RECORD[name].get("groups") and RECORD[name]["all_seconds"] <= SLOW]
QUARTER = REST[int(os.environ.get("RESECT_ZOO", date.today().toordinal())) % 4 :: 4]


@pytest.mark.parametrize("model_type", OFFERED)
def test_cut_equals_mask(model_type: str) -> None:
    row = examine(model_type, double=False)
    assert not row.problem
    assert not row.refused
    assert row.differences.keys() == OFFERED[model_type]
    assert max(row.differences.values()) <= TOLERANCE


@pytest.mark.parametrize("model_type", QUARTER)
def test_a_quarter_of_the_rest(model_type: str) -> None:
    row = examine(model_type, double=False)
    assert max(row.differences.values()) <= TOLERANCE
    assert row.verified or not RECORD[model_type]["verified"]
    assert row.groups.keys() >= RECORD[model_type]["groups"].keys()
