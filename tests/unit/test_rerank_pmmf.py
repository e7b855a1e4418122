"""P-MMF: its projection against three solvers, its lists against the algorithm user by user."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec.data import HEAD, MID, TAIL
from steerrec.errors import MethodError
from steerrec.rerank import PMMF, PMMFItems
from steerrec.rerank.pmmf import project

from .rerank_cases import random_worlds, world

# --- the projection


def points(rng, n, providers):
    """Points of all sizes, in the coordinates gamma * mu, and what may be below zero."""
    scale = rng.choice([0.01, 1, 30], (n, 1))
    moved = rng.normal(rng.normal(size=(n, 1)), 1, (n, providers)) * scale
    moved[rng.random(moved.shape) < 0.1] = 0
    return moved, float(rng.choice([0, 0.01, 0.5, 3]))


def by_active_sets(moved, normals, lam):
    """The nearest y with ``normals @ y >= -lam``, by going through all sets of equalities."""
    found = np.full_like(moved, np.nan)
    for size in range(moved.shape[1] + 1):
        for active in itertools.combinations(range(len(normals)), size):
            rows = normals[list(active)]  # [S, P]
            gram = rows @ rows.T
            if size and np.linalg.matrix_rank(gram) < size:
                continue
            force = -np.linalg.solve(gram, rows @ moved.T + lam) if size else np.zeros((0, 1))
            y = moved + (rows.T @ force).T
            meets = (force >= -1e-9).all(axis=0) & (y @ normals.T >= -lam - 1e-9).all(axis=1)
            found[meets] = y[meets]
    assert np.isfinite(found).all()
    return found


@pytest.mark.parametrize("providers", [1, 2, 3, 4])
def test_projection_against_the_constraints_of_the_paper(providers):
    """Every set of providers; thousands of points."""
    normals = np.array([s for s in itertools.product((0.0, 1.0), repeat=providers) if any(s)])
    rng = np.random.default_rng(providers)
    for _ in range(4):
        moved, lam = points(rng, 400, providers)
        got = project(torch.from_numpy(moved), lam).numpy()
        assert abs(got - by_active_sets(moved, normals, lam)).max() < 1e-6


@pytest.mark.parametrize("providers", [2, 3, 5, 7])
def test_projection_against_the_published_quadratic_programme(providers):
    """Sorted coordinates, a constraint on every prefix; thousands of points."""
    rng = np.random.default_rng(10 + providers)
    for _ in range(6):
        moved, lam = points(rng, 400, providers)
        moved = np.sort(moved, axis=1)
        got = project(torch.from_numpy(moved), lam).numpy()
        expected = by_active_sets(moved, np.tril(np.ones((providers, providers))), lam)
        assert abs(got - expected).max() < 1e-6


def bisected(moved, lam):
    """The threshold by which all negative coordinates shrink, by bisection on the sum of sizes."""
    size = np.maximum(-moved, 0)
    if size.sum() <= lam:
        return moved
    low, high = 0.0, size.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(size - middle, 0).sum() > lam:
            low = middle
        else:
            high = middle
    return np.where(moved < 0, -np.maximum(size - high, 0), moved)


def test_projection_against_bisection():
    rng = np.random.default_rng(0)
    for _ in range(150):
        moved, lam = points(rng, 20, int(rng.integers(1, 60)))
        got = project(torch.from_numpy(moved), lam).numpy()
        assert abs(got - np.array([bisected(row, lam) for row in moved])).max() < 1e-9


def test_projection_against_cvxpy():
    """The published programme, in its own variables mu, solved for thousands of points."""
    cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed: the solvers above are enough")
    rng = np.random.default_rng(6)
    tight = {"eps_abs": 1e-10, "eps_rel": 1e-10, "max_iter": 100_000}
    for _ in range(60):
        providers = int(rng.integers(1, 9))
        moved, lam = points(rng, 40, providers)  # gamma * mu
        weights = rng.uniform(0.1, 1.5, providers)
        mu, order = cp.Variable((40, providers)), np.argsort(moved, axis=1)
        rows = np.arange(40)[:, None]
        shift = cp.multiply(np.broadcast_to(weights, moved.shape), mu) - moved
        sums = [  # the n smallest of each point
            sum(cp.multiply(weights[order[:, i]], mu[rows[:, 0], order[:, i]]) for i in range(n))
            for n in range(1, providers + 1)
        ]
        problem = cp.Problem(cp.Minimize(cp.sum_squares(shift)), [s >= -lam for s in sums])
        problem.solve(solver="OSQP", **tight)
        got = project(torch.from_numpy(moved), lam).numpy()
        assert abs(got - weights * mu.value).max() < 1e-6


@settings(max_examples=100)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.floats(0, 20),
)
def test_projection_is_feasible_idempotent_and_leaves_what_is_positive(moved, lam):
    point = torch.tensor([moved], dtype=torch.float64)
    got = project(point, lam)
    assert (-got).clamp(min=0).sum() <= lam + 1e-9
    assert torch.allclose(project(got, lam), got, atol=1e-9)
    assert torch.equal(got[point >= 0], point[point >= 0])
    assert (got >= point).all()


def test_projection_by_hand():
    moved = torch.tensor([[-5.0, -1.0, 10.0], [-1.0, -1.0, 2.0], [3.0, 2.0, 1.0]]).double()
    # sizes 5 and 1 down to a sum of 3: both less 2, and not below zero; sizes 1 and 1 fit
    assert project(moved, 3.0).tolist() == [[-3, 0, 10], [-1, -1, 2], [3, 2, 1]]
    assert project(moved, 0.0).tolist() == [[0, 0, 10], [0, 0, 2], [3, 2, 1]]


# --- the lists


def providers_of(case, method):
    """Provider of each item, and the weight of each provider."""
    if isinstance(method, PMMFItems):
        owner = list(range(len(case.labels)))
    else:
        present = sorted(set(case.labels))
        owner = [present.index(label) for label in case.labels]
    count = max(owner) + 1
    exposure = [0] * count
    for user in range(len(case.scores)):
        for item in case.ranking(user)[: case.k]:
            exposure[owner[item]] += 1
    weights = []
    for p in range(count):
        share = owner.count(p) / len(owner)
        if sum(exposure):
            share = method.degree * share + (1 - method.degree) * exposure[p] / sum(exposure)
        weights.append((1 + 1 / count) * share)
    return owner, weights


def worth_of(case, method, user):
    if method.scale == "minmax":
        return case.relevance(user)
    if method.scale == "raw":
        return case.scores[user]
    return [1 / (1 + math.exp(-s)) if s > -700 else 0.0 for s in case.scores[user]]


def check_against_the_algorithm(case, method):
    """Replay all users one by one; each list has to be the best for the duals at its time."""
    got = method.lists(case.candidates).tolist()
    owner, weights = providers_of(case, method)
    count, k = len(weights), case.k
    order = method.user_order(case.candidates).tolist()
    assert sorted(order) == list(range(len(got)))
    length = min(method.window or len(order), len(order))
    for start in range(0, len(order), length):
        window = order[start : start + length]
        places = len(window) * k
        step = method.eta / (count**2 * math.sqrt(len(window)))
        dual, gradient = np.zeros(count), np.zeros(count)
        budget = places * np.array(weights)
        for user in window:
            items = case.ranking(user)
            if isinstance(method, PMMFItems):
                items = items[: case.candidates.pool]
            worth = worth_of(case, method, user)
            value = {i: worth[i] - dual[owner[i]] - 1e6 * (budget[owner[i]] <= 0) for i in items}
            best = sorted(value.values(), reverse=True)[:k]
            chosen = [item for item in got[user] if item != -1]
            assert len(chosen) == len(best)
            values = sorted((value[item] for item in chosen), reverse=True)
            assert values == pytest.approx(best, abs=1e-9)
            assert chosen == sorted(chosen, key=items.index)  # in the order of their scores
            exposure = np.zeros(count)
            for item in chosen:
                exposure[owner[item]] += 1
            budget = budget - exposure
            fresh = budget / places - exposure / k
            gradient = method.momentum * fresh + (1 - method.momentum) * gradient
            moved = dual - step * gradient / np.array(weights) ** 2
            dual = bisected(np.array(weights) * moved, method.lam) / np.array(weights)


@pytest.mark.parametrize("kind", [PMMF, PMMFItems])
def test_against_the_algorithm_user_by_user(kind):
    for number, case in enumerate(random_worlds(250, ties=False)):
        method = kind(
            degree=(0.05, 0.3, 0.7, 1.0)[number % 4],
            lam=(0.0, 0.1, 2.0)[number % 3],
            eta=(0.1, 5.0)[number % 2],
            momentum=(0.1, 0.9, 1.0)[number % 3],
            window=(None, 1, 3)[number % 3],
            scale=("minmax", "raw", "sigmoid")[number // 3 % 3],
        )
        check_against_the_algorithm(case, method)


def big_world(users=300, k=5, **options):
    labels = [HEAD] * 10 + [MID] * 30 + [TAIL] * 60
    scores = torch.randn(users, 100, generator=torch.Generator().manual_seed(0))
    scores[:, :10] += 2
    scores[:, 60:] -= 1
    return world(scores, labels=labels, k=k, **options)


def group_shares(case, lists):
    return torch.bincount(case.candidates.labels[lists].flatten(), minlength=3) / lists.numel()


@pytest.mark.parametrize("kind", [PMMF, PMMFItems])
def test_degree_0_is_the_base_list(kind):
    for case in random_worlds(40, seed=3):
        assert torch.equal(kind(degree=0).lists(case.candidates), case.candidates.base)


def test_degree_1_gives_the_groups_their_share_of_the_catalogue():
    case = big_world()
    before, after = (group_shares(case, PMMF(degree=d).lists(case.candidates)) for d in (0, 1))
    assert before[HEAD] > 0.4
    assert after[HEAD] <= 4 / 3 * 0.1 + 0.02  # the budget
    assert after[TAIL] > 0.5


def test_exposure_moves_with_the_degree():
    case = big_world()
    tail = [
        float(group_shares(case, PMMF(degree=d).lists(case.candidates))[TAIL])
        for d in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert tail == sorted(tail)


def test_with_items_as_providers_every_item_of_the_pools_is_shown():
    case = big_world()
    made = PMMFItems(degree=1).lists(case.candidates)
    assert len(made.unique()) == 100 > len(case.candidates.base.unique())


def test_the_order_of_users_is_drawn_from_the_seed():
    one, same, other = (PMMF().user_order(big_world(seed=s).candidates) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_one_user():
    case = world([[5.0, 4.0, 3.0, 2.0]], labels=[HEAD, HEAD, MID, TAIL], k=2)
    assert PMMF().lists(case.candidates).tolist() == [[0, 1]]  # nothing is spent before


def test_no_users():
    candidates = world(torch.empty(0, 4), k=2).candidates
    assert PMMF().lists(candidates).shape == (0, 2)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"degree": 2}, "degree is 2"),
        ({"lam": -1}, "lam is -1"),
        ({"eta": math.inf}, "eta is inf"),
        ({"momentum": 0}, "momentum is 0"),
        ({"window": 0}, "window is 0; expected a number of at least 1"),
        ({"scale": "log"}, "scale is 'log'; expected one of minmax, sigmoid, raw"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(MethodError, match=message):
        PMMF(**parameters)
