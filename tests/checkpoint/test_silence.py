"""What is quiet, and what is heard all the same."""

from __future__ import annotations

import warnings

from resect.checkpoint.silence import quiet
from resect.errors import EmulatedPrecision


def test_warnings_of_others_are_ignored_and_filters_come_back() -> None:
    before = list(warnings.filters)
    with quiet():
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert warnings.filters == before


def test_ours_are_heard_once() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        with quiet():
            for _ in range(2):
                warnings.warn("of a library", UserWarning, stacklevel=1)
                warnings.warn("ours", EmulatedPrecision, stacklevel=1)
            warnings.warn("ours", EmulatedPrecision, stacklevel=1)
    assert [(str(one.message), one.category) for one in heard] == [("ours", EmulatedPrecision)]
