"""What every test gets: shape checks in the maths rooms, two threads, a fixed seed, no network."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported: a test never reaches for a hub

import tests.vision.operators  # noqa: F401, I001  # before transformers
import jaxtyping

# Float[Tensor, "units width"] is checked on every call into these rooms. Must come before their first import.
jaxtyping.install_import_hook(["resect.saliency", "resect.statistics", "resect.plan"], "beartype.beartype")

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_finish() -> None:
    """Saves a twentieth of all time: what was imported and collected stays, so garbage is not looked for in it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
