"""Learned recipes in the order of the price that exposure had when they came out.

Not here: how they are learned (`steerrec.learning`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError
from steerrec.operations import ResponseSteering


@dataclass(frozen=True, eq=False)
class SteeringPath:
    """What one run of learning goes through: a recipe for every price.

    Attributes
    ----------
    recipes
        In the order of their prices, the identity first; each is meant for strength 1.
    """

    recipes: tuple[ResponseSteering, ...]

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ArtifactError("a path has one recipe at least: the identity, where it begins")

    def at(self, position: float) -> ResponseSteering:
        """The recipe at a position between 0, the identity, and 1, the last.

        Between two recipes that have been learned it is the mean of both, weighted by nearness.
        """
        if not 0 <= position <= 1:
            raise ArtifactError(f"the position is {position}; expected 0 to 1")
        place = position * (len(self.recipes) - 1)
        low = min(int(place), len(self.recipes) - 2) if len(self.recipes) > 1 else 0
        one, share = self.recipes[low], place - low
        if share == 0:
            return one
        other = self.recipes[low + 1]
        price = (1 - share) * one.provenance["price"] + share * other.provenance["price"]
        return replace(
            one,
            vectors=one.vectors.lerp(other.vectors, share),
            constant=one.constant.lerp(other.constant, share),
            provenance={**self.describe(), "price": price},
        )

    def describe(self) -> dict[str, Any]:
        """How it was learned, and the price at its end, JSON-able."""
        found = {k: v for k, v in self.recipes[-1].provenance.items() if k != "valid"}
        return {**found, "recipes": len(self.recipes)}

    def digest(self) -> str:
        """Sixteen hex digits that depend on every number of the recipes."""
        sha = hashlib.sha256()
        for recipe in self.recipes:
            for tensor in (recipe.vectors, recipe.constant):
                sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def transform(self, sae: SparseAutoencoder) -> PathTransform:
        """The path as a function of user vectors [B, H] and a position on it."""
        return PathTransform(sae, self)


@dataclass
class PathTransform:
    """User vectors steered by the recipe at a position of a path.

    Attributes
    ----------
    sae, path
        What steers.
    """

    sae: SparseAutoencoder
    path: SteeringPath
    _last: tuple[float, Callable[[Tensor], Tensor]] | None = field(default=None, repr=False)

    def __call__(self, x: Tensor, position: float) -> Tensor:
        """Steered user vectors, [B, H]."""
        if self._last is None or self._last[0] != position:  # asked for chunk after chunk
            self._last = position, self.path.at(position).transform(self.sae)
        return self._last[1](x)
