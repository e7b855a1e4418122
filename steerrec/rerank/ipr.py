"""IPR, inverse popularity re-ranking: a score is divided by how popular its item is.

As among the baselines of Ahmadov & Mansoury (RecSys 2025, arXiv 2508.17297):
``s'_ui = t(s_ui) / (1 + alpha * c_i / max_j c_j)`` with training counts c. Their code divides raw
scores, t(s) = s; where those are negative, as logits often are, that rewards the popular item.
Here t is monotone and nowhere negative, unless that variant is asked for.

Exact over the whole catalogue; O(U * N) a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from steerrec.rerank.base import Need, Reranker, check_choice, check_range
from steerrec.rerank.candidates import Candidates

Transform = Literal["softmax", "sigmoid", "minmax", "published"]


@dataclass(frozen=True)
class IPR(Reranker):
    """Inverse popularity re-ranking.

    Attributes
    ----------
    alpha
        The score of the most popular item is divided by ``1 + alpha``; 0 changes nothing. With
        `softmax` and ever larger alpha the order becomes that of ``s - log(c)``.
    transform
        What makes scores positive: `softmax` over the catalogue, which takes
        ``log(1 + alpha * c_i / max c)`` off a logit; `sigmoid`, which cannot tell large logits
        apart; `minmax`, the distance from the user's lowest score. `published` leaves scores as
        they are.
    """

    name: ClassVar[str] = "ipr"
    strength: ClassVar[str] = "alpha"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3),
        *(5, 7, 10, 15, 20, 30, 50, 100, 300, 1000),
    )
    needs: ClassVar[tuple[Need, ...]] = ("vectors", "counts")

    alpha: float = 1.0
    transform: Transform = "softmax"

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_choice("transform", self.transform, get_args(Transform))

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists by the divided scores, [U, k]."""
        if self.alpha == 0:  # no monotone transform changes an order
            return candidates.base
        counts = candidates.counts.double()
        divisor = 1 + self.alpha * counts / counts.max().clamp(min=1)  # [N]

        def rescore(scores: Tensor, users: slice, items: slice) -> Tensor:
            by = divisor[items].to(scores.device)
            if self.transform == "softmax":  # in logarithms, as the next: the order is the same
                return scores.sub_(by.log().to(scores))
            if self.transform == "sigmoid":  # large logits are told apart by their last bits
                return F.logsigmoid(scores.double()) - by.log()
            if self.transform == "minmax":
                scores.sub_(candidates.lowest[users, None].to(scores))
            return scores.div_(by.to(scores))

        return candidates.rank(rescore=rescore)
