"""File formats: recognise a file or folder and read its rows as they stand.

What comes out still has the file's own columns, as text where the file is text; what the columns
mean, and every preparation of the rows, is the business of `interactions.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from steerrec.data.columns import is_title, looks_like_header
from steerrec.errors import DataError

FORMATS = ("recbole", "movielens", "csv", "parquet", "pairs", "sequences")

LINE = "__line__"
"""Column that holds the line (in Parquet: the row) of the file, counted from 1."""

_PARQUET_SUFFIXES = (".parquet", ".pq")
_TABLE_NAMES = ("interactions", "ratings", "events", "sessions")
_ITEM_TABLES = ("items.csv", "items.tsv", "items.parquet", "movies.csv")
_LIST_COLUMNS = ("genres", "categories", "tags")
_NUMBER = r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$"
_HEAD_BYTES = 1 << 16
_AMBIGUOUS_LINES = 1000


@dataclass(frozen=True)
class RawTable:
    """Rows as the file has them.

    Attributes
    ----------
    rows : DataFrame
        The file's columns, and `LINE`. Text formats give String columns.
    items : DataFrame or None
        The item side, typed, where the data has one.
    format : str
        One of `FORMATS`.
    source : str
        The file's name, for messages.
    floats : set of str
        Columns that RecBole would scale to 0..1 in single precision.
    """

    rows: pl.DataFrame
    items: pl.DataFrame | None
    format: str
    source: str
    floats: frozenset[str] = frozenset()


def read_raw(
    path: str | Path, format: str | None = None, columns: Collection[str] = ()
) -> RawTable:
    """Read a file or folder in the given format, or in the one it is recognised as.

    `columns` are names that the caller expects; a first line that has one is a header.

    Raises
    ------
    DataError
        If the path is missing or empty, the format is unknown or cannot be recognised, or the
        content breaks the format's rules.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise DataError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    if not path.exists():
        raise DataError(
            f"{path} does not exist; expected an interactions file or a folder with one"
        )
    file = _file_in(path, format) if path.is_dir() else path
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; expected one interaction a line (or one sequence)")
    format = format or recognise(file, columns)
    rows, items = _READERS[format](file)
    floats = frozenset[str]()
    if format == "recbole":
        floats = frozenset(c.split(":")[0] for c in rows.columns if c.endswith(":float"))
        rows = rows.rename({c: c.split(":")[0] for c in rows.columns})
    rows = rows.filter(~pl.all_horizontal(pl.exclude(LINE).is_null()))  # blank lines
    if rows.is_empty():
        raise DataError(f"{file} holds no interactions; expected rows after its header")
    return RawTable(rows, items, format, file.name, floats)


def recognise(file: Path, columns: Collection[str] = ()) -> str:
    """Name the format of a file, by its suffix or its first lines.

    A file without a header and with two fields on each of its first 1,000 lines is read as
    pairs, and as sequences otherwise. Where that could well be wrong the caller has to say
    (`format=`): nearly all of these lines have two fields (pairs with a damaged line?), or all
    have the same number of fields with tabs between them (a table without its header?).
    """
    suffix = file.suffix.lower()
    if suffix == ".inter":
        return "recbole"
    if suffix == ".item":
        raise DataError(f"{file} is the item side only; give the .inter file or the folder")
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if suffix in _PARQUET_SUFFIXES or head.startswith(b"PAR1"):
        return "parquet"
    if suffix in (".csv", ".tsv"):
        return "csv"
    if b"\0" in head:
        raise DataError(f"{file} is binary; expected text or Parquet ({', '.join(FORMATS)})")
    lines = [line for line in _as_utf8(head).decode(errors="ignore").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{file} is blank; expected one interaction a line (or one sequence)")
    if "::" in lines[0]:
        return "movielens"
    if ":token" in lines[0] and "\t" in lines[0]:
        return "recbole"
    if looks_like_header(lines[0].split(_separator(lines[0])), columns) or "," in lines[0]:
        return "csv"
    if len(head) == _HEAD_BYTES and len(lines) > 1:
        lines.pop()  # the last line may be cut
    fields = np.array([len(line.split()) for line in lines[:_AMBIGUOUS_LINES]])
    others = np.flatnonzero(fields != 2)
    if not others.size:
        return "pairs"
    if others.size < 0.01 * fields.size:
        raise DataError(
            f"{file} could be `user item` pairs or sequences: line {others[0] + 1} has "
            f"{fields[others[0]]} fields, nearly all others have two; say which (format='pairs' "
            "or format='sequences')"
        )
    if "\t" in lines[0] and fields.size > 1 and (fields == fields[0]).all():
        raise DataError(
            f"{file} has {fields[0]} fields on every line and no header; add a header line such as "
            "user_id, item_id, timestamp (or pass format='sequences' for one sequence a line)"
        )
    return "sequences"


def _file_in(folder: Path, format: str | None) -> Path:
    """The interactions file of a folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    atomic = [p for p in files if p.suffix == ".inter"]
    if atomic and format in (None, "recbole"):
        named = [p for p in atomic if p.stem == folder.name]
        if len(atomic) == 1 or named:
            return (named or atomic)[0]
        names = ", ".join(p.name for p in atomic)
        raise DataError(f"{folder} has several .inter files ({names}); give one of them")
    if format in (None, "movielens"):
        for p in files:
            if p.name == "ratings.dat":
                return p
    tables = [
        p
        for p in files
        if p.suffix.lower() in (".csv", ".tsv", *_PARQUET_SUFFIXES) and p.name not in _ITEM_TABLES
    ]
    named = [p for p in tables if p.stem in _TABLE_NAMES]
    for choice in (named, tables, files):
        if len(choice) == 1:
            return choice[0]
    names = ", ".join(p.name for p in files[:10]) or "nothing"
    raise DataError(
        f"{folder} has no file that is clearly the interactions (found {names}); expected a .inter "
        "file, ratings.dat, or interactions.csv/.tsv/.parquet; or give the file itself"
    )


# Readers, one per format: file -> (rows with LINE, items or None)


def _read_recbole(file: Path) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    rows = _read_table(_as_utf8(file.read_bytes()), file, "\t", quote=None)
    side = file.with_suffix(".item")
    if not side.exists():
        return rows, None
    raw = _read_table(_as_utf8(side.read_bytes()), side, "\t", quote=None).drop(LINE)
    items = []
    for typed in raw.columns:
        name, _, kind = typed.partition(":")
        column = raw[typed].alias(name)
        if kind == "float":
            column = column.cast(pl.Float64, strict=False)
        elif kind.endswith("_seq") and not is_title(name):
            column = column.str.split(" ")
            if kind == "float_seq":
                column = column.cast(pl.List(pl.Float64), strict=False)
        items.append(column)
    return rows, pl.DataFrame(items)


def _read_movielens(file: Path) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    names = ["user_id", "item_id", "rating", "timestamp"]
    rows = _read_table(_single_separator(file), file, "\x1f", quote=None, names=names)
    side = file.with_name("movies.dat")
    if not side.exists():
        return rows, None
    names = ["item_id", "title", "genres"]
    items = _read_table(_single_separator(side), side, "\x1f", quote=None, names=names)
    return rows, items.drop(LINE).with_columns(pl.col("genres").str.split("|"))


def _read_csv(file: Path) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    return _read_separated(file), _item_table_beside(file)


def _read_parquet(file: Path) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    try:
        rows = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {_first_line(error)}") from error
    return rows.with_row_index(LINE, offset=1), _item_table_beside(file)


def _read_pairs(file: Path) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    tokens = _read_tokens(file)
    lines = tokens[LINE].to_numpy()
    fields = np.bincount(lines)
    wrong = np.flatnonzero((fields != 2) & (fields != 0))
    if wrong.size:
        raise DataError(
            f"{file}: line {wrong[0]} has {fields[wrong[0]]} fields; expected `user item`, two "
            "fields a line (or pass format='sequences' for one sequence a line)"
        )
    values = tokens["item_id"]
    rows = pl.DataFrame(
        {
            LINE: tokens[LINE].gather_every(2),
            "user_id": values.gather_every(2),
            "item_id": values.gather_every(2, offset=1),
        }
    )
    return rows, None


def _read_sequences(file: Path) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    tokens = _read_tokens(file)
    return tokens.with_columns(pl.col(LINE).cast(pl.Int64).alias("user_id")), None


_READERS: dict[str, Callable[[Path], tuple[pl.DataFrame, pl.DataFrame | None]]] = {
    "recbole": _read_recbole,
    "movielens": _read_movielens,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "pairs": _read_pairs,
    "sequences": _read_sequences,
}


def _item_table_beside(file: Path) -> pl.DataFrame | None:
    """The typed items.csv (or the like) in the same folder, if there is one."""
    for name in _ITEM_TABLES:
        side = file.with_name(name)
        if side == file or not side.exists():
            continue
        if side.suffix == ".parquet":
            return _read_parquet_items(side)
        return _read_separated(side).drop(LINE)
    return None


def _read_parquet_items(side: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(side)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{side} cannot be read as Parquet: {_first_line(error)}") from error


def type_attributes(frame: pl.DataFrame) -> pl.DataFrame:
    """Text columns become numbers where every value is one, and lists where the name says so."""
    return frame.select(_typed(column) for column in frame)


def _typed(column: pl.Series) -> pl.Series:
    if column.dtype != pl.String or is_title(column.name):
        return column
    if column.name.lower() in _LIST_COLUMNS:
        return column.str.split("|")
    values = column.drop_nulls()
    if values.is_empty() or not values.str.contains(_NUMBER).all():
        return column
    integers = column.cast(pl.Int64, strict=False)
    whole = integers.null_count() == column.null_count()
    return integers if whole else column.cast(pl.Float64)


def _read_separated(file: Path) -> pl.DataFrame:
    """A table with a header, whatever its separator."""
    raw = _as_utf8(file.read_bytes())
    header = raw.lstrip().split(b"\n", 1)[0].decode()
    return _read_table(raw, file, _separator(header), quote='"')


def _separator(header: str) -> str:
    """The separator of a header line: the most frequent of tab, comma, semicolon, bar, space."""
    return max("\t,;| ", key=header.count)


def _read_table(
    raw: bytes, file: Path, separator: str, *, quote: str | None, names: list[str] | None = None
) -> pl.DataFrame:
    """Every column as text, empty fields as null, and LINE."""
    try:
        frame = pl.read_csv(
            raw,
            separator=separator,
            quote_char=quote,
            has_header=names is None,
            infer_schema=False,
            schema=None if names is None else dict.fromkeys(names, pl.String),
        )
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{file} is empty; expected a header and rows") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(
            _too_long(raw, file, separator, quote, names)
            or f"{file} cannot be read as a table: {_first_line(error)}"
        ) from error
    frame = frame.with_columns(pl.all().replace("", None))
    return frame.with_row_index(LINE, offset=1 if names else 2)


def _too_long(
    raw: bytes, file: Path, separator: str, quote: str | None, names: list[str] | None
) -> str | None:
    """What to say of the first line with too many fields; looked for after a failure only."""
    lines = csv.reader(
        raw.decode().splitlines(),
        delimiter=separator,
        quoting=csv.QUOTE_NONE if quote is None else csv.QUOTE_MINIMAL,
    )
    expected = None if names is None else len(names)
    for number, fields in enumerate(lines, start=1):
        expected = expected or len(fields)
        if len(fields) > expected:
            return f"{file}: line {number} has {len(fields)} fields; expected {expected}"
    return None


def _read_tokens(file: Path) -> pl.DataFrame:
    """Whitespace-separated fields of a file without header, one a row: LINE and item_id."""
    raw = _as_utf8(file.read_bytes()).translate(bytes.maketrans(b"\t\r", b"  "))
    lines = pl.read_lines(raw, name="item_id").with_row_index(LINE, offset=1)
    tokens = lines.with_columns(pl.col("item_id").str.split(" ")).explode("item_id")
    return tokens.filter(pl.col("item_id") != "")


def _single_separator(file: Path) -> bytes:
    """The bytes of a `::` file with a separator of one byte that no title holds."""
    return _as_utf8(file.read_bytes()).replace(b"::", b"\x1f")


def _as_utf8(raw: bytes) -> bytes:
    """UTF-8 as it is (less a byte order mark); anything else is taken for Latin-1."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.isascii():
        return raw
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1").encode()
    return raw


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
