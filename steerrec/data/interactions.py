"""Interactions: who took what, and when, read from any of the usual files.

`read_interactions` is the one reader. It prepares the rows (duplicates, k-core) and encodes them;
it does not order them by time or split them (`histories.py`, `split.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steerrec.data import columns as names
from steerrec.data.formats import LINE, RawTable, read_raw, type_attributes
from steerrec.data.values import feature, refuse_rows, times
from steerrec.errors import DataError
from steerrec.files import atomic_file

TIME = "time"
"""What the time of interactions is called among the columns of histories, whatever its own name."""

RESERVED = ("row", "item_id", "count")
"""Columns of the catalogue; an attribute of such a name gets the prefix `attribute_`."""


@dataclass(frozen=True)
class Preparation:
    """How the rows were read: recorded with a model, and the default of later commands on it."""

    format: str
    user_col: str | None = None
    item_col: str | None = None
    time_col: str | None = None
    k_core: int = 0
    dedup: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preparation:
        """Inverse of `to_dict`; unknown keys, of a later version, are passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})


@dataclass(frozen=True, eq=False)
class Interactions:
    """Encoded rows in file order, after preparation.

    Attributes
    ----------
    user, item : int32 array [n]
        Codes, numbered by first appearance in these rows.
    time : int64 or float64 array [n], or None
        None if the data has no time; file order is time order then. Dates are microseconds
        since 1970. RecBole's float times have RecBole's ties (`as_recbole_orders`).
    user_ids : Series [U]
        External id of each user code, Int64 or String.
    item_ids : Series [N]
        External id of each item code, Int64 or String.
    item_attributes : DataFrame [N]
        One row per item code: `title` (String, null where unknown) and further attributes, of
        type List where an item has several values.
    preparation : Preparation
    columns : dict of int64 or float64 arrays [n]
        Further columns of the rows, by name: those that the reader was asked to keep.
    """

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[Any] | None
    user_ids: pl.Series
    item_ids: pl.Series
    item_attributes: pl.DataFrame
    preparation: Preparation
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user)

    def __repr__(self) -> str:
        return (
            f"Interactions(rows={len(self):,}, users={len(self.user_ids):,}, "
            f"items={len(self.item_ids):,}, format={self.preparation.format!r})"
        )


def read_interactions(
    path: str | os.PathLike[str],
    *,
    user_col: str | None = None,
    item_col: str | None = None,
    time_col: str | None = None,
    k_core: int = 0,
    dedup: bool = False,
    keep: Sequence[str] | Mapping[str, Mapping[Any, float] | None] = (),
    format: str | None = None,
) -> Interactions:
    """Read interactions from a file or folder.

    Parameters
    ----------
    path : path
        RecBole atomic files (a `.inter` file, or its folder), MovieLens `ratings.dat` (or its
        folder), CSV, TSV or Parquet with a header (with `items.csv` beside it, if there is one),
        `user item` pairs in order, or one sequence of items a line (the user is then the line
        number).
    user_col, item_col, time_col : str, optional
        Columns to use instead of the ones with the usual names.
    k_core : int
        Drop users and items with fewer interactions, until none is left. 0 keeps all.
    dedup : bool
        Keep only the first, in time, of repeated (user, item) rows. Done before `k_core`.
    keep : sequence of str, or mapping
        Further columns to keep, for models that read more of an interaction than its item and its
        time. They hold numbers; text becomes the numbers that are given for its values,
        ``{"rating": None, "event": {"view": 1, "buy": 2}}``.
    format : str, optional
        One of recbole, movielens, csv, parquet, pairs, sequences; recognised if not given. A file
        without a header whose first 1,000 lines have two fields each is taken for pairs.

    Raises
    ------
    DataError
        If the data is missing, empty or malformed, lacks a column, has unusable times or
        features, or if nothing is left of it.
    """
    if k_core < 0:
        raise DataError(f"k_core is {k_core}; expected 0 (off) or the least count to keep")
    overrides = [c for c in (user_col, item_col, time_col) if c is not None]
    raw = read_raw(Path(path), format, [*overrides, *keep])
    columns = [c for c in raw.rows.columns if c != LINE]
    user = _required(columns, user_col, names.USER_NAMES, "user", raw.source)
    item = _required(columns, item_col, names.ITEM_NAMES, "item", raw.source)
    time = names.choose_column(columns, time_col, names.TIME_NAMES, "time", raw.source)
    if len({user, item, time}) < 3:
        raise DataError(
            f"{raw.source}: user, item and time need a column each; got {user}, {item}, {time}"
        )
    user_codes, user_ids = _encode(_ids(raw, user))
    item_codes, item_ids = _encode(_ids(raw, item))
    when = None if time is None else times(raw, time)
    features = _features(raw, columns, keep)
    attributes = _attributes(raw, item, item_codes, item_ids, {user, item, time})

    left = np.arange(len(user_codes))
    if dedup:
        left = left[first_of_repeated(user_codes, item_codes, when)]
    if k_core > 1:
        left = left[in_k_core(user_codes[left], item_codes[left], k_core)]
        if not left.size:
            raise DataError(
                f"nothing of {raw.source} is left after the {k_core}-core filter; use a smaller "
                "k_core"
            )
    if when is not None:
        when = as_recbole_orders(when[left]) if time in raw.floats else when[left]
    user_codes, kept_users = recode(user_codes[left])
    item_codes, kept_items = recode(item_codes[left])
    return Interactions(
        user=user_codes,
        item=item_codes,
        time=when,
        user_ids=user_ids.gather(kept_users),
        item_ids=item_ids.gather(kept_items),
        item_attributes=attributes[kept_items],
        preparation=Preparation(raw.format, user, item, time, k_core, dedup),
        columns={name: values[left] for name, values in features.items()},
    )


def in_k_core(user: NDArray[Any], item: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """Mask [n] of the rows that stay when users and items with fewer than k rows are dropped.

    Dropping is repeated until every user and every item left has at least k rows.
    """
    keep = np.ones(len(user), dtype=bool)
    while keep.any():
        few_users = np.bincount(user[keep], minlength=int(user.max()) + 1) < k
        few_items = np.bincount(item[keep], minlength=int(item.max()) + 1) < k
        drop = keep & (few_users[user] | few_items[item])
        if not drop.any():
            break
        keep &= ~drop
    return keep


def first_of_repeated(
    user: NDArray[Any], item: NDArray[Any], time: NDArray[Any] | None
) -> NDArray[np.bool_]:
    """Mask [n] of the rows that are the first of their (user, item) in time, ties in file order."""
    order = np.arange(len(user)) if time is None else np.argsort(time, kind="stable")
    pair = user.astype(np.int64) * (int(item.max()) + 1) + item
    _, first = np.unique(pair[order], return_index=True)
    mask = np.zeros(len(user), dtype=bool)
    mask[order[first]] = True
    return mask


def as_recbole_orders(time: NDArray[Any]) -> NDArray[Any]:
    """Times [n] with RecBole's ties: each is the earliest of those that it cannot tell apart.

    RecBole scales a float column to 0..1 and rounds it to single precision before it orders
    histories by it. In a long log that makes ties of times seconds or minutes apart, and decides
    which item is a user's last: a model trained there has to be evaluated on the same split.
    """
    low, high = float(time.min()), float(time.max())
    if low == high:
        return time
    scaled = ((time - low) / (high - low)).astype(np.float32)
    _, tied = np.unique(scaled, return_inverse=True)
    by_time = np.argsort(time, kind="stable")
    _, first = np.unique(tied[by_time], return_index=True)
    earliest: NDArray[Any] = time[by_time][first][tied]
    return earliest


def write_csv(interactions: Interactions, folder: str | os.PathLike[str]) -> None:
    """Write `interactions.csv` and `items.csv` into a folder, as `read_interactions` reads them.

    Rows keep their order; attributes with several values are joined by `|` and come back as
    lists if they are named genres, categories or tags.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    items, rows = _tables(interactions)
    items = items.with_columns(pl.col(pl.List(pl.String)).list.join("|"))
    for name, frame in (("items.csv", items), ("interactions.csv", rows)):
        with atomic_file(Path(folder) / name) as partial:
            frame.write_csv(partial)


def write_parquet(interactions: Interactions, folder: str | os.PathLike[str]) -> None:
    """Write `interactions.parquet` and `items.parquet`, as `write_csv` does: for large data.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    items, rows = _tables(interactions)
    for name, frame in (("items.parquet", items), ("interactions.parquet", rows)):
        with atomic_file(Path(folder) / name) as partial:
            frame.write_parquet(partial)


def _tables(interactions: Interactions) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Items and interactions with the data's own ids."""
    rows = {
        "user_id": interactions.user_ids.gather(interactions.user),
        "item_id": interactions.item_ids.gather(interactions.item),
    }
    if interactions.time is not None:
        rows["timestamp"] = pl.Series(interactions.time)
    if taken := sorted({"user_id", "item_id", "timestamp"} & interactions.columns.keys()):
        raise DataError(
            f"a kept column is called {taken[0]!r}, as one of those that are written; expected "
            "another name"
        )
    rows |= {name: pl.Series(values) for name, values in interactions.columns.items()}
    items = interactions.item_attributes.clone()
    items.insert_column(0, interactions.item_ids.alias("item_id"))
    return items, pl.DataFrame(rows)


def _required(
    columns: list[str], override: str | None, usual: tuple[str, ...], role: str, source: str
) -> str:
    column = names.choose_column(columns, override, usual, role, source)
    if column is None:
        raise DataError(
            f"{source} has no {role} column that is recognised; its columns are "
            f"{', '.join(columns)}; expected a header line with {role}_id, or name the column with "
            f"{role}_col"
        )
    return column


def _ids(raw: RawTable, column: str) -> pl.Series:
    """The id column, Int64 or String; text becomes Int64 only if it reads back the same."""
    ids = raw.rows[column]
    if ids.dtype == pl.String:
        ids = ids.replace("", None)
    refuse_rows(raw, ids.is_null(), f"no value in the id column {column!r}")
    if ids.dtype.is_integer():
        return ids.cast(pl.Int64 if ids.dtype != pl.UInt64 else pl.String)
    if raw.format == "parquet":
        return ids.cast(pl.String)
    integers = ids.cast(pl.Int64, strict=False)
    exact = not integers.has_nulls() and bool((integers.cast(pl.String) == ids).all())
    return integers if exact else ids


def _features(
    raw: RawTable,
    columns: list[str],
    keep: Sequence[str] | Mapping[str, Mapping[Any, float] | None],
) -> dict[str, NDArray[Any]]:
    """The columns to keep, by name."""
    if isinstance(keep, str):
        raise DataError(f"keep is {keep!r}; expected a list of columns, [{keep!r}]")
    found = {}
    for name in keep:
        if name == TIME:
            raise DataError(
                "keep names 'time', which is the time of an interaction and is kept anyway; "
                "expected further columns, and the time's own as time_col"
            )
        column = names.choose_column(columns, name, (), "feature", raw.source)
        assert column is not None  # a name that is given is found or refused
        found[column] = feature(raw, column, keep[name] if isinstance(keep, Mapping) else None)
    return found


def _encode(ids: pl.Series) -> tuple[NDArray[np.int32], pl.Series]:
    """Codes [n] by first appearance, and the id of each code."""
    frame = ids.alias("id").to_frame()
    unique = frame.unique(maintain_order=True).with_row_index("code")
    codes = frame.join(unique, on="id", how="left", maintain_order="left")["code"]
    return codes.to_numpy().astype(np.int32), unique["id"].alias(ids.name)


def recode(codes: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Codes renumbered by first appearance, and the old code of each new one."""
    old, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    new = np.empty(len(old), dtype=np.int32)
    new[order] = np.arange(len(old), dtype=np.int32)
    return new[inverse], old[order].astype(np.int64)


def _attributes(
    raw: RawTable,
    item: str,
    codes: NDArray[np.int32],
    ids: pl.Series,
    used: set[str | None],
) -> pl.DataFrame:
    """Title and attributes, one row per item code, from the item side or from the rows."""
    if raw.items is not None:
        key = item if item in raw.items.columns else None
        key = key or names.find_column(raw.items.columns, names.ITEM_NAMES)
        if key is None:
            raise DataError(
                f"the item file of {raw.source} has no item column; its columns are "
                f"{', '.join(raw.items.columns)}; expected {item!r}"
            )
        side = raw.items.rename({key: "__key__"}).with_columns(pl.col("__key__").cast(pl.String))
    else:
        wanted = (*names.TITLE_NAMES, *names.ATTRIBUTE_NAMES)
        own = [
            c
            for c in raw.rows.columns
            if c not in used and c != LINE and names.normalised(c) in wanted
        ]
        side = raw.rows.select(ids.cast(pl.String).gather(codes).alias("__key__"), *own)
        side = side.group_by("__key__", maintain_order=True).agg(pl.all().drop_nulls().first())
    side = side.unique("__key__", keep="first", maintain_order=True)
    title = names.find_column([c for c in side.columns if c != "__key__"], names.TITLE_NAMES)
    keys = pl.DataFrame({"__key__": ids.cast(pl.String)})
    frame = keys.join(side, on="__key__", how="left", maintain_order="left").drop("__key__")
    if title is None:
        frame = frame.with_columns(pl.lit(None, dtype=pl.String).alias("title"))
    else:
        frame = frame.drop("title") if title != "title" and "title" in frame.columns else frame
        frame = frame.rename({title: "title"}).with_columns(pl.col("title").cast(pl.String))
    if raw.format == "csv":
        frame = type_attributes(frame)
    frame = frame.rename({c: f"attribute_{c}" for c in frame.columns if c in RESERVED})
    return frame.select("title", pl.exclude("title"))
