"""Contrasts in words: ``genres=Horror``, ``price>q80``, ``year<1960 vs >1990``, ``items:FILE``.

What the groups are used for is in `profiles`; attributes of items are the columns of a catalogue.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steerrec.data import Catalogue, DataWarning, Interactions
from steerrec.errors import DataError
from steerrec.profiles import Contrast, popularity_contrast

Rows = NDArray[np.bool_]

POPULARITY = "popularity"
FORMS = "popularity, COLUMN=VALUE, COLUMN<NUMBER, COLUMN>q80, items:FILE, or A vs B of these"
_VS = re.compile(r"\s+vs\s+")
_CONDITION = re.compile(r"(?P<column>[^=<>]*?)\s*(?P<sign><=|>=|=|<|>)\s*(?P<value>.*)", re.DOTALL)
_WORDS = {"<=": "-upto-", ">=": "-from-", "<": "-below-", ">": "-above-", "=": "-"}
_FILE = "items:"
_COMPARE = {"<": pl.Series.lt, "<=": pl.Series.le, ">": pl.Series.gt, ">=": pl.Series.ge}


class _Group(NamedTuple):
    """Some items, and those of which it is not known whether they belong to them."""

    rows: Rows
    unknown: Rows
    definition: dict[str, Any]


def item_contrast(catalogue: Catalogue, text: str) -> Contrast:
    """A contrast between the items that a text describes and all others, or between two groups.

    - ``popularity``: head against tail.
    - ``genres=Horror``: items with this value in a column of the catalogue, which may hold several
      (a list, or `Horror|Thriller`); ``genres=Horror|Thriller``: any of them.
    - ``price<10``, ``price>=99.5``, ``price>q80``: numbers, q80 being the number that 80 % of the
      items are below. Items without a number are in neither group.
    - ``items:FILE``: the items whose ids are in a file, one a line.
    - ``A vs B``: two of these; ``year<q20 vs >q80`` has the column once. An item of both is in
      neither.

    Parameters
    ----------
    catalogue
        Items and their attributes.
    text
        What to compare.

    Returns
    -------
    Contrast
        Its name is `contrast_name(text)`.

    Raises
    ------
    DataError
        If there is no such column, value or item, with the nearest that there are.
    """
    if text.strip() == POPULARITY:
        return popularity_contrast(catalogue)
    parts = _VS.split(text.strip())
    if len(parts) > 2:
        raise DataError(f"contrast {text!r} has more than two groups; expected {FORMS}")
    a = _group(catalogue, parts[0], text, "")
    definition_b: Any = "all others"
    if len(parts) == 1:
        group_a, group_b, label_b = a.rows, ~a.rows & ~a.unknown, "others"
    else:
        matched = _CONDITION.fullmatch(parts[0])
        b = _group(catalogue, parts[1], text, matched["column"] if matched else "")
        both = a.rows & b.rows
        group_a, group_b = a.rows & ~both, b.rows & ~both
        label_b, definition_b = parts[1], b.definition
    return Contrast(
        name=contrast_name(text),
        group_a=np.flatnonzero(group_a),
        group_b=np.flatnonzero(group_b),
        label_a=parts[0],
        label_b=label_b,
        definition={"kind": "items", "text": text, "a": a.definition, "b": definition_b},
    )


def contrast_name(text: str) -> str:
    """What files call a contrast: `genres=Horror` is `genres-Horror`, `year<q20` `year-below-q20`.

    Where other characters than these have to go, a few digits of a hash tell the names apart.
    """
    text = text.strip()
    short = _VS.sub("-vs-", text)
    if short.startswith(_FILE) or f"-vs-{_FILE}" in short:
        short = "-vs-".join(
            f"items-{Path(part[len(_FILE) :]).stem}" if part.startswith(_FILE) else part
            for part in short.split("-vs-")
        )
    for sign, word in _WORDS.items():
        short = re.sub(rf"\s*{sign}\s*", word, short)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", short).replace("-vs--", "-vs-").strip("-._")
    plain = re.sub(r"-{2,}", "-", plain)
    if re.fullmatch(r"[A-Za-z0-9._ -]+", short) and 0 < len(plain) <= 80 and " " not in short:
        return plain
    return f"{plain[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:4]}".lstrip("-")


def with_attributes(catalogue: Catalogue, interactions: Interactions) -> Catalogue:
    """The catalogue with the attributes that only the data has, such as those of `movies.dat`."""
    there = interactions.item_attributes
    new = [name for name in there.columns if name not in catalogue.frame.columns]
    if not new:
        return catalogue
    rows = catalogue.rows_of(interactions.item_ids)
    extra = there.select(new).with_columns(pl.Series("row", rows)).filter(pl.col("row") >= 0)
    frame = catalogue.frame.join(extra, on="row", how="left", maintain_order="left")
    return Catalogue(frame)


# --- groups


def _group(catalogue: Catalogue, part: str, text: str, column: str) -> _Group:
    if part.startswith(_FILE):
        return _from_file(catalogue, Path(part[len(_FILE) :].strip()))
    matched = _CONDITION.fullmatch(part)
    if matched is None or not (matched["column"] or column) or not matched["value"]:
        raise DataError(f"{part!r} in contrast {text!r} is no group of items; expected {FORMS}")
    name = matched["column"] or column
    series = attribute_column(catalogue, name)
    if matched["sign"] == "=":
        return _of_value(series, name, matched["value"])
    return _by_number(series, name, matched["sign"], matched["value"])


def attribute_column(catalogue: Catalogue, name: str) -> pl.Series:
    """A column of the catalogue; DataError, with the nearest names, if there is none."""
    columns = [column for column in catalogue.frame.columns if column != "row"]
    if name in columns:
        return catalogue.frame[name]
    near = get_close_matches(name, columns, n=3, cutoff=0.5) or columns
    raise DataError(
        f"items have no column {name!r}; there are {', '.join(near)}: attributes come with the "
        "data, from movies.dat, an .item file or items.csv beside the interactions"
    )


def attribute_values(series: pl.Series) -> pl.DataFrame:
    """The values of an attribute, text, one a row with the item that it is of: `row`, `value`."""
    rows = pl.int_range(len(series), eager=True).alias("row")
    values = series.alias("value")
    if series.dtype != pl.List:
        values = values.cast(pl.String).str.split("|")
    frame = pl.DataFrame([rows, values]).explode("value")
    text = pl.col("value").cast(pl.String).str.strip_chars()
    return frame.with_columns(text).filter(pl.col("value").is_not_null() & (pl.col("value") != ""))


def _of_value(series: pl.Series, name: str, value: str) -> _Group:
    values = attribute_values(series)
    wanted = [part.strip() for part in value.split("|")]
    known = values["value"].unique().sort().to_list()
    folded = {other.casefold(): other for other in known}
    rows = np.zeros(len(series), dtype=bool)
    found = []
    for part in wanted:
        match = part if part in known else folded.get(part.casefold())
        if match is None:
            near = get_close_matches(part, known, n=5, cutoff=0.5) or known[:5]
            raise DataError(f"no item has {name} {part!r}; nearest: {', '.join(near)}")
        rows[values.filter(pl.col("value") == match)["row"].to_numpy()] = True
        found.append(match)
    unknown = np.zeros(len(series), dtype=bool)  # an item without a value has not this one
    return _Group(rows, unknown, {"column": name, "values": found})


def _by_number(series: pl.Series, name: str, sign: str, value: str) -> _Group:
    if not series.dtype.is_numeric():
        raise DataError(
            f"{name} {sign} {value}: {name} holds no numbers ({series.dtype}); expected "
            f"{name}=VALUE"
        )
    numbers = series.cast(pl.Float64).fill_nan(None)
    try:
        share = float(value[1:]) / 100 if value.startswith("q") else None
        bound = float(value) if share is None else None
    except ValueError:
        bound = share = None
    if share is not None and 0 <= share <= 1:
        bound = numbers.quantile(share, "linear")
    if bound is None or bound != bound:
        raise DataError(
            f"{name} {sign} {value!r}: expected a number, or a quantile such as q80 of a column "
            "that holds numbers"
        )
    rows = _COMPARE[sign](numbers, bound).fill_null(False).to_numpy()
    definition = {"column": name, "sign": sign, "than": value, "bound": bound}
    return _Group(rows, numbers.is_null().to_numpy(), definition)


def _from_file(catalogue: Catalogue, path: Path) -> _Group:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of item ids: {error}") from error
    ids = pl.Series("id", [line.strip() for line in lines if line.strip()], dtype=pl.String)
    found = catalogue.rows_of(ids)
    known = found[found >= 0]
    if not len(known):
        example = f", such as {ids[0]!r}" if len(ids) else ""
        raise DataError(
            f"{path} has {len(ids)} item ids{example}, none of which the model knows; expected ids "
            f"such as {catalogue.item_ids[0]!r}, one a line"
        )
    if len(known) < len(ids):
        warnings.warn(
            f"{path}: {len(ids) - len(known):,} of {len(ids):,} item ids are unknown to the model",
            DataWarning,
            stacklevel=4,
        )
    rows = np.zeros(len(catalogue), dtype=bool)
    rows[known] = True
    definition = {"file": path.name, "items": int(rows.sum())}
    return _Group(rows, np.zeros(len(catalogue), dtype=bool), definition)
