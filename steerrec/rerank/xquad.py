"""xQuAD for popularity: the next place goes to what the list, and its user, still lack.

Abdollahpouri, Burke & Mobasher, "Managing popularity bias in recommender systems with personalized
re-ranking" (FLAIRS 2019, arXiv 1901.07555, eq. 4), after Santos et al. (WWW 2010). The list S is
filled greedily by

    ``(1 - lam) * P(v|u) + lam * sum_c P(c|u) * P(v|c) * prod_{i in S} (1 - P(i|c, S))``

over two categories, the long tail (a fifth of the interactions) and the short head (the rest: head
and mid items). P(c|u) is the category's share of the user's history, P(v|c) 1 where v belongs to c.
P(i|c, S) is 1 for an item of c and else 0 (binary), or the share of S that is in c (smooth). P(v|u)
is the score on the user's own scale from 0, the lowest of the catalogue, to 1.

Exact over the whole catalogue, of which it needs the k best of each group; O(U * k) a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from steerrec.data import TAIL
from steerrec.rerank.base import Need, Reranker, check_choice, check_range
from steerrec.rerank.candidates import Candidates
from steerrec.rerank.filling import fill

Coverage = Literal["smooth", "binary"]


@dataclass(frozen=True)
class XQuAD(Reranker):
    """xQuAD over short head and long tail.

    Attributes
    ----------
    lam
        Weight of coverage against relevance, 0 to 1; 0 changes nothing.
    coverage
        `smooth`: what has a place already counts by its share of the list. `binary`: one item of a
        category covers it, and the rest of the list goes by score.
    """

    name: ClassVar[str] = "xquad"
    strength: ClassVar[str] = "lam"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25),
        *(0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
    )
    needs: ClassVar[tuple[Need, ...]] = ("groups", "histories")

    lam: float = 0.5
    coverage: Coverage = "smooth"

    def __post_init__(self) -> None:
        check_range("lam", self.lam, 0, 1)
        check_choice("coverage", self.coverage, get_args(Coverage))

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists filled greedily, [U, k]."""
        grouped, relevance = candidates.grouped, candidates.relevance
        tail = torch.arange(grouped.ids.shape[1]) == TAIL  # [G]
        taste = candidates.shares[:, TAIL, None]
        liking = torch.where(tail, taste, 1 - taste)  # P(c|u) of each group's category, [U, G]

        def utility(place: int, taken: Tensor) -> Tensor:
            in_tail = taken[:, TAIL, None].double()
            held = torch.where(tail, in_tail, place - in_tail)  # in the group's category, [U, G]
            if self.coverage == "binary":
                missing = (held == 0).double()
            else:
                missing = (1 - held / max(place, 1)) ** place
            return (1 - self.lam) * grouped.next(relevance, taken) + self.lam * liking * missing

        return fill(grouped, utility)[0]


@dataclass(frozen=True)
class BinaryXQuAD(XQuAD):
    """xQuAD in its binary form."""

    name: ClassVar[str] = "xquad-binary"

    coverage: Coverage = "binary"
