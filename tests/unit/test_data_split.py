"""Leave-one-out, worked by hand."""

import warnings

import pytest

from steerrec.data import DataWarning, Histories, Split, leave_one_out
from steerrec.errors import DataError

LISTS = [[4, 1, 2, 3], [0, 1], [2, 2, 2], [3]]


@pytest.fixture
def split() -> Split:
    with pytest.warns(DataWarning, match="2 of 4 users have fewer than 3 interactions"):
        return leave_one_out(Histories.from_lists(LISTS), num_items=6)


def test_short_users_train_whole_and_are_not_evaluated(split: Split) -> None:
    assert split.evaluated.tolist() == [0, 2]
    assert [row.tolist() for row in split.train] == [[4, 1], [0, 1], [2], [3]]
    assert [row.tolist() for row in split.histories] == LISTS


def test_validation_asks_for_the_last_but_one(split: Split) -> None:
    histories, targets = split.held_out("valid")

    assert [row.tolist() for row in histories] == [[4, 1], [2]]
    assert targets.tolist() == [2, 2]
    assert histories.user_ids.to_list() == [0, 2]


def test_test_history_includes_the_validation_item(split: Split) -> None:
    histories, targets = split.held_out("test")

    assert [row.tolist() for row in histories] == [[4, 1, 2], [2, 2]]
    assert targets.tolist() == [3, 2]


def test_counts_are_of_training_interactions(split: Split) -> None:
    assert split.counts.tolist() == [1, 2, 1, 1, 1, 0]


def test_other_parts_are_not_there(split: Split) -> None:
    with pytest.raises(ValueError, match="'valid' or 'test'"):
        split.held_out("train")  # type: ignore[arg-type]


def test_no_warning_where_nobody_is_short() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leave_one_out(Histories.from_lists([[0, 1, 2]]), num_items=3)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="none of 2 users has 3 interactions"):
        leave_one_out(Histories.from_lists([[0, 1], [1]]), num_items=2)
