"""Calibration: fixed token batches, and where they came from.

Text goes in (files, hub data sets, the demo package's passages, or the model's own words), token windows with
provenance come out.
The only room beside `statistics` that ever calls a model, and only for the source ``self``.
"""

from __future__ import annotations

from resect.calibration.batches import Calibration, calibrate
from resect.calibration.chat import chat_text
from resect.calibration.corpora import Rows
from resect.calibration.heldout import HeldOut, evaluation_text, evaluation_tokens, held_out, token_sizes, wikitext_rows
from resect.calibration.hub import HUB, HubSet
from resect.calibration.limits import check_length, check_vocabulary, check_windows, positions_of
from resect.calibration.passages import package_root
from resect.calibration.sources import read_rows, read_texts
from resect.calibration.tokenised import sections_in_places, texts_in_tokens
from resect.calibration.windows import digest

__all__ = [
    "HUB",
    "Calibration",
    "HeldOut",
    "HubSet",
    "Rows",
    "calibrate",
    "chat_text",
    "check_length",
    "check_vocabulary",
    "check_windows",
    "digest",
    "evaluation_text",
    "evaluation_tokens",
    "held_out",
    "package_root",
    "positions_of",
    "read_rows",
    "read_texts",
    "sections_in_places",
    "texts_in_tokens",
    "token_sizes",
    "wikitext_rows",
]
