"""The controls: random items of the best, and the last places for the least exposed items."""

import heapq

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec.errors import MethodError
from steerrec.metrics import gini, ranking_metrics
from steerrec.rerank import RandomTop, SlotFilling
from steerrec.rerank.slot_filling import _least_exposed

from .rerank_cases import random_worlds, world


def many_users(users=400, items=60, **options):
    scores = torch.randn(users, items, generator=torch.Generator().manual_seed(0))
    scores += torch.linspace(2, -2, items)
    return world(scores, **{"k": 5, "pool": 40} | options)


# --- random


def test_no_extra_is_the_base_list():
    for case in random_worlds(60):
        assert torch.equal(RandomTop(extra=0).lists(case.candidates), case.candidates.base)


def test_draws_are_among_the_best_without_repeats_and_in_order():
    case = many_users()
    made = RandomTop(extra=7).lists(case.candidates)
    for user, row in enumerate(made.tolist()):
        places = [case.ranking(user).index(item) for item in row]
        assert places == sorted(set(places))
        assert places[-1] < 12


def test_every_place_is_drawn_as_often():
    case = many_users(users=4000, items=20, k=4, pool=20)
    made = RandomTop(extra=6).lists(case.candidates)
    places = (made[:, :, None] == case.candidates.ids[:, None, :10]).nonzero()[:, 2]
    drawn = torch.bincount(places, minlength=10) / 4000
    assert drawn.tolist() == pytest.approx([0.4] * 10, abs=4 * (0.24 / 4000) ** 0.5)


def test_the_pool_has_to_be_large_enough():
    case = many_users(pool=8)
    with pytest.raises(MethodError, match="random draws from 9 items, the pool holds 8"):
        RandomTop(extra=4).lists(case.candidates)


def test_a_small_catalogue_is_drawn_from_as_a_whole():
    case = world([[3.0, 2.0, 1.0]], k=2)
    assert RandomTop(extra=90).lists(case.candidates).shape == (1, 2)


def test_of_few_items_left_all_are_taken():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(30, 4)
    case = world(scores, histories=[[0, 2]] * 30, k=3, mask_seen=True)
    assert RandomTop(extra=1).lists(case.candidates).tolist() == [[1, 3, -1]] * 30


@pytest.mark.parametrize("extra", [-1, 1.5, float("nan")])
def test_bad_extra(extra):
    with pytest.raises(MethodError, match="extra is"):
        RandomTop(extra=extra)


# --- slot filling


@settings(max_examples=200)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(0, 60))
def test_places_go_one_by_one_to_the_least_exposed_item(exposure, total):
    heap = [(count, item) for item, count in enumerate(exposure)]
    heapq.heapify(heap)
    for _ in range(total):
        count, item = heapq.heappop(heap)
        heapq.heappush(heap, (count + 1, item))
    items = _least_exposed(torch.tensor(exposure), total, torch.Generator().manual_seed(0))
    assert len(items) == total
    after = torch.tensor(exposure) + torch.bincount(items, minlength=len(exposure))
    assert sorted(after.tolist()) == sorted(count for count, _ in heap)


def test_no_share_is_the_base_list():
    for case in random_worlds(60):
        assert torch.equal(SlotFilling(share=0).lists(case.candidates), case.candidates.base)


def test_the_first_places_stay_and_the_last_bring_all_items_up():
    case = many_users()
    made = SlotFilling(share=0.4).lists(case.candidates)
    assert torch.equal(made[:, :3], case.candidates.base[:, :3])
    kept = torch.bincount(made[:, :3].flatten(), minlength=60)
    after = torch.bincount(made.flatten(), minlength=60)
    assert after.sum() == 2000
    # 800 places for 60 items: those that the kept places show less come up to one level
    filled = after[after > kept]
    assert filled.max() - filled.min() <= 1
    assert gini(after) < gini(torch.bincount(case.candidates.base.flatten(), minlength=60))


def test_a_part_of_a_place_is_given_by_some_of_the_users():
    case = many_users()
    made = SlotFilling(share=0.3).lists(case.candidates)  # one and a half of five
    changed = (made != case.candidates.base).sum(dim=1)
    assert changed.max() <= 2
    given = 400 * 1.5
    assert given * 0.8 < changed.sum() <= given  # an item may be dealt back to its own place


def test_one_place_covers_the_tail_and_wins_every_exposure_metric():
    case = many_users(users=600)
    options = {"counts": case.candidates.counts, "groups": case.candidates.labels}
    before = ranking_metrics(case.candidates.base, **options)
    after = ranking_metrics(SlotFilling(share=0.2).lists(case.candidates), **options)
    assert after["ltc@5"] == after["coverage@5"] == 1
    assert after["gini@5"] < before["gini@5"]


def test_nobody_gets_an_item_twice_or_one_that_is_left_out():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 30, 12).tolist() for _ in range(100)]
    case = many_users(users=100, items=30, pool=30, histories=histories, mask_seen=True, k=8)
    for share in SlotFilling.settings:
        made = SlotFilling(share=share).lists(case.candidates)
        for row, history in zip(made.tolist(), histories, strict=True):
            assert len(set(row)) == 8
            assert not set(row) & set(history)


def test_the_whole_list():
    case = many_users()
    exposure = torch.bincount(SlotFilling(share=1).lists(case.candidates).flatten())
    assert exposure.max() - exposure.min() <= 2


def test_the_seed_decides():
    one, same, other = (SlotFilling().lists(many_users(seed=seed).candidates) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_bad_share():
    with pytest.raises(MethodError, match="share is 2; expected a number of at least 0"):
        SlotFilling(share=2)
