"""Sweeps: equal to one evaluation at each strength, and the choice within a budget by hand."""

import json
import math

import pytest
import torch

from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import leave_one_out
from steerrec.evaluation import Evaluation, evaluate
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering
from steerrec.tradeoff import DEFAULT_ALPHAS, Sweep, SweepPoint, sweep

from .tiny import random_histories, random_recommender

ALPHAS = (0.5, 2.0)
SCORED = Site("mean", layout="BH")  # the recommender's own site
INSIDE = Site("item_embedding", positions="real", positions_from=TokenIds("item_embedding"))


@pytest.fixture
def rec():
    return random_recommender(items=30, width=4)


@pytest.fixture
def split():
    return leave_one_out(random_histories(50, 30, shortest=3), num_items=30)


@pytest.fixture
def sae():
    return SparseAutoencoder(4, 12, k=3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def steering():
    shift = torch.randn(12, generator=torch.Generator().manual_seed(2))
    return Steering(shift, name="random", provenance={"rule": "none"})


# --- sweep


@pytest.mark.parametrize("site", [None, SCORED, INSIDE])
@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
def test_a_sweep_is_an_evaluation_at_each_strength(
    rec, split, sae, steering, site, mask_seen, splice
):
    steering = Steering(steering.shift, splice=splice)
    options = {"k": 5, "mask_seen": mask_seen}
    found = sweep(rec, sae, steering, split, site=site, alphas=ALPHAS, **options)
    assert [point.alpha for point in found.points] == [0.0, *ALPHAS]
    for point in found.points:
        for which, got in (("valid", point.valid), ("test", point.test)):
            if point.alpha == 0:
                expected = evaluate(rec, split, which=which, **options)
            else:
                with attach(rec, sae, site=site, steering=steering.with_alpha(point.alpha)):
                    expected = evaluate(rec, split, which=which, **options)
            assert got.protocol == expected.protocol
            assert got.metrics == pytest.approx(expected.metrics, nan_ok=True)
            torch.testing.assert_close(got.user_ndcg, expected.user_ndcg)
    ndcg = [point.test.user_ndcg for point in found.points]
    assert not torch.equal(ndcg[0], ndcg[1])
    assert not torch.equal(ndcg[1], ndcg[2])


def test_strength_zero_is_measured_first_and_once(rec, split, sae, steering):
    found = sweep(rec, sae, steering, split, alphas=(1.0, 0.0, 0.5), k=5)
    assert [point.alpha for point in found.points] == [0.0, 1.0, 0.5]


def test_strength_zero_is_the_unsteered_model_even_without_the_residual(rec, split, sae, steering):
    steering = Steering(steering.shift, splice="reconstruct")
    found = sweep(rec, sae, steering, split, alphas=(), k=5)
    (point,) = found.points
    assert point.test == evaluate(rec, split, k=5)


def test_at_the_scored_vector_the_model_runs_once_for_all_strengths(rec, split, sae, steering):
    sweep(rec, sae, steering, split, alphas=(), k=5)
    alone, rec.forwards = rec.forwards, 0
    sweep(rec, sae, steering, split, alphas=ALPHAS, k=5)
    assert rec.forwards == alone > 0


def test_anywhere_else_it_runs_for_each_and_is_left_without_hooks(rec, split, sae, steering):
    sweep(rec, sae, steering, split, site=INSIDE, alphas=(), k=5)
    alone, rec.forwards = rec.forwards, 0
    sweep(rec, sae, steering, split, site=INSIDE, alphas=ALPHAS, k=5)
    probes = 2 * len(ALPHAS)  # each attaching, on either split, scores one short history
    assert rec.forwards == alone * (1 + len(ALPHAS)) + probes
    for module in rec.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_ten_strengths_by_default(rec, split, sae, steering):
    found = sweep(rec, sae, steering, split)
    assert [point.alpha for point in found.points] == [0.0, *DEFAULT_ALPHAS]
    assert len(DEFAULT_ALPHAS) == 10
    assert found.points[0].test.protocol["k"] == 10


# --- within


def evaluation(ndcg, tail=0.1, gini=0.5):
    metrics = {"ndcg@5": ndcg, "ndcg_tail@5": tail, "gini@5": gini, "hr@5": 0.0}
    return Evaluation({"k": 5}, metrics, torch.empty(0))


def made(*valid):
    """A sweep of these validation results at strengths 0, 1, 2, …; on test all are perfect."""
    perfect = evaluation(1.0, tail=1.0, gini=0.0)
    points = (SweepPoint(float(alpha), found, perfect) for alpha, found in enumerate(valid))
    return Sweep(tuple(points), {"name": "by hand"})


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (0.0, 1.0),  # costs nothing, and Gini is lower than without
        (0.04, 1.0),
        (0.06, 2.0),
        (0.12, 4.0),  # 3 costs less, but its Gini is higher; 5 costs too much
        (0.50, 5.0),
    ],
)
def test_the_lowest_gini_within_the_budget(budget, chosen):
    found = made(
        evaluation(0.40, gini=0.60),
        evaluation(0.40, gini=0.55),
        evaluation(0.38, gini=0.50),
        evaluation(0.37, gini=0.52),
        evaluation(0.36, gini=0.45),
        evaluation(0.30, gini=0.40),
    )
    assert found.within(budget).alpha == chosen


def test_what_costs_the_tail_accuracy_is_not_admissible():
    """However low its Gini: the exposure has to reach the users who want the tail."""
    found = made(
        evaluation(0.4, tail=0.10, gini=0.6),
        evaluation(0.4, tail=0.09, gini=0.1),
        evaluation(0.4, tail=0.10, gini=0.5),
        evaluation(0.4, tail=0.11, gini=0.55),
    )
    assert found.within(0.05).alpha == 2.0


def test_without_targets_in_the_tail_that_condition_is_void():
    found = made(evaluation(0.4, tail=math.nan, gini=0.6), evaluation(0.4, tail=math.nan, gini=0.5))
    assert found.within(0.05).alpha == 1.0


def test_unsteered_where_nothing_else_is_admissible_or_better():
    found = made(evaluation(0.4, gini=0.6), evaluation(0.2, gini=0.1), evaluation(0.4, gini=0.6))
    assert found.within(0.05) is found.points[0]


# --- to_dict


def test_a_sweep_as_json(rec, split, sae, steering):
    found = sweep(rec, sae, steering, split, alphas=ALPHAS, k=5)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    told = {"name": "random", "operation": "shift", "splice": "delta", "rule": "none"}
    assert document["steering"] == told
    assert document["points"] == [
        {"alpha": point.alpha, "valid": point.valid.to_dict(), "test": point.test.to_dict()}
        for point in found.points
    ]
    assert document["chosen_on_validation"] == {
        "1%": found.within(0.01).alpha,
        "5%": found.within(0.05).alpha,
        "10%": found.within(0.10).alpha,
    }


def test_undefined_metrics_become_null():
    found = made(evaluation(0.4, tail=math.nan))
    assert found.to_dict()["points"][0]["valid"]["metrics"]["ndcg_tail@5"] is None
