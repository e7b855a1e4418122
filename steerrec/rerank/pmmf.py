"""P-MMF: max-min fair exposure of providers, kept up online while users come one by one.

Xu et al., "P-MMF: Provider max-min fairness re-ranking in recommender system" (WWW 2023, arXiv
2303.06660). For a window of T users the lists maximise

    ``(1/T) * sum_t sum_{i in list t} s_ti + lam * min_p e_p / gamma_p``, with ``e_p <= gamma_p``,

e_p being the exposure of provider p in the window (the number of places) and gamma_p its weight,
which is also its budget. Mirror descent in the dual space does it online: user t gets the k items
of the largest ``s_ti - mu_p(i)`` of providers with budget left, in the order of their scores; then

    ``g = momentum * (budget left - exposure) + (1 - momentum) * g``, as shares of the window's,
    ``mu = argmin_{mu' in D} <g, mu'> + |gamma * (mu' - mu)|^2 / (2 * step)``, with
    ``D = {mu : sum_{p in S} gamma_p * mu_p >= -lam for every set S of providers}``.

Here the providers are the popularity groups or, in `PMMFItems`, the items. The weights are, as in
the authors' code, ``(1 + 1/P)`` times the share of the catalogue that P providers have. Duals and
budgets start anew in each window; the windows are computed side by side, which is the same.

With groups exact over the whole catalogue, of which it needs the k best of each; with items it
chooses from the pool. O(U * G * k log(G k)) a setting, in T steps one after the other; with items
O(U * (m log m + N)) in T steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from steerrec.rerank.base import Need, Reranker, check_choice, check_range
from steerrec.rerank.candidates import Candidates

Scale = Literal["minmax", "sigmoid", "raw"]


@dataclass(frozen=True, eq=False)
class _Market:
    """Who competes: every user's items, best first, whose they are, and what providers weigh.

    Attributes
    ----------
    ids
        Catalogue rows, int64 [U, C]; -1 where none is left.
    scores
        What they are worth to the user, float64 [U, C].
    owner
        The provider of each, int64 [U, C].
    weights
        gamma of each provider, as a share of the places of a window, float64 [P].
    """

    ids: Tensor
    scores: Tensor
    owner: Tensor
    weights: Tensor


@dataclass(frozen=True)
class PMMF(Reranker):
    """P-MMF with the popularity groups for providers.

    Attributes
    ----------
    degree
        How far the providers' weights go from the exposure that they have in the unchanged lists
        (0, where there is nothing to re-rank) to their share of the catalogue (1, the paper's
        method). The paper's own trade-off, `lam`, does not lead back to the unchanged lists: the
        budgets hold whatever it is.
    lam
        Weight of the least provider's exposure against relevance.
    eta
        Step of the descent, in units of ``1 / (P^2 * sqrt(T))``: by the square, since weights are
        about 1 / P; the authors' code has 0.001 in units of ``1 / sqrt(T)``.
    momentum
        Weight of the new gradient against the one before, above 0 and at most 1.
    window
        Users in a window, T; None for all users.
    scale
        Scores as they are (`raw`), their `sigmoid` as in the authors' code, which cannot tell large
        logits apart, or `minmax`, from 0 for the lowest of the catalogue to 1 for the user's best.
    """

    name: ClassVar[str] = "p-mmf"
    strength: ClassVar[str] = "degree"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35),
        *(0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
    )
    needs: ClassVar[tuple[Need, ...]] = ("groups",)

    degree: float = 1.0
    lam: float = 0.1
    eta: float = 0.1
    momentum: float = 0.1
    window: int | None = 256
    scale: Scale = "minmax"

    def __post_init__(self) -> None:
        check_range("degree", self.degree, 0, 1)
        check_range("lam", self.lam, 0)
        check_range("eta", self.eta, 0)
        check_range("momentum", self.momentum, 1e-9, 1)
        check_range("window", 1 if self.window is None else self.window, 1)
        check_choice("scale", self.scale, get_args(Scale))

    def user_order(self, candidates: Candidates) -> Tensor:
        """The order in which users come, which the lists depend on: a seeded permutation, [U]."""
        generator = torch.Generator().manual_seed(candidates.seed)
        return torch.randperm(len(candidates), generator=generator)

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists of all users in the order of `user_order`, returned in their own, [U, k]."""
        base = candidates.base
        if self.degree == 0 or not len(base):
            return base
        market = self._market(candidates)
        order = self.user_order(candidates)
        users, k = base.shape
        length = min(self.window or users, users)
        count = math.ceil(users / length)  # windows, of which the last may be shorter
        lengths = torch.full((count, 1), length)
        lengths[-1] = users - (count - 1) * length
        places = (lengths * k).double()  # [W, 1]
        weights = market.weights
        step = self.eta / (len(weights) ** 2 * lengths.double().sqrt())  # [W, 1]
        dual = torch.zeros(count, len(weights), dtype=torch.float64)  # [W, P]
        gradient = torch.zeros_like(dual)
        budget = places * weights
        lists = torch.empty_like(base)
        for turn in range(length):
            now = slice(0, count if turn < lengths[-1] else count - 1)
            user = order[torch.arange(now.stop) * length + turn]  # one of each window
            chosen, owner = _choose(market, user, dual[now], budget[now], k)
            lists[user] = chosen
            exposure = torch.zeros_like(dual[now])
            exposure.scatter_add_(1, owner, (chosen >= 0).double())
            budget[now] -= exposure
            new = budget[now] / places[now] - exposure / k
            gradient[now] = self.momentum * new + (1 - self.momentum) * gradient[now]
            moved = weights * dual[now] - step[now] * gradient[now] / weights
            dual[now] = project(moved, self.lam) / weights
        return lists

    def _market(self, candidates: Candidates) -> _Market:
        grouped = candidates.grouped
        best_first = grouped.order.flatten(1).argsort(dim=1)  # [U, G * k]
        ids = grouped.ids.flatten(1).gather(1, best_first)
        values = {"minmax": candidates.relevance, "raw": grouped.scores.double()}
        values["sigmoid"] = grouped.scores.double().sigmoid()
        scores = values[self.scale].flatten(1).gather(1, best_first)
        sizes = candidates.group_sizes
        present = sizes > 0
        provider = present.cumsum(0) - 1  # of each group that has items
        return _Market(
            ids=ids,
            scores=scores,
            owner=provider[candidates.labels[ids.clamp(min=0)]],
            weights=self._weights(sizes[present], candidates, provider[candidates.labels]),
        )

    def _weights(self, sizes: Tensor, candidates: Candidates, provider: Tensor) -> Tensor:
        """The weight of each provider, given its number of items [P] and whose items are [N]."""
        listed = candidates.base[candidates.base >= 0]
        exposure = torch.bincount(provider[listed], minlength=len(sizes)).double()
        share = sizes / sizes.sum()
        if len(listed):
            share = self.degree * share + (1 - self.degree) * exposure / exposure.sum()
        return (1 + 1 / len(sizes)) * share


@dataclass(frozen=True)
class PMMFItems(PMMF):
    """P-MMF with the items themselves for providers, one window for all users.

    It chooses from the pool, and is as sequential as its users are many.
    """

    name: ClassVar[str] = "p-mmf-items"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2),
        *(0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
    )
    needs: ClassVar[tuple[Need, ...]] = ("pool",)

    eta: float = 1.0
    window: int | None = None

    def _market(self, candidates: Candidates) -> _Market:
        scores, items = candidates.scores.double(), torch.arange(len(candidates.labels))
        if self.scale == "minmax":
            scores = candidates.relative(scores)
        elif self.scale == "sigmoid":
            scores = scores.sigmoid()
        return _Market(
            ids=candidates.ids,
            scores=scores,
            owner=candidates.ids.clamp(min=0),
            weights=self._weights(torch.ones(len(items)), candidates, items),
        )


def _choose(
    market: _Market, user: Tensor, dual: Tensor, budget: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k items that are worth most to each user [W], by score, and their providers, [W, k].

    Items of providers without budget come after all others, as in the authors' code.
    """
    ids, owner = market.ids[user], market.owner[user]
    worth = market.scores[user] - dual.gather(1, owner)
    last = (budget.gather(1, owner) <= 0).byte() + 2 * (ids < 0).byte()
    order = worth.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, last.gather(1, order).argsort(dim=1, stable=True))
    first = order[:, :k].sort(dim=1).values  # the candidates are in the order of their scores
    return ids.gather(1, first), owner.gather(1, first)


def project(moved: Tensor, lam: float) -> Tensor:
    """The nearest points of which no coordinates add up to less than -lam.

    That is the projection on D in the coordinates ``gamma * mu``. The least sum of any coordinates
    is that of the negative ones, so these must not add up to more than lam in size: those above
    zero stay, and the sizes of the others are projected on the simplex of that sum, all made
    smaller by one threshold (Held, Wolfe & Crowder 1974; Duchi et al. 2008).

    Parameters
    ----------
    moved
        Points, [..., P].
    lam
        What the negative coordinates may add up to, at least 0.

    Returns
    -------
    Tensor
        [..., P].
    """
    size = (-moved).clamp(min=0)
    if bool((size.sum(dim=-1) <= lam).all()):
        return moved
    ordered = size.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(dim=-1) - lam
    rank = torch.arange(1, moved.shape[-1] + 1, dtype=moved.dtype, device=moved.device)
    count = (ordered * rank > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, count - 1) / count
    return moved + torch.minimum(size, threshold.clamp(min=0))
