"""AUROC and point-biserial correlation: by hand, against scipy, and what must hold of any."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerrec.autoencoder import SparseAutoencoder
from steerrec.separation import auroc, aurocs, point_biserial

from .small_models import random_sae

groups = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12).map(np.array)


def test_auroc_by_hand():
    # pairs (a, b): 3 > 1, 3 > 2, 2 > 1, and 2 = 2 counts half
    area, _ = auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    assert area == 3.5 / 4


def test_standard_error_by_hand():
    # placements of A: (1, .75); of B among A: (0, .25) -> variances .03125 each, over 2 users
    _, error = auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    assert error == pytest.approx((0.03125 / 2 + 0.03125 / 2) ** 0.5)


@given(groups, groups)
def test_auroc_is_the_mann_whitney_statistic(a, b):
    expected = scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
    assert auroc(a.copy(), b.copy())[0] == pytest.approx(expected)


@given(groups, groups)
def test_the_groups_exchanged_give_the_complement(a, b):
    area, error = auroc(a.copy(), b.copy())
    other, same = auroc(b.copy(), a.copy())
    assert area == pytest.approx(1 - other)
    assert error == pytest.approx(same)


def test_the_standard_error_is_the_spread_over_samples():
    rng = np.random.default_rng(0)
    drawn = [auroc(rng.normal(0.5, 1, 200), rng.normal(0, 2, 150)) for _ in range(400)]
    areas, errors = np.array(drawn).T
    assert errors.mean() == pytest.approx(areas.std(), rel=0.1)


@pytest.mark.parametrize("chunk", [5, 64])
def test_every_latent_by_its_pre_activations(chunk):
    sae = random_sae()
    a, b = torch.randn(30, 8) + 0.3, torch.randn(40, 8)
    areas, errors = aurocs(sae, a, b, chunk=chunk, within=0)
    for j in range(sae.d_sae):
        sides = [sae.pre_acts(x)[:, j].numpy().copy() for x in (a, b)]
        assert (areas[j], errors[j]) == pytest.approx(auroc(*sides))


def reading_sae(d_sae):
    """Every latent is one coordinate of the vector."""
    sae = SparseAutoencoder(d_sae, d_sae, 1).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(d_sae))
    return sae


@pytest.mark.parametrize("n_a", [700, 3])
def test_counted_in_bins_the_area_is_as_near_as_it_says(n_a):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n_a, 6, generator=generator) * torch.tensor([1, 1, 1e-5, 1e5, 3, 1])
    b = torch.randn(900, 6, generator=generator) * torch.tensor([1, 2, 1e-5, 1e5, 3, 1])
    a += torch.tensor([0, 0.5, 1e-5, 0, 0.2, 20])
    near, error = aurocs(reading_sae(6), a, b, within=0.01)
    exact, exact_error = aurocs(reading_sae(6), a, b, within=0)
    assert not torch.equal(near, exact)
    assert (near - exact).abs().max() < 0.001  # far nearer than what must hold
    torch.testing.assert_close(error, exact_error, rtol=0.01, atol=0)
    assert (near[5], error[5]) == (1, 0)  # no overlap


def test_pairs_in_one_bin_count_half():
    # the range from 0 to 4,094 is cut into bins of width 2
    a = torch.tensor([0.0, 1.5, 4094.0, 10.0])
    b = torch.tensor([0.5, 1.0, 9.5, 10.5])
    near, error = aurocs(reading_sae(1), a[:, None], b[:, None], within=0.157)
    in_bins = [(x // 2).numpy() for x in (a, b)]
    assert (float(near), float(error)) == pytest.approx(auroc(*in_bins))
    assert float(near) == (1 + 1 + 4 + 3.5) / 16
    # five pairs share a bin, so that the area may be 2.5 / 16 = 0.15625 off
    exact, _ = aurocs(reading_sae(1), a[:, None], b[:, None], within=0.156)
    assert float(exact) == (0 + 2 + 4 + 3) / 16


@pytest.mark.parametrize("within", [0.002, 0.5])
def test_latents_that_bins_say_too_little_of_are_sorted(within):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 4, generator=generator), torch.randn(200, 4, generator=generator)
    a[:, 0] += 0.3
    a[0, 0] = 1e6  # all others are in one bin
    a[:, 1] = b[:, 1] = 2.5  # nothing to cut into bins
    a[3, 2], b[3, 2] = 3e38, -3e38  # a range that no float holds
    a[:, 3], b[:, 3] = torch.arange(300) % 3, torch.arange(200) % 3  # ties, and nothing else
    exact = aurocs(reading_sae(4), a, b, within=0)
    near = aurocs(reading_sae(4), a, b, within=within)
    sorted_at = [0, 1, 2, 3] if within < 0.01 else [1, 2, 3]
    for one, other in zip(near, exact, strict=True):
        assert torch.equal(one[sorted_at], other[sorted_at])
    assert (float(near[0][1]), float(near[1][1])) == (0.5, 0.0)
    assert (near[0] - exact[0]).abs().max() <= within


def test_many_users_do_not_overflow():
    a, b = torch.randn(80_000, 1) + 0.2, torch.randn(80_000, 1)
    found = [float(x) for x in aurocs(reading_sae(1), a, b)]
    assert found == pytest.approx(auroc(a[:, 0].numpy(), b[:, 0].numpy()), rel=1e-3)


def test_point_biserial_is_pearsons_with_its_interval():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.4, 1, 60), rng.normal(0, 2, 90)
    moments = [
        torch.tensor([x], dtype=torch.float64) for x in (a.mean(), b.mean(), a.var(), b.var())
    ]
    found = [float(x) for x in point_biserial(*moments, 60, 90)]
    expected = scipy.stats.pearsonr(np.r_[a, b], np.r_[np.ones(60), np.zeros(90)])
    interval = expected.confidence_interval(0.95)
    assert found == pytest.approx([expected.statistic, interval.low, interval.high])


def test_point_biserial_without_variance_and_without_overlap():
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    assert float(point_biserial(one, one, zero, zero, 10, 10)[0]) == 0.0
    r, low, high = (float(x) for x in point_biserial(one, zero, zero, zero, 10, 10))
    assert r == 1.0
    assert -1 <= low <= high <= 1


def test_the_merge_gives_what_searching_gives(monkeypatch):
    rng = np.random.default_rng(0)
    for n_a, n_b in ((50, 30), (1, 7), (7, 1)):
        a, b = (rng.integers(0, 12, n).astype(np.float32) for n in (n_a, n_b))  # many ties
        merged = auroc(a.copy(), b.copy())
        with monkeypatch.context() as patch:
            patch.setattr("steerrec.separation.kernels", lambda: None)
            assert auroc(a.copy(), b.copy()) == merged
