"""Histories in Parquet: written, read back in slices, and what is wrong with a file said."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerrec.data import Catalogue, Histories
from steerrec.data.history_files import Slice, history_files, read_slice, slices, write_histories
from steerrec.errors import ColumnError, DataError

CATALOGUE = Catalogue(
    pl.DataFrame(
        {
            "row": range(6),
            "item_id": list("abcdef"),
            "title": [None] * 6,
            "count": [1] * 6,
        },
        schema={"row": pl.Int64, "item_id": pl.String, "title": pl.String, "count": pl.Int64},
    )
)


def lists(histories):
    return [row.tolist() for row in histories]


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=7), min_size=1, max_size=12))
def test_what_is_written_is_read_back_slice_by_slice(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("histories") / "users.parquet"
    times = [[float(i) for i in range(len(row))] for row in rows]
    histories = Histories.from_lists(rows, columns={"time": times})
    write_histories(histories, CATALOGUE, file)
    found, when, users = [], [], []
    for part in slices([file], 5):
        assert len(part) <= 5
        piece, dropped = read_slice(part, CATALOGUE, columns=["time"])
        assert dropped == 0
        found += lists(piece)
        when += piece.columns["time"].tolist()
        users += piece.user_ids.to_list()
    assert found == rows
    assert when == [value for row in times for value in row]
    assert users == list(range(len(rows)))


def test_unknown_items_and_empty_users_are_dropped_and_counted(tmp_path):
    file = tmp_path / "users.parquet"
    pl.DataFrame(
        {
            "user": ["u", "v", "w", "x"],
            "history": [["a", "b", "c", "d", "e"], ["?"], [], ["f", "a", "f", "b"]],
            "time": [[1, 2, 3, 4, 5], [6], [], [7, 8, 9, 10]],
        }
    ).write_parquet(file)
    histories, dropped = read_slice(Slice(str(file), 0, 4), CATALOGUE, columns=["time"])
    assert lists(histories) == [[0, 1, 2, 3, 4], [5, 0, 5, 1]]
    assert histories.user_ids.to_list() == ["u", "x"]
    assert histories.columns["time"].tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert dropped == 1


def test_a_folder_of_histories_is_told_from_interactions(tmp_path):
    write_histories(Histories.from_lists([[0, 1]]), CATALOGUE, tmp_path / "b.parquet")
    write_histories(Histories.from_lists([[2]]), CATALOGUE, tmp_path / "a.parquet")
    assert [path.name for path in history_files(tmp_path)] == ["a.parquet", "b.parquet"]
    rows = pl.DataFrame({"user_id": [1], "item_id": ["a"]})
    rows.write_parquet(tmp_path / "rows.parquet")
    assert history_files(tmp_path / "rows.parquet") == []
    with pytest.raises(DataError, match=r"rows\.parquet has no column of lists"):
        history_files(tmp_path)


def test_what_is_wrong_with_a_file(tmp_path):
    file = tmp_path / "users.parquet"
    pl.DataFrame({"user_id": [1, 2], "items": [["a"], ["?"]]}).write_parquet(file)
    with pytest.raises(DataError, match="1 of 2 interactions"):
        read_slice(Slice(str(file), 0, 2), CATALOGUE)
    with pytest.raises(DataError, match="has become shorter"):
        read_slice(Slice(str(file), 0, 3), CATALOGUE)
    with pytest.raises(ColumnError, match="no list column 'time'"):
        read_slice(Slice(str(file), 0, 1), CATALOGUE, columns=["time"])
    pl.DataFrame({"id": [1], "items": [["a"]]}).write_parquet(file)
    with pytest.raises(ColumnError, match="expected a user id"):
        read_slice(Slice(str(file), 0, 1), CATALOGUE)
    pl.DataFrame({"user": [1], "items": [["a"]], "time": [[1, 2]]}).write_parquet(file)
    with pytest.raises(DataError, match="other lengths"):
        read_slice(Slice(str(file), 0, 1), CATALOGUE, columns=["time"])
    file.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        history_files(file)


def test_items_are_matched_by_id_and_not_by_row(tmp_path):
    turned = Catalogue(CATALOGUE.frame.reverse().with_columns(pl.Series("row", np.arange(6))))
    write_histories(Histories.from_lists([[0, 1]]), CATALOGUE, tmp_path / "users.parquet")
    histories, _ = read_slice(Slice(str(tmp_path / "users.parquet"), 0, 1), turned)
    assert lists(histories) == [[5, 4]]
