"""Histories of interactions: ordered in time, in the rows of a catalogue."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from steerrec.data.histories import DataWarning, Histories
from steerrec.data.interactions import TIME, Interactions
from steerrec.errors import ColumnError, DataError

if TYPE_CHECKING:
    from steerrec.data.catalogue import Catalogue


def build_histories(
    interactions: Interactions, catalogue: Catalogue, *, columns: Iterable[str] = ()
) -> Histories:
    """Order every user's interactions by time, ties in file order, as rows of a catalogue.

    Users come in order of first appearance. Interactions with items that the catalogue does not
    know are dropped, and users who have none left with them.

    Parameters
    ----------
    interactions : Interactions
    catalogue : Catalogue
    columns : iterable of str
        What else the model reads of each interaction: `time`, and columns that the reader kept.
        Those of a recommender are its `reads`. None by default: histories cost twice as much with
        a column as without.

    Raises
    ------
    ColumnError
        If the interactions have no such column.
    DataError
        If more than a fifth of the interactions has an unknown item, or nothing is left.

    Warns
    -----
    DataWarning
        With the number of interactions dropped.
    """
    if isinstance(columns, str):
        raise DataError(f"columns is {columns!r}; expected a list of columns, [{columns!r}]")
    carried = {name: _column_of(interactions, name) for name in columns}
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
    return Histories(
        rows[known][order],
        offsets,
        interactions.user_ids.gather(present),
        {name: values[known][order] for name, values in carried.items()},
    )


def _column_of(interactions: Interactions, name: str) -> NDArray[Any]:
    """The time of interactions, or one of their further columns."""
    if name == TIME and interactions.time is not None:
        return interactions.time
    if name in interactions.columns:
        return interactions.columns[name]
    how = (
        "give data with a column timestamp, time or date, or name the column with time_col"
        if name == TIME
        else f"keep it, read_interactions(..., keep=[{name!r}])"
    )
    raise ColumnError(f"the interactions have no column {name!r}, which the model reads: {how}")
