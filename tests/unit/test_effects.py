"""Effects of decoder rows on scores: by hand, against naive loops, and which way is which."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.effects import grad_attribution, logit_slopes, mean_latents
from steerrec.item_properties import ItemValues, item_values, taste
from steerrec.profiles import Contrast, popularity_contrast, users_by_taste
from steerrec.recommender import ItemHead

from .small_models import random_sae
from .tiny import catalogue, random_recommender

RNG = np.random.default_rng(0)


def random_head(items=30, width=8, **options):
    generator = torch.Generator().manual_seed(2)
    return ItemHead(
        torch.randn(items, width, generator=generator),
        torch.randn(items, generator=generator),
        **options,
    )


HEADS = {
    "dot": random_head(),
    "scaled": random_head(scale=3.0),
    "cosine": random_head(scale=10.0, normalize=True),
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def random_values(items=30, counted=None):
    counted = np.ones(items, dtype=bool) if counted is None else counted
    return ItemValues(np.random.default_rng(3).normal(size=items), counted)


# --- values of items, taste of users


def test_popularity_is_the_log_of_counts_over_all_items():
    items = catalogue([7, 3, 0])
    found = item_values(popularity_contrast(catalogue([7, 3, 1])), items)
    np.testing.assert_allclose(found.values, np.log([8, 4, 1]))
    assert found.counted.tolist() == [True] * 3


def test_another_contrast_is_plus_one_minus_one_and_nothing():
    contrast = Contrast("x", np.array([0, 2]), np.array([1, 2]), "these", "those", {"kind": "x"})
    found = item_values(contrast, catalogue([1, 1, 1, 1]))
    assert found.values.tolist() == [1, -1, 0, 0]  # item 2 is in both
    assert found.counted.tolist() == [True, True, True, False]


def test_taste_by_hand():
    people = Histories.from_lists([[0, 1], [], [2, 2, 1]])
    assert taste(people, np.array([1.0, -1.0, 0.5])).tolist() == [0, 0, 0]
    assert taste(people, np.array([4.0, 2.0, 0.5])).tolist() == [3, 0, 1]


def test_users_with_the_most_and_the_least_of_any_contrast():
    people = Histories.from_lists([[0, 0, 1], [1, 1], [2, 3], [0, 2], [1, 3]])
    contrast = Contrast("x", np.array([0]), np.array([1]), "these", "those", {"kind": "x"})
    most, least = users_by_taste(
        people, catalogue([3, 4, 2, 2]), max_length=2, share=0.2, contrast=contrast
    )
    assert [row.tolist() for row in most] == [[0, 2]]  # 1/2 of group A, and none of B
    assert [row.tolist() for row in least] == [[1, 1]]


# --- direct logit attribution


def test_logit_attribution_by_hand():
    sae = SparseAutoencoder(2, 3, 1).requires_grad_(False)
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]))
    head = ItemHead(torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 8.0]]))
    items = ItemValues(np.array([0.0, 1.0, 2.0]), np.ones(3, dtype=bool))
    correlation, slope = logit_slopes(sae, head, items)
    # row 0 adds 1, 2, 3: exactly with the values; row 1 adds -10, -10, -16; row 2 nothing
    assert correlation.tolist() == pytest.approx([1.0, -3 / 12**0.5, 0.0])
    sigma = (2 / 3) ** 0.5
    assert slope.tolist() == pytest.approx([sigma, -2 / sigma, 0.0])


@heads
@pytest.mark.parametrize("chunk", [7, 1000])
def test_logit_attribution_is_the_correlation_of_what_each_row_adds(head, chunk):
    sae = random_sae()
    items = random_values(counted=RNG.random(30) < 0.7)
    correlation, slope = logit_slopes(sae, head, items, chunk=chunk)
    weight = F.normalize(head.weight, dim=-1) if head.normalize else head.weight
    for j in range(sae.d_sae):
        added = (weight @ sae.W_dec[j]).numpy()[items.counted]
        values = items.values[items.counted]
        assert float(correlation[j]) == pytest.approx(
            scipy.stats.pearsonr(added, values).statistic, abs=1e-5
        )
        expected = head.scale * np.cov(added, values, ddof=0)[0, 1] / values.std()
        assert float(slope[j]) == pytest.approx(expected, abs=1e-5)


def test_items_that_are_all_alike_give_zero():
    items = ItemValues(np.ones(30), np.ones(30, dtype=bool))
    correlation, slope = logit_slopes(random_sae(), HEADS["dot"], items)
    assert not correlation.any()
    assert not slope.any()


@pytest.mark.parametrize("unit", [False, True])
def test_mean_latents_and_firing_rates(unit):
    sae = random_sae()
    x = torch.randn(50, 8)
    mean, rate = mean_latents(sae, x, unit=unit, chunk=7)
    dense = sae.encode(x).dense(sae.d_sae)
    assert rate.tolist() == pytest.approx((dense > 0).double().mean(dim=0).tolist())
    if unit:
        dense = dense / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(mean.float(), dense.mean(dim=0))


# --- gradient x activation


def soft_list(scores, theta, tau):
    return ((scores - theta) / tau).sigmoid()


def objective(head, values, x, tau, total, k):
    """Mean value of the soft lists whose degrees sum to what they summed to: by bisection."""
    scores = head.scores(x)
    low, high = scores.min(dim=1).values - 9, scores.max(dim=1).values + 9
    for _ in range(80):
        middle = (low + high) / 2
        much = soft_list(scores, middle[:, None], tau).sum(dim=1) > total
        low, high = torch.where(much, middle, low), torch.where(much, high, middle)
    return soft_list(scores, low[:, None], tau) @ torch.from_numpy(values) / k


@heads
def test_gradient_times_activation_is_the_derivative_by_the_latents(head):
    """Central differences of the objective, as each active latent is scaled."""
    sae, values, k = random_sae(), RNG.normal(size=30), 4
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    found = grad_attribution(sae, head, values, x, k=k, cells=70)  # two users at a time
    double = ItemHead(head.weight.double(), head.bias.double(), head.scale, head.normalize)
    ranked = double.scores(x.double()).sort(dim=1, descending=True).values
    tau = (ranked[:, 1] - ranked[:, 7]).unsqueeze(1) / 12  # ranks k / 2 and 2 k
    theta = (ranked[:, 3] + ranked[:, 4]).unsqueeze(1) / 2
    total = soft_list(double.scores(x.double()), theta, tau).sum(dim=1)
    latents = sae.encode(x).dense(sae.d_sae).double()
    for j in range(sae.d_sae):
        step = 1e-5 * latents[:, j : j + 1] * sae.W_dec[j].double()
        up, down = (
            objective(double, values, x.double() + s * step, tau, total, k) for s in (1, -1)
        )
        expected = float((up - down).mean() / 2e-5)
        assert float(found[j]) == pytest.approx(expected, abs=1e-4, rel=1e-3)
    assert found.abs().max() > 0.01


def test_it_is_what_a_list_loses_without_a_latent_if_that_is_small():
    """Over many users the hard lists lose what the gradient says."""
    sae, head = random_sae(), HEADS["dot"]
    values = RNG.normal(size=30)
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(5))
    found = grad_attribution(sae, head, values, x, k=4)
    latents, lost = sae.encode(x).dense(sae.d_sae), []
    worth = torch.from_numpy(values)
    before = worth[head.scores(x).topk(4).indices].mean(dim=1)
    for j in range(sae.d_sae):
        moved = x - 0.1 * latents[:, j : j + 1] * sae.W_dec[j]
        lost.append(float((before - worth[head.scores(moved).topk(4).indices].mean(dim=1)).mean()))
    assert np.corrcoef(found.numpy(), lost)[0, 1] > 0.97


def test_a_neuron_that_pushes_valued_items_is_positive():
    """Its row is the direction of the one item of value, and it alone is active."""
    sae = SparseAutoencoder(2, 2, 1).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(2))
    sae.W_dec.copy_(torch.eye(2))
    head = ItemHead(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]))
    found = grad_attribution(sae, head, np.array([1.0, -1.0, 0.0]), torch.tensor([[1.0, 0.2]]), k=1)
    assert found[0] > 0
    assert found[1] == 0  # not active


def test_seen_items_have_no_part_in_the_objective():
    rec, sae = random_recommender(), random_sae(4)
    x = torch.randn(3, 4)
    values = np.zeros(20)
    values[5] = 1.0
    seen = Histories.from_lists([[5], [5, 5], [5]])
    assert grad_attribution(sae, rec.item_head, values, x, k=4).abs().max() > 0
    assert grad_attribution(sae, rec.item_head, values, x, k=4, seen=seen).abs().max() < 1e-9


def test_lists_that_hold_everything_cannot_change():
    rec, sae = random_recommender(), random_sae(4)
    found = grad_attribution(sae, rec.item_head, RNG.normal(size=20), torch.randn(3, 4), k=20)
    assert not found.any()


def test_scores_that_are_all_equal_give_finite_numbers():
    head = ItemHead(torch.zeros(20, 4))
    found = grad_attribution(random_sae(4), head, RNG.normal(size=20), torch.randn(3, 4), k=4)
    assert bool(found.isfinite().all())
