"""AUROC and point-biserial correlation: by hand, against scipy, and what must hold of any."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    areas, errors = aurocs(sae, a, b, chunk=chunk)
    for j in range(sae.d_sae):
        sides = [sae.pre_acts(x)[:, j].numpy().copy() for x in (a, b)]
        assert (areas[j], errors[j]) == pytest.approx(auroc(*sides))


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
