"""Evaluation by hand: a recommender that looks at the last item alone, so every list is known."""

import json
import math

import numpy as np
import pytest
import torch

from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import DataWarning, Histories, leave_one_out
from steerrec.errors import DataError
from steerrec.evaluation import (
    capture_held_out,
    capture_users,
    evaluate,
    measure,
    rank,
    rank_steered,
    recommend,
    reconstruction_cost,
    steered,
)
from steerrec.sites import Site
from steerrec.steering import Steering

from .tiny import TinyRecommender, random_histories, random_recommender

COUNTS = [10, 4, 3, 2, 1]  # head {0}, mid {1, 2}, tail {3, 4}
NEXT = torch.tensor(  # score of each item (column) after each item (row)
    [
        [0.0, 4.0, 3.0, 2.0, 1.0],  # after 0: 1 2 3 4 0
        [4.0, 0.0, 1.0, 2.0, 3.0],  # after 1: 0 4 3 2 1
        [4.0, 0.0, 1.0, 3.0, 2.0],  # after 2: 0 3 4 2 1
        [1.0, 4.0, 3.0, 0.0, 2.0],  # after 3: 1 2 4 0 3
        [4.0, 3.0, 2.0, 1.0, 0.0],  # after 4: 0 1 2 3 4
    ]
)
USERS = [[2, 3, 0, 1], [0, 2, 1, 4], [0, 1, 2, 0]]
GAIN_2, GAIN_4 = 1 / math.log2(3), 1 / math.log2(5)


@pytest.fixture
def rec():
    """The user vector is the one-hot last item: a window of one, and an identity embedding."""
    return TinyRecommender(torch.eye(5), NEXT.T.contiguous(), COUNTS, max_length=1)


@pytest.fixture
def split():
    return split_of(USERS)


def split_of(users):
    return leave_one_out(Histories.from_lists(users), num_items=5)


def as_if_after(item):
    """Sends every user vector to the one of `item`."""
    return lambda vectors: torch.eye(5)[item].expand(len(vectors), 5)


# --- evaluate


def test_test_metrics_by_hand(rec, split):
    """Lists 1 2, 0 4 and 0 3 for the targets 1, 4 and 0."""
    found = evaluate(rec, split, k=2)
    assert found.protocol == {
        "split": "test",
        "mask_seen": False,
        "k": 2,
        "users": 3,
        "items": 5,
    }
    assert found.metrics == pytest.approx(
        {
            "ndcg@2": (1 + GAIN_2 + 1) / 3,
            "hr@2": 1.0,
            "ndcg_head@2": 1.0,
            "hr_head@2": 1.0,
            "ndcg_mid@2": 1.0,
            "hr_mid@2": 1.0,
            "ndcg_tail@2": GAIN_2,
            "hr_tail@2": 1.0,
            "ltc@2": 1.0,
            "gini@2": 2 * (1 + 2 + 3 + 4 + 5 * 2) / (5 * 6) - 6 / 5,  # item 0 twice, others once
            "coverage@2": 1.0,
            "arp@2": (2 * 10 + 4 + 3 + 2 + 1) / 20 / 6,
            "tail_share@2": 2 / 6,
        }
    )
    assert found.user_ndcg.tolist() == pytest.approx([1, GAIN_2, 1])


def test_validation_metrics_by_hand(rec, split):
    """After 3, 2 and 1 come 1 2 4 0, 0 3 4 2 and 0 4 3 2; the targets are 0, 1 and 2."""
    found = evaluate(rec, split, which="valid", k=4)
    assert found.protocol["split"] == "valid"
    assert found.user_ndcg.tolist() == pytest.approx([GAIN_4, 0, GAIN_4])
    assert found.metrics["hr@4"] == pytest.approx(2 / 3)


def test_seen_items_are_masked_a_repeated_target_included(rec, split):
    """Lists 1 4, 4 3 and 3 4; the last user's target, 0, is in its own history."""
    found = evaluate(rec, split, k=2, mask_seen=True)
    assert found.protocol["mask_seen"] is True
    assert found.protocol["unreachable"] == pytest.approx(1 / 3)
    assert found.user_ndcg.tolist() == [1, 1, 0]
    assert found.metrics["coverage@2"] == 3 / 5
    assert found.metrics["tail_share@2"] == 5 / 6


def test_unreachable_counts_users_not_repetitions(rec):
    split = split_of([[0, 0, 0, 0], [1, 0, 2, 3]])
    found = evaluate(rec, split, k=1, mask_seen=True)
    assert found.protocol["unreachable"] == 0.5


def test_masking_may_leave_slots_empty(rec):
    split = split_of([[0, 1, 2, 3, 4, 4]])
    found = evaluate(rec, split, k=3, mask_seen=True)
    assert found.metrics["hr@3"] == 0.0
    assert math.isnan(found.metrics["gini@3"])


def test_short_users_are_left_out_with_a_warning(rec, split):
    with pytest.warns(DataWarning, match="1 of 4 users"):
        with_short = split_of([*USERS, [1, 0]])
    assert evaluate(rec, with_short, k=2) == evaluate(rec, split, k=2)


def test_a_transform_is_applied_to_the_vectors(rec, split):
    """As if all were after 1, every list is 0 4: the targets are 1, 4 and 0."""
    found = evaluate(rec, split, k=2, transform=as_if_after(1))
    assert found.user_ndcg.tolist() == pytest.approx([0, GAIN_2, 1])
    assert found.metrics["coverage@2"] == 2 / 5


def test_vectors_captured_once_are_ranked_often(rec, split):
    held_out = capture_held_out(rec, split, "test")
    rec.forwards = 0
    vectors = held_out.vectors.clone()
    for transform in (None, as_if_after(1)):
        measured = measure(rec, held_out, k=2, mask_seen=True, transform=transform)
        assert rec.forwards == 0
        assert measured == evaluate(rec, split, k=2, mask_seen=True, transform=transform)
        rec.forwards = 0
    assert torch.equal(held_out.vectors, vectors)


def test_a_live_attachment_takes_part_until_it_is_removed(rec, split):
    sae = SparseAutoencoder(5, 5, 1).requires_grad_(False)
    sae.W_dec.zero_()
    sae.b_dec.copy_(torch.eye(5)[1])  # whatever goes in, the vector after item 1 comes out
    base = evaluate(rec, split, k=2)
    with attach(rec, sae) as attachment:
        assert evaluate(rec, split, k=2) == base  # it observes only
        attachment.steering = Steering(torch.zeros(5), splice="reconstruct")
        through = evaluate(rec, split, k=2)
        assert through == evaluate(rec, split, k=2, transform=as_if_after(1))
        assert through != base
    assert evaluate(rec, split, k=2) == base


@pytest.mark.parametrize(
    ("site", "runs_again"),
    [
        (None, False),
        (Site("mean", layout="BH"), False),  # the scored vector: what was captured is steered
        (Site("item_embedding", positions_from="last"), True),  # equal to it in a window of one
    ],
)
def test_steered_lists_are_equal_by_either_way(rec, split, site, runs_again):
    sae = SparseAutoencoder(5, 5, 1).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(5))
    sae.W_dec.copy_(torch.eye(5))
    to_item_1 = Steering(3 * torch.eye(5)[1])  # turned up beyond any other latent
    users = capture_held_out(rec, split, "test")
    rec.forwards = 0
    lists = rank_steered(
        rec, sae, to_item_1, users, lambda: capture_held_out(rec, split, "test"), site=site, k=2
    )
    assert lists.ids.tolist() == [[0, 4]] * 3  # all as if after 1
    assert bool(rec.forwards) is runs_again
    assert rank(rec, users, k=2).ids.tolist() == [[1, 2], [0, 4], [0, 3]]


def test_k_larger_than_the_catalogue_is_refused(rec, split):
    with pytest.raises(DataError, match="k is 6 but the catalogue has 5 items"):
        evaluate(rec, split, k=6)


# --- what it returns


def test_what_is_undefined_becomes_null(rec):
    found = evaluate(rec, split_of([USERS[0]]), k=2)  # one user, whose target is a mid item
    assert math.isnan(found.metrics["ndcg_head@2"])
    values = found.to_dict()
    assert values["metrics"]["ndcg_head@2"] is None
    assert values["metrics"]["ndcg_mid@2"] == 1.0
    assert values["protocol"] == found.protocol
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_at_most_max_users_are_a_seeded_sample_with_their_own_targets():
    rec = random_recommender()
    split = leave_one_out(random_histories(users=60, shortest=3), num_items=20)
    everyone = capture_held_out(rec, split, "test")
    sample, again, other = (
        capture_held_out(rec, split, "test", max_users=20, seed=seed) for seed in (0, 0, 1)
    )
    ids = everyone.histories.user_ids.to_list()
    rows = [ids.index(user) for user in sample.histories.user_ids]
    assert len(rows) == len(set(rows)) == 20
    torch.testing.assert_close(sample.vectors, everyone.vectors[rows])
    assert torch.equal(sample.targets, everyone.targets[rows])
    assert np.array_equal(sample.histories.items, everyone.histories.select(rows).items)
    assert torch.equal(sample.vectors, again.vectors)
    assert sample.histories.user_ids.to_list() != other.histories.user_ids.to_list()
    assert evaluate(rec, split, max_users=20).protocol["users"] == 20
    assert evaluate(rec, split, max_users=10_000).protocol["users"] == len(everyone.targets)


def test_steering_in_chunks_is_steering_at_once():
    vectors = torch.randn(10, 3, requires_grad=True)
    sizes = []

    def transform(part):
        sizes.append(len(part))
        return part * 2

    out = steered(vectors, transform, chunk=4)
    assert sizes == [4, 4, 2]
    assert torch.equal(out, vectors * 2)
    assert not out.requires_grad


# --- lists without targets


def test_recommendations_follow_whole_histories(rec):
    histories = Histories.from_lists(USERS)  # they end in 1, 4 and 0
    lists = recommend(rec, histories, k=2)
    assert lists.ids.tolist() == [[0, 4], [0, 1], [1, 2]]
    assert lists.scores.tolist() == [[4, 3], [4, 3], [4, 3]]
    masked = recommend(rec, histories, k=3, mask_seen=True)
    assert masked.ids.tolist() == [[4, -1, -1], [3, -1, -1], [3, 4, -1]]
    assert recommend(rec, histories, k=2, transform=as_if_after(3)).ids.tolist() == [[1, 2]] * 3


def test_exposure_is_measured_without_targets(rec):
    found = measure(rec, capture_users(rec, Histories.from_lists(USERS)), k=2)
    assert found.protocol == {
        "split": "none",
        "mask_seen": False,
        "k": 2,
        "users": 3,
        "items": 5,
    }
    assert found.metrics["coverage@2"] == 4 / 5
    assert found.metrics["ltc@2"] == 1 / 2
    assert "ndcg@2" not in found.metrics
    assert len(found.user_ndcg) == 0


# --- what the reconstruction costs


def test_a_perfect_sae_costs_nothing(rec, split):
    sae = SparseAutoencoder(5, 5, 5).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(5))
    sae.W_dec.copy_(torch.eye(5))
    cost = reconstruction_cost(rec, sae, split, k=4)
    assert list(cost) == ["valid", "test"]
    for which, found in cost.items():
        assert found["ndcg_kept"] == 1.0
        assert found["reconstruction"] == found["base"]
        assert found["base"] == evaluate(rec, split, which=which, k=4).to_dict()


def test_a_bad_reconstruction_is_measured_in_the_place_of_the_vector(rec, split):
    sae = SparseAutoencoder(5, 5, 1).requires_grad_(False)
    sae.W_dec.zero_()
    sae.b_dec.copy_(torch.eye(5)[4])  # lists 0 1 2 3 for the targets 0, 1, 2 and then 1, 4, 0
    cost = reconstruction_cost(rec, sae, split, k=4)
    by_hand = {
        "valid": (2 / 3 * GAIN_4, (1 + GAIN_2 + 0.5) / 3),
        "test": ((2 + GAIN_2) / 3, (1 + GAIN_2) / 3),
    }
    for which, (own, through) in by_hand.items():
        found = cost[which]
        assert found["base"]["metrics"]["ndcg@4"] == pytest.approx(own)
        assert found["reconstruction"]["metrics"]["ndcg@4"] == pytest.approx(through)
        assert found["ndcg_kept"] == pytest.approx(through / own)
        assert evaluate(rec, split, which=which, k=4).to_dict() == found["base"]  # nothing stays
