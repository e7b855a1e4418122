"""The simulated world: reproducible, biased towards popular items, and learnable."""

import numpy as np
import pytest

from steerrec.data import (
    Catalogue,
    Interactions,
    Split,
    build_histories,
    leave_one_out,
    simulate,
)
from steerrec.errors import DataError


def split_of(data: Interactions) -> tuple[Split, Catalogue]:
    catalogue = Catalogue.from_interactions(data)
    return leave_one_out(build_histories(data, catalogue), len(catalogue)), catalogue


def test_one_seed_one_world() -> None:
    one, same, other = (simulate(users=50, items=40, seed=s) for s in (1, 1, 2))

    assert np.array_equal(one.item, same.item)
    assert np.array_equal(one.time, same.time)  # type: ignore[arg-type]
    assert one.item_attributes.equals(same.item_attributes)
    assert not np.array_equal(one.item[:100], other.item[:100])


def test_shape_of_the_log() -> None:
    data = simulate(users=200, items=300, seed=0, min_length=5, max_length=20)
    lengths = np.bincount(data.user)

    assert len(lengths) == 200
    assert lengths.min() >= 5
    assert lengths.max() <= 20
    assert len(np.unique(lengths)) > 5
    assert data.time is not None
    assert (np.diff(data.time) >= 0).all()  # a log, oldest first
    pairs = np.unique(np.stack([data.user, data.item]), axis=1)
    assert pairs.shape[1] == len(data)  # nobody takes an item twice
    assert data.item[0] == data.user[0] == 0  # codes by first appearance


def test_items_have_unique_titles_and_a_category() -> None:
    data = simulate(users=3000, items=5000, seed=0, max_length=20)
    attributes = data.item_attributes

    assert attributes.columns == ["title", "category"]
    assert attributes["title"].n_unique() == len(attributes) == len(data.item_ids)
    assert attributes["category"].n_unique() == 12
    assert not attributes["title"].has_nulls()


@pytest.mark.parametrize("size", [{"users": 1, "items": 2}, {"users": 3, "items": 5}])
def test_tiny_worlds(size: dict[str, int]) -> None:
    data = simulate(**size, min_length=4, max_length=8)

    assert len(data.user_ids) == size["users"]
    assert len(data.item_ids) <= size["items"]


@pytest.mark.parametrize("bad", [{"users": 0}, {"items": 1}, {"min_length": 9, "max_length": 8}])
def test_sizes_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(DataError, match="cannot simulate"):
        simulate(**bad)
    with pytest.raises(DataError, match="cannot simulate follow=2"):
        simulate(follow=2)


def test_popularity_is_biased_with_a_long_tail() -> None:
    _, catalogue = split_of(simulate())
    head, _, tail = catalogue.groups.sizes

    assert head <= 0.05 * len(catalogue)  # some percent of the items take a fifth
    assert tail >= 0.45 * len(catalogue)


@pytest.mark.parametrize("world", [{}, {"seed": 7}, {"users": 600, "items": 200, "seed": 1}])
def test_what_came_next_beats_what_is_popular(world: dict[str, int]) -> None:
    split, catalogue = split_of(simulate(**world))
    follows = np.zeros((len(catalogue), len(catalogue)))  # [N, N] item -> next item
    for row in split.train:
        np.add.at(follows, (row[:-1], row[1:]), 1)
    histories, targets = split.held_out("test")
    last = histories.items[histories.offsets[1:] - 1]
    popular = split.counts / split.counts.sum()

    def ndcg(scores: np.ndarray) -> float:  # [E, N], unmasked
        rank = (scores > scores[np.arange(len(targets)), targets][:, None]).sum(axis=1)
        return float(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean())

    by_popularity = ndcg(np.tile(popular, (len(targets), 1)))
    assert ndcg(follows[last] + popular) >= 2.5 * by_popularity
