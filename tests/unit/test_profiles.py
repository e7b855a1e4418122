"""Contrasts, and synthetic users: whose items, how many of them, drawn how."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from steerrec.data import Histories
from steerrec.errors import DataError
from steerrec.profiles import Contrast, popularity_contrast, synthetic_users

from .tiny import catalogue, random_histories

GROUP = np.array([3, 8, 15])


def contrast(group_a, group_b):
    return Contrast("genre", np.array(group_a), np.array(group_b), "horror", "others", {})


def test_the_popularity_contrast_is_head_against_tail():
    # 20 interactions: the first item has more than a fifth and is head all the same; 0 + 1 + 2
    # are at most a fifth, 0 + 1 + 2 + 3 are not
    found = popularity_contrast(catalogue([4, 10, 3, 2, 1, 0]))
    assert found.name == "popularity"
    assert found.group_a.tolist() == [1]
    assert found.group_b.tolist() == [3, 4, 5]
    assert (found.label_a, found.label_b) == ("popular", "unpopular")
    assert found.describe() == {
        "name": "popularity",
        "group_a": {"label": "popular", "items": 1},
        "group_b": {"label": "unpopular", "items": 3},
        "definition": {"kind": "popularity", "head_share": 0.2, "tail_share": 0.2},
    }


@pytest.mark.parametrize(("groups", "empty"), [(([], [1]), "horror"), (([1], []), "others")])
def test_a_group_without_items_is_refused(groups, empty):
    with pytest.raises(DataError, match=f"contrast 'genre': no items are {empty}"):
        contrast(*groups)


def test_items_come_from_the_group_alone():
    people = synthetic_users(random_histories(), GROUP, n=100, max_length=6)
    assert len(people) == 100
    assert set(people.items.tolist()) == set(GROUP.tolist())


@pytest.mark.parametrize("max_length", [1, 4, 50])
def test_lengths_are_those_of_training_prefixes_cut_at_the_window(max_length):
    train = random_histories()
    prefixes = [min(t, max_length) for items in train for t in range(1, len(items))]
    everyone = synthetic_users(train, GROUP, n=len(prefixes), max_length=max_length)
    assert Counter(everyone.lengths.tolist()) == Counter(prefixes)


def test_more_users_than_prefixes_keep_the_distribution_of_lengths():
    train = Histories.from_lists([[0] * 2, [0] * 4])  # lengths 1; 1, 2, 3
    people = synthetic_users(train, GROUP, n=4000, max_length=10)
    counts = Counter(people.lengths.tolist())
    assert set(counts) == {1, 2, 3}
    # the standard deviation of a count is at most sqrt(4000 / 4) = 32
    assert abs(counts[1] - 2000) < 150
    assert abs(counts[2] - 1000) < 150


def test_items_are_drawn_uniformly_with_replacement():
    train = Histories.from_lists([[0] * 11])
    people = synthetic_users(train, GROUP, n=3000, max_length=10)
    counts = Counter(people.items.tolist())
    n = len(people.items)
    for item in GROUP.tolist():  # the standard deviation of a share is sqrt(2 / 9 / n)
        assert abs(counts[item] / n - 1 / 3) < 5 * (2 / 9 / n) ** 0.5
    # an item follows itself as often as it follows any other
    pairs = [first == second for items in people for first, second in pairwise(items.tolist())]
    assert abs(np.mean(pairs) - 1 / 3) < 5 * (2 / 9 / len(pairs)) ** 0.5
    assert max(map(len, people)) > len(GROUP)


def test_the_seed_decides_and_gives_both_groups_the_same_lengths():
    train = random_histories()

    def users(group, seed):
        return synthetic_users(train, np.array(group), n=50, max_length=6, seed=seed)

    one, again, other = users([1, 2, 3], 0), users([1, 2, 3], 0), users([1, 2, 3], 1)
    assert np.array_equal(one.items, again.items)
    assert np.array_equal(one.offsets, again.offsets)
    assert not np.array_equal(one.offsets, other.offsets)
    assert np.array_equal(one.offsets, users([7, 8], 0).offsets)


def test_the_seed_decides_the_items_too():
    train = Histories.from_lists([[0] * 2])  # a single prefix, so that all lengths are equal
    one, other = (synthetic_users(train, GROUP, n=50, max_length=6, seed=seed) for seed in (0, 1))
    assert np.array_equal(one.offsets, other.offsets)
    assert not np.array_equal(one.items, other.items)


def test_columns_are_those_of_the_prefixes_position_by_position():
    # the prefixes of 1, 2 and 3 items, each drawn once; the window leaves the last two items
    columns = {"time": [[10, 20, 30, 40]], "rating": [[0.5, 1.5, 2.5, 3.5]]}
    train = Histories.from_lists([[0] * 4], columns=columns)
    people = synthetic_users(train, GROUP, n=3, max_length=2)
    bounds = pairwise(people.offsets.tolist())
    times = [people.column("time")[start:stop].tolist() for start, stop in bounds]
    assert sorted(times) == [[10], [10, 20], [20, 30]]
    assert np.array_equal(people.column("rating") * 10 + 5, people.column("time"))
    assert set(people.items.tolist()) <= set(GROUP.tolist())


def test_columns_change_nothing_about_the_items_and_are_the_same_for_both_groups():
    train = random_histories()
    timed = replace(train, columns={"time": np.arange(len(train.items))})
    plain, one, other = (
        synthetic_users(histories, np.array(group), n=60, max_length=6, seed=3)
        for histories, group in ((train, [1, 2]), (timed, [1, 2]), (timed, [7, 8, 9]))
    )
    assert dict(plain.columns) == {}
    assert np.array_equal(one.items, plain.items)
    assert np.array_equal(one.column("time"), other.column("time"))
    assert not np.array_equal(one.items, other.items)


def test_histories_without_a_prefix_are_refused():
    with pytest.raises(DataError, match="no training prefixes"):
        synthetic_users(Histories.from_lists([[1], [2]]), GROUP, n=5, max_length=6)
