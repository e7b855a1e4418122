"""Columns beside the items of histories: what every operation does with them."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerrec.data import (
    Histories,
    build_histories,
    leave_one_out,
    simulate,
)
from steerrec.errors import ColumnError, DataError

from .test_data_histories import catalogue, interactions

NUMBERS = st.integers(-(2**62), 2**62)
LISTS = st.lists(st.lists(st.tuples(st.integers(0, 9), NUMBERS), max_size=8), max_size=8)
Pairs = list[list[tuple[int, int]]]


def histories(lists: Pairs) -> Histories:
    """Histories of (item, time)."""
    return Histories.from_lists(
        [[item for item, _ in row] for row in lists],
        columns={
            "time": [[time for _, time in row] for row in lists],
            "half": [[time % 100 / 2 for _, time in row] for row in lists],
        },
    )


def as_pairs(found: Histories) -> Pairs:
    """The (item, time) of each user; the column `half` has to have gone along."""
    assert found.column("half").tolist() == [t % 100 / 2 for t in found.column("time").tolist()]
    bounds = zip(found.offsets[:-1], found.offsets[1:], strict=True)
    pairs = list(zip(found.items.tolist(), found.column("time").tolist(), strict=True))
    return [pairs[start:stop] for start, stop in bounds]


WORKED: Pairs = [[(5, 10), (6, 20), (7, 30)], [], [(8, 40)]]


def test_columns_keep_their_numbers() -> None:
    found = Histories.from_lists(
        [[1, 2], [3]], columns={"time": [[2**60 + 1, 2], [3]], "rating": [[0.5, 1], [2]]}
    )

    assert found.column("time").tolist() == [2**60 + 1, 2, 3]
    assert found.column("time").dtype == np.int64
    assert found.column("rating").tolist() == [0.5, 1.0, 2.0]
    assert found.column("rating").dtype == np.float64
    assert repr(found) == "Histories(users=2, interactions=3, columns=['time', 'rating'])"
    assert repr(Histories.from_lists([[1]])) == "Histories(users=1, interactions=1)"


def test_operations_worked_by_hand() -> None:
    found = histories(WORKED)

    assert as_pairs(found.select([2, 0, 2])) == [[(8, 40)], WORKED[0], [(8, 40)]]
    assert as_pairs(found.truncate(2)) == [[(6, 20), (7, 30)], [], [(8, 40)]]
    assert as_pairs(found.cut([2, 0, 1])) == [[(5, 10)], [], []]
    assert as_pairs(found.prefixes([0, 0], [2, 3], 2)) == [
        [(5, 10), (6, 20)],
        [(6, 20), (7, 30)],
    ]
    assert found.padded(2, -1, column="time").tolist() == [[20, 30], [-1, -1], [40, -1]]
    assert found.padded(2, 0, side="left", column="half").tolist() == [[10, 15], [0, 0], [0, 20]]


@given(LISTS, st.integers(0, 9))
def test_truncate_and_cut(lists: Pairs, n: int) -> None:
    found = histories(lists)

    assert as_pairs(found.truncate(n)) == [row[max(len(row) - n, 0) :] for row in lists]
    assert as_pairs(found.cut(n)) == [row[: max(len(row) - n, 0)] for row in lists]


@given(st.data())
def test_prefixes_and_select(data: st.DataObject) -> None:
    lists = data.draw(LISTS.filter(bool))
    users = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10))
    lengths = [data.draw(st.integers(0, len(lists[u]))) for u in users]
    window = data.draw(st.integers(1, 9))
    found = histories(lists)

    cut = [lists[u][:n][-window:] for u, n in zip(users, lengths, strict=True)]
    assert as_pairs(found.prefixes(users, lengths, window)) == cut
    assert as_pairs(found.select(users)) == [lists[u] for u in users]


@given(LISTS, st.integers(1, 9), st.sampled_from(["left", "right"]))
def test_padded_columns_lie_where_the_items_lie(lists: Pairs, length: int, side: str) -> None:
    found = histories(lists)

    times = found.padded(length, 7, side, column="time")

    expected = []
    for row in lists:
        fill = [7] * max(length - len(row), 0)
        kept = [time for _, time in row][-length:]
        expected.append(fill + kept if side == "left" else kept + fill)
    assert times.shape == (len(lists), length)
    assert times.dtype == np.int64
    assert times.tolist() == expected


def test_the_split_carries_columns() -> None:
    rows: Pairs = [[(1, 10), (2, 20), (3, 30), (4, 40)], [(5, 50), (6, 60)]]

    with pytest.warns(UserWarning, match="fewer than 3"):
        split = leave_one_out(histories(rows), 10)

    assert as_pairs(split.train) == [rows[0][:2], rows[1]]
    assert as_pairs(split.held_out("valid")[0]) == [rows[0][:2]]
    assert as_pairs(split.held_out("test")[0]) == [rows[0][:3]]


# --- from interactions ----------------------------------------------------------------------------

ROWS = [("b", 7, 5), ("a", 8, 2), ("b", 9, 1), ("a", 7, 2), ("b", 8, 5), ("a", 9, 1)]


def test_built_with_time_and_features_in_the_order_of_the_items() -> None:
    data = replace(interactions(ROWS), columns={"rating": np.array([1, 2, 3, 4, 5, 6])})

    found = build_histories(data, catalogue([7, 8, 9]), columns=["time", "rating"])

    assert [row.tolist() for row in found] == [[2, 0, 1], [2, 1, 0]]
    assert found.column("time").tolist() == [1, 5, 5, 1, 2, 2]
    assert found.column("rating").tolist() == [3, 1, 5, 6, 2, 4]


def test_only_what_is_asked_for_is_carried() -> None:
    data = replace(interactions(ROWS), columns={"rating": np.arange(6)})

    assert dict(build_histories(data, catalogue([7, 8, 9])).columns) == {}
    assert list(build_histories(data, catalogue([7, 8, 9]), columns=["time"]).columns) == ["time"]


@pytest.mark.filterwarnings("ignore:dropped")
def test_columns_of_unknown_items_are_dropped_with_them() -> None:
    rows = [("a", 7, 1), ("c", 9, 2), ("b", 8, 3), ("a", 8, 4), ("b", 7, 5)]

    found = build_histories(interactions(rows), catalogue([8, 7]), columns=["time"])

    assert found.column("time").tolist() == [1, 4, 3, 5]


def test_simulated_interactions_have_times_that_never_go_down() -> None:
    data = simulate(users=30, items=20, seed=1)
    items = catalogue(data.item_ids.to_list())

    found = build_histories(data, items, columns=["time"])

    assert all((np.diff(found.select([u]).column("time")) >= 0).all() for u in range(30))
    assert sorted(found.column("time").tolist()) == sorted(data.time.tolist())  # type: ignore[union-attr]


# --- what is refused ------------------------------------------------------------------------------


def test_a_missing_column_is_one_error_that_says_how_to_provide_it() -> None:
    plain = Histories.from_lists([[1]])
    rated = Histories.from_lists([[1]], columns={"rating": [[5]]})

    for ask in (lambda: plain.column("time"), lambda: plain.padded(3, 0, column="time")):
        with pytest.raises(ColumnError, match=r"no column 'time'.*columns=\['time'\]"):
            ask()
    with pytest.raises(ColumnError, match="no column 'time', which the model reads; there is rat"):
        rated.column("time")


def test_interactions_without_the_column() -> None:
    untimed = interactions(ROWS, timed=False)

    with pytest.raises(ColumnError, match=r"no column 'time'.*time_col"):
        build_histories(untimed, catalogue([7, 8, 9]), columns=["time"])
    with pytest.raises(ColumnError, match=r"no column 'dwell'.*keep=\['dwell'\]"):
        build_histories(untimed, catalogue([7, 8, 9]), columns=["dwell"])
    with pytest.raises(DataError, match=r"columns is 'time'; expected a list of columns"):
        build_histories(untimed, catalogue([7, 8, 9]), columns="time")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], r"column 'x' has shape \(2,\) for 3 items"),
        ([[1], [2], [3]], r"has shape \(3, 1\)"),
        ([1.0, np.nan, 2.0], "not finite"),
        ([1.0, np.inf, 2.0], "not finite"),
        (["a", "b", "c"], "holds <U1; expected numbers"),
        ([None, 1, 2], "holds object"),
        (np.array([1, 2, 2**63], dtype=np.uint64), "holds uint64; .*within int64"),
        (np.array(["2020-01-01"] * 3, dtype="datetime64[s]"), "holds datetime64"),
        ([1j, 2, 3], "holds complex"),
    ],
)
def test_columns_hold_one_finite_number_for_each_item(values: object, message: str) -> None:
    plain = Histories.from_lists([[1, 2], [3]])

    with pytest.raises(DataError, match=message):
        Histories(plain.items, plain.offsets, plain.user_ids, {"x": values})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([True, False, True]), np.int64),
        (np.array([1, 2, 3], dtype=np.uint8), np.int64),
        (np.array([1, 2, 3], dtype=np.float32), np.float64),
    ],
)
def test_other_numbers_become_int64_or_float64(values: np.ndarray, kind: type) -> None:
    plain = Histories.from_lists([[1, 2], [3]])

    found = replace(plain, columns={"x": values}).column("x")

    assert found.dtype == kind
    assert found.tolist() == values.tolist()


def test_lists_of_other_lengths() -> None:
    with pytest.raises(DataError, match="column 'time' has lists of other lengths"):
        Histories.from_lists([[1, 2], [3]], columns={"time": [[1], [2, 3]]})
    with pytest.raises(DataError, match="column 'time' has lists of other lengths"):
        Histories.from_lists([[1, 2]], columns={"time": [[1, 2], []]})


def test_no_histories_and_no_items() -> None:
    for lists in ([], [[], []]):
        found = Histories.from_lists(lists, columns={"time": lists})
        assert found.padded(3, -1, column="time").tolist() == [[-1] * 3] * len(lists)
        assert found.truncate(2).column("time").tolist() == []


def test_a_filling_that_is_no_whole_number_makes_floats() -> None:
    found = Histories.from_lists([[1]], columns={"rating": [[4]]})

    assert found.padded(2, 0.5, column="rating").tolist() == [[4.0, 0.5]]
    assert found.padded(2, 0).dtype == np.int64
    assert isinstance(found.user_ids, pl.Series)
