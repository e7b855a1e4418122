"""Histories against plain Python lists."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerrec.data import (
    Catalogue,
    DataWarning,
    Histories,
    Interactions,
    Preparation,
    build_histories,
)
from steerrec.errors import DataError

LISTS = st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=8)


def as_lists(histories: Histories) -> list[list[int]]:
    return [row.tolist() for row in histories]


def interactions(rows: list[tuple[str, int, int]], timed: bool = True) -> Interactions:
    """Rows of (user, item, time), encoded by hand."""
    users = list(dict.fromkeys(u for u, _, _ in rows))
    items = list(dict.fromkeys(i for _, i, _ in rows))
    return Interactions(
        user=np.array([users.index(u) for u, _, _ in rows], dtype=np.int32),
        item=np.array([items.index(i) for _, i, _ in rows], dtype=np.int32),
        time=np.array([t for _, _, t in rows]) if timed else None,
        user_ids=pl.Series(users),
        item_ids=pl.Series(items),
        item_attributes=pl.DataFrame({"title": [None] * len(items)}, schema={"title": pl.String}),
        preparation=Preparation("csv"),
    )


def catalogue(ids: list[int]) -> Catalogue:
    return Catalogue(
        pl.DataFrame(
            {"row": range(len(ids)), "item_id": ids, "title": [None] * len(ids), "count": 0},
            schema={"row": pl.Int64, "item_id": pl.Int64, "title": pl.String, "count": pl.Int64},
        )
    )


def test_built_in_time_with_ties_in_file_order() -> None:
    rows = [("b", 7, 5), ("a", 8, 2), ("b", 9, 1), ("a", 7, 2), ("b", 8, 5), ("a", 9, 1)]

    histories = build_histories(interactions(rows), catalogue([7, 8, 9]))

    assert histories.user_ids.to_list() == ["b", "a"]
    assert as_lists(histories) == [[2, 0, 1], [2, 1, 0]]


def test_built_in_file_order_without_time() -> None:
    rows = [("b", 7, 5), ("a", 8, 2), ("b", 9, 1), ("a", 7, 2)]

    histories = build_histories(interactions(rows, timed=False), catalogue([7, 8, 9]))

    assert as_lists(histories) == [[0, 2], [1, 0]]


def test_few_unknown_items_are_dropped_with_a_count() -> None:
    # item 9 of user c is unknown: 1 row of 5, exactly a fifth; c has nothing left
    rows = [("a", 7, 1), ("c", 9, 1), ("b", 8, 1), ("a", 8, 2), ("b", 7, 2)]

    with pytest.warns(DataWarning, match=r"dropped: 1 of 5 interactions.*\(1 ids\)"):
        histories = build_histories(interactions(rows), catalogue([8, 7]))

    assert histories.user_ids.to_list() == ["a", "b"]
    assert as_lists(histories) == [[1, 0], [0, 1]]


def test_many_unknown_items_are_an_error() -> None:
    rows = [("a", 7, 1), ("c", 9, 1), ("b", 8, 1), ("a", 8, 2)]

    with pytest.raises(DataError, match=r"1 of 4 interactions.*at most a fifth"):
        build_histories(interactions(rows), catalogue([8, 7]))
    with pytest.raises(DataError, match="4 of 4 interactions"):
        build_histories(interactions(rows), catalogue([1]))


def test_from_lists() -> None:
    histories = Histories.from_lists([[1, 2], [], [3]], user_ids=["x", "y", "z"])

    assert len(histories) == 3
    assert histories.offsets.tolist() == [0, 2, 2, 3]
    assert histories.lengths.tolist() == [2, 0, 1]
    assert histories[-1].tolist() == [3]
    assert histories.user_ids.to_list() == ["x", "y", "z"]
    assert Histories.from_lists([[1]]).user_ids.to_list() == [0]
    with pytest.raises(IndexError):
        histories[3]
    with pytest.raises(DataError, match="2 user ids for 1 histories"):
        Histories.from_lists([[1]], user_ids=[1, 2])


@given(LISTS, st.integers(0, 9))
def test_truncate_and_cut(lists: list[list[int]], n: int) -> None:
    histories = Histories.from_lists(lists)

    assert as_lists(histories.truncate(n)) == [row[max(len(row) - n, 0) :] for row in lists]
    assert as_lists(histories.cut(n)) == [row[: max(len(row) - n, 0)] for row in lists]
    each = np.arange(len(lists)) % 3
    assert as_lists(histories.cut(each)) == [
        row[: max(len(row) - d, 0)] for row, d in zip(lists, each.tolist(), strict=True)
    ]


@given(LISTS, st.integers(0, 8), st.integers(0, 8))
def test_between(lists: list[list[int]], start: int, stop: int) -> None:
    start, stop = sorted(min(n, len(lists)) for n in (start, stop))
    whole = Histories.from_lists(lists, columns={"time": [[2 * i for i in row] for row in lists]})
    part = whole.between(start, stop)
    assert as_lists(part) == lists[start:stop]
    assert part.user_ids.to_list() == list(range(start, stop))
    assert part.column("time").tolist() == [2 * i for row in lists[start:stop] for i in row]
    assert as_lists(part.select(range(len(part)))) == lists[start:stop]
    assert np.shares_memory(part.items, whole.items) or not len(part.items)


@given(LISTS, st.integers(1, 9), st.sampled_from(["left", "right"]))
def test_padded(lists: list[list[int]], length: int, side: str) -> None:
    padded = Histories.from_lists(lists).padded(length, pad=-7, side=side)

    expected = []
    for row in lists:
        fill = [-7] * max(length - len(row), 0)
        expected.append(fill + row[-length:] if side == "left" else row[-length:] + fill)
    assert padded.shape == (len(lists), length)
    assert padded.dtype == np.int64
    assert padded.tolist() == expected


@given(st.data())
def test_prefixes_and_select(data: st.DataObject) -> None:
    lists = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=6))
    users = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10))
    lengths = [data.draw(st.integers(0, len(lists[u]))) for u in users]
    window = data.draw(st.integers(1, 9))
    histories = Histories.from_lists(lists, user_ids=[f"u{i}" for i in range(len(lists))])

    prefixes = histories.prefixes(users, lengths, window)

    expected = [lists[u][:n][-window:] for u, n in zip(users, lengths, strict=True)]
    assert as_lists(prefixes) == expected
    assert prefixes.user_ids.to_list() == [f"u{u}" for u in users]
    assert as_lists(histories.select(users)) == [lists[u] for u in users]


def test_prefixes_stay_inside_their_history() -> None:
    histories = Histories.from_lists([[1, 2], [3]])

    with pytest.raises(ValueError, match="longer than its history"):
        histories.prefixes([1], [2], 5)
    with pytest.raises(ValueError, match="side is 'top'"):
        histories.padded(2, 0, side="top")
