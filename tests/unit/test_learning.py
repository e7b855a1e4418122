"""Learned steering: its guard, its seed, its parts by hand, and that it does what it is for."""

import math

import numpy as np
import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.errors import ArtifactError, TrainingError
from steerrec.evaluation import capture_held_out, evaluate, measure, rank
from steerrec.explaining import neuron_effects, strongest_alone
from steerrec.learning import SteeringTraining, latest_states, learn_steering, temperature
from steerrec.objectives import Objective, group_shares, more_tail
from steerrec.steering import SteerTransform

from .learning_cases import QUICK, WIDTH, popular_model, small_sae, tasteful_split


@pytest.fixture(scope="module")
def rec():
    return popular_model()


@pytest.fixture(scope="module")
def split():
    return tasteful_split()


@pytest.fixture(scope="module")
def sae():
    return small_sae()


@pytest.fixture(scope="module")
def learned(rec, sae, split):
    return learn_steering(rec, sae, split, budget=0.2, k=5, training=QUICK)


def measured(rec, sae, split, steering, **options):
    transform = None if steering is None else SteerTransform(sae, steering)
    return evaluate(rec, split, which="valid", k=5, transform=transform, **options).metrics


# --- what it is for


def test_exposure_is_more_even_within_the_budget(rec, sae, split, learned):
    before = measured(rec, sae, split, None)
    after = measured(rec, sae, split, learned)
    assert learned.alpha > 0
    assert after["gini@5"] < before["gini@5"] - 0.02
    assert after["ndcg@5"] >= 0.8 * before["ndcg@5"]
    assert after["ndcg_tail@5"] >= before["ndcg_tail@5"]
    found = learned.provenance["valid"]
    assert found["gini"] == pytest.approx(after["gini@5"])
    assert found["ndcg"] == pytest.approx(after["ndcg@5"], abs=1e-6)


@pytest.mark.parametrize("objective", ["popularity", "tail_share", "ltc"])
def test_other_objectives(rec, sae, split, objective):
    steering = learn_steering(rec, sae, split, objective=objective, budget=0.2, k=5, training=QUICK)
    before, after = (measured(rec, sae, split, recipe) for recipe in (None, steering))
    signs = {"popularity": ("arp@5", 1), "tail_share": ("tail_share@5", -1), "ltc": ("ltc@5", -1)}
    key, sign = signs[objective]
    assert sign * after[key] < sign * before[key]
    assert steering.name == f"learned-{objective}"


def test_exposure_of_groups_comes_nearer_to_the_shares_that_are_wanted(rec, sae, split):
    labels = torch.arange(rec.catalogue.counts.size) % 3
    objective = group_shares(labels, torch.tensor([0.6, 0.2, 0.2]))
    steering = learn_steering(rec, sae, split, objective=objective, budget=0.3, k=5, training=QUICK)
    users = capture_held_out(rec, split, "valid")
    before, after = (
        objective.value(
            torch.bincount(rank(rec, users, k=5, transform=t).ids.flatten(), minlength=60)
        )
        for t in (None, SteerTransform(sae, steering))
    )
    assert steering.alpha > 0
    assert after < before - 0.01
    assert steering.provenance["objective"] == "group_shares"


# --- the guard


def test_a_budget_of_0_is_the_identity(rec, sae, split):
    steering = learn_steering(rec, sae, split, budget=0.0, k=5, training=QUICK)
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(3))
    assert torch.equal(SteerTransform(sae, steering)(x), x)
    assert torch.equal(SteerTransform(sae, steering)(x, 1.0), x)  # nothing was learned at all


def test_tail_targets_are_guarded_apart_from_the_budget(rec, sae, split):
    """What takes tail items out of the lists gains accuracy here, and yet is not admitted."""
    groups = torch.from_numpy(rec.catalogue.groups.labels.copy())
    more = more_tail(groups)
    less = Objective("less_tail", lambda e: -more.prices(e), lambda e: -more.value(e))
    steering = learn_steering(rec, sae, split, objective=less, budget=0.9, k=5, training=QUICK)
    before, after = (measured(rec, sae, split, recipe) for recipe in (None, steering))
    assert after["ndcg_tail@5"] >= before["ndcg_tail@5"]


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("mask_seen", [False, True])
def test_the_guard_holds_on_validation(rec, sae, split, budget, mask_seen):
    steering = learn_steering(
        rec, sae, split, budget=budget, k=5, mask_seen=mask_seen, training=QUICK
    )
    before = measured(rec, sae, split, None, mask_seen=mask_seen)
    after = measured(rec, sae, split, steering, mask_seen=mask_seen)
    assert after["ndcg@5"] >= (1 - budget) * before["ndcg@5"] - 1e-9
    assert after["ndcg_tail@5"] >= before["ndcg_tail@5"] - 1e-9
    assert after["gini@5"] <= before["gini@5"]


# --- seeds


def test_same_seed_same_recipe_and_no_trace_on_the_random_stream(rec, sae, split, learned):
    torch.manual_seed(5)
    again = learn_steering(rec, sae, split, budget=0.2, k=5, training=QUICK)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(again.vectors, learned.vectors)
    assert torch.equal(again.constant, learned.constant)
    assert again.alpha == learned.alpha
    other = SteeringTraining(**{**vars(QUICK), "seed": 1, "users": 64})
    assert not torch.equal(
        learn_steering(rec, sae, split, budget=0.2, k=5, training=other).vectors, learned.vectors
    )


def test_model_and_sae_stay_as_they_are(rec, sae, split):
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    head = rec.item_head.weight.clone()
    learn_steering(rec, sae, split, budget=0.2, k=5, training=SteeringTraining(steps=10))
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    assert torch.equal(rec.item_head.weight, head)


# --- sparse


def test_only_so_many_neurons(rec, sae, split, learned):
    few = SteeringTraining(**{**vars(QUICK), "neurons": 5})
    steering = learn_steering(rec, sae, split, budget=0.2, k=5, training=few)
    assert 0 < len(steering.neurons) <= 5 < len(learned.neurons)


def test_l1_takes_neurons_out_entirely(rec, sae, split, learned):
    pulled = SteeringTraining(**{**vars(QUICK), "l1": 0.6})
    steering = learn_steering(rec, sae, split, budget=0.2, k=5, training=pulled)
    assert len(steering.neurons) < len(learned.neurons)
    stuck = SteeringTraining(**{**vars(QUICK), "l1": 2.0})  # harder than anything can grow
    assert len(learn_steering(rec, sae, split, budget=0.2, k=5, training=stuck).neurons) == 0


# --- what it does if only some neurons are used


def test_the_strongest_alone_are_the_recipe_without_the_others(rec, sae, split, learned):
    users = capture_held_out(rec, split, "test")
    found = strongest_alone(learned, sae, rec, users, counts=(0, 3, 99), k=5)
    effects = neuron_effects(learned, sae, rec.item_head, users.vectors, neurons=32, items=2)
    assert [part.neurons for part in found] == [0, 3, len(effects)]
    first = torch.tensor([effect.neuron for effect in effects[:3]])
    alone = SteerTransform(sae, learned.only(first))
    want = measure(rec, users, k=5, transform=alone).metrics
    assert found[1].metrics == pytest.approx(want, nan_ok=True)
    assert found[1].share == pytest.approx(sum(effect.share for effect in effects[:3]))
    whole = measure(rec, users, k=5, transform=SteerTransform(sae, learned)).metrics
    assert found[2].metrics == pytest.approx(whole, nan_ok=True)
    assert found[2].share == pytest.approx(1.0)

    def constant_alone(x):
        return x + learned.alpha * learned.constant

    none = measure(rec, users, k=5, transform=constant_alone).metrics
    assert found[0].metrics == pytest.approx(none, nan_ok=True)
    assert found[0].share == 0.0


def test_a_neuron_raises_the_items_that_it_is_said_to_raise(rec, sae, split, learned):
    """In users in whom it is active, against the same recipe without it."""
    users = capture_held_out(rec, split, "test")
    effect = neuron_effects(learned, sae, rec.item_head, users.vectors, neurons=1, items=3)[0]
    others = learned.neurons[learned.neurons != effect.neuron]
    with torch.no_grad():
        whole, rest = (
            recipe.transform(sae)(users.vectors) for recipe in (learned, learned.only(others))
        )
        change = rec.item_head.scores(whole) - rec.item_head.scores(rest)  # [U, N]
        values, indices = sae.encode(users.vectors)
    active = ((indices == effect.neuron) & (values > 0)).any(dim=1)
    assert float(active.double().mean()) == pytest.approx(effect.firing_rate)
    assert bool((change[~active].abs() < 1e-6).all())
    assert set(effect.raises.tolist()) == set(change[active][0].topk(3).indices.tolist())
    assert bool((change[active][:, effect.raises] > 0).all())
    assert bool((change[active][:, effect.lowers] < 0).all())


# --- parts


@pytest.mark.parametrize("perplexity", [2.0, 7.5])
def test_the_temperature_gives_the_perplexity(perplexity):
    scores = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 2, 9
    ).unsqueeze(1)
    heat = temperature(scores, perplexity)
    share = (scores / heat).double().softmax(dim=1)
    found = -(share * share.log()).nan_to_num().sum(dim=1)
    torch.testing.assert_close(
        found, torch.full_like(found, math.log(perplexity)), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(temperature(3 * scores, perplexity), 3 * heat, rtol=1e-3, atol=0)


def test_equal_scores_have_a_finite_temperature():
    assert temperature(torch.zeros(2, 30), 7.5).isfinite().all()


def test_latest_states_by_hand():
    train = Histories.from_lists([[1, 2, 3], [4], [], [5, 6]])
    users, lengths = latest_states(train, 2, 100, np.random.default_rng(0))
    assert users.tolist() == [0, 0, 1, 3, 3]
    assert lengths.tolist() == [3, 2, 1, 2, 1]


def test_fewer_states_are_those_of_fewer_users():
    train = Histories.from_lists([[1, 2, 3]] * 10)
    users, lengths = latest_states(train, 2, 7, np.random.default_rng(0))
    assert len(np.unique(users)) == 3
    assert lengths.tolist() == [3, 2] * 3


# --- what makes no sense


def test_what_makes_no_sense_is_said(rec, sae, split):
    with pytest.raises(TrainingError, match="budget is 1"):
        learn_steering(rec, sae, split, budget=1)
    with pytest.raises(TrainingError, match="99 neurons asked for; this SAE has 32"):
        learn_steering(rec, sae, split, training=SteeringTraining(neurons=99))
    with pytest.raises(ArtifactError, match="reads vectors of width 5, the item head 8"):
        learn_steering(rec, SparseAutoencoder(5, 16, k=2), split)
