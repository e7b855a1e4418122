"""Random items of each user's best: a control, no method to use.

k of the ``k + extra`` best items are drawn without replacement and kept in their order. It shows
what exposure metrics alone make of chance. O(U * m) a setting for a pool of m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerrec.errors import MethodError
from steerrec.rerank.base import Need, Reranker, check_range
from steerrec.rerank.candidates import Candidates


@dataclass(frozen=True)
class RandomTop(Reranker):
    """k random ones of the best items.

    Attributes
    ----------
    extra
        How many items more than k there are to draw from; 0 changes nothing.
    """

    name: ClassVar[str] = "random"
    strength: ClassVar[str] = "extra"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 1, 2, 3, 4, 5, 6, 8, 10, 12),
        *(15, 20, 25, 30, 40, 50, 60, 70, 80, 90),
    )
    needs: ClassVar[tuple[Need, ...]] = ("pool",)
    control: ClassVar[bool] = True

    extra: int = 40

    def __post_init__(self) -> None:
        check_range("extra", self.extra, 0)
        if self.extra != int(self.extra):
            raise MethodError(f"extra is {self.extra}; expected a whole number")

    def lists(self, candidates: Candidates) -> Tensor:
        """Drawn lists, [U, k]."""
        k, size = candidates.k, candidates.k + int(self.extra)
        size = min(size, len(candidates.labels))
        if size > candidates.pool:
            raise MethodError(
                f"random draws from {size} items, the pool holds {candidates.pool}; gather "
                "candidates with a larger pool, or draw from fewer"
            )
        ids = candidates.ids[:, :size]
        generator = torch.Generator().manual_seed(candidates.seed)
        drawn = torch.rand(ids.shape, generator=generator).masked_fill(ids < 0, -1)
        return ids.gather(1, drawn.topk(k, dim=1).indices.sort(dim=1).values)
