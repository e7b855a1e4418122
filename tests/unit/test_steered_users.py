"""Users before and after: lists as `recommend` makes them, changes that sum to the whole."""

import numpy as np
import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.evaluation import CapturedUsers, capture_users, recommend
from steerrec.operations import LatentSteering
from steerrec.recommender import ItemHead
from steerrec.steered_users import describe_users, part_of_neurons
from steerrec.steering import Steering, SteerTransform

from .tiny import random_histories, random_recommender

ITEMS, LATENTS = 40, 16


@pytest.fixture(scope="module")
def world():
    rec = random_recommender(ITEMS, 5)
    sae = SparseAutoencoder(5, LATENTS, 4).requires_grad_(False)
    shift = torch.randn(LATENTS, generator=torch.Generator().manual_seed(2))
    histories = random_histories(60, ITEMS, shortest=2)
    return rec, sae, Steering(shift, alpha=0.7), histories


@pytest.fixture(scope="module")
def users(world):
    rec, _, _, histories = world
    captured = capture_users(rec, histories)
    return CapturedUsers(captured.vectors, histories, torch.arange(60) % ITEMS, "test")


def test_lists_are_those_of_recommend(world, users):
    rec, sae, steering, histories = world
    before = recommend(rec, histories, k=5)
    after = recommend(rec, histories, k=5, transform=SteerTransform(sae, steering))
    for user in describe_users(rec, sae, steering, users, count=7, k=5):
        place = int(user.user_id)
        listed = {entry.item.row: (entry.before, entry.after) for entry in user.items}
        for lists, at in ((before, 0), (after, 1)):
            ranked = sorted((places[at], row) for row, places in listed.items() if places[at])
            assert [row for _, row in ranked] == lists.ids[place].tolist()
        assert user.length == len(histories[place])
        assert [item.row for item in user.latest] == histories[place][-6:].tolist()
        held_out = [entry.item.row for entry in user.items if entry.held_out]
        assert held_out in ([], [place % ITEMS])


def test_parts_of_neurons_sum_to_the_change_of_the_score(world, users):
    rec, sae, steering, _ = world
    x = users.vectors[:1]
    after = SteerTransform(sae, steering)(x)
    pre_acts = sae.pre_acts(x)
    moved = sae.activate(pre_acts + 0.7 * steering.shift).dense(LATENTS)
    change = (moved - sae.activate(pre_acts).dense(LATENTS))[0]
    head = ItemHead(rec.item_head.weight, torch.randn(ITEMS), scale=3.0)
    parts = part_of_neurons(head, sae, change, after[0])
    torch.testing.assert_close(parts.sum(dim=0), (head.scores(after) - head.scores(x))[0])
    assert len(parts) == int((change != 0).sum())


def test_score_changes_are_those_of_the_head(world, users):
    rec, sae, steering, _ = world
    after = SteerTransform(sae, steering)(users.vectors)
    change = rec.item_head.scores(after) - rec.item_head.scores(users.vectors)
    for user in describe_users(rec, sae, steering, users, count=4, k=5):
        for entry in user.items:
            expected = float(change[int(user.user_id), entry.item.row])
            assert entry.score_change == pytest.approx(expected, abs=1e-5)


def test_what_rises_was_pushed_up_and_what_leaves_was_pushed_down(world, users):
    rec, sae, steering, _ = world
    for user in describe_users(rec, sae, steering, users, count=12, k=5):
        for entry in user.items:
            up = entry.before is None or (entry.after is not None and entry.after < entry.before)
            assert all((mover.moved > 0) == up for mover in entry.moved_by)


def test_users_go_from_popular_to_rare_taste_and_are_all_different(world, users):
    rec, sae, steering, histories = world
    shown = describe_users(rec, sae, steering, users, count=12, k=5)
    assert len({user.user_id for user in shown}) == 12
    taste = [np.log1p(rec.catalogue.counts[histories[int(user.user_id)]]).mean() for user in shown]
    assert taste == sorted(taste, reverse=True)
    assert [user.taste for user in shown] == sorted((u.taste for u in shown), reverse=True)


def test_of_few_users_all_are_shown(world):
    rec, sae, steering, histories = world
    few = capture_users(rec, histories.select([3, 4]))
    assert len(describe_users(rec, sae, steering, few, count=12, k=5)) == 2


def test_no_neuron_is_named_for_a_recipe_that_adds_other_vectors(world, users):
    rec, sae, _, _ = world
    recipe = LatentSteering.scale(sae, range(8), 3.0)
    for user in describe_users(rec, sae, recipe, users, count=3, k=5):
        assert not any(entry.moved_by for entry in user.items)
