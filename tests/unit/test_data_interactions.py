"""Preparation of the rows: ids, times, duplicates, k-core, and the order of the codes."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerrec.data import Preparation, read_interactions, simulate, write_csv
from steerrec.data.interactions import first_of_repeated, in_k_core
from steerrec.errors import DataError


def write(folder: Path, text: str) -> Path:
    path = folder / "x.csv"
    path.write_text(text)
    return path


def test_codes_follow_first_appearance_in_what_is_left(tmp_path: Path) -> None:
    # item z is dropped by the 2-core, and user c with it, so y is the first item that stays
    path = write(tmp_path, "user,item\nc,z\nb,y\na,x\nb,x\na,y\n")

    data = read_interactions(path, k_core=2)

    assert data.user_ids.to_list() == ["b", "a"]
    assert data.item_ids.to_list() == ["y", "x"]
    assert data.user.tolist() == [0, 1, 0, 1]
    assert data.item.tolist() == [0, 1, 1, 0]
    assert data.user.dtype == data.item.dtype == np.int32


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["1", "20", "-3"], [1, 20, -3]),
        (["1", "007"], ["1", "007"]),
        (["1", "1.0"], ["1", "1.0"]),
        (["+1", "2"], ["+1", "2"]),
        (["1", "99999999999999999999"], ["1", "99999999999999999999"]),
        (["1", "x"], ["1", "x"]),
    ],
)
def test_ids_become_integers_only_if_nothing_is_lost(
    tmp_path: Path, ids: list[str], expected: list[object]
) -> None:
    path = write(tmp_path, "user,item\n" + "".join(f"u,{i}\n" for i in ids))

    assert read_interactions(path).item_ids.to_list() == expected


def test_k_core_takes_as_many_rounds_as_it_needs(tmp_path: Path) -> None:
    # Round 1 drops item z (one row). User c then has one row and goes in round 2, which leaves
    # item y with two rows: a and b stay.
    text = "user,item\na,x\na,y\nb,x\nb,y\nc,y\nc,z\n"

    data = read_interactions(write(tmp_path, text), k_core=2)

    assert data.user_ids.to_list() == ["a", "b"]
    assert data.item_ids.to_list() == ["x", "y"]
    assert len(data) == 4


def test_k_core_of_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item\na,x\nb,y\n")

    with pytest.raises(DataError, match=r"nothing of x.csv is left after the 2-core filter"):
        read_interactions(path, k_core=2)
    with pytest.raises(DataError, match="k_core is -1"):
        read_interactions(path, k_core=-1)
    assert len(read_interactions(path, k_core=1)) == 2


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@given(PAIRS, st.integers(1, 4))
def test_k_core_is_the_naive_fixpoint(pairs: list[tuple[int, int]], k: int) -> None:
    left = list(range(len(pairs)))
    while True:
        users = [pairs[i][0] for i in left]
        items = [pairs[i][1] for i in left]
        kept = [i for i in left if users.count(pairs[i][0]) >= k and items.count(pairs[i][1]) >= k]
        if kept == left:
            break
        left = kept

    user, item = np.array(pairs).T
    assert np.flatnonzero(in_k_core(user, item, k)).tolist() == left


def test_dedup_keeps_the_first_in_time_and_then_in_file_order(tmp_path: Path) -> None:
    text = "user,item,time\na,x,5\na,x,3\na,y,4\na,x,3\nb,x,9\n"

    data = read_interactions(write(tmp_path, text), dedup=True)

    assert data.time is not None
    assert list(zip(data.user.tolist(), data.item.tolist(), data.time.tolist(), strict=True)) == [
        (0, 0, 3),  # the second row: x before y, though y is earlier than the first row
        (0, 1, 4),
        (1, 0, 9),
    ]


def test_dedup_comes_before_k_core(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item\na,x\na,x\na,y\nb,y\nb,y\na,z\nb,z\n")

    data = read_interactions(path, dedup=True, k_core=2)

    assert data.item_ids.to_list() == ["y", "z"]  # of x, one row is left before k-core


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30
    ),
    st.booleans(),
)
def test_first_of_repeated_against_a_loop(rows: list[tuple[int, int, int]], timed: bool) -> None:
    order = sorted(range(len(rows)), key=lambda i: rows[i][2]) if timed else range(len(rows))
    first: dict[tuple[int, int], int] = {}
    for i in order:
        first.setdefault(rows[i][:2], i)

    user, item, time = np.array(rows).T
    mask = first_of_repeated(user, item, time if timed else None)
    assert np.flatnonzero(mask).tolist() == sorted(first.values())


@pytest.mark.parametrize(
    ("times", "expected", "kind"),
    [
        (["978300760", "-5"], [978300760, -5], "i"),
        (["9007199254740993", "1"], [9007199254740993, 1], "i"),  # no float holds the first
        (["1.5", "2"], [1.5, 2.0], "f"),
        (["1970-01-01", "1970-01-02"], [0, 86_400_000_000], "i"),
        (["1970-01-01 00:00:01", "1970-01-01T00:00:01.5"], [1_000_000, 1_500_000], "i"),
        (["1970-01-01T00:00:01Z", "1970-01-01T01:00:01+01:00"], [1_000_000, 1_000_000], "i"),
        (["1970-01-01 00:01", "1970-01-01"], [60_000_000, 0], "i"),
    ],
)
def test_times(tmp_path: Path, times: list[str], expected: list[float], kind: str) -> None:
    path = write(tmp_path, "user,item,time\n" + "".join(f"a,x,{t}\n" for t in times))

    time = read_interactions(path).time

    assert time is not None
    assert time.tolist() == expected
    assert time.dtype.kind == kind


@pytest.mark.parametrize("bad", ["", "NaN", "nan", "inf", "soon", "2020-13-01"])
def test_unusable_times_are_counted_and_the_first_line_is_named(tmp_path: Path, bad: str) -> None:
    lines = ["a,x,1", "a,y,2.5", f"a,z,{bad}", "b,x,3", f"b,y,{bad}"]
    path = write(tmp_path, "user,item,time\n" + "\n".join(lines) + "\n")

    with pytest.raises(DataError, match=r"2 rows have no usable time in column 'time'.*line 4;"):
        read_interactions(path)


def test_unusable_dates(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item,date\na,x,2020-01-01\na,y,2020-01-02\na,z,02/01/2020\n")

    with pytest.raises(DataError, match=r"1 row has no usable time.*line 4"):
        read_interactions(path)


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_unusable_times_in_parquet(tmp_path: Path, bad: float | None) -> None:
    frame = pl.DataFrame({"user": [1, 1], "item": [1, 2], "time": [1.0, bad]})
    frame.write_parquet(tmp_path / "x.parquet")

    with pytest.raises(DataError, match=r"1 row has no usable time.*in row 2"):
        read_interactions(tmp_path / "x.parquet")


def test_times_of_a_type_that_is_none(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1], "item": [1], "time": [True]})
    frame.write_parquet(tmp_path / "x.parquet")

    with pytest.raises(DataError, match="holds Boolean; expected numbers or dates"):
        read_interactions(tmp_path / "x.parquet")


def test_preparation_survives_json() -> None:
    preparation = Preparation("csv", "user", "item", None, 5, True)

    values = preparation.to_dict()

    assert Preparation.from_dict(values) == preparation
    assert Preparation.from_dict({**values, "from_a_later_version": 1}) == preparation


def test_recorded_preparation_reads_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("1 2\n1 3\n2 2\n2 3\n")
    once = read_interactions(path, k_core=2, dedup=True)

    again = read_interactions(path, **once.preparation.to_dict())

    assert again.preparation == once.preparation
    assert np.array_equal(again.item, once.item)


def test_written_csv_reads_back(tmp_path: Path) -> None:
    data = simulate(users=40, items=30, seed=3)
    write_csv(data, tmp_path / "new" / "folder")

    back = read_interactions(tmp_path / "new" / "folder")

    assert np.array_equal(back.user, data.user)
    assert np.array_equal(back.item, data.item)
    assert back.time is not None
    assert data.time is not None
    assert np.array_equal(back.time, data.time)
    assert back.user_ids.equals(data.user_ids)
    assert back.item_ids.equals(data.item_ids)
    assert back.item_attributes.equals(data.item_attributes)
    assert back.preparation == data.preparation


def test_written_csv_keeps_lists_and_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.csv"
    path.parent.mkdir()
    path.write_text('user,item,title,genres\n1,5,"A, ""b""",Crime|Drama\n1,6,,\n')
    data = read_interactions(path)
    write_csv(data, tmp_path / "b")

    back = read_interactions(tmp_path / "b")

    assert back.time is None
    assert back.item_attributes.equals(data.item_attributes)
    assert back.item_attributes.to_dict(as_series=False) == {
        "title": ['A, "b"', None],
        "genres": [["Crime", "Drama"], None],
    }
