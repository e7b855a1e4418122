"""Popularity groups: cases worked by hand, and a plain loop as an oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerrec.data import HEAD, MID, TAIL, popularity_groups
from steerrec.errors import DataError


@pytest.mark.parametrize(
    ("counts", "labels"),
    [
        # total 20, a fifth is 4: head 4; tail 1 + 1 + 2 = 4 fits, the next 3 does not
        ([3, 1, 4, 2, 1, 3, 3, 3], [MID, TAIL, HEAD, TAIL, TAIL, MID, MID, MID]),
        # total 10, a fifth is 2: nothing fits the head, which is one item nevertheless
        ([1, 6, 1, 2], [TAIL, HEAD, TAIL, MID]),
        # total 20: both ends of one item each, though neither fits
        ([8, 5, 7], [HEAD, TAIL, MID]),
        # ties by row on both sides: of the two 4s the first is head, of the four 2s the first
        # two are tail
        ([2, 2, 4, 2, 4, 2, 4], [TAIL, TAIL, HEAD, MID, MID, MID, MID]),
        # items without interactions cost the tail nothing
        ([5, 0, 5, 0, 3, 2], [HEAD, TAIL, MID, TAIL, MID, TAIL]),
        # all alike: the head takes the first, the tail the first of the others
        ([1] * 10, [HEAD] * 2 + [TAIL] * 2 + [MID] * 6),
        ([3, 3], [HEAD, TAIL]),
        ([3], [HEAD]),
    ],
)
def test_by_hand(counts: list[int], labels: list[int]) -> None:
    groups = popularity_groups(counts)

    assert groups.labels.tolist() == labels
    assert groups.labels.dtype == np.int8
    assert groups.sizes == tuple(labels.count(g) for g in (HEAD, MID, TAIL))


@given(st.lists(st.integers(0, 20), min_size=2, max_size=40).filter(any))
def test_against_a_loop(counts: list[int]) -> None:
    total, rows = sum(counts), range(len(counts))

    def leading(order: list[int]) -> list[int]:
        chosen, held = [], 0
        for row in order:
            held += counts[row]
            if 5 * held > total:
                break
            chosen.append(row)
        return chosen or order[:1]

    head = leading(sorted(rows, key=lambda r: (-counts[r], r)))
    rest = [r for r in sorted(rows, key=lambda r: (counts[r], r)) if r not in head]
    tail = leading(rest)

    labels = popularity_groups(counts).labels
    assert np.flatnonzero(labels == HEAD).tolist() == sorted(head)
    assert np.flatnonzero(labels == TAIL).tolist() == sorted(tail)


def test_the_bound_is_exact_in_integers() -> None:
    big = 2**53  # 5 * big and its neighbour are one number in float64
    assert popularity_groups([big, big - 1] + [big] * 3).sizes[0] == 1
    assert popularity_groups([3, 3, 3, 3, 3]).labels.tolist()[0] == HEAD  # 5 * 3 = 15: just fits


@pytest.mark.parametrize(
    ("counts", "message"),
    [([0, 0], "every count is zero"), ([1, -1], "whole count"), ([0.5, 1.0], "whole count")],
)
def test_bad_counts(counts: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        popularity_groups(counts)
