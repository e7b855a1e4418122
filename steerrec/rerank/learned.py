"""Learned steering as a method of a comparison: its strength is how far along its path it is.

One run of `steerrec.learn_path` gives a recipe for each price of exposure, the same step on the
user vector for whoever comes; nothing is known of the other users of a batch. Unlike the rules of
`vectors` it has been learned for these lists, on training histories, and its path ends where
validation says; the cost of that is in `fit_seconds` of a comparison.

It ranks the whole catalogue anew; O(U * N) a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from steerrec.rerank.base import Need, check_range
from steerrec.rerank.vectors import _Moved
from steerrec.steering_path import PathTransform


@dataclass(frozen=True)
class Learned(_Moved):
    """Learned steering.

    Attributes
    ----------
    transform
        From `steerrec.learn_path(...).transform(sae)`.
    position
        Where on the path: 0 changes nothing, 1 is where accuracy on validation no longer allowed
        more; the price of exposure grows in proportion.
    """

    name: ClassVar[str] = "learned"
    strength: ClassVar[str] = "position"
    settings: ClassVar[tuple[float, ...]] = tuple(i / 19 for i in range(20))
    needs: ClassVar[tuple[Need, ...]] = ("vectors", "transform")

    transform: PathTransform
    position: float = 1.0

    def __post_init__(self) -> None:
        check_range("position", self.position, 0, 1)

    def vectors(self, vectors: Tensor) -> Tensor:
        """Steered user vectors."""
        return self.transform(vectors, self.position) if self.position else vectors

    def describe(self) -> dict[str, Any]:
        """Name and parameters, how the path was learned, and a digest of its recipes."""
        path = self.transform.path
        return {**super().describe(), "learning": path.describe(), "digest": path.digest()}
