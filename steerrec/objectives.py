"""What learned steering is for: which items have too much exposure, and how well it is spread.

An objective puts a price on a list slot of each item. Where the exposure of items is to be evened
out, the price is the derivative of the measure by the item's exposure, up to a factor: it depends
on how often the item is recommended now, so it is asked again and again while steering is learned.
"""

from __future__ import annotations

from collections.abc import Callable
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
        From exposure (list slots by item, float [N]) to the price of a slot, float [N], from
        -0.5, wanted, to 0.5, unwanted.
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


def named_objective(name: str, counts: Tensor, groups: Tensor) -> Objective:
    """`gini`, `popularity` or `tail_share` for a catalogue of these counts and groups [N]."""
    makers: dict[str, Callable[[], Objective]] = {
        "gini": even_exposure,
        "popularity": lambda: less_popularity(counts),
        "tail_share": lambda: more_tail(groups),
    }
    if name not in makers:
        raise ValueError(f"no objective {name!r}; expected one of {', '.join(makers)}")
    return makers[name]()


def _spread(values: Tensor) -> Tensor:
    """Values shifted and scaled to -0.5 … 0.5; zeros if they are all equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) - 0.5 if high > low else torch.zeros_like(values)
