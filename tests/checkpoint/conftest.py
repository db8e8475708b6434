"""Code shipped with a checkpoint is copied to a folder of the test session, not to the user's cache."""

from __future__ import annotations

import sys

import pytest
import transformers.dynamic_module_utils


@pytest.fixture(autouse=True, scope="session")
def _modules_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = str(tmp_path_factory.mktemp("modules"))
    transformers.dynamic_module_utils.HF_MODULES_CACHE = folder  # type: ignore[attr-defined]
    sys.path.append(folder)
