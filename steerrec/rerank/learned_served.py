"""Learned steering for the very users of a comparison, all of whom it looks at, as P-MMF does.

Of those users it sees the vectors and what they have taken, never what they took next; validation
and test users are steered by recipes of their own, learned in the same way. The strength is the
price of a list slot in median temperatures of the users who are learned for, so that the one chosen
on validation means the same on test. Learning is in `fit_seconds` of a comparison, not in the
milliseconds a user.

It ranks the whole catalogue anew; O(U * N) a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from steerrec.rerank.base import Need, Reranker, check_range
from steerrec.rerank.candidates import Candidates
from steerrec.rerank.learned import Learned
from steerrec.rerank.vectors import moved_lists
from steerrec.served_steering import ServedSteering


@dataclass(frozen=True)
class LearnedServed(Reranker):
    """Steering learned for the users who are served.

    Attributes
    ----------
    transform
        How it is learned.
    position
        The price, as a share of the highest: 0 changes nothing.
    """

    name: ClassVar[str] = "learned-served"
    strength: ClassVar[str] = "position"
    settings: ClassVar[tuple[float, ...]] = Learned.settings
    needs: ClassVar[tuple[Need, ...]] = ("vectors", "transform")

    transform: ServedSteering
    position: float = 1.0

    def __post_init__(self) -> None:
        check_range("position", self.position, 0, 1)

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists from the steered vectors, [U, k]."""
        if not self.position or not len(candidates):
            return candidates.base
        recipe = self.transform.path(candidates).at(self.position)
        return moved_lists(candidates, recipe.transform(self.transform.sae))

    def describe(self) -> dict[str, Any]:
        """Name and parameters, and how it is learned."""
        return {**super().describe(), "learning": self.transform.describe()}
