"""FA*IR: golden m-tables, exact enumeration of all rankings, the paper's algorithm in a loop."""

from fractions import Fraction
from itertools import product
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec.data import HEAD, MID, TAIL
from steerrec.errors import MethodError
from steerrec.rerank import FairTopK, m_table
from steerrec.rerank.fair import fail_probability

from .rerank_cases import random_worlds, world

GOLDEN = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_golden_table():
    """k = 10, p = .5, alpha = .1: places 4 and 7 change together, where P = 1/16 exactly."""
    assert m_table(10, 0.5, 0.1) == GOLDEN
    assert fail_probability(GOLDEN, 0.5) == Fraction(77, 1024)  # .0752
    unadjusted = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert m_table(10, 0.5, 0.1, adjusted=False) == unadjusted
    assert fail_probability(unadjusted, 0.5) == Fraction(33, 256)  # .129


def test_a_correction_for_independent_tests_would_ask_for_far_too_little():
    """Prefixes overlap: the significance of ten separate tests, 1 - .9^(1/10), fails in .8 %."""
    sidak = m_table(10, 0.5, round(1 - 0.9 ** (1 / 10), 6), adjusted=False)
    assert sidak == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert fail_probability(sidak, 0.5) == Fraction(1, 128)


def test_a_probability_equal_to_alpha_is_enough():
    """P[Binomial(4, .5) <= 0] is 1/16."""
    assert m_table(4, 0.5, 0.0625, adjusted=False) == [0, 0, 0, 0]
    assert m_table(4, 0.5, 0.0626, adjusted=False) == [0, 0, 0, 1]


def failing(table, p):
    """Probability by going through all 2^k rankings."""
    p, total = Fraction(str(p)), Fraction(0)
    for ranking in product((0, 1), repeat=len(table)):
        if any(sum(ranking[: i + 1]) < needed for i, needed in enumerate(table)):
            ones = sum(ranking)
            total += p**ones * (1 - p) ** (len(table) - ones)
    return total


def naive_table(k, p, at):
    """The least m with P[Binomial(i, p) <= m] >= at, place by place."""
    p, table = Fraction(str(p)), []
    for i in range(1, k + 1):
        m, reached = 0, (1 - p) ** i
        while reached < at:
            m += 1
            reached += comb(i, m) * p**m * (1 - p) ** (i - m)
        table.append(m)
    return table


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.15])
def test_the_table_is_the_strictest_that_fails_no_more_often_than_alpha(k, p, alpha):
    table = m_table(k, p, alpha)
    assert failing(table, p) <= Fraction(str(alpha))
    assert failing(table, p) == fail_probability(table, p)

    # every table that any significance up to alpha gives
    share = Fraction(str(p))
    thresholds = {Fraction(str(alpha))}
    for i in range(1, k + 1):
        reached = Fraction(0)
        for m in range(i + 1):
            reached += comb(i, m) * share**m * (1 - share) ** (i - m)
            thresholds.add(min(reached, Fraction(str(alpha))))
    tables = [naive_table(k, p, at) for at in thresholds]
    passing = [t for t in tables if failing(t, p) <= Fraction(str(alpha))]
    assert table == max(passing, key=sum, default=[0] * k)
    assert m_table(k, p, alpha, adjusted=False) == naive_table(k, p, Fraction(str(alpha)))


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(0, 99), st.integers(0, 30))
def test_tables_are_tables(k, p, alpha):
    table = m_table(k, p / 100, alpha / 100)
    steps = [b - a for a, b in zip([0, *table], table, strict=False)]
    assert set(steps) <= {0, 1}
    assert fail_probability(table, p / 100) <= Fraction(alpha, 100)


def test_long_lists_take_no_time():
    assert m_table(100, 0.98, 0.1)[-1] > 90


def naive_lists(case, table, size=None):
    """Algorithm 2 of the paper, over all items or the best of them."""
    lists = []
    for user in range(len(case.scores)):
        ranking = case.ranking(user)[:size]
        protected = [i for i in ranking if case.labels[i] == TAIL]
        others = [i for i in ranking if case.labels[i] != TAIL]
        made, held = [], 0
        while len(made) < case.k and (protected or others):
            if not others or (protected and held < table[len(made)]):
                queue = protected
            elif not protected or ranking.index(others[0]) < ranking.index(protected[0]):
                queue = others
            else:
                queue = protected
            held += queue is protected
            made.append(queue.pop(0))
        lists.append(case.padded(made))
    return lists


def test_against_the_paper_in_a_loop():
    for number, case in enumerate(random_worlds(400)):
        p, alpha = FairTopK.settings[number % 20], (0.01, 0.1)[number % 2]
        table = m_table(case.k, p, alpha)
        got = FairTopK(p=p, alpha=alpha).lists(case.candidates)
        assert got.tolist() == naive_lists(case, table)


def test_a_pool_is_the_paper_on_a_shorter_ranking():
    for number, case in enumerate(random_worlds(200, seed=9)):
        p, size = FairTopK.settings[number % 20], case.candidates.pool
        table = m_table(case.k, p, 0.1)
        got = FairTopK(p=p, pool=size).lists(case.candidates)
        assert got.tolist() == naive_lists(case, table, size)


def test_a_pool_of_k_leaves_the_items_and_a_larger_one_than_there_is_is_refused():
    case = world([[9.0, 8.0, 7.0, 6.0]], labels=[HEAD, TAIL, HEAD, TAIL], k=2, pool=3)
    assert FairTopK(p=0.99, pool=2).lists(case.candidates).tolist() == [[1, 0]]
    assert FairTopK(p=0.99).lists(case.candidates).tolist() == [[1, 3]]  # beyond the pool
    for pool in (1, 4, 9):
        with pytest.raises(MethodError, match="the candidates' pool holds 3; expected a pool of"):
            FairTopK(pool=pool).lists(case.candidates)


def test_every_prefix_passes_where_the_tail_is_long_enough():
    labels = [HEAD] * 8 + [MID] * 8 + [TAIL] * 8
    scores = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    scores[:, 16:] -= 3  # hardly any tail item by itself
    case = world(scores, labels=labels, k=8)
    for p in FairTopK.settings:
        table = m_table(8, p, 0.1)
        tail = case.candidates.labels[FairTopK(p=p).lists(case.candidates)] == TAIL
        assert (tail.cumsum(dim=1) >= torch.tensor(table)).all()
        assert (tail.cumsum(dim=1)[:, -1] >= table[-1]).all()


def test_the_highest_share_leaves_only_the_tail():
    case = world([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0]], labels=[HEAD, MID, MID, TAIL, TAIL, TAIL])
    assert FairTopK(p=0.999).lists(case.candidates).tolist() == [[5, 4, 3]]


def test_without_tail_items_the_others_are_taken():
    case = world([[3.0, 2.0, 1.0]], labels=[HEAD, MID, MID], k=3)
    assert FairTopK(p=0.9).lists(case.candidates).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    "parameters", [{"p": 1.0}, {"p": -0.1}, {"alpha": 1.0}, {"p": float("nan")}]
)
def test_bad_parameters(parameters):
    with pytest.raises(MethodError, match="expected a number of at least 0 and at most"):
        FairTopK(**parameters)
