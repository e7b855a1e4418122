"""Made-up histories to try a recommender on, with the columns that it reads beside items.

Not here: what is looked for with them (`conformance.py`, `layers.py`, `wrapping.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steerrec.data import TIME, Histories
from steerrec.errors import ColumnError, DataError
from steerrec.recommender import Recommender, columns_read

_EXAMPLES = 16  # histories that columns are taken from
_LONGEST = 64
_MINUTE, _MONTH = 60, 30 * 24 * 3600


def probe(
    rec: Recommender,
    lists: Sequence[Sequence[int]],
    *,
    example: Histories | None = None,
    alike: bool = False,
) -> Histories:
    """Histories of these items, with the columns of real histories at their positions.

    Columns come from `example` and from that of the recommender. The time is made up where they
    have none: whole seconds, a minute to a month apart.

    Parameters
    ----------
    rec
        A recommender; what it `reads` must then be there.
    lists
        Catalogue rows, oldest first.
    example
        Real histories.
    alike
        Give all histories the same columns, as far as they go.

    Raises
    ------
    ColumnError
        If a column is read that no example has.
    """
    made = Histories.from_lists(lists)
    columns: dict[str, NDArray[Any]] = {}
    for source in (_imagined(), getattr(rec, "example", None), example):
        if source is not None:
            columns |= _columns(source, made, alike)
    for name in columns_read(rec):
        if name not in columns:
            raise ColumnError(
                f"the model reads column {name!r}, of which nothing is known yet: give a few "
                "histories that have it as example, so that the model can be tried"
            )
    return Histories(made.items, made.offsets, made.user_ids, columns)


def examples(histories: Histories, max_length: int) -> Histories:
    """A few of the longest histories, no longer than the window."""
    longest = np.argsort(-histories.lengths, kind="stable")[:_EXAMPLES]
    return histories.select(longest).truncate(max_length)


def _columns(example: Histories, made: Histories, alike: bool) -> dict[str, NDArray[Any]]:
    """The columns of example histories, one for each that is made; the last value goes on."""
    if not example.columns:
        return {}
    lengths = example.lengths
    needed = min(int(made.lengths.max(initial=1)), int(lengths.max(initial=0)))
    if not needed:
        raise DataError("the example histories are empty; expected some with interactions")
    users = np.flatnonzero(lengths >= needed)  # long enough, or the longest
    chosen = users[np.arange(len(made)) % (1 if alike else len(users))]
    owners = np.repeat(np.arange(len(made)), made.lengths)
    steps = np.arange(len(made.items)) - made.offsets[owners]
    source = chosen[owners]
    index = example.offsets[source] + np.minimum(steps, lengths[source] - 1)
    return {name: values[index] for name, values in example.columns.items()}


def _imagined() -> Histories:
    """Histories with times."""
    rng = np.random.default_rng(0)
    gaps = np.exp(rng.uniform(np.log(_MINUTE), np.log(_MONTH), (_EXAMPLES, _LONGEST)))
    times = 1_600_000_000 + gaps.astype(np.int64).cumsum(axis=1).ravel()
    offsets = np.arange(_EXAMPLES + 1) * _LONGEST
    users = pl.Series("user_id", range(_EXAMPLES))
    return Histories(np.zeros_like(times), offsets, users, {TIME: times})
