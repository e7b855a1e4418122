"""Bootstrap: the metrics' own definitions on the drawn users, intervals that cover, pairs."""

import numpy as np
import pytest
import torch

from steerrec.metrics import ranking_metrics
from steerrec.significance import Replicates, bootstrap

USERS, ITEMS, K = 40, 15, 4
GROUPS = torch.arange(ITEMS, dtype=torch.int8) % 3


def lists(seed):
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(USERS, ITEMS, generator=generator).argsort(dim=1)[:, :K]
    found[0, 2:] = -1  # empty slots
    return found


def ndcg(seed):
    return torch.rand(USERS, generator=torch.Generator().manual_seed(seed))


def test_replicates_are_the_metrics_of_the_drawn_users():
    found = bootstrap(lists(0), ndcg(1), GROUPS, replicates=5, seed=3)
    rng = np.random.default_rng(3)
    for r in range(5):
        drawn = rng.integers(USERS, size=USERS)
        expected = ranking_metrics(lists(0)[drawn], None, counts=torch.ones(ITEMS), groups=GROUPS)
        assert found.values["ltc"][r] == pytest.approx(expected[f"ltc@{K}"])
        assert found.values["gini"][r] == pytest.approx(expected[f"gini@{K}"])
        assert found.values["ndcg"][r] == pytest.approx(float(ndcg(1)[drawn].double().mean()))


def test_the_same_seed_draws_the_same_users():
    one, same = (bootstrap(lists(0), ndcg(1), GROUPS, replicates=3, seed=7) for _ in range(2))
    other = bootstrap(lists(0), ndcg(1), GROUPS, replicates=3, seed=8)
    assert np.array_equal(one.values["ndcg"], same.values["ndcg"])
    assert not np.array_equal(one.values["ndcg"], other.values["ndcg"])


def test_an_interval_lies_around_what_was_measured():
    values = {"ndcg": np.arange(1001) / 1000, "gini": np.arange(1001) / 1000 + 5}
    found = Replicates(values).interval({"ndcg": 0.5, "gini": 0.1})
    assert found["ndcg"] == pytest.approx((0.025, 0.975))
    assert found["gini"] == pytest.approx((0.1 - 0.475, 0.1 + 0.475))  # their own mean taken off


def test_intervals_of_the_mean_cover_it_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = torch.from_numpy(rng.random(100))
        found = bootstrap(
            torch.zeros(100, 1, dtype=torch.int64), sample, GROUPS, replicates=200, seed=trial
        )
        low, high = found.interval({"ndcg": float(sample.mean()), "ltc": 0.0, "gini": 0.0})["ndcg"]
        covered += low <= 0.5 <= high
    assert 178 <= covered <= 199  # 190 expected


def test_pairs():
    base = np.linspace(0, 1, 99)
    better = Replicates({"ndcg": base + 0.1}).against(Replicates({"ndcg": base}))["ndcg"]
    assert better["difference"] == pytest.approx(0.1)
    assert better["interval"] == pytest.approx((0.1, 0.1))
    assert better["p"] == pytest.approx(2 * 1 / 100)
    same = Replicates({"ndcg": base}).against(Replicates({"ndcg": base}))["ndcg"]
    assert same["difference"] == 0
    assert same["p"] == 1
