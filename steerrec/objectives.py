"""What learned steering is for: which items have too much exposure, and how well it is spread.

An objective puts a price on a list slot of each item. Where the exposure of items is to be evened
out, the price is the derivative of the measure by the item's exposure, up to a factor: it depends
on how often the item is recommended now, so it is asked again and again while steering is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerrec.data import TAIL
from steerrec.metrics import gini


@dataclass(frozen=True)
class Objective:
    """A measure of exposure to be lowered.

    Attributes
    ----------
    name
        What it is called in recipes.
    prices
        From exposure (list slots of each item for one user on average, float [N]) to the price of a
        slot, float [N], from -0.5, wanted, to 0.5, unwanted; a sum of objectives has wider ones.
    value
        From exposure (integer counts [N]) to what is lowered.
    """

    name: str
    prices: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], float]


def mid_ranks(values: Tensor) -> Tensor:
    """Rank of each of N values as a share of N, from 0 to 1; equal values share their mean rank."""
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)  # sorted
    ends = sizes.cumsum(0)
    ranks: Tensor = (ends - sizes / 2) / len(values)
    return ranks[group]


def even_exposure() -> Objective:
    """Lower the Gini index of exposure.

    The derivative of the Gini index by an item's exposure is linear in the item's rank.
    """
    return Objective("gini", lambda exposure: mid_ranks(exposure) - 0.5, gini)


def exposure_entropy(users: int) -> Objective:
    """Raise the entropy of exposure; what is lowered is the share of it that is missing.

    Its derivative by an item's exposure is linear in the logarithm. Unlike ranks it tells an item
    with a slot in ten users from one with a slot in all, and moves little when exposure does.

    Parameters
    ----------
    users
        How many users lists are for; an item that none of them gets counts as half a slot.
    """

    def value(exposure: Tensor) -> float:
        share = exposure.double() / exposure.sum()
        entropy = -float(torch.special.xlogy(share, share).sum())
        return 1 - entropy / math.log(len(share)) if len(share) > 1 else 0.0

    return Objective("entropy", lambda e: _spread((e + 0.5 / users).log()), value)


def tail_coverage(groups: Tensor, users: int, *, slots: float = 1.5) -> Objective:
    """Raise the share of tail items that are in somebody's list (LTC).

    Where ``users`` lists hold item i ``c_i`` times on average, the chance that none does is about
    ``exp(-c_i)``: nothing is gained by further slots for an item that has some. The price has this
    form, and all other items have the same price.

    Parameters
    ----------
    groups
        Popularity group of each item, 2 for the tail, [N].
    users
        How many users lists are for.
    slots
        How fast the price rises with the slots that an item has: above 1, since
        an item that has one on average is in nobody's list in a third of the cases.
    """
    return _covered("ltc", groups == TAIL, users, slots)


def coverage(items: int, users: int, *, slots: float = 1.5) -> Objective:
    """Raise the share of all items that are in somebody's list; see `tail_coverage`.

    Parameters
    ----------
    items
        How many there are, N.
    users, slots
        As above.
    """
    return _covered("coverage", torch.ones(items, dtype=torch.bool), users, slots)


def _covered(name: str, wanted: Tensor, users: int, slots: float) -> Objective:
    def prices(exposure: Tensor) -> Tensor:
        missing = torch.exp(-exposure * users / slots)
        return 0.5 - missing * wanted.to(exposure)

    def value(exposure: Tensor) -> float:
        return -float((exposure[wanted] > 0).double().mean()) if bool(wanted.any()) else 0.0

    return Objective(name, prices, value)


def weighted(name: str, parts: Sequence[tuple[float, Objective]]) -> Objective:
    """Several objectives at once: the prices and values of each, times its weight."""
    if not parts or any(weight <= 0 for weight, _ in parts):
        raise ValueError("expected one objective at least, and positive weights")
    return Objective(
        name,
        lambda e: torch.stack([w * part.prices(e).double() for w, part in parts]).sum(dim=0),
        lambda e: sum(w * part.value(e) for w, part in parts),
    )


def less_popularity(counts: Tensor) -> Objective:
    """Lower the mean popularity of list slots; prices grow with log(1 + training interactions)."""
    prices = _spread(counts.double().log1p())
    share = counts.double() / counts.sum()
    return Objective(
        "popularity",
        lambda _: prices,
        lambda exposure: float((exposure * share).sum() / exposure.sum()),
    )


def more_tail(groups: Tensor) -> Objective:
    """Raise the share of list slots that hold tail items (label 2 of the groups [N])."""
    tail = groups == TAIL
    prices = torch.where(tail, -0.5, 0.5)
    return Objective(
        "tail_share",
        lambda _: prices,
        lambda exposure: -float(exposure[tail].sum() / exposure.sum()),
    )


def group_shares(labels: Tensor, shares: Tensor) -> Objective:
    """Bring the exposure of groups of items (providers, brands, genres) to given shares.

    Parameters
    ----------
    labels
        Group of each item, 0 to G - 1, integer [N].
    shares
        Share of the list slots that each group is to have, [G], of sum 1.
    """
    wanted = shares.double()
    if labels.max() >= len(wanted) or (wanted < 0).any() or abs(float(wanted.sum()) - 1) > 1e-6:
        raise ValueError(
            f"{len(wanted)} shares of sum {float(wanted.sum()):.4g} for the groups 0 to "
            f"{int(labels.max())}; expected one non-negative share for each, of sum 1"
        )

    def surplus(exposure: Tensor) -> Tensor:
        held = torch.zeros_like(wanted).index_add_(0, labels, exposure.double())
        return held / held.sum() - wanted  # [G]

    def prices(exposure: Tensor) -> Tensor:
        too_much = surplus(exposure)
        scale = 2 * too_much.abs().max().clamp_min(0.05)  # fades out near the goal
        return (too_much / scale)[labels]

    return Objective("group_shares", prices, lambda e: float(surplus(e).abs().sum()) / 2)


OBJECTIVES = ("gini", "entropy", "ltc", "coverage", "even", "broad", "popularity", "tail_share")
"""Names that `named_objective` knows."""


def named_objective(name: str, counts: Tensor, groups: Tensor, *, users: int) -> Objective:
    """One of `OBJECTIVES`.

    Parameters
    ----------
    name
        Such as `gini`.
    counts, groups
        Training interactions and popularity group of each item, [N].
    users
        How many users lists are for.
    """
    makers: dict[str, Callable[[], Objective]] = {
        "gini": even_exposure,
        "entropy": lambda: exposure_entropy(users),
        "ltc": lambda: tail_coverage(groups, users),
        "even": lambda: weighted(
            "even", [(1.0, tail_coverage(groups, users)), (EVEN, exposure_entropy(users))]
        ),
        "coverage": lambda: coverage(len(counts), users),
        "broad": lambda: weighted(
            "broad",
            [
                (BROAD, tail_coverage(groups, users)),
                (BROAD, coverage(len(counts), users)),
                (EVEN, exposure_entropy(users)),
            ],
        ),
        "popularity": lambda: less_popularity(counts),
        "tail_share": lambda: more_tail(groups),
    }
    if name not in makers:
        raise ValueError(f"no objective {name!r}; expected one of {', '.join(OBJECTIVES)}")
    return makers[name]()


EVEN = 0.2
"""Weight of the entropy of exposure beside the coverage of the tail in `even` and `broad`."""

BROAD = 0.5
"""Weight of the coverage of the tail, and again of all items, in the objective `broad`."""


def _spread(values: Tensor) -> Tensor:
    """Values shifted and scaled to -0.5 … 0.5; zeros if they are all equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) - 0.5 if high > low else torch.zeros_like(values)
