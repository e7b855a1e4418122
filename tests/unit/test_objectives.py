"""Objectives: prices and values by hand, and prices as derivatives of what they stand for."""

import math

import pytest
import torch

from steerrec.metrics import gini, ranking_metrics
from steerrec.objectives import (
    OBJECTIVES,
    even_exposure,
    exposure_entropy,
    group_shares,
    mid_ranks,
    named_objective,
    tail_coverage,
    weighted,
)


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


def test_entropy_by_hand():
    objective = exposure_entropy(users=4)
    assert objective.value(torch.tensor([3, 3, 3])) == pytest.approx(0)
    assert objective.value(torch.tensor([5, 0, 0])) == pytest.approx(1)
    half = 1 - math.log(2) / math.log(4)
    assert objective.value(torch.tensor([2, 2, 0, 0])) == pytest.approx(half)
    # half a slot for what has none: 1/8, 1/4 and 1/2 a user
    prices = objective.prices(torch.tensor([0, 0.125, 0.375]))
    torch.testing.assert_close(prices, torch.tensor([-0.5, 0, 0.5]))


def test_entropy_prices_are_its_derivative_where_the_total_is_kept():
    """Up to the half slot and one factor, which the spread of the prices is divided by."""
    exposure = torch.tensor([4.0, 0.5, 9.0, 2.0, 7.0], dtype=torch.float64)
    objective = exposure_entropy(users=10**9)
    prices, step = objective.prices(exposure), 1e-5
    factor = math.log(9.0 / 0.5) / (exposure.sum() * math.log(5))
    for i in range(5):
        for j in range(5):
            moved = exposure.clone()
            moved[i] += step
            moved[j] -= step
            slope = (objective.value(moved) - objective.value(exposure)) / step
            want = float(factor * (prices[i] - prices[j]))
            assert slope == pytest.approx(want, abs=1e-5)


def test_tail_coverage_by_hand():
    groups = torch.tensor([0, 2, 1, 2, 2])
    objective = tail_coverage(groups, users=10, slots=2.0)
    # no slot, and one for five users, two of the ten, which the price has to fall by e for
    prices = objective.prices(torch.tensor([0.0, 0.0, 1.0, 0.2, 50.0]))
    want = torch.tensor([0.5, -0.5, 0.5, 0.5 - math.exp(-1), 0.5])
    torch.testing.assert_close(prices, want)
    lists = torch.tensor([[1, 0], [2, 3]])
    exposure = torch.bincount(lists.flatten(), minlength=5)
    found = ranking_metrics(lists, counts=torch.ones(5, dtype=torch.int64), groups=groups)
    assert objective.value(exposure) == pytest.approx(-found["ltc@2"]) == pytest.approx(-2 / 3)
    nothing = tail_coverage(torch.zeros(2, dtype=torch.int64), users=3)
    assert nothing.value(torch.ones(2)) == 0.0


def test_a_sum_of_objectives_by_hand():
    groups = torch.tensor([0, 2])
    parts = [(1.0, tail_coverage(groups, users=2)), (0.5, exposure_entropy(2))]
    both, exposure = weighted("both", parts), torch.tensor([3.0, 0.0])
    want = parts[0][1].prices(exposure) + 0.5 * parts[1][1].prices(exposure)
    torch.testing.assert_close(both.prices(exposure).float(), want)
    assert both.value(exposure) == parts[0][1].value(exposure) + 0.5 * parts[1][1].value(exposure)
    for wrong in ([], [(0.0, parts[0][1])]):
        with pytest.raises(ValueError, match="positive weights"):
            weighted("nothing", wrong)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_whatever_is_over_exposed_costs_no_less(name):
    """Prices do not fall with popularity, and are finite where nothing is shown at all."""
    counts, groups = torch.tensor([9, 5, 2, 1]), torch.tensor([0, 1, 2, 2])
    objective = named_objective(name, counts, groups, users=5)
    assert objective.name == name
    prices = objective.prices(torch.tensor([1.0, 0.6, 0.2, 0.0]))
    assert bool((prices.diff() <= 1e-6).all())
    assert bool((prices[0] > prices[-1]).all())
    assert bool(objective.prices(torch.zeros(4)).isfinite().all())


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
