"""Popularity groups: head, mid and tail of a catalogue, from training interactions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steerrec.errors import DataError

HEAD, MID, TAIL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class PopularityGroups:
    """The group of every catalogue row.

    Attributes
    ----------
    labels : int8 array [N]
        `HEAD`, `MID` or `TAIL`.
    """

    labels: NDArray[np.int8]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of head, mid and tail items."""
        head, mid, tail = np.bincount(self.labels, minlength=3).tolist()
        return head, mid, tail


def popularity_groups(counts: ArrayLike) -> PopularityGroups:
    """Split a catalogue by its items' shares of the interactions.

    Items sorted by count, descending, ties by row ascending: the head is the leading items while
    5 * cumulative <= total, at least one. The tail is the same on the ascending sort, ties by row
    ascending too. Mid is the rest. Integers throughout. Where both claim an item, which takes
    counts so even that items of one count fill most of the total, it is head, and the tail is
    counted over the items that are left.

    Parameters
    ----------
    counts : integer array [N]
        Training interactions per catalogue row.

    Raises
    ------
    DataError
        If the counts are not whole numbers >= 0, or sum to nothing.
    """
    given: NDArray[Any] = np.asarray(counts)
    if given.ndim != 1 or given.dtype.kind not in "iu" or (given.size and given.min() < 0):
        raise DataError("popularity groups need one whole count >= 0 per catalogue row")
    whole = given.astype(np.int64)
    total = int(whole.sum())
    if total == 0:
        raise DataError("popularity groups need training interactions; every count is zero")
    rows = np.arange(len(whole))
    labels = np.full(len(whole), MID, dtype=np.int8)
    head = _leading(np.lexsort((rows, -whole)), whole, total)
    labels[head] = HEAD
    ascending = np.lexsort((rows, whole))
    labels[_leading(ascending[labels[ascending] != HEAD], whole, total)] = TAIL
    return PopularityGroups(labels)


def _leading(order: NDArray[np.int64], counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """The leading rows of an order that hold at most a fifth of the total, at least one."""
    size = np.searchsorted(5 * np.cumsum(counts[order]), total, side="right")
    return order[: max(1, int(size))]
