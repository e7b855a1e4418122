"""Steps on the user vector as methods of a comparison: without an SAE, and with one.

`MeanDifference` steers along the difference between what unpopular and what popular histories make
of the user vector, as in contrastive activation addition (Rimsky et al., arXiv 2312.06681), with
the synthetic users of a contrast for the two sides. `RawPopSteer` is the rule of Ahmadov & Mansoury
(RecSys 2025, arXiv 2508.17297) with the H dimensions of the user vector in place of neurons. Both
are there to tell what the SAE adds. `PopSteer` is any steering of the scored vector, so that it can
be swept like the others.

They rank the whole catalogue anew; O(U * N) a setting.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerrec.attribution import AttributionTable, score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.profiles import Contrast
from steerrec.recommender import Recommender
from steerrec.rerank.base import Need, Reranker, check_range
from steerrec.rerank.candidates import Candidates
from steerrec.sites import Site
from steerrec.steering import Steering

_ROWS = 4096


def score_dimensions(
    rec: Recommender,
    contrast: Contrast,
    train: Histories,
    *,
    site: Site | None = None,
    users: int = 8192,
    seed: int = 0,
) -> AttributionTable:
    """The attribution table of the user vector's own dimensions, [H] rows.

    That is the table of an SAE whose latents are these dimensions; see `score_neurons`.
    """
    width = rec.item_head.width
    plain = SparseAutoencoder(width, width, k=width)
    with torch.no_grad():
        plain.W_enc.copy_(torch.eye(width))
        plain.W_dec.copy_(torch.eye(width))
    return score_neurons(rec, plain, contrast, train, site=site, users=users, seed=seed)


@dataclass(frozen=True)
class _Moved(Reranker):
    """The catalogue ranked from other user vectors."""

    @abstractmethod
    def vectors(self, vectors: Tensor) -> Tensor:
        """User vectors [B, H] as the method makes them."""

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists from the moved vectors, [U, k]."""
        return moved_lists(candidates, self.vectors)


@torch.no_grad()
def moved_lists(candidates: Candidates, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Lists [U, k] from the vectors that a function of user vectors [B, H] makes."""
    moved = [move(part) for part in candidates.vectors.split(_ROWS)]
    return candidates.rank(vectors=torch.cat(moved))


@dataclass(frozen=True)
class _Shifted(_Moved):
    dimensions: AttributionTable
    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)

    @property
    @abstractmethod
    def shift(self) -> Tensor:
        """What strength 1 adds to a user vector, [H]."""

    def vectors(self, vectors: Tensor) -> Tensor:
        """``vectors + alpha * shift``."""
        return vectors + self.alpha * self.shift.to(vectors)


@dataclass(frozen=True)
class MeanDifference(_Shifted):
    """User vectors moved from the popular towards the unpopular side of a contrast.

    Attributes
    ----------
    dimensions
        Table of the contrast, from `score_dimensions`.
    alpha
        How much of the difference of the two means is added; 0 changes nothing.
    """

    name: ClassVar[str] = "mean-difference"
    strength: ClassVar[str] = "alpha"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175),
        *(0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85),
    )
    needs: ClassVar[tuple[Need, ...]] = ("vectors", "dimensions")

    @property
    def shift(self) -> Tensor:
        """Mean over group B less mean over group A, [H]."""
        return self.dimensions["mean_b"] - self.dimensions["mean_a"]


@dataclass(frozen=True)
class RawPopSteer(_Shifted):
    """The PopSteer rule on the dimensions of the user vector.

    Attributes
    ----------
    dimensions
        Table of the contrast, from `score_dimensions`.
    alpha
        Strength of the rule; 0 changes nothing.
    """

    name: ClassVar[str] = "raw-popsteer"
    strength: ClassVar[str] = "alpha"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
        *(0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2),
    )
    needs: ClassVar[tuple[Need, ...]] = ("vectors", "dimensions")

    @property
    def shift(self) -> Tensor:
        """``-w_j * s_j`` where d_j > 0 and ``w_j * s_j`` where d_j < 0, [H]; see `Steering`."""
        return Steering.popsteer(self.dimensions).shift


@dataclass(frozen=True)
class PopSteer(_Moved):
    """A steering of the scored vector.

    Attributes
    ----------
    transform
        Maps user vectors [B, H] and a strength to [B, H]: a `steerrec.SteerTransform`, say.
    alpha
        Strength; 0 is the model without any steering, also where the recipe puts a reconstruction
        in place of the vector.
    """

    name: ClassVar[str] = "popsteer"
    strength: ClassVar[str] = "alpha"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        *(1, 1.1, 1.25, 1.4, 1.5, 1.75, 2, 2.5, 3, 4),
    )
    needs: ClassVar[tuple[Need, ...]] = ("vectors", "transform")

    transform: Callable[[Tensor, float], Tensor]
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)

    def vectors(self, vectors: Tensor) -> Tensor:
        """Steered user vectors."""
        return self.transform(vectors, self.alpha) if self.alpha else vectors
