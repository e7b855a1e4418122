"""Which setting of a method to use: chosen on validation within a budget of nDCG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

By = Literal["gini", "ltc"]
CRITERIA: tuple[By, ...] = ("gini", "ltc")
BUDGETS = (0.01, 0.05, 0.10)
"""Shares of nDCG that a user may be ready to give."""


def admissible(settings: Sequence[dict[str, float]], budget: float) -> list[int]:
    """Which settings, by their validation metrics, keep to a budget; the first is the unchanged.

    nDCG is at or above ``(1 - budget)`` of the first, nDCG on tail targets at or above the first.
    """
    base = settings[0]
    least, tail = (1 - budget) * metric_of(base, "ndcg"), metric_of(base, "ndcg_tail")
    return [
        i
        for i, metrics in enumerate(settings)
        if i == 0
        or (metric_of(metrics, "ndcg") >= least and not metric_of(metrics, "ndcg_tail") < tail)
    ]


def choose(settings: Sequence[dict[str, float]], budget: float, by: By = "gini") -> int:
    """The admissible setting with the lowest Gini or the highest LTC, the weaker of equal ones."""
    sign = 1 if by == "gini" else -1
    return min(admissible(settings, budget), key=lambda i: (sign * metric_of(settings[i], by), i))


def hypervolume(
    valid: Sequence[dict[str, float]], test: Sequence[dict[str, float]], by: By = "gini"
) -> float:
    """What a method gains on test within 10 % of nDCG: ten times the integral over retentions.

    Chosen on validation at each retention r from 0.9 to 1, the gain is a step function of r with
    its steps at the retentions of the settings, so that the integral is a sum.
    """
    sign = 1 if by == "gini" else -1
    own = metric_of(valid[0], "ndcg")
    retained = (metric_of(metrics, "ndcg") / own for metrics in valid)
    steps = sorted({0.9, 1.0, *(r for r in retained if 0.9 < r < 1)})
    total = 0.0
    for low, high in pairwise(steps):
        chosen = choose(valid, 1 - (low + high) / 2, by)  # the same everywhere in between
        gain = sign * (metric_of(test[0], by) - metric_of(test[chosen], by))
        total += max(0.0, gain) * (high - low)
    return 10 * total


def metric_of(metrics: dict[str, float], name: str) -> float:
    """A metric by its name without k."""
    return next(value for key, value in metrics.items() if key.partition("@")[0] == name)
