"""Ranks of one group of numbers within another, compiled by numba: merged, or counted in bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerrec.kernels import Floats, Indices, _compiled, _is_finite

Ints = NDArray[np.int32]

BINS = 2048
"""Into how many equal parts the range of a latent is cut; counts of two groups stay in cache."""

_PLACED = 1024  # values whose bins are found at once, without a branch


@_compiled()
def placements(values: NDArray[Any], others: NDArray[Any]) -> tuple[int, int]:
    """Sum, and sum of squares, of twice the number of `others` below each value.

    Both are sorted; of others that equal a value half counts as below it.
    """
    lower, upper, total, squares = 0, 0, 0, 0
    for i in range(len(values)):
        value = values[i]
        while lower < len(others) and others[lower] < value:
            lower += 1
        upper = max(upper, lower)
        while upper < len(others) and others[upper] <= value:
            upper += 1
        twice = lower + upper
        total += twice
        squares += twice * twice
    return total, squares


@_compiled(fastmath={"nnan", "ninf", "nsz"})  # rows that are not finite do not come here
def _extremes(row: Floats) -> tuple[Any, Any]:
    low = high = row[0]
    for i in range(len(row)):
        low, high = min(low, row[i]), max(high, row[i])
    return low, high


@_compiled()  # not reassociated: a larger value must never come into a lower bin
def _place(row: Floats, low: Any, scale: Any, places: Ints) -> None:
    for i in range(len(row)):
        places[i] = np.int32((row[i] - low) * scale)


@_compiled()
def _count(row: Floats, low: Any, scale: Any, places: Ints, counts: Ints) -> None:
    counts[:] = 0
    for start in range(0, len(row), len(places)):
        part = row[start : start + len(places)]
        _place(part, low, scale, places)
        for i in range(len(part)):
            counts[np.uint32(places[i])] += 1  # an unsigned index is not looked at for its sign


@_compiled("void(float32[:, ::1], int64, int64[:, ::1])")
def binned_placements(rows: Floats, n_a: int, found: Indices) -> None:
    """What `placements` gives of each row both ways, with equal what falls into one bin.

    Parameters
    ----------
    rows
        Numbers of the users of A, `n_a` of them, and then of those of B: [R, n_a + n_b].
    n_a
        How many are of A.
    found
        Where it goes, [R, 5]: sum and sum of squares of A within B, the same of B within A, and
        how many pairs of A and B share a bin; -1 for the last where a row cannot be cut into bins.
    """
    places = np.empty(_PLACED, np.int32)
    in_a, in_b = np.empty(BINS, np.int32), np.empty(BINS, np.int32)
    for r in range(len(rows)):
        row = rows[r]
        found[r] = -1
        if not _is_finite(row):
            continue
        low, high = _extremes(row)
        spread = high - low
        if not np.float32(1e-30) < spread < np.float32(1e30):
            continue
        scale = np.float32(BINS - 1) / spread
        _count(row[:n_a], low, scale, places, in_a)
        _count(row[n_a:], low, scale, places, in_b)
        below_a, below_b, shared = 0, 0, 0
        total_a, squares_a, total_b, squares_b = 0, 0, 0, 0
        for i in range(BINS):
            a, b = int(in_a[i]), int(in_b[i])
            twice_b, twice_a = 2 * below_b + b, 2 * below_a + a
            total_a += a * twice_b
            squares_a += a * twice_b * twice_b
            total_b += b * twice_a
            squares_b += b * twice_a * twice_a
            shared += a * b
            below_a += a
            below_b += b
        found[r, 0], found[r, 1] = total_a, squares_a
        found[r, 2], found[r, 3] = total_b, squares_b
        found[r, 4] = shared
