"""Histories: the items of every user, oldest first, as one flat array with offsets.

Beside the items there may be columns, such as the time of each interaction, for models that read
more than items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steerrec.errors import ColumnError, DataError


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
    columns : dict of int64 or float64 arrays [n]
        What else is known of each interaction, by name: `time`, and features. All that makes
        histories of histories (`select`, `truncate`, `cut`, `prefixes`) carries them along.

    Raises
    ------
    DataError
        If a column is of another length than the items, or holds anything but finite numbers.
    """

    items: NDArray[np.int64]
    offsets: NDArray[np.int64]
    user_ids: pl.Series
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.columns:
            size = len(self.items)
            checked = {name: _numbers(name, found, size) for name, found in self.columns.items()}
            object.__setattr__(self, "columns", checked)

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[int]],
        user_ids: pl.Series | Sequence[int | str] | None = None,
        *,
        columns: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ) -> Histories:
        """Histories from one list of catalogue rows per user; user ids are 0..U-1 if not given.

        Each of the columns has lists of the same lengths.
        """
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in lists], out=offsets[1:])
        items = np.array([item for row in lists for item in row], dtype=np.int64)
        ids = pl.Series("user_id", range(len(lists)) if user_ids is None else user_ids)
        if len(ids) != len(lists):
            raise DataError(f"{len(ids)} user ids for {len(lists)} histories; expected one each")
        flat = {}
        for name, values in (columns or {}).items():
            if [len(row) for row in values] != [len(row) for row in lists]:
                raise DataError(
                    f"column {name!r} has lists of other lengths than the histories; expected one "
                    "value for each item"
                )
            numbers = [value for row in values for value in row]
            flat[name] = np.array(numbers, dtype=None if numbers else np.int64)
        return cls(items, offsets, ids, flat)

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
        columns = f", columns={list(self.columns)}" if self.columns else ""
        return f"Histories(users={len(self):,}, interactions={len(self.items):,}{columns})"

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns, int64 or float64 [n].

        Raises
        ------
        ColumnError
            If there is none of that name.
        """
        if name not in self.columns:
            there = f"; there is {', '.join(self.columns)}" if self.columns else ""
            raise ColumnError(
                f"the histories have no column {name!r}, which the model reads{there}: "
                f"build_histories(..., columns=[{name!r}]) takes it from the data, and "
                f"Histories.from_lists(..., columns={{{name!r}: ...}}) from lists"
            )
        return self.columns[name]

    def select(self, users: ArrayLike) -> Histories:
        """The histories of these users (indices [P], in this order, repeats allowed)."""
        chosen = np.asarray(users, dtype=np.int64)
        starts = self.offsets[chosen]  # not through `lengths`, which would look at every user
        return self._slices(chosen, starts, self.offsets[chosen + 1] - starts)

    def between(self, start: int, stop: int) -> Histories:
        """The histories of users `start` up to, not including, `stop`, without a copy of them."""
        offsets = self.offsets[start : stop + 1]
        items = slice(offsets[0], offsets[-1])
        columns = {name: values[items] for name, values in self.columns.items()}
        ids = self.user_ids[start:stop]
        return Histories(self.items[items], offsets - offsets[0], ids, columns)

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

    def padded(
        self, max_length: int, pad: float, side: str = "right", *, column: str | None = None
    ) -> NDArray[Any]:
        """The last `max_length` items of each history as a rectangle, or what a column has of them.

        Parameters
        ----------
        max_length : int
            Width L.
        pad : int or float
            What fills the rest.
        side : {"right", "left"}
            Where the filling goes.
        column : str, optional
            Which column; the items if not given.

        Returns
        -------
        int64 array [U, L]
            Or float64, where the column or `pad` is.

        Raises
        ------
        ColumnError
            If the histories have no such column.
        """
        if side not in ("right", "left"):
            raise ValueError(f"side is {side!r}; expected 'right' or 'left'")
        values = self.items if column is None else self.column(column)
        lengths = np.minimum(self.lengths, max_length)  # [U]
        width, steps = lengths[:, None], np.arange(max_length)[None, :]  # [U, 1], [1, L]
        real = steps < width if side == "right" else steps >= max_length - width
        out = np.full((len(self), max_length), pad, dtype=np.result_type(values.dtype, pad))
        index, _ = _slices_at(self.offsets[1:] - lengths, lengths)
        out[real] = values[index]  # row-major, as the items are
        return out

    def _slices(
        self,
        users: NDArray[np.int64] | None,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Histories:
        """Slices items[start:start + length], one per user of the result."""
        index, offsets = _slices_at(starts, lengths)
        ids = self.user_ids if users is None else self.user_ids.gather(users)
        columns = {name: values[index] for name, values in self.columns.items()}
        return Histories(self.items[index], offsets, ids, columns)


def _slices_at(
    starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index [n] of all elements start, …, start + length - 1, and the offsets [P + 1] of slices."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


def _numbers(name: str, found: ArrayLike, size: int) -> NDArray[Any]:
    """A column as int64 or float64, checked."""
    values = np.asarray(found)
    if values.shape != (size,):
        raise DataError(
            f"column {name!r} has shape {values.shape} for {size} items; expected one value each"
        )
    if values.dtype.kind == "f":
        values = values.astype(np.float64, copy=False)
        if not np.isfinite(values).all():
            raise DataError(f"column {name!r} holds values that are not finite; expected numbers")
        return values
    if values.dtype.kind not in "biu" or (values.size and values.max() > np.iinfo(np.int64).max):
        raise DataError(
            f"column {name!r} holds {values.dtype}; expected numbers within int64 or float64"
        )
    return values.astype(np.int64, copy=False)
