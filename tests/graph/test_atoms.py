"""The algebra of axes, held against numbers: every position carries a label, and labels that meet must be equal."""

from __future__ import annotations

import pytest
import torch

from resect.graph.atoms import (
    Misaligned,
    concatenate,
    coordinates,
    factor,
    freeze,
    fresh,
    join,
    kept_length,
    leaves,
    length,
    narrow,
    reshape,
)


def test_view_splits_and_merges_in_row_major_order() -> None:
    axis = fresh(24)
    heads, width = reshape([axis], [6, 4])
    (back,) = reshape([heads, width], [24])
    assert leaves(back) == leaves(axis) == [*heads, *width]
    found = coordinates(axis)
    assert torch.equal(found[heads[0]], torch.arange(24) // 4)
    assert torch.equal(found[width[0]], torch.arange(24) % 4)


def test_joining_with_a_repeated_axis_refines_the_coarse_one() -> None:
    """Query heads against KV heads that were repeated: the query axis learns which KV head it reads."""
    queries, keys, repeats = fresh(6), fresh(2), fresh(3)
    join(queries, (*keys, *repeats))
    assert torch.equal(coordinates(queries)[leaves(keys)[0]], torch.arange(6) // 3)


def test_segments_of_a_fused_projection_keep_their_own_units() -> None:
    fused = fresh(24 + 8 + 8)
    query, key, value = narrow(fused, 0, 24), narrow(fused, 24, 32), narrow(fused, 32, 40)
    heads, _ = reshape([query], [6, 4])
    key_heads, _ = reshape([key], [2, 4])
    value_heads, _ = reshape([value], [2, 4])
    join(key_heads, value_heads)
    join(heads, (*key_heads, *fresh(3)))
    of_kv = coordinates(fused)[leaves(key_heads)[0]]
    assert of_kv.tolist() == [*(p // 12 for p in range(24)), *(p // 4 for p in range(8)), *(p // 4 for p in range(8))]


def test_rotating_halves_pairs_the_two_halves_of_a_head() -> None:
    """cat(-x[4:], x[:4]) added to x: position p and p + 4 go together."""
    width = fresh(8)
    left, right = narrow(width, 0, 4), narrow(width, 4, 8)
    join(width, concatenate([right, left]))
    (pair,) = set(coordinates(width))
    assert coordinates(width)[pair].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_sums_with_different_edges_are_cut_at_both() -> None:
    a, b = fresh(12), fresh(12)
    first, _ = narrow(a, 0, 4), narrow(a, 4, 12)
    second, _ = narrow(b, 0, 6), narrow(b, 6, 12)
    join(a, b)
    assert len(coordinates(a)) == 3
    assert leaves(first)[0] in coordinates(second)


def test_a_sum_is_factored_where_every_segment_is() -> None:
    """[q; k; v] of 3 x 8 positions seen as 6 rows of 4."""
    fused = concatenate([fresh(8), fresh(8), fresh(8)])
    outer, inner = factor(fused, 6)
    assert (length(outer), length(inner)) == (6, 4)
    assert coordinates(fused)[leaves(inner)[0]].tolist() == [p % 4 for p in range(24)]


@pytest.mark.parametrize("shape", [[4, 6], [5, 5]])
def test_what_does_not_fit_is_refused(shape: list[int]) -> None:
    axis = concatenate([fresh(9), fresh(15)])
    with pytest.raises(Misaligned):
        reshape([axis], shape)


def test_freezing_reaches_what_is_refined_later_and_what_is_joined_later() -> None:
    axis, other = fresh(24), fresh(24)
    freeze(axis, "why")
    heads, width = reshape([axis], [6, 4])
    join(other, axis)
    assert {leaf.reason for leaf in (*heads, *width, *leaves(other))} == {"why"}


def test_freezing_a_part_leaves_the_rest_free() -> None:
    axis = fresh(10)
    freeze(narrow(axis, 0, 4), "why")
    assert sorted(leaf.reason for leaf in coordinates(axis)) == ["", "why"]


def test_length_after_removal_is_counted_through_products_and_sums() -> None:
    heads, width = fresh(6), fresh(4)
    fused = concatenate([(*heads, *width), fresh(5)])
    assert kept_length(fused, {heads[0]: 2}) == 2 * 4 + 5


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_agree_with_labels(seed: int) -> None:
    """Random views, slices and joins: two positions share a coordinate exactly as the labels of a brute force say."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [[2, 3, 4], [6, 4], [2, 12], [24]]

    def pick() -> list[int]:
        return shapes[int(torch.randint(len(shapes), (), generator=generator))]

    a, b = fresh(24), fresh(24)
    for axis in (a, b):
        for _ in range(2):
            reshape([axis], pick())
    join(a, b)
    found_a, found_b = coordinates(a), coordinates(b)
    assert found_a.keys() == found_b.keys()
    for leaf, where in found_a.items():
        assert torch.equal(where, found_b[leaf])
    together = torch.stack(list(found_a.values()))
    assert len({tuple(column) for column in together.T.tolist()}) == 24
