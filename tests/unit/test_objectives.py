"""Objectives: prices and values by hand, and prices as derivatives of what they stand for."""

import pytest
import torch

from steerrec.metrics import gini
from steerrec.objectives import even_exposure, group_shares, mid_ranks, named_objective


def smooth_gini(exposure):
    """The Gini index of real numbers, by mean absolute differences."""
    n = len(exposure)
    differences = (exposure[:, None] - exposure[None, :]).abs().sum()
    return float(differences / (2 * n * exposure.sum()))


def test_mid_ranks_by_hand():
    assert mid_ranks(torch.tensor([5.0, 1.0, 1.0, 9.0])).tolist() == [0.625, 0.25, 0.25, 0.875]


def test_gini_prices_are_its_derivative_where_the_total_is_kept():
    exposure = torch.tensor([4.0, 0.5, 9.0, 2.0, 7.0], dtype=torch.float64)
    prices = even_exposure().prices(exposure).double()
    step = 1e-4
    for i in range(5):
        for j in range(5):
            moved = exposure.clone()
            moved[i] += step
            moved[j] -= step
            slope = (smooth_gini(moved) - smooth_gini(exposure)) / step
            want = 2 * (prices[i] - prices[j]) / exposure.sum()
            assert slope == pytest.approx(float(want), abs=1e-6)
    assert even_exposure().value(exposure.long()) == gini(exposure.long())


def test_popularity_and_tail_share_by_hand():
    counts, groups = torch.tensor([7, 0, 3]), torch.tensor([0, 2, 1])
    exposure = torch.tensor([1, 2, 1])
    popularity = named_objective("popularity", counts, groups, users=4)
    assert popularity.value(exposure) == pytest.approx((0.7 + 0.3) / 4)
    # log(1 + count) is 3, 0 and 2 times log 2
    torch.testing.assert_close(
        popularity.prices(exposure), torch.tensor([0.5, -0.5, 1 / 6], dtype=torch.float64)
    )
    tail = named_objective("tail_share", counts, groups, users=4)
    assert tail.value(exposure) == -0.5
    assert tail.prices(exposure).tolist() == [0.5, -0.5, 0.5]


def test_group_shares_by_hand():
    objective = group_shares(torch.tensor([0, 1, 1]), torch.tensor([0.25, 0.75]))
    assert objective.value(torch.tensor([3, 1, 0])) == pytest.approx(0.5)  # .75 against .25
    assert objective.prices(torch.tensor([3.0, 1, 0])).tolist() == [0.5, -0.5, -0.5]
    assert objective.prices(torch.tensor([1.0, 3, 0])).tolist() == [0, 0, 0]  # nothing to do


def test_equal_counts_have_no_price():
    flat = named_objective("popularity", torch.tensor([4, 4]), torch.tensor([0, 2]), users=4)
    assert flat.prices(torch.ones(2)).tolist() == [0, 0]


def test_what_makes_no_sense_is_said():
    with pytest.raises(ValueError, match="no objective 'fame'; expected one of gini, entropy, ltc"):
        named_objective("fame", torch.ones(2), torch.zeros(2), users=4)
    with pytest.raises(ValueError, match="of sum 1"):
        group_shares(torch.tensor([0, 1]), torch.tensor([0.5, 0.4]))
