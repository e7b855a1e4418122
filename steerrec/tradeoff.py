"""The trade-off of a steering over its strengths: accuracy against exposure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from steerrec.autoencoder import SparseAutoencoder
from steerrec.choosing import BUDGETS, choose
from steerrec.data import Split
from steerrec.evaluation import (
    Evaluation,
    Which,
    capture_held_out,
    measure_lists,
    rank,
    rank_steered,
)
from steerrec.many_strengths import steered_at
from steerrec.progress import track
from steerrec.recipes import Recipe
from steerrec.recommender import Recommender
from steerrec.sites import Site
from steerrec.steering import SteerTransform


@dataclass(frozen=True)
class SweepPoint:
    """One strength, measured on validation and on test."""

    alpha: float
    valid: Evaluation
    test: Evaluation


@dataclass(frozen=True)
class Sweep:
    """The trade-off of one steering over its strengths; the first point is the unsteered model.

    Attributes
    ----------
    points
        In the order of the strengths, strength 0 first.
    steering
        Name and provenance of the recipe.
    """

    points: tuple[SweepPoint, ...]
    steering: dict[str, Any]

    def within(self, budget: float) -> SweepPoint:
        """The strength to use at an nDCG budget, chosen on validation alone.

        Admissible is what keeps nDCG at or above ``(1 - budget) * base`` and nDCG on tail targets
        at or above its base; among those the lowest Gini is taken.
        """
        return self.points[choose([point.valid.metrics for point in self.points], budget)]

    def to_dict(self) -> dict[str, Any]:
        """All points, and the choice at budgets of 1, 5 and 10 %, as JSON-able values."""
        return {
            "steering": self.steering,
            "points": [
                {"alpha": p.alpha, "valid": p.valid.to_dict(), "test": p.test.to_dict()}
                for p in self.points
            ],
            "chosen_on_validation": {
                f"{budget:.0%}": self.within(budget).alpha for budget in BUDGETS
            },
        }


DEFAULT_ALPHAS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
"""Ten strengths that cover the useful range of the PopSteer rule."""


def sweep(
    rec: Recommender,
    sae: SparseAutoencoder,
    steering: Recipe,
    split: Split,
    *,
    site: Site | None = None,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    k: int = 10,
    mask_seen: bool = False,
    max_users: int | None = None,
) -> Sweep:
    """Measure a steering at many strengths, on validation and on test.

    Where the SAE sits on the scored vector itself, user vectors are captured once and steered
    again for each strength; anywhere else the model has to run each time.

    Parameters
    ----------
    rec, sae, steering, split
        What to steer, with what, measured on whom.
    site
        Where the SAE belongs; the recommender's own site by default.
    alphas
        Strengths; 0 is always measured first.
    k, mask_seen
        See `measure`.
    max_users
        See `capture_held_out`.
    """
    strengths = (0.0, *(alpha for alpha in alphas if alpha != 0))
    found: dict[Which, list[Evaluation]] = {"valid": [], "test": []}
    for which, results in found.items():
        capture = partial(capture_held_out, rec, split, which, max_users=max_users)
        users = capture()
        moved = (
            steered_at(users.vectors, SteerTransform(sae, steering), strengths[1:])
            if site is None or site == rec.site
            else None
        )
        for alpha in track(strengths, f"strengths on {which}", unit="alpha"):
            if alpha == 0:  # the unsteered model, also where a reconstruction would be spliced in
                lists = rank(rec, users, k=k, mask_seen=mask_seen)
            elif moved is not None:
                steered = replace(users, vectors=next(moved))
                lists = rank(rec, steered, k=k, mask_seen=mask_seen)
            else:
                recipe = steering.with_alpha(alpha)
                lists = rank_steered(
                    rec, sae, recipe, users, capture, site=site, k=k, mask_seen=mask_seen
                )
            results.append(measure_lists(rec, users, lists, mask_seen=mask_seen))
    points = zip(strengths, found["valid"], found["test"], strict=True)
    return Sweep(
        tuple(SweepPoint(*point) for point in points),
        steering.describe(),
    )
