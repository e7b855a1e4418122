"""Made-up histories: their items as asked, their columns from real ones."""

from types import SimpleNamespace

import numpy as np
import pytest

from steerrec.data import Histories
from steerrec.errors import ColumnError, DataError
from steerrec.probes import examples, probe

RATINGS = [[1, 2, 3], [4], [5, 6, 7, 8]]
EXAMPLE = Histories.from_lists([[0] * len(row) for row in RATINGS], columns={"rating": RATINGS})


def ratings(histories):
    bounds = zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
    return [histories.column("rating")[start:stop].tolist() for start, stop in bounds]


def test_items_are_those_asked_for_and_times_go_up_in_seconds():
    made = probe(SimpleNamespace(), [[4, 2, 7], [3], []])

    assert [row.tolist() for row in made] == [[4, 2, 7], [3], []]
    times = made.column("time")
    assert times.dtype == np.int64
    assert (np.diff(times[:3]) >= 60).all()
    assert (np.diff(times[:3]) <= 30 * 86_400).all()
    assert times[3] != times[0]  # another history, other times
    again = probe(SimpleNamespace(), [[4, 2, 7], [3], []])
    assert np.array_equal(again.column("time"), times)


def test_columns_come_from_histories_that_are_long_enough():
    rec = SimpleNamespace(reads={"rating": 0}, example=EXAMPLE)

    made = probe(rec, [[9, 9, 9], [9], [9, 9], []])

    assert ratings(made) == [[1, 2, 3], [5], [1, 2], []]
    assert len(made.column("time")) == 6


def test_columns_go_on_with_their_last_value_where_none_is_long_enough():
    made = probe(SimpleNamespace(example=EXAMPLE), [[9] * 6, [9] * 2])

    assert ratings(made) == [[5, 6, 7, 8, 8, 8], [5, 6]]


def test_alike_histories_have_the_same_columns():
    made = probe(SimpleNamespace(example=EXAMPLE), [[9] * 2, [9] * 3, [9]], alike=True)

    assert ratings(made) == [[1, 2], [1, 2, 3], [1]]
    assert made.column("time")[0] == made.column("time")[2] == made.column("time")[5]


def test_given_histories_come_before_the_recommenders_own():
    given = Histories.from_lists([[0, 0]], columns={"rating": [[70, 80]], "time": [[1, 2]]})

    made = probe(SimpleNamespace(example=EXAMPLE), [[9, 9]], example=given)

    assert ratings(made) == [[70, 80]]
    assert made.column("time").tolist() == [1, 2]
    plain = Histories.from_lists([[0, 0]])
    assert ratings(probe(SimpleNamespace(example=EXAMPLE), [[9, 9]], example=plain)) == [[1, 2]]


def test_a_column_that_no_example_has():
    with pytest.raises(ColumnError, match=r"reads column 'price', .* as example"):
        probe(SimpleNamespace(reads=["price"], example=EXAMPLE), [[1]])
    empty = Histories.from_lists([[], []], columns={"price": [[], []]})
    with pytest.raises(DataError, match="empty"):
        probe(SimpleNamespace(reads=["price"], example=empty), [[1]])


def test_examples_are_the_longest_within_the_window():
    held = examples(EXAMPLE, 2)

    assert ratings(held) == [[7, 8], [2, 3], [4]]
    assert len(examples(Histories.from_lists([[1]] * 100), 5)) == 16
