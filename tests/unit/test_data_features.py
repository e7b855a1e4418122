"""Columns that the reader is asked to keep: which, as what, and through which preparation."""

from pathlib import Path

import polars as pl
import pytest

from steerrec.data import Interactions, read_interactions, write_csv
from steerrec.errors import ColumnError, DataError

TEXT = """\
user,item,time,rating,event,dwell
a,x,3,4,view,1.5
a,y,2,5,buy,2
b,x,1,3, view ,9
b,y,7,1,cart,-1e3
c,z,9,2,view,4
"""


def read(folder: Path, text: str = TEXT, **options: object) -> Interactions:
    path = folder / "x.csv"
    path.write_text(text)
    return read_interactions(path, **options)  # type: ignore[arg-type]


def kept(data: Interactions) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in data.columns.items()}


def test_nothing_is_kept_unless_asked(tmp_path: Path) -> None:
    assert read(tmp_path).columns == {}


def test_numbers_in_file_order_whole_ones_as_integers(tmp_path: Path) -> None:
    data = read(tmp_path, keep=["dwell", "rating"])

    assert kept(data) == {"dwell": [1.5, 2.0, 9.0, -1000.0, 4.0], "rating": [4, 5, 3, 1, 2]}
    assert [values.dtype.kind for values in data.columns.values()] == ["f", "i"]


def test_text_takes_the_numbers_that_are_given(tmp_path: Path) -> None:
    codes = {"view": 1, "cart": 2, "buy": 9}

    data = read(tmp_path, keep={"event": codes, "rating": None})

    assert kept(data) == {"event": [1, 9, 1, 2, 1], "rating": [4, 5, 3, 1, 2]}
    assert data.columns["event"].dtype.kind == "i"
    halves = read(tmp_path, keep={"event": {**codes, "buy": 0.5}})
    assert kept(halves) == {"event": [1, 0.5, 1, 2, 1]}


def test_numbers_can_be_recoded_too(tmp_path: Path) -> None:
    codes = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1}

    assert kept(read(tmp_path, keep={"rating": codes})) == {"rating": [1, 1, 0, 0, 0]}


def test_the_core_and_the_first_of_repeated_rows_keep_their_own(tmp_path: Path) -> None:
    # the second row of (a, x) is earlier: it stays; c is alone with z, and goes
    text = TEXT + "a,x,0,6,buy,8\n"

    data = read(tmp_path, text, keep=["rating"], dedup=True, k_core=2)

    assert [data.item_ids[code] for code in data.item.tolist()] == ["y", "x", "y", "x"]
    assert kept(data) == {"rating": [5, 3, 1, 6]}


def test_parquet_columns(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user": [1, 1], "item": [1, 2], "bought": [True, False], "price": [1.5, 2.0], "kind": "a"}
    )
    frame.write_parquet(tmp_path / "x.parquet")

    data = read_interactions(
        tmp_path / "x.parquet", keep={"bought": None, "price": None, "kind": {"a": 3}}
    )

    assert kept(data) == {"bought": [1, 0], "price": [1.5, 2.0], "kind": [3, 3]}


def test_recbole_columns_with_or_without_their_type(tmp_path: Path) -> None:
    path = tmp_path / "x.inter"
    path.write_text("user_id:token\titem_id:token\trating:float\n1\t2\t4\n1\t3\t5\n")

    assert kept(read_interactions(path, keep=["rating"])) == {"rating": [4, 5]}
    assert kept(read_interactions(path, keep=["rating:float"])) == {"rating": [4, 5]}


def test_movielens_ratings(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::20::5::100\n2::10::3::90\n")

    assert kept(read_interactions(tmp_path, keep=["rating"])) == {"rating": [5, 3]}


def test_written_csv_reads_back(tmp_path: Path) -> None:
    data = read(tmp_path, keep=["rating", "dwell"])
    write_csv(data, tmp_path / "new")

    assert kept(read_interactions(tmp_path / "new", keep=["rating", "dwell"])) == kept(data)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            ["event"],
            r"x.csv: 5 rows have no number in column 'event', the first in line 2; .*keep=",
        ),
        ({"event": {"view": 1, "buy": 2}}, r"1 row has a value in column 'event' that keep has no"),
        ({"event": {}}, "5 rows have a value in column 'event' that keep has no number for"),
        ({"event": {"view": "one"}}, r"keep gives \['one'\] for the values of column 'event'"),
        (["time"], "'time', which is the time of an interaction and is kept anyway"),
        ("rating", r"keep is 'rating'; expected a list of columns"),
    ],
)
def test_unusable(tmp_path: Path, keep: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, keep=keep)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ColumnError, match="no feature column 'price'; its columns are user, item"):
        read(tmp_path, keep=["price"])


@pytest.mark.parametrize("bad", ["", "nan", "inf", "many"])
def test_a_row_without_a_number_is_named(tmp_path: Path, bad: str) -> None:
    with pytest.raises(DataError, match=r"1 row has no number in column 'dwell'.*line 7"):
        read(tmp_path, TEXT + f"a,z,1,1,view,{bad}\n", keep=["dwell"])


def test_a_type_that_holds_no_numbers(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1], "item": [1], "tags": [["a", "b"]]})
    frame.write_parquet(tmp_path / "x.parquet")

    for keep in (["tags"], {"tags": {"a": 1}}):
        with pytest.raises(DataError, match=r"'tags' holds List\(String\); expected numbers"):
            read_interactions(tmp_path / "x.parquet", keep=keep)
