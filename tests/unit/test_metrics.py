"""Metrics: hand-worked lists, a naive implementation and ranx as oracles."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec.metrics import RankingMetrics, gini, ranking_metrics

# Six items; the groups are given, not derived, so that every number can be checked by hand.
COUNTS = torch.tensor([10, 4, 3, 2, 1, 0])  # 20 training interactions
GROUPS = torch.tensor([0, 1, 1, 2, 2, 2], dtype=torch.int8)  # a head, two mid, three tail items
LISTS = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 3, -1], [1, 0, 2]])  # 11 slots, one empty
TARGETS = torch.tensor([0, 1, 3, 5])  # ranks 1, 3, 2, not listed; head, mid, tail, tail
# exposure: item 0 four times, 1 three times, 2 and 3 twice, 4 and 5 never
GAIN_2 = 1 / math.log2(3)  # of rank 2; rank 1 gives 1, rank 3 gives 1 / log2(4) = 1/2


def test_hand_worked_lists():
    metrics = ranking_metrics(LISTS, TARGETS, counts=COUNTS, groups=GROUPS)
    assert metrics == pytest.approx(
        {
            "ndcg@3": (1 + 1 / 2 + GAIN_2 + 0) / 4,
            "hr@3": 3 / 4,
            "ndcg_head@3": 1.0,  # user 0
            "hr_head@3": 1.0,
            "ndcg_mid@3": 1 / 2,  # user 1
            "hr_mid@3": 1.0,
            "ndcg_tail@3": GAIN_2 / 2,  # users 2 and 3
            "hr_tail@3": 1 / 2,
            "ltc@3": 1 / 3,  # item 3 of 3, 4, 5
            # ascending 0 0 2 2 3 4: 2 * (3*2 + 4*2 + 5*3 + 6*4) / (6 * 11) - 7/6
            "gini@3": 106 / 66 - 7 / 6,
            "coverage@3": 4 / 6,
            "arp@3": (4 * 10 + 3 * 4 + 2 * 3 + 2 * 2) / 20 / 11,
            "tail_share@3": 2 / 11,
        },
        abs=1e-12,
    )


def test_user_ndcg_is_kept_in_the_order_of_the_updates():
    metrics = RankingMetrics(COUNTS, GROUPS, k=3)
    metrics.update(LISTS[2:], TARGETS[2:])
    metrics.update(LISTS[:2], TARGETS[:2])
    assert metrics.user_ndcg.dtype == torch.float32
    assert metrics.user_ndcg.tolist() == pytest.approx([GAIN_2, 0.0, 1.0, 0.5])


def test_exposure_is_a_copy_of_the_slots_per_item():
    metrics = RankingMetrics(COUNTS, GROUPS, k=3)
    metrics.update(LISTS, TARGETS)
    metrics.exposure.zero_()
    assert metrics.exposure.tolist() == [4, 3, 2, 2, 0, 0]


def test_without_targets_there_is_no_accuracy_but_the_same_exposure():
    with_targets = ranking_metrics(LISTS, TARGETS, counts=COUNTS, groups=GROUPS)
    without = ranking_metrics(LISTS, counts=COUNTS, groups=GROUPS)
    assert set(without) == {"ltc@3", "gini@3", "coverage@3", "arp@3", "tail_share@3"}
    assert all(without[key] == with_targets[key] for key in without)


def test_an_item_listed_twice_hits_at_its_first_place():
    metrics = RankingMetrics(COUNTS, GROUPS, k=3)
    metrics.update(torch.tensor([[4, 1, 1]]), torch.tensor([1]))
    assert metrics.user_ndcg.tolist() == pytest.approx([GAIN_2])


def test_values_without_a_denominator_are_nan():
    empty = torch.full((2, 3), -1)
    metrics = ranking_metrics(empty, torch.tensor([0, 0]), counts=COUNTS, groups=GROUPS)
    undefined = {key for key, value in metrics.items() if math.isnan(value)}
    no_slot = {"gini@3", "arp@3", "tail_share@3"}
    no_target = {"ndcg_mid@3", "ndcg_tail@3", "hr_mid@3", "hr_tail@3"}
    assert undefined == no_slot | no_target
    assert metrics["ltc@3"] == metrics["coverage@3"] == metrics["ndcg@3"] == 0.0

    no_tail = ranking_metrics(LISTS, counts=COUNTS, groups=torch.ones(6, dtype=torch.int8))
    assert math.isnan(no_tail["ltc@3"])
    no_training = ranking_metrics(LISTS, counts=torch.zeros(6, dtype=torch.int64), groups=GROUPS)
    assert math.isnan(no_training["arp@3"])


def test_nothing_fed_at_all():
    metrics = RankingMetrics(COUNTS, GROUPS, k=3)
    assert metrics.compute()["coverage@3"] == 0.0
    assert metrics.user_ndcg.shape == (0,)
    metrics.update(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert math.isnan(metrics.compute()["ndcg@3"])


@pytest.mark.parametrize(
    ("recommended", "targets", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), None, r"\(4, 2\).*\[users, 3\]"),
        (torch.zeros(3, dtype=torch.int64), None, r"\(3,\).*\[users, 3\]"),
        (LISTS, TARGETS[:3], r"targets have shape \(3,\).*\[4\]"),
        (LISTS, TARGETS[:, None], r"targets have shape \(4, 1\)"),
        (LISTS + 3, TARGETS, "recommended holds rows 2 to 6; expected -1 to 5"),
        (LISTS - 1, TARGETS, "recommended holds rows -2 to 2"),
        (LISTS, TARGETS - 1, "targets holds rows -1 to 4; expected 0 to 5"),
        (LISTS.float(), TARGETS, "recommended has dtype torch.float32"),
    ],
)
def test_input_that_does_not_fit_is_refused_and_leaves_no_trace(recommended, targets, message):
    metrics = RankingMetrics(COUNTS, GROUPS, k=3)
    with pytest.raises(ValueError, match=message):
        metrics.update(recommended, targets)
    metrics.update(LISTS, TARGETS)
    assert metrics.compute() == ranking_metrics(LISTS, TARGETS, counts=COUNTS, groups=GROUPS)


def test_construction_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(6,\) and groups \(5,\)"):
        RankingMetrics(COUNTS, GROUPS[:5], k=3)
    with pytest.raises(ValueError, match="other labels"):
        RankingMetrics(COUNTS, GROUPS + 1, k=3)
    with pytest.raises(ValueError, match="k is 0"):
        RankingMetrics(COUNTS, GROUPS, k=0)
    with pytest.raises(ValueError, match=r"recommended has shape \(3,\)"):
        ranking_metrics(torch.zeros(3, dtype=torch.int64), counts=COUNTS, groups=GROUPS)


def test_targets_come_always_or_never():
    metrics = RankingMetrics(COUNTS, GROUPS, k=3)
    metrics.update(LISTS)
    with pytest.raises(ValueError, match="always or never"):
        metrics.update(LISTS, TARGETS)


@pytest.mark.parametrize(
    ("exposure", "expected"),
    [([1, 1, 1, 1], 0.0), ([0, 0, 0, 8], 0.75), ([0, 2], 0.5), ([5], 0.0), ([3, 1], 0.25)],
)
def test_gini_of_small_cases(exposure, expected):
    assert gini(torch.tensor(exposure)) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_relative_mean_absolute_difference(exposure):
    n = len(exposure)
    differences = sum(abs(a - b) for a in exposure for b in exposure)
    expected = differences / (2 * n * sum(exposure))
    assert gini(torch.tensor(exposure)) == pytest.approx(expected, abs=1e-12)


def naive_metrics(recommended, targets, counts, groups):
    """The definitions once more, a user and an item at a time."""
    k, n = len(recommended[0]), len(counts)
    slots = [item for row in recommended for item in row if item != -1]
    tail = {item for item in range(n) if groups[item] == 2}
    values = {
        "ltc": len(tail & set(slots)) / len(tail) if tail else math.nan,
        "coverage": len(set(slots)) / n,
        "gini": math.nan,
        "arp": math.nan,
        "tail_share": math.nan,
    }
    if slots:
        exposure = [slots.count(item) for item in range(n)]
        differences = sum(abs(a - b) for a in exposure for b in exposure)
        values["gini"] = differences / (2 * n * len(slots))
        values["tail_share"] = sum(item in tail for item in slots) / len(slots)
        if sum(counts):
            values["arp"] = sum(counts[item] / sum(counts) for item in slots) / len(slots)
    users = list(zip(recommended, targets, strict=True))
    for suffix, labels in {"": {0, 1, 2}, "_head": {0}, "_mid": {1}, "_tail": {2}}.items():
        own = [(row, target) for row, target in users if groups[target] in labels]
        gains = [1 / math.log2(row.index(t) + 2) if t in row else 0.0 for row, t in own]
        values[f"ndcg{suffix}"] = sum(gains) / len(own) if own else math.nan
        values[f"hr{suffix}"] = sum(t in row for row, t in own) / len(own) if own else math.nan
    return {f"{name}@{k}": value for name, value in values.items()}


@st.composite
def experiments(draw):
    """Lists with empty slots, targets, counts and groups of random shapes, and a chunk size."""
    n = draw(st.integers(1, 12))
    k = draw(st.integers(1, n))
    users = draw(st.integers(1, 15))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    recommended = np.stack([rng.permutation(n)[:k] for _ in range(users)])
    filled = rng.integers(0, k + 1, size=users) if draw(st.booleans()) else np.full(users, k)
    recommended[np.arange(k) >= filled[:, None]] = -1
    targets = rng.integers(0, n, size=users)
    counts = rng.integers(0, 20, size=n)
    groups = rng.integers(0, 3, size=n).astype(np.int8)
    return recommended, targets, counts, groups, draw(st.integers(1, users))


@settings(deadline=None)
@given(experiments())
def test_agrees_with_the_naive_implementation_however_it_is_chunked(experiment):
    *arrays, chunk = experiment
    recommended, targets, counts, groups = map(torch.from_numpy, arrays)
    whole = ranking_metrics(recommended, targets, counts=counts, groups=groups)
    expected = naive_metrics(*(array.tolist() for array in arrays))
    assert whole == pytest.approx(expected, abs=1e-12, nan_ok=True)

    metrics = RankingMetrics(counts, groups, k=recommended.shape[1])
    for lists, wanted in zip(recommended.split(chunk), targets.split(chunk), strict=True):
        metrics.update(lists, wanted)
    chunked = metrics.compute()
    assert chunked == pytest.approx(whole, rel=0, abs=0, nan_ok=True)  # to the last bit
    assert metrics.user_ndcg.double().mean() == pytest.approx(whole[f"ndcg@{metrics.k}"], abs=1e-6)


RANX = """
import json, sys, ranx
qrels, run, metrics = json.load(sys.stdin)
print(json.dumps(ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), metrics, threads=1)))
"""


def test_agrees_with_ranx():
    users, n, k = 60, 40, 10
    generator = torch.Generator().manual_seed(0)
    lists = torch.rand(users, n, generator=generator).argsort(dim=1)[:, :k]
    targets = torch.randint(n, (users,), generator=generator)
    run = {
        str(user): {str(item): float(k - place) for place, item in enumerate(row)}
        for user, row in enumerate(lists.tolist())
    }
    qrels = {str(user): {str(target): 1} for user, target in enumerate(targets.tolist())}
    done = subprocess.run(
        [sys.executable, "-c", RANX],
        input=json.dumps([qrels, run, [f"ndcg@{k}", f"hit_rate@{k}"]]),
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},  # compiling would take half a minute
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(done.stdout)
    groups = torch.arange(n, dtype=torch.int8) % 3
    ours = ranking_metrics(lists, targets, counts=torch.ones(n), groups=groups)
    assert 0 < ours["hr@10"] < 1
    assert ours["ndcg@10"] == pytest.approx(theirs["ndcg@10"], abs=1e-12)
    assert ours["hr@10"] == pytest.approx(theirs["hit_rate@10"], abs=1e-12)
