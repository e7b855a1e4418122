"""How sure a metric of lists is: bootstrap over users, paired between methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Replicates:
    """Metrics of resampled users; equal seeds resample the same users, so that they can be paired.

    Attributes
    ----------
    values
        For each metric its value in each replicate, [R].
    """

    values: dict[str, Floats]

    def interval(self, measured: dict[str, float], level: float = 0.95) -> dict[str, Interval]:
        """Intervals around measured values, as wide as the quantiles of the replicates.

        Drawn with replacement, fewer different users reach fewer different items: replicates of
        LTC and Gini lie to one side of the measured value, so their mean is taken off.
        """
        tails = [(1 - level) / 2, (1 + level) / 2]
        found = {}
        for name, values in self.values.items():
            low, high = measured[name] + np.quantile(values, tails) - values.mean()
            found[name] = (float(low), float(high))
        return found

    def against(self, other: Replicates, level: float = 0.95) -> dict[str, dict[str, Any]]:
        """Mean difference to another method on the same users, its interval and p-value.

        The two-sided p-value is twice the share of replicates on the rarer side of zero, counting
        the observed sample as one (Davison & Hinkley 1997, section 4.4).
        """
        found = {}
        tails = [(1 - level) / 2, (1 + level) / 2]
        for name in self.values.keys() & other.values.keys():
            difference = self.values[name] - other.values[name]
            low, high = np.quantile(difference, tails)
            rarer = min(int((difference <= 0).sum()), int((difference >= 0).sum()))
            found[name] = {
                "difference": float(difference.mean()),
                "interval": (float(low), float(high)),
                "p": min(1.0, 2 * (rarer + 1) / (len(difference) + 1)),
            }
        return dict(sorted(found.items()))


def bootstrap(
    lists: Tensor,
    user_ndcg: Tensor,
    groups: Tensor,
    *,
    replicates: int = 500,
    seed: int = 0,
) -> Replicates:
    """Metrics of users drawn with replacement, as many as there are.

    Parameters
    ----------
    lists
        Recommended catalogue rows, int64 [U, k]; -1 in empty slots.
    user_ndcg
        nDCG of each user, [U].
    groups
        Popularity group of each item: 0 head, 1 mid, 2 tail; [N].
    replicates
        How often users are drawn.
    seed
        Which users: the same for the same number of users.

    Returns
    -------
    Replicates
        `ndcg`, `ltc` and `gini`, as `steerrec.metrics` defines them.
    """
    rows, ndcg = lists.cpu().numpy(), user_ndcg.double().cpu().numpy()
    tail = groups.cpu().numpy() == 2
    users, items = len(rows), len(tail)
    filled = rows >= 0
    flat, rank = rows[filled], np.arange(1, items + 1)
    per_user = filled.sum(axis=1)
    tail_items = max(int(np.count_nonzero(tail)), 1)
    rng = np.random.default_rng(seed)
    values = {name: np.empty(replicates) for name in ("ndcg", "ltc", "gini")}
    for r in range(replicates):
        times = np.bincount(rng.integers(users, size=users), minlength=users)
        exposure = np.bincount(flat, np.repeat(times, per_user), minlength=items)
        total = exposure.sum()
        values["ndcg"][r] = times @ ndcg / users
        values["ltc"][r] = np.count_nonzero(exposure[tail]) / tail_items
        ranked = 2 * (rank @ np.sort(exposure)) / (items * total) if total else np.nan
        values["gini"][r] = ranked - (items + 1) / items
    return Replicates(values)
