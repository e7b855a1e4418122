"""The catalogue: what it takes from interactions, ids to rows, and the file."""

from pathlib import Path

import polars as pl
import pytest

from steerrec.data import Catalogue, read_interactions
from steerrec.errors import DataError, StorageError


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    path = tmp_path / "x.csv"
    path.write_text(
        "user,item,time,title,genres\n"
        "1,30,1,Thirty,Crime|Drama\n"
        "2,20,2,,\n"
        "1,20,2,,\n"
        "1,10,3,Ten,Drama\n"
        "2,30,4,,\n"
    )
    return Catalogue.from_interactions(read_interactions(path))


def test_from_interactions(catalogue: Catalogue) -> None:
    assert catalogue.frame.to_dict(as_series=False) == {
        "row": [0, 1, 2],
        "item_id": [30, 20, 10],
        "title": ["Thirty", None, "Ten"],
        # user 1 trains on 30 only; user 2 is short and trains on all: 20, 30
        "count": [2, 1, 0],
        "genres": [["Crime", "Drama"], None, ["Drama"]],
    }
    assert catalogue.titles == ["Thirty", "20", "Ten"]
    assert catalogue.counts.tolist() == [2, 1, 0]
    assert catalogue.groups.labels.tolist() == [0, 1, 2]


def numbered(tmp_path: Path, *ids: object) -> Catalogue:
    path = tmp_path / "numbered.csv"
    rows = [f"{1 + place // 2},{item},{place}\n" for place, item in enumerate(ids)]
    path.write_text("user,item,time\n" + "".join(rows))
    (tmp_path / "items.csv").write_text("item_id,title\n4,Four\n")
    return Catalogue.from_numbers(read_interactions(path))


def test_from_numbers_keeps_their_order_and_those_that_nobody_took(tmp_path: Path) -> None:
    assert numbered(tmp_path, 4, 2, 2, 1).frame.to_dict(as_series=False) == {
        "row": [0, 1, 2, 3],
        "item_id": [1, 2, 3, 4],
        "title": [None, None, None, "Four"],
        "count": [1, 2, 0, 1],  # two users too short for anything to be held back
    }


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ((1, 0), "0"),
        ((1, -3), "-3"),
        (("1", "b7"), "'b7'"),
        (("1", "01", "x"), "'01'"),
        (("1", "2.5"), "2.5"),
        ((1, 1050), "1050"),
        ((1, 10**15), "1000000000000000"),
    ],
)
def test_ids_that_do_not_number_items_are_refused(
    tmp_path: Path, ids: tuple[object, ...], shown: str
) -> None:
    message = (
        rf"item ids such as '?{shown.strip(chr(39))}'?; expected the numbers 1 to N.*--item-map"
    )
    with pytest.raises(DataError, match=message):
        numbered(tmp_path, *ids)


def test_rows_of(catalogue: Catalogue) -> None:
    assert catalogue.rows_of(pl.Series([10, 99, 30, 10])).tolist() == [2, -1, 0, 2]
    assert catalogue.rows_of(pl.Series([10, 30], dtype=pl.UInt8)).tolist() == [2, 0]
    assert catalogue.rows_of(pl.Series(["10", "030", "x", None])).tolist() == [2, -1, -1, -1]
    assert catalogue.rows_of(pl.Series([10, None], dtype=pl.Int64)).tolist() == [2, -1]


def test_with_counts(catalogue: Catalogue) -> None:
    other = catalogue.with_counts([1, 2, 3])

    assert other.counts.tolist() == [1, 2, 3]
    assert other.frame.columns == catalogue.frame.columns
    assert catalogue.counts.tolist() == [2, 1, 0]
    with pytest.raises(DataError, match="2 counts for 3 items"):
        catalogue.with_counts([1, 2])


def test_written_and_read_back(catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    catalogue.write(path)
    catalogue.write(path)  # over itself

    assert Catalogue.read(path).frame.equals(catalogue.frame)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.parquet", "x.csv"]


def test_failed_write_leaves_what_was_there(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "items.parquet"
    catalogue.write(path)

    def full_disk(self: pl.DataFrame, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full_disk)
    with pytest.raises(StorageError, match=r"cannot write .*items.parquet: .*No space"):
        catalogue.with_counts([9, 9, 9]).write(path)

    assert Catalogue.read(path).counts.tolist() == [2, 1, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.parquet", "x.csv"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": [1, 0, 2]}, "rows are not 0..N-1"),
        ({"row": [0.0, 1.0, 2.0]}, "row and count have to be Int64"),
        ({"item_id": [1, 1, 2]}, "ids are not unique"),
        ({"item_id": [1, None, 2]}, "ids are not unique"),
        ({"item_id": [1.0, 2.0, 3.0]}, "item_id has to be"),
        ({"count": [1, -1, 0]}, "counts are not"),
    ],
)
def test_damaged_files(
    catalogue: Catalogue, tmp_path: Path, change: dict[str, list[object]], message: str
) -> None:
    path = tmp_path / "items.parquet"
    columns = [pl.Series(name, values) for name, values in change.items()]
    catalogue.frame.with_columns(columns).write_parquet(path)

    with pytest.raises(DataError, match=f"items.parquet is not a catalogue: .*{message}"):
        Catalogue.read(path)


def test_files_that_are_no_catalogue(catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    with pytest.raises(DataError, match="does not exist"):
        Catalogue.read(path)
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        Catalogue.read(path)
    catalogue.frame.drop("count").write_parquet(path)
    with pytest.raises(DataError, match="no column count"):
        Catalogue.read(path)
    catalogue.frame.clear().write_parquet(path)
    with pytest.raises(DataError, match="no items"):
        Catalogue.read(path)
