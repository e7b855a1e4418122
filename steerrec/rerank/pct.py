"""PCT: lists calibrated to personal targets that add up to a target for the whole system.

Wang et al., "Two-sided calibration for quality-aware responsible recommendation" (RecSys 2023,
10.1145/3604915.3608799). The *solver* finds an exposure of the groups for each user: as close to
the user's own history as can be, while the mean over all users is the policy's. The *re-ranker*
then makes two passes over a list. The first goes from place to place and takes the best item whose
group has not used up its target with what the place is worth, 1 / log2(rank + 1). The second fills
the places that the first left empty by ``lam / (r + 1) - (1 - lam) * d``, with r the item's place
in the unchanged ranking, from 0, and d half the squared distance to the target that it would leave.

Exact over the whole catalogue, of which it needs the k best of each group; r is exact within the
pool, and the pool's size m for all items beyond, a difference of lam / (m + 1) at most. O(U * k *
G) a setting for G groups, and O(U * log U) for the targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from steerrec.rerank.base import Need, Reranker, check_choice, check_range
from steerrec.rerank.candidates import Candidates
from steerrec.rerank.filling import fill

Policy = Literal["equal", "avg-equal"]

_SLACK = 1e-9  # of an exposure, so that a target that is met exactly is not missed by rounding


@dataclass(frozen=True)
class PCT(Reranker):
    """Personalised calibration targets over the popularity groups.

    Attributes
    ----------
    degree
        How far a list's targets go from the exposure that the unchanged list gives (0, and then it
        stays as it is) to the personal targets (1, the paper's method). The paper has no parameter
        that leads back to the unchanged list.
    policy
        The target of the whole system: `equal` shares for all groups, or shares by how many items
        they have, `avg-equal`.
    lam
        Weight of relevance in the second pass, 0 to 1; the authors' value by default.
    """

    name: ClassVar[str] = "pct"
    strength: ClassVar[str] = "degree"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35),
        *(0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
    )
    needs: ClassVar[tuple[Need, ...]] = ("groups", "pool", "histories")

    degree: float = 1.0
    policy: Policy = "equal"
    lam: float = 0.5

    def __post_init__(self) -> None:
        check_range("degree", self.degree, 0, 1)
        check_choice("policy", self.policy, get_args(Policy))
        check_range("lam", self.lam, 0, 1)

    def targets(self, candidates: Candidates) -> Tensor:
        """Personal targets of the policy, shares of the exposure of a list, float64 [U, G]."""
        sizes = candidates.group_sizes.double()
        overall = sizes if self.policy == "avg-equal" else (sizes > 0).double()
        return personal_targets(candidates.shares, overall / overall.sum())

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists of two passes, [U, k]."""
        grouped, lam = candidates.grouped, self.lam
        worth = torch.arange(2, candidates.k + 2, dtype=torch.float64).log2().reciprocal()  # [k]
        own = _exposure(candidates, worth)
        target = (1 - self.degree) * own + self.degree * worth.sum() * self.targets(candidates)
        spent = torch.zeros_like(target)

        def first_pass(place: int, taken: Tensor) -> Tensor:
            fits = spent + worth[place] <= target + _SLACK
            return (-grouped.next(grouped.order, taken).double()).masked_fill(~fits, -torch.inf)

        def second_pass(place: int, taken: Tensor) -> Tensor:
            gap = (spent - target).square()
            left = gap.sum(dim=1, keepdim=True) - gap + (spent + worth[place] - target).square()
            rank = grouped.next(grouped.ranks, taken)
            return lam / (rank + 1) - (1 - lam) * left / 2

        def spend(place: int, group: Tensor, filled: Tensor) -> None:
            spent.scatter_add_(1, group, filled * worth[place])

        chosen, taken = fill(grouped, first_pass, then=spend)
        return fill(grouped, second_pass, chosen=chosen, taken=taken, then=spend)[0]


@dataclass(frozen=True)
class PCTAvgEqual(PCT):
    """PCT with the exposure of each group by its number of items."""

    name: ClassVar[str] = "pct-avg-equal"

    policy: Policy = "avg-equal"


def personal_targets(shares: Tensor, overall: Tensor) -> Tensor:
    """Distributions that are close to the users' own and whose mean is the overall one.

    A solution of the linear programme ``min sum_u |q_u - p_u|_1`` over distributions q_u with
    ``mean_u q_u = overall``. What a group has too much of has to be taken from users who have it,
    and can be; what is taken goes to the groups that lack it. So the least is
    ``U * |mean_u p_u - overall|_1``, and all ways to take and give it are solutions; this one takes
    evenly, which keeps the largest change of a user small: ``min(p_u, t)`` of a group, with one t
    for all users.

    The authors move every user along one direction, that of ``mean_u p_u - overall``. Where that is
    possible it is a solution too; with three groups it often is not, since a user who has nothing
    of a group can give nothing.

    Parameters
    ----------
    shares
        The users' own distributions p, float64 [U, G].
    overall
        The mean that is asked for, float64 [G].

    Returns
    -------
    Tensor
        Distributions q, float64 [U, G].
    """
    change = overall - shares.mean(dim=0)  # [G]
    taken = torch.zeros_like(shares)
    for group in (change < 0).nonzero()[:, 0].tolist():
        total = -float(change[group]) * len(shares)
        taken[:, group] = shares[:, group].clamp(max=_level(shares[:, group], total))
    given = change.clamp(min=0)
    given = given / given.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return shares - taken + taken.sum(dim=1, keepdim=True) * given


def _level(values: Tensor, total: float) -> float:
    """The t for which ``min(values, t)`` adds up to a total that is at most the values' own."""
    ordered = values.sort().values
    below = ordered.cumsum(0) - ordered  # what the smaller ones add up to
    rest = torch.arange(len(values), 0, -1)
    at = int(torch.searchsorted(below + rest * ordered, total).clamp(max=len(values) - 1))
    return (total - float(below[at])) / int(rest[at])


def _exposure(candidates: Candidates, worth: Tensor) -> Tensor:
    """What each group's places in the unchanged list are worth, float64 [U, G]."""
    base = candidates.base
    exposure = torch.zeros_like(candidates.shares)
    groups = candidates.labels[base.clamp(min=0)]
    return exposure.scatter_add_(1, groups, (base >= 0) * worth)
