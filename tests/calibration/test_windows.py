from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from resect.calibration.windows import crop, different, digest, pack

LENGTH = 10


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(*sizes: int) -> list[list[int]]:
    """Pieces of the given sizes in which every token is another number."""
    counter = itertools.count()
    return [[next(counter) for _ in range(size)] for size in sizes]


def assert_runs_of(window: Sequence[int], piece: Sequence[int]) -> None:
    start = list(piece).index(window[0])
    assert list(window) == list(piece[start : start + len(window)])


def test_crops_come_from_one_long_piece_each_before_any_gives_two() -> None:
    pieces = numbered(35, 9, 10, 57)
    windows = list(crop(pieces, LENGTH, seeded()))
    assert len(windows) == 3 + 0 + 1 + 5
    assert [numbers for _, numbers in windows[:3]] == [{0}, {2}, {3}]
    for window, numbers in windows:
        assert_runs_of(window, pieces[next(iter(numbers))])


def test_crops_never_overlap() -> None:
    tokens = [token for window, _ in crop(numbered(123, 456), LENGTH, seeded()) for token in window]
    assert len(tokens) == len(set(tokens)) == 570


def test_a_crop_may_start_anywhere() -> None:
    starts = {next(crop(numbered(14), LENGTH, seeded(seed)))[0][0] for seed in range(60)}
    assert starts == {0, 1, 2, 3, 4}


def test_a_packed_stream_holds_every_piece_with_the_separator_between() -> None:
    pieces, separator = numbered(3, 4, 5), [99]
    windows = list(pack(pieces, 2, seeded(), separator=separator))
    stream = [0, 1, 2, 99, 3, 4, 5, 6, 99, 7, 8, 9, 10, 11]
    assert sorted(window for window, _ in windows) == sorted(zip(stream[::2], stream[1::2], strict=True))
    assert dict(windows)[(2, 99)] == {0}
    assert dict(windows)[(99, 7)] == {2}
    assert dict(windows)[(3, 4)] == {1}


@pytest.mark.parametrize("length", [1, 3, 50])
def test_too_little_text_gives_no_window(length: int) -> None:
    assert list(crop([], length, seeded())) == []
    assert list(pack([[]], length, seeded(), separator=[0])) == []


def test_different_drops_what_repeats_and_what_is_taken() -> None:
    windows = [(tokens, frozenset([i])) for i, tokens in enumerate([(1, 2), (1, 2), (3, 4), (5, 6), (7, 8)])]
    kept = different(windows, samples=2, length=2, taken=[torch.tensor([[3, 4]])])
    assert kept.tokens.tolist() == [[1, 2], [5, 6]]
    assert kept.pieces == {0, 3}


def test_different_of_nothing_is_empty() -> None:
    kept = different([], samples=2, length=7)
    assert kept.tokens.shape == (0, 7)
    assert kept.pieces == frozenset()


def test_the_digest_is_the_sha256_of_little_endian_integers() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    expected = hashlib.sha256(np.arange(12, dtype="<i8").tobytes()).hexdigest()
    assert digest(tokens) == digest(tokens.to(torch.int32)) == expected
    assert digest(tokens.T) != expected
