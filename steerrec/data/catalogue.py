"""Catalogue: the items a recommender knows, in the order of its rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steerrec.data.building import build_histories
from steerrec.data.interactions import Interactions
from steerrec.data.popularity import PopularityGroups, popularity_groups
from steerrec.data.split import held_back
from steerrec.errors import DataError
from steerrec.files import atomic_file

_COLUMNS = ("row", "item_id", "title", "count")


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Items by catalogue row.

    Attributes
    ----------
    frame : DataFrame [N]
        Columns `row` (Int64, 0..N-1), `item_id` (Int64 or String), `title` (String or null),
        `count` (Int64, training interactions), then attributes.
    """

    frame: pl.DataFrame

    def __post_init__(self) -> None:
        problem = _problem(self.frame)
        if problem:
            raise DataError(f"not a catalogue: {problem}")

    @classmethod
    def from_interactions(cls, interactions: Interactions) -> Catalogue:
        """The items of some interactions, in order of first appearance.

        Counts are those of the leave-one-out training part.
        """
        num_items = len(interactions.item_ids)
        frame = interactions.item_attributes.select(
            pl.int_range(num_items, dtype=pl.Int64).alias("row"),
            interactions.item_ids.alias("item_id"),
            "title",
            pl.lit(0, dtype=pl.Int64).alias("count"),
            pl.exclude("title"),
        )
        return cls(frame)._counted(interactions)

    @classmethod
    def from_numbers(cls, interactions: Interactions) -> Catalogue:
        """The items 1..N of data that number them so, in this order; N is the largest of them.

        Counts are those of the leave-one-out training part; a number that no interaction has is
        an item too.

        Raises
        ------
        DataError
            If an id is no whole number from 1 on.
        """
        ids = interactions.item_ids
        numbers = ids.cast(pl.Int64, strict=False)
        same = (numbers.cast(pl.String) == ids.cast(pl.String)) & (numbers >= 1)
        # far fewer items than numbers: ids of another kind, and too many rows to make
        wrong = ids.filter(~same.fill_null(False) | (numbers > 10 * len(ids) + 1000))
        if len(wrong):
            raise DataError(
                f"the data have item ids such as {wrong[0]!r}; expected the numbers 1 to N, as the "
                "model knows its items, or a table of these numbers and the ids (--item-map)"
            )
        largest = int(numbers.max())  # type: ignore[arg-type]
        own = interactions.item_attributes.with_columns(numbers.alias("item_id"))
        frame = pl.DataFrame({"item_id": pl.int_range(1, largest + 1, eager=True)})
        frame = frame.join(own, on="item_id", how="left", maintain_order="left").select(
            pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
            "item_id",
            "title",
            pl.lit(0, dtype=pl.Int64).alias("count"),
            pl.exclude("item_id", "title"),
        )
        return cls(frame)._counted(interactions)

    @classmethod
    def from_item_map(
        cls, path: str | os.PathLike[str], interactions: Interactions | None = None
    ) -> Catalogue:
        """The items in the order of another library's own numbers, which a table gives.

        Parameters
        ----------
        path
            CSV, TSV or Parquet with a header: a column of numbers 1..N or 0..N-1 (`index`, or the
            first column), then one of external ids; `title` (or `name`) and further columns are
            kept.
        interactions
            Training counts are those of the leave-one-out training part of these.

        Raises
        ------
        DataError
            If the file is missing or no such table, or knows none of the items of `interactions`.
        """
        frame = _item_map(Path(path))
        catalogue = cls(frame)
        if interactions is None:
            return catalogue
        ids = interactions.item_ids
        known = catalogue.rows_of(ids) >= 0
        if not known.any():
            raise DataError(
                f"none of the {len(ids):,} items of the data is in {path}, whose ids are such as "
                f"{catalogue.item_ids[0]!r}; expected the ids of the data, such as {ids[0]!r}"
            )
        return catalogue._counted(interactions)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Catalogue:
        """Read what `write` wrote.

        Raises
        ------
        DataError
            If the file is missing, is not Parquet, or is no catalogue.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path} does not exist; expected a catalogue (items.parquet)")
        try:
            frame = pl.read_parquet(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            reason = str(error).split("\n", 1)[0]
            raise DataError(f"{path} cannot be read as Parquet: {reason}") from error
        try:
            return cls(frame)
        except DataError as error:
            raise DataError(f"{path} is {error}") from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the frame as Parquet, whole or not at all.

        Raises
        ------
        StorageError
            If the file system refuses.
        """
        with atomic_file(Path(path)) as partial:
            self.frame.write_parquet(partial)

    def __len__(self) -> int:
        return self.frame.height

    def __repr__(self) -> str:
        return f"Catalogue(items={len(self):,}, columns={self.frame.columns})"

    @property
    def item_ids(self) -> pl.Series:
        """External ids [N]."""
        return self.frame["item_id"]

    @cached_property
    def titles(self) -> list[str]:
        """Titles [N]; the id where an item has none."""
        ids = pl.col("item_id").cast(pl.String)
        return self.frame.select(pl.col("title").fill_null(ids))["title"].to_list()

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Training interactions per row, int64 [N]."""
        return self.frame["count"].to_numpy()

    @cached_property
    def groups(self) -> PopularityGroups:
        """Head, mid and tail by these counts."""
        return popularity_groups(self.counts)

    def rows_of(self, ids: pl.Series) -> NDArray[np.int64]:
        """Catalogue rows of external ids, int64 [M]; -1 where unknown.

        Ids of different types are compared as text.
        """
        own = self.item_ids
        if not (own.dtype.is_integer() and ids.dtype.is_integer()):
            own, ids = own.cast(pl.String), ids.cast(pl.String)
        table = pl.DataFrame({"id": own, "row": self.frame["row"]})
        asked = pl.DataFrame({"id": ids.cast(own.dtype, strict=False)})
        found = asked.join(table, on="id", how="left", maintain_order="left")["row"]
        return found.fill_null(-1).to_numpy()

    def _counted(self, interactions: Interactions) -> Catalogue:
        histories = build_histories(interactions, self)
        train = histories.cut(held_back(histories))
        return self.with_counts(np.bincount(train.items, minlength=len(self)))

    def with_counts(self, counts: ArrayLike) -> Catalogue:
        """The same items with other training counts [N]."""
        values = pl.Series("count", np.asarray(counts, dtype=np.int64))
        if len(values) != len(self):
            raise DataError(f"{len(values)} counts for {len(self)} items; expected one each")
        return Catalogue(self.frame.with_columns(values))


def _item_map(path: Path) -> pl.DataFrame:
    """The frame of a catalogue from a table of numbers and ids."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a table of item numbers and ids")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pl.read_parquet(path)
        else:
            separator = "\t" if path.suffix.lower() in (".tsv", ".txt") else ","
            table = pl.read_csv(path, separator=separator, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{path} cannot be read as a table: {reason}") from error
    number = "index" if "index" in table.columns else next(iter(table.columns), "")
    others = [name for name in table.columns if name != number]
    if not others or table.is_empty() or not table[number].dtype.is_integer():
        raise DataError(
            f"{path} has columns {', '.join(table.columns) or 'none'}; expected a column of whole "
            "numbers, 'index' or the first one, then one of item ids"
        )
    table = table.sort(number)
    start = int(table[number][0] or 0)
    if start not in (0, 1) or not np.array_equal(
        table[number].to_numpy(), np.arange(start, start + table.height)
    ):
        raise DataError(f"{path}: {number} is not 1..{table.height} or 0..{table.height - 1}")
    ids = table[others[0]]
    title = next((name for name in ("title", "name") if name in others[1:]), None)
    titles = pl.lit(None) if title is None else pl.col(title)
    taken = {number, others[0], title}
    return table.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
        ids.cast(pl.Int64 if ids.dtype.is_integer() else pl.String).alias("item_id"),
        titles.cast(pl.String).alias("title"),
        pl.lit(0, dtype=pl.Int64).alias("count"),
        *(name for name in others if name not in taken),
    )


def _problem(frame: pl.DataFrame) -> str | None:
    """What keeps a frame from being a catalogue."""
    missing = [name for name in _COLUMNS if name not in frame.columns]
    if missing:
        return f"no column {', '.join(missing)} among {', '.join(frame.columns) or 'none'}"
    if frame.is_empty():
        return "it has no items"
    if frame["row"].dtype != pl.Int64 or frame["count"].dtype != pl.Int64:
        return "row and count have to be Int64"
    if frame["item_id"].dtype not in (pl.Int64, pl.String) or frame["title"].dtype != pl.String:
        return "item_id has to be Int64 or String, and title String"
    if not np.array_equal(frame["row"].to_numpy(), np.arange(frame.height)):
        return "its rows are not 0..N-1 in order"
    if frame["item_id"].has_nulls() or frame["item_id"].n_unique() < frame.height:
        return "its item ids are not unique"
    if frame["count"].has_nulls() or int(frame["count"].to_numpy().min()) < 0:
        return "its counts are not whole numbers >= 0"
    return None
