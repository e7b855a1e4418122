"""PCT: targets against linear programmes and brute force, lists against the paper in a loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from steerrec.data import HEAD, MID, TAIL
from steerrec.errors import MethodError
from steerrec.rerank import PCT, PCTAvgEqual, personal_targets

from .rerank_cases import GROUPS, random_worlds, world

METHODS = (PCT, PCTAvgEqual)


def random_shares(rng, users, groups):
    """Distributions, with many zeros and some users all alike."""
    shares = rng.dirichlet(np.full(groups, 0.5), users)
    shares[rng.random(shares.shape) < 0.3] = 0
    shares[:, 0] += shares.sum(axis=1) == 0
    return shares / shares.sum(axis=1, keepdims=True)


def least_change(shares, overall):
    """The value of ``min sum |q - p|`` over distributions q of this mean, by HiGHS."""
    users, groups = shares.shape
    size = users * groups
    of_user = np.kron(np.eye(users), np.ones(groups))  # [U, U * G]
    of_group = np.kron(np.ones(users), np.eye(groups))  # [G, U * G]
    eye = np.eye(size)
    result = linprog(
        np.concatenate([np.zeros(size), np.ones(size)]),  # q, then the sizes of the changes
        A_ub=np.block([[eye, -eye], [-eye, -eye]]),
        b_ub=np.concatenate([shares.ravel(), -shares.ravel()]),
        A_eq=np.block([[of_user, np.zeros_like(of_user)], [of_group, np.zeros_like(of_group)]]),
        b_eq=np.concatenate([np.ones(users), users * overall]),
        method="highs",
    )
    assert result.status == 0
    return result.fun


def test_targets_are_a_solution_of_the_linear_programme():
    rng = np.random.default_rng(0)
    for _ in range(200):
        users, groups = int(rng.integers(1, 12)), int(rng.integers(1, 5))
        shares, overall = random_shares(rng, users, groups), random_shares(rng, 1, groups)[0]
        targets = personal_targets(torch.from_numpy(shares), torch.from_numpy(overall)).numpy()
        assert (targets >= -1e-12).all()
        assert targets.sum(axis=1) == pytest.approx(np.ones(users))
        assert targets.mean(axis=0) == pytest.approx(overall, abs=1e-12)
        assert abs(targets - shares).sum() == pytest.approx(least_change(shares, overall), abs=1e-7)


def test_of_all_solutions_the_one_that_takes_most_evenly():
    """The largest amount taken of a group, against a second linear programme for it alone."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        users, groups = int(rng.integers(2, 12)), int(rng.integers(2, 5))
        shares, overall = random_shares(rng, users, groups), random_shares(rng, 1, groups)[0]
        targets = personal_targets(torch.from_numpy(shares), torch.from_numpy(overall)).numpy()
        for group in np.flatnonzero(shares.mean(axis=0) > overall + 1e-9):
            least = linprog(
                [*np.zeros(users), 1],  # what is taken of each, and the most of all
                A_ub=np.hstack([np.eye(users), -np.ones((users, 1))]),
                b_ub=np.zeros(users),
                A_eq=[[*np.ones(users), 0]],
                b_eq=[(shares[:, group] - overall[group]).sum()],
                bounds=[*zip(np.zeros(users), shares[:, group], strict=True), (0, None)],
                method="highs",
            )
            taken = shares[:, group] - targets[:, group]
            assert taken.max() == pytest.approx(least.fun, abs=1e-7)
            # and whoever gave less than that gave all
            full = np.isclose(taken, shares[:, group]) | np.isclose(taken, taken.max())
            assert full.all()


def test_two_groups_against_brute_force():
    """All ways to move whole sixteenths, for two and three users."""
    grid = 16
    cases = [([4, 16], 6), ([12, 2], 13), ([0, 16, 8], 6), ([16, 16, 4], 4), ([3, 9, 9], 7)]
    for tail, overall in cases:
        total = overall * len(tail)
        options = [
            tuple(q)
            for q in np.ndindex(*(grid + 1,) * len(tail))
            if sum(q) == total  # the constraint on the mean
        ]
        cost = {q: sum(abs(a - b) for a, b in zip(q, tail, strict=True)) for q in options}
        best = [q for q in options if cost[q] == min(cost.values())]
        shares = torch.tensor([[1 - t / grid, t / grid] for t in tail], dtype=torch.float64)
        overall_share = torch.tensor([1 - overall / grid, overall / grid], dtype=torch.float64)
        got = personal_targets(shares, overall_share)[:, 1] * grid
        assert abs(got - torch.tensor(tail)).sum() == pytest.approx(min(cost.values()))
        most = {q: max(abs(a - b) for a, b in zip(q, tail, strict=True)) for q in best}
        even = min(best, key=most.__getitem__)
        assert abs(got - torch.tensor(even)).max() < 1  # up to the grid


def test_three_groups_against_brute_force():
    """All ways to share out whole quarters: the least change of all that meet the constraint.

    What can be moved is moved in whole units by some best solution, as in any flow of whole
    amounts, so the grid loses nothing.
    """
    grid, rng = 4, np.random.default_rng(2)
    ways = np.array([q for q in np.ndindex(*(grid + 1,) * 3) if sum(q) == grid])  # [W, G]
    for _ in range(150):
        users = int(rng.integers(1, 4))
        own, other = (ways[rng.integers(len(ways), size=users)] for _ in range(2))
        picks = np.array(list(np.ndindex(*(len(ways),) * users)))  # a way for each user
        totals = ways[picks].sum(axis=1)
        meets = picks[(totals == other.sum(axis=0)).all(axis=1)]
        least = abs(ways[meets] - own).sum(axis=(1, 2)).min()
        shares = torch.from_numpy(own / grid)
        targets = personal_targets(shares, torch.from_numpy(other.mean(axis=0) / grid))
        assert float((targets - shares).abs().sum()) * grid == pytest.approx(least, abs=1e-9)
        assert targets.mean(dim=0).numpy() * grid == pytest.approx(other.mean(axis=0), abs=1e-9)
        assert targets.sum(dim=1).numpy() == pytest.approx(np.ones(users))
        assert (targets >= -1e-12).all()


def test_targets_by_hand():
    shares = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64)
    targets = personal_targets(shares, torch.tensor([0.3, 0.7], dtype=torch.float64))
    # .7 has to be taken of group 0: the third user gives all they have, .1, the others .3 each
    expected = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(targets, expected)


def test_where_the_mean_is_right_already_nothing_changes():
    shares = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    assert torch.equal(personal_targets(shares, shares.mean(dim=0)), shares)


def test_one_direction_for_all_users_need_not_be_possible():
    """The published programme has no solution here; the targets exist all the same."""
    shares = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    overall = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    change = (shares.mean(dim=0) - overall).numpy()
    direction = change / np.linalg.norm(change)
    with np.errstate(divide="ignore"):
        limits = np.where(direction > 0, shares.numpy() / direction, np.inf).min(axis=1)
    assert limits.sum() < len(shares) * np.linalg.norm(change)
    targets = personal_targets(shares, overall)
    assert torch.allclose(targets, torch.tensor([[0.4, 0, 0.6], [0, 0.4, 0.6]]).double())


@pytest.mark.parametrize("method", METHODS)
def test_the_policies(method):
    labels = [HEAD, MID, MID, TAIL, TAIL, TAIL, TAIL, TAIL]
    case = world(torch.randn(9, 8), labels=labels, histories=[[i % 8] for i in range(9)], k=3)
    mean = method().targets(case.candidates).mean(dim=0).tolist()
    assert mean == pytest.approx([1 / 3] * 3 if method is PCT else [1 / 8, 2 / 8, 5 / 8])


def test_a_group_without_items_has_no_target():
    case = world([[3.0, 2.0, 1.0]] * 2, labels=[HEAD, HEAD, TAIL], histories=[[0], [2]], k=2)
    for method in METHODS:
        assert method().targets(case.candidates)[:, MID].eq(0).all()
    assert PCT().targets(case.candidates).mean(dim=0).tolist() == pytest.approx([0.5, 0, 0.5])


# --- lists


def naive_lists(case, method):
    """Both passes of the paper, over all items; ranks count up to the pool's size."""
    targets, lam = method.targets(case.candidates).tolist(), method.lam
    worth = [1 / math.log2(place + 2) for place in range(case.k)]
    lists = []
    for user in range(len(case.scores)):
        ranking = case.ranking(user)
        base = [0.0, 0.0, 0.0]
        for place, item in enumerate(ranking[: case.k]):
            base[case.labels[item]] += worth[place]
        target = [
            (1 - method.degree) * base[g] + method.degree * sum(worth) * targets[user][g]
            for g in GROUPS
        ]
        spent, made, used = [0.0, 0.0, 0.0], [-1] * case.k, set()
        for place in range(case.k):
            for item in ranking:
                group = case.labels[item]
                if item not in used and spent[group] + worth[place] <= target[group] + 1e-9:
                    made[place] = item
                    used.add(item)
                    spent[group] += worth[place]
                    break
        for place in range(case.k):
            left = [item for item in ranking if item not in used]
            if made[place] != -1 or not left:
                continue
            values = {}
            for group in GROUPS:
                first = next((item for item in left if case.labels[item] == group), None)
                if first is None:
                    continue
                after = [spent[g] + (g == group) * worth[place] for g in GROUPS]
                gap = sum((a - t) ** 2 for a, t in zip(after, target, strict=True)) / 2
                rank = min(ranking.index(first), case.candidates.pool) + 1
                values[first] = lam * (1 / rank) - (1 - lam) * gap
            best = max(values.values())
            item = next(i for i in ranking if i in values and values[i] >= best - 1e-12)
            made[place] = item
            used.add(item)
            spent[case.labels[item]] += worth[place]
        lists.append(made)
    return lists


@pytest.mark.parametrize("kind", METHODS)
def test_against_the_paper_in_a_loop(kind):
    for number, case in enumerate(random_worlds(250)):
        method = kind(degree=(*kind.settings, 1.0)[number % 21], lam=(0.5, 0.0, 0.9)[number % 3])
        assert method.lists(case.candidates).tolist() == naive_lists(case, method)


@pytest.mark.parametrize("kind", METHODS)
def test_degree_0_is_the_base_list(kind):
    for case in random_worlds(100, seed=2):
        assert torch.equal(kind(degree=0).lists(case.candidates), case.candidates.base)


@pytest.mark.parametrize("k", range(1, 31))
def test_a_target_that_is_met_exactly_is_not_missed_by_rounding(k):
    """Two users of one group each, whose targets are their own tastes: whole lists of it."""
    labels = [TAIL] + [HEAD] * 30 + [TAIL] * 30  # the best item of all is of the other group
    scores = torch.arange(61, 0, -1).float().expand(2, 61)
    case = world(scores, labels=labels, histories=[[1], [0]], k=k)
    assert PCT().targets(case.candidates)[0].tolist() == [1, 0, 0]
    made = PCT(lam=0.9).lists(case.candidates)[0].tolist()
    assert made == list(range(1, k + 1))


@settings(max_examples=30)
@given(st.integers(0, 2**16))
def test_at_degree_1_lists_come_near_the_system_target(seed):
    """Places are whole: a list misses its target by about half of the first place at most."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([HEAD] * 20 + [MID] * 20 + [TAIL] * 20).tolist()
    case = world(
        torch.from_numpy(rng.normal(size=(40, 60))),
        labels=labels,
        histories=[rng.integers(0, 60, 10).tolist() for _ in range(40)],
        k=10,
    )
    made = PCT(lam=0).lists(case.candidates)
    worth = torch.arange(2, 12, dtype=torch.float64).log2().reciprocal()
    groups = case.candidates.labels[made]
    exposure = torch.stack([((groups == g) * worth).sum(dim=1) for g in GROUPS], dim=1)
    assert exposure.mean(dim=0) == pytest.approx(torch.full((3,), worth.sum() / 3).numpy(), abs=0.2)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"degree": 1.1}, "degree is 1.1"),
        ({"lam": -1}, "lam is -1"),
        ({"policy": "fair"}, "policy is 'fair'; expected one of equal, avg-equal"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(MethodError, match=message):
        PCT(**parameters)
