"""Ranks of one sorted group within another by one merge, compiled by numba."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from steerrec.kernels import _compiled


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
