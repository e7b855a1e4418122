"""Histories in Parquet, one row a user: what runs over any number of users are fed from.

A file has a column of user ids, one of lists of item ids, oldest first, and where a model reads
more of an interaction, a list column of each of those. Such files are read in slices of rows, so
that nobody has to hold them as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from steerrec.data import columns as names
from steerrec.data.catalogue import Catalogue
from steerrec.data.histories import Histories
from steerrec.errors import ColumnError, DataError
from steerrec.files import atomic_file

_ITEM_LISTS = ("itemids", "items", "history", "sequence", *names.ITEM_NAMES)


@dataclass(frozen=True)
class Slice:
    """Rows `start` up to, not including, `stop` of a file of histories."""

    file: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def write_histories(
    histories: Histories, catalogue: Catalogue, path: str | os.PathLike[str]
) -> None:
    """Write histories as one Parquet file: `user_id`, `item_ids`, and a list for each column.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    values = {"item_ids": catalogue.item_ids.gather(histories.items)}
    values |= {name: pl.Series(column) for name, column in histories.columns.items()}
    user = np.repeat(np.arange(len(histories)), histories.lengths)
    lists = pl.DataFrame({"__user__": user, **values}).group_by("__user__", maintain_order=True)
    frame = pl.DataFrame({"__user__": np.arange(len(histories)), "user_id": histories.user_ids})
    frame = frame.join(lists.agg(pl.all()), on="__user__", how="left", maintain_order="left")
    with atomic_file(Path(path)) as temporary:
        frame.drop("__user__").write_parquet(temporary)


def history_files(path: str | os.PathLike[str]) -> list[Path]:
    """The Parquet files of histories at a path, by name; empty if it holds anything else.

    Raises
    ------
    DataError
        If some of the files of a folder hold histories, and others do not.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in (".parquet", ".pq") and file.is_file()]
    found = [_item_lists(_schema(file)) is not None for file in files]
    if any(found) and not all(found):
        raise DataError(
            f"{files[found.index(False)]} has no column of lists of item ids, unlike other files "
            f"of {path}; expected histories in all of them"
        )
    return files if any(found) else []


def slices(files: Iterable[Path], users: int) -> Iterator[Slice]:
    """Files of histories in slices of at most so many users."""
    for file in files:
        rows = int(pl.scan_parquet(file).select(pl.len()).collect().item())
        for start in range(0, rows, users):
            yield Slice(str(file), start, min(start + users, rows))


def read_slice(
    part: Slice, catalogue: Catalogue, *, columns: Iterable[str] = ()
) -> tuple[Histories, int]:
    """The histories of a slice as catalogue rows, and how many interactions were dropped.

    Items that the catalogue does not know are dropped, and users who have none left with them.

    Raises
    ------
    ColumnError
        If the file lacks a column.
    DataError
        If it is damaged, or more than a fifth of the items is unknown.
    """
    schema = _schema(Path(part.file))
    items = _item_lists(schema)
    user = names.choose_column(list(schema), None, names.USER_NAMES, "user", part.file)
    if items is None or user is None:
        raise ColumnError(
            f"{part.file} has columns {', '.join(schema)}; expected a user id, user_id, and a list "
            "of item ids, item_ids"
        )
    wanted = list(columns)
    if missing := [name for name in wanted if not isinstance(schema.get(name), pl.List)]:
        raise ColumnError(
            f"{part.file} has no list column {missing[0]!r}, which the model reads; its columns "
            f"are {', '.join(schema)}"
        )
    frame = pl.scan_parquet(part.file).slice(part.start, len(part)).collect()
    if len(frame) < len(part):
        raise DataError(f"{part.file} has become shorter; expected rows up to {part.stop}")
    lists = frame.select(user, items, *wanted).filter(pl.col(items).list.len() > 0)
    lengths = lists[items].list.len().to_numpy().astype(np.int64)
    rows = catalogue.rows_of(lists[items].explode())
    known = rows >= 0
    dropped = int(np.count_nonzero(~known))
    if 5 * dropped > len(rows):
        raise DataError(
            f"{dropped:,} of {len(rows):,} interactions of {part.file}, rows {part.start} to "
            f"{part.stop}, have an item id that the catalogue does not know; at most a fifth may: "
            "is this the data of this model, in the same ids?"
        )
    owner = np.repeat(np.arange(len(lists)), lengths)[known]
    left = np.bincount(owner, minlength=len(lists))
    present = np.flatnonzero(left)
    offsets = np.concatenate([[0], np.cumsum(left[present])]).astype(np.int64)
    flat = {name: _numbers(part.file, name, lists[name], lengths)[known] for name in wanted}
    return Histories(rows[known], offsets, lists[user].gather(present), flat), dropped


def _numbers(file: str, name: str, lists: pl.Series, lengths: np.ndarray[Any, Any]) -> Any:
    if not np.array_equal(lists.list.len().fill_null(0).to_numpy(), lengths):
        raise DataError(f"{file}: lists of {name!r} have other lengths than those of the items")
    return lists.explode().to_numpy()


def _schema(file: Path) -> Mapping[str, Any]:
    try:
        return pl.read_parquet_schema(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{file} cannot be read as Parquet: {reason}") from error


def _item_lists(schema: Mapping[str, Any]) -> str | None:
    lists = [name for name, dtype in schema.items() if isinstance(dtype, pl.List)]
    return names.find_column(lists, _ITEM_LISTS)
