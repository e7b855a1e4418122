"""Logit adjustment: a multiple of the log popularity is taken off every score.

``s'_ui = s_ui - lam * log(1 + c_i)`` with training counts c: the post-hoc correction of Menon et
al., "Long-tail learning via logit adjustment" (ICLR 2021, arXiv 2007.07314), with items for classes
and ``1 + c_i`` for their prior, so that it is never zero.

Exact over the whole catalogue; O(U * N) a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steerrec.rerank.base import Need, Reranker, check_range
from steerrec.rerank.candidates import Candidates


@dataclass(frozen=True)
class LogitAdjustment(Reranker):
    """Scores less a multiple of the log popularity.

    Attributes
    ----------
    lam
        The multiple; 0 changes nothing. It is in units of the scores: the default settings are for
        logits, and for cosines want to be divided by about the temperature.
    """

    name: ClassVar[str] = "logit-adjustment"
    strength: ClassVar[str] = "lam"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
        *(0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 3),
    )
    needs: ClassVar[tuple[Need, ...]] = ("vectors", "counts")

    lam: float = 0.5

    def __post_init__(self) -> None:
        check_range("lam", self.lam, 0)

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists by the adjusted scores, [U, k]."""
        discount = self.lam * candidates.counts.double().log1p()  # [N]

        def rescore(scores: Tensor, users: slice, items: slice) -> Tensor:
            return scores.sub_(discount[items].to(scores))

        return candidates.rank(rescore=rescore)
