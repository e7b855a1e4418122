"""Steps on the user vector: their shifts worked out again, their lists by plain ranking."""

import math

import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories, leave_one_out
from steerrec.errors import MethodError
from steerrec.evaluation import capture_held_out, rank
from steerrec.profiles import popularity_contrast, synthetic_users
from steerrec.ranking import top_k
from steerrec.recommender import user_vectors
from steerrec.rerank import (
    MeanDifference,
    PopSteer,
    RawPopSteer,
    gather_candidates,
    score_dimensions,
)
from steerrec.steering import Steering, SteerTransform

from .tiny import random_histories, random_recommender

USERS = 200


@pytest.fixture(scope="module")
def rec():
    return random_recommender(items=30, width=4)


@pytest.fixture(scope="module")
def split():
    return leave_one_out(random_histories(50, 30, shortest=3), num_items=30)


@pytest.fixture(scope="module")
def held_out(rec, split):
    return capture_held_out(rec, split, "test")


@pytest.fixture(scope="module")
def candidates(rec, held_out):
    return gather_candidates(
        held_out.vectors, rec.item_head, held_out.histories, rec.catalogue, k=5
    )


@pytest.fixture(scope="module")
def dimensions(rec, split):
    return score_dimensions(rec, popularity_contrast(rec.catalogue), split.train, users=USERS)


@pytest.fixture(scope="module")
def sides(rec, split):
    """User vectors of the synthetic users of both groups."""
    contrast = popularity_contrast(rec.catalogue)
    return [
        user_vectors(
            rec, synthetic_users(split.train, group, n=USERS, max_length=rec.max_length)
        ).double()
        for group in (contrast.group_a, contrast.group_b)
    ]


def test_the_table_is_that_of_the_vectors_themselves(dimensions, sides):
    popular, unpopular = sides
    assert len(dimensions) == 4
    assert dimensions["mean_a"] == pytest.approx(popular.mean(dim=0).numpy(), abs=1e-6)
    assert dimensions["std_b"] == pytest.approx(
        unpopular.std(dim=0, correction=0).numpy(), abs=1e-6
    )
    assert dimensions["firing_rate_a"] == pytest.approx((popular > 0).double().mean(0).numpy())


def test_mean_difference_leads_from_popular_to_unpopular(dimensions, sides, candidates):
    popular, unpopular = sides
    shift = unpopular.mean(dim=0) - popular.mean(dim=0)
    method = MeanDifference(dimensions, alpha=0.5)
    assert method.shift == pytest.approx(shift.numpy(), abs=1e-6)
    moved = candidates.vectors + 0.5 * shift.float()
    expected = top_k(moved, candidates.head, 5).ids
    assert torch.equal(method.lists(candidates), expected)


def test_raw_popsteer_is_the_rule_on_dimensions(dimensions, sides, candidates):
    popular, unpopular = sides
    a, b = popular.std(dim=0, correction=0), unpopular.std(dim=0, correction=0)
    d = (popular.mean(dim=0) - unpopular.mean(dim=0)) / ((a**2 + b**2) / 2).sqrt()
    weight = (d.abs() - d.abs().min()) / (d.abs().max() - d.abs().min())
    shift = torch.where(d > 0, -weight * a, weight * b)
    method = RawPopSteer(dimensions, alpha=2.0)
    assert method.shift == pytest.approx(shift.numpy(), abs=1e-5)
    expected = top_k(candidates.vectors + 2 * shift.float(), candidates.head, 5).ids
    assert torch.equal(method.lists(candidates), expected)


@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
def test_popsteer_is_the_steered_ranking(rec, held_out, candidates, splice):
    sae = SparseAutoencoder(4, 12, k=3, generator=torch.Generator().manual_seed(1))
    shift = torch.randn(12, generator=torch.Generator().manual_seed(2))
    steering = Steering(shift, splice=splice)
    method = PopSteer(SteerTransform(sae, steering), alpha=1.5)
    transform = SteerTransform(sae, steering.with_alpha(1.5))
    assert torch.equal(method.lists(candidates), rank(rec, held_out, k=5, transform=transform).ids)
    assert torch.equal(method.at(0).lists(candidates), candidates.base)


@pytest.mark.parametrize("kind", [MeanDifference, RawPopSteer])
def test_without_strength_the_base_list(kind, dimensions, candidates):
    assert torch.equal(kind(dimensions, alpha=0).lists(candidates), candidates.base)


def test_very_much_of_a_shift_is_all_that_counts(dimensions, candidates):
    method = MeanDifference(dimensions, alpha=1e9)
    alone = top_k(method.shift[None], candidates.head, 5).ids
    assert (method.lists(candidates) == alone).all()


def test_seen_items_are_left_out(rec, held_out, dimensions):
    masked = gather_candidates(
        held_out.vectors, rec.item_head, held_out.histories, rec.catalogue, k=5, mask_seen=True
    )
    for row, history in zip(
        MeanDifference(dimensions).lists(masked).tolist(), held_out.histories, strict=True
    ):
        assert not set(row) & set(history.tolist())


def test_no_users(rec, dimensions):
    none = gather_candidates(
        torch.empty(0, 4), rec.item_head, Histories.from_lists([]), rec.catalogue, k=5
    )
    assert MeanDifference(dimensions).lists(none).shape == (0, 5)


@pytest.mark.parametrize("alpha", [-1.0, math.nan])
def test_bad_strength(dimensions, alpha):
    with pytest.raises(MethodError, match="alpha is"):
        MeanDifference(dimensions, alpha=alpha)
