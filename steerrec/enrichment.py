"""Which attributes of items a neuron stands for: more often than chance, and by a corrected test.

Attributes are the columns of a catalogue in words (a genre, a brand, a price fifth), the decade in
the titles if they end in a year, and the popularity groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steerrec.data import Catalogue

GROUP_WORDS = ("popular", "mid-popularity", "rare")
"""What the popularity groups head, mid and tail are called for people."""

LONGEST = 60  # characters of a value
_VALUES = 256  # of all columns, the most frequent ones
_PER_ITEM = 16
_FEWEST = 5  # items of a value, for a test to mean anything
_FIFTHS = ("lowest", "second", "middle", "fourth", "highest")
_OWN = ("row", "item_id", "title", "count")
_YEAR = re.compile(r"\((1[89]\d\d|20\d\d)\)\s*\Z")


@dataclass(frozen=True, eq=False)
class ItemAttributes:
    """The attributes of all items, numbered.

    Attributes
    ----------
    names
        What each of the V attributes is called; the last three are the popularity groups.
    of_items
        Numbers of the attributes of each item, int32 [N, A], -1 where there is no more.
    """

    names: tuple[str, ...]
    of_items: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def described(self) -> int:
        """How many of the attributes are the data's own: those before the popularity groups."""
        return len(self.names) - len(GROUP_WORDS)

    def count(
        self, rows: NDArray[np.int64], owners: NDArray[np.int64], n: int
    ) -> NDArray[np.int64]:
        """How many items each of n owners has of each attribute, int64 [n, V].

        Parameters
        ----------
        rows
            Catalogue rows, [R].
        owners
            Whose each of them is, 0..n-1, [R].
        n
            How many owners there are.
        """
        found = self.of_items[rows]  # [R, A]
        cells = owners[:, None] * len(self) + found
        counts = np.bincount(cells[found >= 0], minlength=n * len(self))
        return counts.reshape(n, len(self))


def item_attributes(catalogue: Catalogue) -> ItemAttributes:
    """The attributes of a catalogue: values that items share, in the columns that have such.

    Lists and texts give their values, true-or-false columns their name, numbers of many values the
    fifth that they are in. A text that hardly any two items share, such as an address, is no
    attribute; of values the 256 most frequent are taken. Titles that end in a year give a decade.
    """
    pairs = [_values(catalogue.frame, name) for name in catalogue.frame.columns if name not in _OWN]
    pairs.append(_decades(catalogue.titles))
    frame = pl.concat([pair for pair in pairs if pair is not None] or [_no_pairs()]).unique(
        maintain_order=True
    )
    sizes = frame.group_by("name", maintain_order=True).len().filter(pl.col("len") >= _FEWEST)
    sizes = sizes.filter(pl.col("len") < len(catalogue))  # what all items have says nothing
    kept = sizes.sort("len", descending=True, maintain_order=True).head(_VALUES)["name"].to_list()
    number = {name: place for place, name in enumerate(kept)}
    frame = frame.filter(pl.col("name").is_in(kept))
    rows = frame["row"].to_numpy()
    values = np.array([number[name] for name in frame["name"].to_list()], dtype=np.int32)
    order = np.lexsort((values, rows))  # frequent values first
    rows, values = rows[order], values[order]
    places = np.arange(len(rows)) - np.searchsorted(rows, rows)
    fits = places < _PER_ITEM
    width = int(places[fits].max(initial=-1)) + 1
    of_items = np.full((len(catalogue), width + 1), -1, dtype=np.int32)
    of_items[rows[fits], places[fits]] = values[fits]
    of_items[:, width] = len(kept) + catalogue.groups.labels
    return ItemAttributes((*kept, *GROUP_WORDS), of_items)


def _no_pairs() -> pl.DataFrame:
    return pl.DataFrame(schema={"row": pl.Int64, "name": pl.String})


def _values(frame: pl.DataFrame, column: str) -> pl.DataFrame | None:
    """(row, value in words) of a column, if it has values that items share."""
    dtype = frame[column].dtype
    pairs = frame.select("row", pl.col(column).alias("name"))
    if isinstance(dtype, pl.List):
        pairs = pairs.explode("name")
    pairs = pairs.drop_nulls()
    distinct = pairs["name"].n_unique()
    if pairs.is_empty() or (distinct < 2 and dtype != pl.Boolean):
        return None
    if dtype == pl.Boolean:
        pairs = pairs.filter(pl.col("name")).with_columns(name=pl.lit(column))
    elif dtype.is_numeric() and distinct > 20:
        fifth = (pl.col("name").rank("average") - 1) * 5 // pl.len()
        words = pl.Series(_FIFTHS).gather(pairs.select(fifth.cast(pl.Int64))["name"])
        pairs = pairs.with_columns(name=pl.lit(f"{column}: ") + words + pl.lit(" fifth"))
    elif dtype.is_numeric():
        pairs = pairs.with_columns(name=pl.lit(f"{column} ") + pl.col("name").cast(pl.String))
    elif distinct > max(20, len(pairs) // 3):
        return None
    name = pl.col("name").cast(pl.String, strict=False).str.strip_chars().str.slice(0, LONGEST)
    return pairs.select("row", name).drop_nulls().filter(pl.col("name") != "")


def _decades(titles: list[str]) -> pl.DataFrame | None:
    """(row, decade) where at least four fifths of the titles end in a year in brackets."""
    years = [(row, _YEAR.search(title)) for row, title in enumerate(titles)]
    found = [(row, f"{year[1][:3]}0s") for row, year in years if year]
    if len(found) < 0.8 * len(titles) or not found:
        return None
    rows, names = zip(*found, strict=True)
    return pl.DataFrame({"row": rows, "name": names}, schema={"row": pl.Int64, "name": pl.String})


@dataclass(frozen=True, eq=False)
class Enrichment:
    """The attributes that owners have more of than chance, the surest first, [O, E] each.

    Attributes
    ----------
    attributes
        Their numbers, int32; -1 where there is no more.
    ratios
        Share among what the owner has, by the share among all, float32.
    hits, drawn
        How many of how many, int32 [O, E] and [O].
    q
        p-values of the hypergeometric test, corrected for the number of tests by the false
        discovery rate (Benjamini & Hochberg 1995), float32.
    """

    attributes: NDArray[np.int32]
    ratios: NDArray[np.float32]
    hits: NDArray[np.int32]
    drawn: NDArray[np.int32]
    q: NDArray[np.float32]


def enriched(
    counts: NDArray[np.int64],
    drawn: NDArray[np.int64],
    population: NDArray[np.int64],
    total: int,
    *,
    most: int = 4,
    level: float = 0.05,
) -> Enrichment:
    """Attributes that are more frequent than in the population, by a one-sided test.

    Each owner has drawn some things from the population without replacement; under chance its
    count of an attribute is hypergeometric (Fisher's exact test). All owners that have drawn
    anything, times all attributes, are the tests that are corrected for.

    Parameters
    ----------
    counts
        What each owner has of each attribute, [O, V].
    drawn
        How many things each has, [O].
    population
        How many of all things have each attribute, [V].
    total
        How many things there are.
    most
        How many attributes of an owner, at most.
    level
        Largest corrected p-value.
    """
    tests = int((drawn > 0).sum()) * int((population > 0).sum())
    owners, attributes = np.nonzero(counts >= 2)
    hits, sizes = counts[owners, attributes], drawn[owners]
    marked = population[attributes]
    ratios = hits * total / (sizes * marked)
    more = ratios > 1  # of the others p is large: 1 keeps the correction on the safe side
    owners, attributes, ratios = owners[more], attributes[more], ratios[more]
    hits, sizes, marked = hits[more], sizes[more], marked[more]
    q = adjusted(hypergeometric_tail(hits, sizes, marked, total), tests)
    order = np.lexsort((-ratios, q, owners))
    order = order[q[order] <= level]
    places = np.arange(len(order)) - np.searchsorted(owners[order], owners[order])
    order, places = order[places < most], places[places < most]
    found = Enrichment(
        np.full((len(counts), most), -1, dtype=np.int32),
        np.zeros((len(counts), most), dtype=np.float32),
        np.zeros((len(counts), most), dtype=np.int32),
        drawn.astype(np.int32),
        np.ones((len(counts), most), dtype=np.float32),
    )
    cells = owners[order], places
    found.attributes[cells], found.ratios[cells] = attributes[order], ratios[order]
    found.hits[cells], found.q[cells] = hits[order], q[order]
    return found


def hypergeometric_tail(
    hits: NDArray[np.int64], drawn: NDArray[np.int64], marked: NDArray[np.int64], total: int
) -> NDArray[np.float64]:
    """P(X >= hits), X hypergeometric: `drawn` of `total` things, `marked` of them marked; [T]."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])  # of factorials

    def choose(n: NDArray[np.int64], k: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(logs[n] - logs[k] - logs[n - k])

    whole = choose(np.full_like(drawn, total), drawn)
    tail = np.zeros(len(hits))
    last = np.minimum(drawn, marked)
    for step in range(int((last - hits).max(initial=-1)) + 1):
        k = hits + step
        here = (k <= last) & (drawn - k <= total - marked)
        n, m = drawn[here], marked[here]
        term = choose(m, k[here]) + choose(total - m, n - k[here]) - whole[here]
        tail[here] += np.exp(term)
    return np.minimum(tail, 1.0)


def adjusted(p: NDArray[np.float64], tests: int) -> NDArray[np.float64]:
    """Benjamini and Hochberg's corrected p-values, where the tests not given have p = 1; [T]."""
    order = np.argsort(p, kind="stable")
    steps = p[order] * tests / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1.0)
    return q
