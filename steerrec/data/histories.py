"""Histories: the items of every user, oldest first, as one flat array with offsets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steerrec.data.interactions import Interactions
from steerrec.errors import DataError

if TYPE_CHECKING:
    from steerrec.data.catalogue import Catalogue


class DataWarning(UserWarning):
    """Data was left out that could not be used; the message counts it."""


@dataclass(frozen=True, eq=False)
class Histories:
    """Item histories in compressed rows.

    Attributes
    ----------
    items : int64 array [n]
        Catalogue rows, user by user, oldest first.
    offsets : int64 array [U + 1]
        User u has `items[offsets[u]:offsets[u + 1]]`.
    user_ids : Series [U]
        External ids.
    """

    items: NDArray[np.int64]
    offsets: NDArray[np.int64]
    user_ids: pl.Series

    @classmethod
    def from_lists(
        cls, lists: Sequence[Sequence[int]], user_ids: pl.Series | Sequence[int | str] | None = None
    ) -> Histories:
        """Histories from one list of catalogue rows per user; user ids are 0..U-1 if not given."""
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in lists], out=offsets[1:])
        items = np.array([item for row in lists for item in row], dtype=np.int64)
        ids = pl.Series("user_id", range(len(lists)) if user_ids is None else user_ids)
        if len(ids) != len(lists):
            raise DataError(f"{len(ids)} user ids for {len(lists)} histories; expected one each")
        return cls(items, offsets, ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of items of each user, [U]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> NDArray[np.int64]:
        if not -len(self) <= user < len(self):
            raise IndexError(f"user {user} of {len(self)}")
        user %= len(self)
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[user] for user in range(len(self)))

    def __repr__(self) -> str:
        return f"Histories(users={len(self):,}, interactions={len(self.items):,})"

    def select(self, users: ArrayLike) -> Histories:
        """The histories of these users (indices [P], in this order, repeats allowed)."""
        chosen = np.asarray(users, dtype=np.int64)
        starts = self.offsets[chosen]  # not through `lengths`, which would look at every user
        return self._slices(chosen, starts, self.offsets[chosen + 1] - starts)

    def truncate(self, max_length: int) -> Histories:
        """The last `max_length` items of each history."""
        lengths = np.minimum(self.lengths, max_length)
        return self._slices(None, self.offsets[1:] - lengths, lengths)

    def cut(self, drop_last: ArrayLike) -> Histories:
        """Each history without its last n items; n is one number or [U] of them."""
        lengths = np.maximum(self.lengths - np.asarray(drop_last, dtype=np.int64), 0)
        return self._slices(None, self.offsets[:-1], lengths)

    def prefixes(self, users: ArrayLike, lengths: ArrayLike, max_length: int) -> Histories:
        """Prefixes of histories, windowed to their last items.

        Parameters
        ----------
        users : int array [P]
            Indices of users, repeats allowed.
        lengths : int array [P]
            How many items of the user's history prefix p has, from the oldest on.
        max_length : int
            Only the last `max_length` items of a prefix are kept.

        Returns
        -------
        Histories
            P of them, with the ids of their users.

        Raises
        ------
        ValueError
            If a prefix is longer than its history.
        """
        chosen = np.asarray(users, dtype=np.int64)
        ends = np.asarray(lengths, dtype=np.int64)
        if (ends < 0).any() or (ends > self.lengths[chosen]).any():
            raise ValueError("a prefix cannot be longer than its history, nor negative")
        kept = np.minimum(ends, max_length)
        return self._slices(chosen, self.offsets[chosen] + ends - kept, kept)

    def padded(self, max_length: int, pad: int, side: str = "right") -> NDArray[np.int64]:
        """The last `max_length` items of each history as a rectangle.

        Parameters
        ----------
        max_length : int
            Width L.
        pad : int
            What fills the rest.
        side : {"right", "left"}
            Where the filling goes.

        Returns
        -------
        int64 array [U, L]
        """
        if side not in ("right", "left"):
            raise ValueError(f"side is {side!r}; expected 'right' or 'left'")
        lengths = np.minimum(self.lengths, max_length)[:, None]  # [U, 1]
        column = np.arange(max_length)[None, :]  # [1, L]
        real = column < lengths if side == "right" else column >= max_length - lengths
        out = np.full((len(self), max_length), pad, dtype=np.int64)
        out[real] = self.truncate(max_length).items  # row-major, as the items are
        return out

    def _slices(
        self,
        users: NDArray[np.int64] | None,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Histories:
        """Slices items[start:start + length], one per user of the result."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        ids = self.user_ids if users is None else self.user_ids.gather(users)
        return Histories(self.items[index], offsets, ids)


def build_histories(interactions: Interactions, catalogue: Catalogue) -> Histories:
    """Order every user's interactions by time, ties in file order, as rows of a catalogue.

    Users come in order of first appearance. Interactions with items that the catalogue does not
    know are dropped, and users who have none left with them.

    Raises
    ------
    DataError
        If more than a fifth of the interactions has an unknown item, or nothing is left.

    Warns
    -----
    DataWarning
        With the number of interactions dropped.
    """
    rows = catalogue.rows_of(interactions.item_ids)[interactions.item]  # [n]
    known = rows >= 0
    dropped = int(np.count_nonzero(~known))
    if dropped:
        items = len(np.unique(interactions.item[~known]))
        what = (
            f"{dropped:,} of {len(rows):,} interactions have an item id that the catalogue does "
            f"not know ({items:,} ids)"
        )
        if 5 * dropped > len(rows) or dropped == len(rows):
            raise DataError(
                f"{what}; at most a fifth may: is this the data of this model, in the same ids?"
            )
        warnings.warn(f"dropped: {what}", DataWarning, stacklevel=2)
    user = interactions.user[known]
    if not user.size:
        raise DataError("no interactions are left to build histories from")
    time = None if interactions.time is None else interactions.time[known]
    order = np.argsort(user, kind="stable") if time is None else np.lexsort((time, user))
    lengths = np.bincount(user, minlength=len(interactions.user_ids))
    present = np.flatnonzero(lengths)
    offsets = np.zeros(len(present) + 1, dtype=np.int64)
    np.cumsum(lengths[present], out=offsets[1:])
    return Histories(rows[known][order], offsets, interactions.user_ids.gather(present))
