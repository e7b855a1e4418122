"""A column of a table as numbers: times, and features of interactions.

A row without a usable value is refused with its line; what the columns mean is the business of
`interactions.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steerrec.data.formats import LINE, RawTable
from steerrec.errors import DataError

_DATE_FORMATS = (
    "%Y-%m-%dT%H:%M:%S%.f%:z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d",
)
_MEND = "mend or drop them"


def times(raw: RawTable, column: str) -> NDArray[Any]:
    """The time column as int64 or float64; whatever is not a time is refused."""
    values = raw.rows[column]
    if values.dtype == pl.String:
        found = _parsed(values.str.strip_chars())
    elif values.dtype.is_temporal():
        found = values.cast(pl.Datetime("us")).cast(pl.Int64)
    elif values.dtype.is_integer():
        found = values.cast(pl.Int64)
    elif values.dtype.is_numeric():
        found = values.cast(pl.Float64)
    else:
        raise DataError(
            f"{raw.source}: time column {column!r} holds {values.dtype}; expected numbers or dates"
        )
    refuse_rows(
        raw, _unusable(found), f"no usable time in column {column!r} (a number or an ISO date)"
    )
    return found.to_numpy()


def feature(raw: RawTable, column: str, codes: Mapping[Any, float] | None = None) -> NDArray[Any]:
    """A further column as int64 or float64; values become the numbers that `codes` has for them.

    Raises
    ------
    DataError
        If a row has no number, or a value that `codes` does not know.
    """
    values = raw.rows[column]
    how = f"keep={{{column!r}: {{'...': 1, ...}}}}"
    if codes is not None and not values.dtype.is_nested():
        found = _coded(values, codes)
        what = f"a value in column {column!r} that keep has no number for"
        refuse_rows(raw, _unusable(found), what, "give all of them, or drop these rows")
        return found.to_numpy()
    if values.dtype == pl.String:
        text = values.str.strip_chars()
        integers = text.cast(pl.Int64, strict=False)
        found = text.cast(pl.Float64, strict=False) if integers.has_nulls() else integers
    elif values.dtype.is_integer() or values.dtype == pl.Boolean:
        found = values.cast(pl.Int64, strict=False)
    elif values.dtype.is_numeric():
        found = values.cast(pl.Float64)
    else:
        raise DataError(
            f"{raw.source}: column {column!r} holds {values.dtype}; expected numbers, or text with "
            f"the model's numbers for it, {how}"
        )
    do = f"{_MEND}, or give the model's numbers for text, {how}"
    refuse_rows(raw, _unusable(found), f"no number in column {column!r}", do)
    return found.to_numpy()


def refuse_rows(raw: RawTable, bad: pl.Series, what: str, do: str = _MEND) -> None:
    """Raise DataError if any row is bad: how many, the first one's line, and what to do."""
    if count := int(bad.sum()):
        line = raw.rows[LINE].filter(bad)[0]
        where = "row" if raw.format == "parquet" else "line"
        rows = "row has" if count == 1 else "rows have"
        raise DataError(f"{raw.source}: {count:,} {rows} {what}, the first in {where} {line}; {do}")


def _unusable(values: pl.Series) -> pl.Series:
    """Which values are missing or not finite, [n]."""
    bad = values.is_null()
    if values.dtype == pl.Float64:
        bad |= ~values.is_finite().fill_null(False)
    return bad


def _coded(values: pl.Series, codes: Mapping[Any, float]) -> pl.Series:
    """The number of each value, compared as text; null where there is none."""
    numbers = np.array(list(codes.values()))
    if numbers.dtype.kind not in "biuf":
        raise DataError(
            f"keep gives {list(codes.values())} for the values of column {values.name!r}; expected "
            "numbers"
        )
    kind = pl.Int64() if numbers.dtype.kind in "biu" else pl.Float64()
    text = values.cast(pl.String).str.strip_chars()
    return text.replace_strict(
        [str(value) for value in codes], numbers.tolist(), default=None, return_dtype=kind
    )


def _parsed(text: pl.Series) -> pl.Series:
    """Int64 if every value is a whole number, else whichever of float or date fits more values."""
    integers = text.cast(pl.Int64, strict=False)
    if not integers.has_nulls():
        return integers
    numbers = text.cast(pl.Float64, strict=False)
    if numbers.null_count() * 2 <= len(text):
        return numbers
    text = text.str.replace(" ", "T", literal=True).str.replace("Z$", "+00:00")
    dates = pl.Series(text.name, [None] * len(text), dtype=pl.Int64)
    for pattern in _DATE_FORMATS:
        parsed = text.str.to_datetime(pattern, strict=False, time_unit="us")
        dates = dates.fill_null(parsed.cast(pl.Int64))
        if not dates.has_nulls():
            break
    return dates
