"""Quiet for the library underneath: transformers' notes and progress bars belong to whoever calls it directly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

from resect.errors import ResectWarning


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or lesser log lines from transformers and its hub client in the block; as before afterwards.

    Warnings of ours (`ResectWarning`) are shown, each once.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("once", ResectWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
