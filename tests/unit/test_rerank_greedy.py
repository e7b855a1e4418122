"""Calibrated popularity and xQuAD: the papers' greedy loops over all items, and their limits."""

import math

import pytest
import torch

from steerrec.data import HEAD, MID, TAIL
from steerrec.errors import MethodError
from steerrec.rerank import BinaryXQuAD, Calibrated, XQuAD

from .rerank_cases import GROUPS, random_worlds, world


def greedy(case, user, utility):
    """Add the item of the largest utility(list, item) until the list is full, ties by score."""
    made, left = [], case.ranking(user)
    while len(made) < case.k and left:
        values = {item: utility(made, item) for item in left}
        best = max(values.values())
        item = next(i for i in left if values[i] >= best - 1e-12)
        made.append(item)
        left.remove(item)
    return case.padded(made)


def calibrated_utility(case, user, lam, smoothing):
    """Steck (2018), eq. 4 and 6: relevance of the whole list against its divergence."""
    wanted, relevance = case.shares(user), case.relevance(user)

    def utility(made, item):
        listed = [*made, item]
        divergence = 0.0
        for group in GROUPS:
            p = wanted[group]
            q = sum(case.labels[i] == group for i in listed) / len(listed)
            q = (1 - smoothing) * q + smoothing * p
            if p > 0:
                divergence += p * math.log(p / q)
        return (1 - lam) * sum(relevance[i] for i in listed) - lam * divergence

    return utility


def xquad_utility(case, user, lam, coverage):
    """Abdollahpouri et al. (2019), eq. 4, term by term."""
    relevance, tail_taste = case.relevance(user), case.shares(user)[TAIL]

    def utility(made, item):
        total = 0.0
        for category, taste in (("tail", tail_taste), ("head", 1 - tail_taste)):

            def belongs(i, category=category):
                return (case.labels[i] == TAIL) == (category == "tail")

            missing = 1.0
            for i in made:
                if coverage == "binary":
                    missing *= 1 - belongs(i)
                else:
                    missing *= 1 - sum(map(belongs, made)) / len(made)
            total += taste * belongs(item) * missing
        return (1 - lam) * relevance[item] + lam * total

    return utility


def test_calibrated_against_the_paper_in_a_loop():
    for number, case in enumerate(random_worlds(300)):
        lam, smoothing = Calibrated.settings[number % 20], (0.01, 0.2)[number % 2]
        got = Calibrated(lam=lam, smoothing=smoothing).lists(case.candidates)
        for user, row in enumerate(got.tolist()):
            assert row == greedy(case, user, calibrated_utility(case, user, lam, smoothing))


@pytest.mark.parametrize("method", [XQuAD, BinaryXQuAD])
def test_xquad_against_the_paper_in_a_loop(method):
    for number, case in enumerate(random_worlds(250)):
        lam = method.settings[number % 20]
        got = method(lam=lam)
        for user, row in enumerate(got.lists(case.candidates).tolist()):
            assert row == greedy(case, user, xquad_utility(case, user, lam, got.coverage))


@pytest.mark.parametrize("method", [Calibrated, XQuAD, BinaryXQuAD])
def test_without_strength_the_base_list(method):
    for case in random_worlds(60, seed=1):
        assert torch.equal(method(lam=0).lists(case.candidates), case.candidates.base)


SCORES = [[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]]
LABELS = [HEAD, HEAD, HEAD, HEAD, MID, MID, TAIL, TAIL]


def test_full_calibration_gives_the_shares_of_the_history():
    history = [[0, 4, 5, 6]]  # a quarter head, half mid, a quarter tail
    case = world(SCORES, labels=LABELS, histories=history, k=4)
    made = Calibrated(lam=1).lists(case.candidates)[0].tolist()
    assert sorted(case.labels[i] for i in made) == [HEAD, MID, MID, TAIL]
    assert {0, 4, 5, 6} == set(made)  # the best of each


def test_full_binary_xquad_covers_both_categories_and_goes_on_by_score():
    case = world(SCORES, labels=LABELS, histories=[[6, 6, 6, 0]], k=4)
    # tail first, which the user likes; then the head; then nothing is missing any more
    assert BinaryXQuAD(lam=1).lists(case.candidates).tolist() == [[6, 0, 1, 2]]
    assert BinaryXQuAD(lam=0.99).lists(case.candidates).tolist() == [[6, 0, 1, 2]]


def test_full_smooth_xquad_by_hand():
    case = world(SCORES, labels=LABELS, histories=[[6, 6, 6, 0]], k=4)
    # place 1: .75 tail, .25 head. 2: the tail covers all: head. 3: half each, (1/2)^2 * taste:
    # tail. 4: two thirds tail, (1/3)^3 * .75 = .028 against head (2/3)^3 * .25 = .074: head
    assert XQuAD(lam=1).lists(case.candidates).tolist() == [[6, 0, 7, 1]]


def test_a_user_without_taste_for_the_tail_is_left_alone_by_xquad():
    case = world(SCORES, labels=LABELS, histories=[[0, 1, 4]], k=4)
    assert XQuAD(lam=0.5).lists(case.candidates).tolist() == [[0, 1, 2, 3]]


def test_constant_scores_leave_the_choice_to_the_groups():
    case = world([[1.0] * 8], labels=LABELS, histories=[[6, 7]], k=3)
    assert Calibrated(lam=0.5).lists(case.candidates).tolist() == [[6, 7, 0]]


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        (Calibrated, {"lam": 1.5}, "lam is 1.5; expected a number of at least 0 and at most 1"),
        (Calibrated, {"smoothing": 0}, "smoothing is 0; expected a number of at least 1e-09"),
        (XQuAD, {"lam": -0.1}, "lam is -0.1"),
        (XQuAD, {"coverage": "both"}, "coverage is 'both'; expected one of smooth, binary"),
    ],
)
def test_bad_parameters(method, parameters, message):
    with pytest.raises(MethodError, match=message):
        method(**parameters)
