"""Ranking and exposure metrics of lists of recommended catalogue rows [U, k].

Everything is accumulated in integers (hits by rank, exposure by item), so a result does not
depend on how the users were cut into chunks. Not here: making the lists (`steerrec.ranking`),
nor confidence intervals and comparisons (`steerrec.evaluation`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP_NAMES = ("head", "mid", "tail")  # of the labels 0, 1, 2 of steerrec.data.popularity
_TAIL = 2


def gini(exposure: Tensor) -> float:
    """Gini index of how often each of N items is recommended; 0 is equal, near 1 is one item.

    ``(2 * sum_i i * c_(i)) / (N * sum_i c_i) - (N + 1) / N``, the counts c sorted ascending, i
    from 1, items that were never recommended included.

    Parameters
    ----------
    exposure
        Integer counts, [N].

    Returns
    -------
    float
        NaN if nothing was recommended.
    """
    counts = exposure.to(torch.int64).sort().values
    n, total = len(counts), int(counts.sum())
    if total == 0:
        return math.nan
    weighted = int((torch.arange(1, n + 1, device=counts.device) * counts).sum())
    return 2 * weighted / (n * total) - (n + 1) / n


class RankingMetrics:
    """Every metric at k of a list of recommendations, fed a chunk of users at a time.

    With rank r of the target in a user's list (from 1), one relevant item per user, N items,
    c_i the number of list slots that hold item i, and p_i the item's training interactions:

    ====================  ===========================================================
    ``ndcg@k``            mean over users of ``1 / log2(r + 1)``, 0 where not listed
    ``hr@k``              share of users whose list holds the target (= recall)
    ``ndcg_head@k``, ...  the same for users whose target is a head, mid or tail item,
    ``hr_head@k``, ...    NaN if there is no such user
    ``ltc@k``             tail items with c_i > 0 / tail items
    ``gini@k``            see `gini`
    ``coverage@k``        items with c_i > 0 / N
    ``arp@k``             ``sum_i c_i * p_i / (sum_i c_i * sum_i p_i)``: the mean over list
                          slots of the item's share of training interactions
    ``tail_share@k``      share of list slots that hold tail items
    ====================  ===========================================================

    Slots that hold -1 are empty: they count as no recommendation. Values without a denominator
    are NaN. Memory is O(N + users).

    Parameters
    ----------
    counts
        Training interactions of each item, integer [N].
    groups
        Popularity group of each item: 0 head, 1 mid, 2 tail; integer [N].
    k
        Length of the lists.
    """

    def __init__(self, counts: Tensor, groups: Tensor, k: int) -> None:
        if counts.ndim != 1 or groups.shape != counts.shape:
            raise ValueError(
                f"counts have shape {tuple(counts.shape)} and groups {tuple(groups.shape)}; "
                "expected [items] for both"
            )
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        self.k = k
        self.num_items = len(counts)
        self._counts = counts.cpu().to(torch.int64)
        self._groups = groups.cpu().to(torch.int64)
        if len(counts) and not 0 <= self._groups.min() <= self._groups.max() <= _TAIL:
            raise ValueError("groups hold other labels than 0 (head), 1 (mid) and 2 (tail)")
        self._exposure = torch.zeros(self.num_items, dtype=torch.int64)
        # Users by group of the target and its place in the list; the last place is "not listed".
        self._places = torch.zeros(len(GROUP_NAMES), k + 1, dtype=torch.int64)
        self._user_ndcg: list[Tensor] = []
        self._has_targets: bool | None = None

    def update(self, recommended: Tensor, targets: Tensor | None = None) -> None:
        """Add the lists of a chunk of users.

        Parameters
        ----------
        recommended
            Catalogue rows, best first, -1 in empty slots; int64 [B, k].
        targets
            The held-out item of each user, int64 [B]; None if there is none, and then in every
            chunk.

        Raises
        ------
        ValueError
            If shapes do not fit, a row is not in the catalogue, or targets come with some chunks
            only.
        """
        recommended = recommended.cpu()
        if recommended.ndim != 2 or recommended.shape[1] != self.k:
            raise ValueError(
                f"recommended has shape {tuple(recommended.shape)}; expected [users, {self.k}]"
            )
        self._check_rows("recommended", recommended, lowest=-1)
        if self._has_targets not in (None, targets is not None):
            raise ValueError("targets came with some chunks only; pass them always or never")
        if targets is not None:
            self._add_hits(recommended, targets.cpu())
        self._has_targets = targets is not None
        listed = recommended[recommended >= 0]
        self._exposure += torch.bincount(listed, minlength=self.num_items)

    def add_exposure(self, rows: Tensor, counts: Tensor) -> None:
        """Add lists without targets that were counted elsewhere.

        Parameters
        ----------
        rows
            Catalogue rows, integer [R].
        counts
            How many list slots hold each, int64 [R].

        Raises
        ------
        ValueError
            If shapes do not fit, a row is not in the catalogue, or other lists came with targets.
        """
        if rows.shape != counts.shape or rows.ndim != 1:
            raise ValueError(
                f"rows have shape {tuple(rows.shape)} and counts {tuple(counts.shape)}; expected "
                "[rows] for both"
            )
        if self._has_targets:
            raise ValueError("targets came with some chunks only; pass them always or never")
        self._check_rows("rows", rows, lowest=0)
        self._has_targets = False
        self._exposure.index_add_(0, rows.cpu().long(), counts.cpu().long())

    def compute(self) -> dict[str, float]:
        """The metrics of all users so far, keyed like ``"ndcg@10"``.

        The keys of ndcg and hr are absent if the lists came without targets.
        """
        values = self._accuracy() if self._has_targets else {}
        values |= self._exposure_metrics()
        return {f"{name}@{self.k}": value for name, value in values.items()}

    @property
    def exposure(self) -> Tensor:
        """How many list slots hold each item, int64 [N]."""
        return self._exposure.clone()

    @property
    def user_ndcg(self) -> Tensor:
        """nDCG of each user in the order of the updates, float32 [users]."""
        return torch.cat(self._user_ndcg) if self._user_ndcg else torch.empty(0)

    def _add_hits(self, recommended: Tensor, targets: Tensor) -> None:
        if targets.shape != recommended.shape[:1]:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}; expected [{len(recommended)}], "
                "one per list"
            )
        self._check_rows("targets", targets, lowest=0)
        hits = recommended == targets[:, None]  # [B, k]
        places = torch.where(hits.any(dim=1), hits.int().argmax(dim=1), self.k)  # [B]
        cells = self._groups[targets] * (self.k + 1) + places
        self._places += torch.bincount(cells, minlength=self._places.numel()).view_as(self._places)
        self._user_ndcg.append(self._gains()[places].float())

    def _gains(self) -> Tensor:
        """nDCG of a target at each place, float64 [k + 1]."""
        gains = torch.log2(torch.arange(2, self.k + 3, dtype=torch.float64)).reciprocal()
        gains[self.k] = 0.0
        return gains

    def _accuracy(self) -> dict[str, float]:
        places = {"": self._places.sum(dim=0)}
        places |= {f"_{name}": self._places[label] for label, name in enumerate(GROUP_NAMES)}
        gains = self._gains()
        values = {}
        for suffix, users in places.items():
            total = int(users.sum())
            values[f"ndcg{suffix}"] = _ratio(float((users * gains).sum()), total)
            values[f"hr{suffix}"] = _ratio(int(users[: self.k].sum()), total)
        return values

    def _exposure_metrics(self) -> dict[str, float]:
        exposure, tail = self._exposure, self._groups == _TAIL
        slots = int(exposure.sum())
        return {
            "ltc": _ratio(int((exposure[tail] > 0).sum()), int(tail.sum())),
            "gini": gini(exposure),
            "coverage": _ratio(int((exposure > 0).sum()), self.num_items),
            "arp": _ratio(int((exposure * self._counts).sum()), slots * int(self._counts.sum())),
            "tail_share": _ratio(int(exposure[tail].sum()), slots),
        }

    def _check_rows(self, name: str, rows: Tensor, lowest: int) -> None:
        if rows.is_floating_point():
            raise ValueError(f"{name} has dtype {rows.dtype}; expected catalogue rows as integers")
        if rows.numel() and not lowest <= rows.min() <= rows.max() < self.num_items:
            raise ValueError(
                f"{name} holds rows {int(rows.min())} to {int(rows.max())}; "
                f"expected {lowest} to {self.num_items - 1}"
            )


def ranking_metrics(
    recommended: Tensor, targets: Tensor | None = None, *, counts: Tensor, groups: Tensor
) -> dict[str, float]:
    """The metrics of `RankingMetrics` for lists [U, k] that are at hand as a whole.

    Parameters
    ----------
    recommended
        Catalogue rows, best first, -1 in empty slots; int64 [U, k].
    targets
        The held-out item of each user, int64 [U], or None.
    counts, groups
        Training interactions and popularity group of each item, integer [N].

    Returns
    -------
    dict
        Keyed like ``"ndcg@10"``.
    """
    if recommended.ndim != 2:
        raise ValueError(f"recommended has shape {tuple(recommended.shape)}; expected [users, k]")
    metrics = RankingMetrics(counts, groups, recommended.shape[1])
    metrics.update(recommended, targets)
    return metrics.compute()


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
