"""IPR and logit adjustment: every item scored anew in a loop, and what their limits must be."""

import math

import pytest
import torch

from steerrec.data import Histories
from steerrec.errors import MethodError
from steerrec.recommender import ItemHead
from steerrec.rerank import IPR, LogitAdjustment, gather_candidates

from .rerank_cases import random_worlds, world
from .tiny import catalogue

TRANSFORMS = ("softmax", "sigmoid", "minmax", "published")


def sigmoid(s):
    return 1 / (1 + math.exp(-s)) if s >= 0 else math.exp(s) / (1 + math.exp(s))


def by_score(case, score):
    """Lists by other scores, `score(user, item)`, equal ones by row."""
    lists = []
    for user in range(len(case.scores)):
        items = case.ranking(user)
        best = sorted(items, key=lambda i: (-score(user, i), i))
        lists.append(case.padded(best[: case.k]))
    return lists


def close(case, got, score, rounding=1e-12):
    """Whether lists hold the best items by a score, up to what single precision rounds."""
    for user, row in enumerate(got.tolist()):
        want = by_score(case, score)[user]
        assert row.count(-1) == want.count(-1)
        pairs = [(a, b) for a, b in zip(row, want, strict=True) if a != -1]
        for a, b in pairs:
            assert score(user, a) == pytest.approx(score(user, b), rel=1e-5, abs=rounding)
        assert len({a for a, _ in pairs}) == len(pairs)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_ipr_against_its_formula(transform):
    for number, case in enumerate(random_worlds(120, ties=False)):
        alpha = IPR.settings[number % 20]
        most = max(case.counts)

        def score(user, item, case=case, alpha=alpha, most=most):
            s = case.scores[user][item]
            finite = [x for x in case.scores[user] if x > -math.inf]
            if transform == "softmax":
                value = math.exp(s - max(finite)) / sum(math.exp(x - max(finite)) for x in finite)
            elif transform == "sigmoid":
                value = sigmoid(s)
            elif transform == "minmax":
                value = s - min(finite)
            else:
                value = s
            return value / (1 + alpha * case.counts[item] / most)

        got = IPR(alpha=alpha, transform=transform).lists(case.candidates)
        close(case, got, score, rounding=1e-6 if transform == "minmax" else 1e-12)


def test_logit_adjustment_against_its_formula():
    for number, case in enumerate(random_worlds(300)):
        lam = LogitAdjustment.settings[number % 20]

        def score(user, item, case=case, lam=lam):
            return case.scores[user][item] - lam * math.log(1 + case.counts[item])

        close(case, LogitAdjustment(lam=lam).lists(case.candidates), score, rounding=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_without_strength_ipr_is_the_base_list(transform):
    for case in random_worlds(60):
        lists = IPR(alpha=0, transform=transform).lists(case.candidates)
        assert torch.equal(lists, case.candidates.base)


@pytest.mark.parametrize(
    "method",
    [LogitAdjustment(lam=1), *(IPR(alpha=3, transform=transform) for transform in TRANSFORMS)],
)
def test_chunks_do_not_matter(method):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-3, 4, (20, 4), generator=generator).float()
    head = ItemHead(torch.randint(-3, 4, (30, 4), generator=generator).float())
    histories, items = Histories.from_lists([[0]] * 20), catalogue(list(range(60, 0, -2)))
    lists = [
        method.lists(
            gather_candidates(vectors, head, histories, items, user_chunk=users, item_chunk=rows)
        )
        for users, rows in ((1024, 16_384), (7, 11), (1, 1), (20, 4))
    ]
    assert all(torch.equal(lists[0], other) for other in lists[1:])


def test_the_published_ipr_rewards_popular_items_with_negative_scores():
    case = world([[-1.0, -1.1]], counts=[1, 10], k=1)
    assert IPR(alpha=1, transform="published").lists(case.candidates).tolist() == [[1]]
    for transform in ("softmax", "sigmoid", "minmax"):
        lists = IPR(alpha=1, transform=transform).lists(case.candidates)
        assert lists.tolist() == [[0]], transform


def test_much_ipr_is_logit_adjustment_of_one():
    """alpha * c / max c leaves nothing of the 1 beside it, and -log c of the division."""
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 3
    counts = torch.randint(50, 5000, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    candidates = world(scores, counts=counts, k=5).candidates
    ipr = IPR(alpha=1e9).lists(candidates)
    expected = (scores - torch.tensor(counts).log()).topk(5).indices
    assert torch.equal(ipr, expected)


def test_much_logit_adjustment_is_the_least_popular_first():
    candidates = world([[9.0, 1.0, 3.0, 2.0]], counts=[50, 3, 20, 3], k=4).candidates
    # of the two items with three interactions the one with the better score
    assert LogitAdjustment(lam=1e6).lists(candidates).tolist() == [[3, 1, 2, 0]]


def test_items_without_interactions():
    candidates = world([[3.0, 2.0, 1.0]], counts=[2, 0, 1], k=3).candidates
    assert IPR(alpha=100.0).lists(candidates).tolist() == [[1, 0, 2]]  # 3 - log 101 < 2


@pytest.mark.parametrize("k", [1, 3])
def test_constant_scores(k):
    candidates = world([[2.0] * 3], counts=[5, 1, 3], k=k).candidates
    assert LogitAdjustment(lam=1).lists(candidates).tolist() == [[1, 2, 0][:k]]
    assert IPR(alpha=1).lists(candidates).tolist() == [[1, 2, 0][:k]]
    # nothing above the lowest score: nothing to divide, so by row
    assert IPR(alpha=1, transform="minmax").lists(candidates).tolist() == [[0, 1, 2][:k]]


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        (IPR, {"alpha": -1}, "alpha is -1; expected a number of at least 0"),
        (IPR, {"alpha": math.nan}, "alpha is nan"),
        (IPR, {"transform": "log"}, "transform is 'log'; expected one of softmax, sigmoid"),
        (LogitAdjustment, {"lam": math.inf}, "lam is inf; expected a number of at least 0"),
    ],
)
def test_bad_parameters(method, parameters, message):
    with pytest.raises(MethodError, match=message):
        method(**parameters)
