"""Calibrated popularity: lists as popular, item by item, as what their user took before.

Steck, "Calibrated recommendations" (RecSys 2018, eq. 3 to 6), with popularity groups for genres, as
Abdollahpouri et al., "User-centered evaluation of popularity bias in recommender systems" (UMAP
2021), use it. The list I maximises ``(1 - lam) * sum_{i in I} r_ui - lam * KL(p_u, q_I)``, and is
filled greedily, place by place. p_u is the share of each group in the history, q_I that in the
list, smoothed: ``KL = sum_g p_g log(p_g / ((1 - a) q_g + a p_g))``. r is the score on the user's
own scale from 0, the lowest of the catalogue, to 1, so that `lam` means the same for every model.

Exact over the whole catalogue, of which it needs the k best of each group; O(U * k * G^2) a setting
for G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerrec.rerank.base import Need, Reranker, check_range
from steerrec.rerank.candidates import Candidates
from steerrec.rerank.filling import fill


@dataclass(frozen=True)
class Calibrated(Reranker):
    """Calibration to the popularity of the user's own history.

    Attributes
    ----------
    lam
        Weight of calibration against relevance, 0 to 1; 0 changes nothing, at 1 only the groups
        count and the scores decide within them.
    smoothing
        How much of p_u is mixed into q_I, so that a group that is missing from the list costs a
        finite amount; Steck's value by default.
    """

    name: ClassVar[str] = "calibrated"
    strength: ClassVar[str] = "lam"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05),
        *(0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85, 1),
    )
    needs: ClassVar[tuple[Need, ...]] = ("groups", "histories")

    lam: float = 0.5
    smoothing: float = 0.01

    def __post_init__(self) -> None:
        check_range("lam", self.lam, 0, 1)
        check_range("smoothing", self.smoothing, 1e-9, 1)

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists filled greedily, [U, k]."""
        grouped, relevance = candidates.grouped, candidates.relevance
        wanted = candidates.shares.unsqueeze(1)  # [U, 1, G]
        one_more = torch.eye(wanted.shape[2], dtype=torch.float64)

        def utility(place: int, taken: Tensor) -> Tensor:
            listed = (taken.unsqueeze(1) + one_more) / (place + 1)  # [U, G taken from, G]
            listed = (1 - self.smoothing) * listed + self.smoothing * wanted
            divergence = torch.xlogy(wanted, wanted / listed.clamp(min=1e-300)).sum(dim=2)
            return (1 - self.lam) * grouped.next(relevance, taken) - self.lam * divergence

        return fill(grouped, utility)[0]
