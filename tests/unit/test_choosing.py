"""Choosing within a budget and hypervolumes, by hand."""

import math

import pytest

from steerrec.choosing import admissible, choose, hypervolume


def metrics(ndcg, gini, tail=0.1, ltc=0.5):
    return {"ndcg@10": ndcg, "ndcg_tail@10": tail, "gini@10": gini, "ltc@10": ltc}


BASE = metrics(0.20, 0.8)


def test_admissible_keeps_ndcg_and_the_tail():
    settings = [
        BASE,
        metrics(0.19, 0.7),  # exactly 5 % lost
        metrics(0.1899, 0.6),  # a little more
        metrics(0.2, 0.5, tail=0.0999),  # tail targets lost
        metrics(0.2, 0.5, tail=math.nan),  # no tail target: nothing to lose
    ]
    assert admissible(settings, 0.05) == [0, 1, 4]
    assert admissible(settings, 0.06) == [0, 1, 2, 4]
    assert admissible(settings, 0.0) == [0, 4]


def test_the_lowest_gini_or_the_highest_ltc_the_weaker_of_equals():
    settings = [
        BASE,
        metrics(0.199, 0.7, ltc=0.6),
        metrics(0.198, 0.7, ltc=0.6),
        metrics(0.197, 0.75, ltc=0.7),
        metrics(0.1, 0.1, ltc=1.0),
    ]
    assert choose(settings, 0.05, "gini") == 1
    assert choose(settings, 0.05, "ltc") == 3
    assert choose([BASE], 0.1) == 0


def test_the_unchanged_lists_are_always_there():
    assert choose([BASE, metrics(0.1, 0.1)], 0.0) == 0


def test_a_hypervolume_is_a_sum_of_rectangles():
    # retentions on validation: 1, .98, .94 and, too far, .8
    valid = [BASE, metrics(0.196, 0.7), metrics(0.188, 0.6), metrics(0.16, 0.1)]
    test = [
        metrics(0.21, 0.81, ltc=0.5),
        metrics(0.2, 0.72, ltc=0.55),
        metrics(0.2, 0.66, ltc=0.45),
        metrics(0.2, 0.0, ltc=1.0),
    ]
    # from .98 to 1 nothing is chosen, from .94 the second, from .9 the third
    assert hypervolume(valid, test, "gini") == pytest.approx(10 * (0.04 * 0.09 + 0.04 * 0.15))
    # by LTC the first of equals is chosen: the base, always
    assert hypervolume(valid, test, "ltc") == 0
    better = [valid[0], *(dict(v, **{"ltc@10": 0.6}) for v in valid[1:])]
    assert hypervolume(better, test, "ltc") == pytest.approx(10 * 0.08 * 0.05)


def test_what_is_worse_on_test_counts_for_nothing():
    valid = [BASE, metrics(0.2, 0.1)]
    assert hypervolume(valid, [BASE, metrics(0.2, 0.9)]) == 0
    assert hypervolume(valid, [BASE, metrics(0.1, 0.3)]) == pytest.approx(10 * 0.1 * 0.5)
