"""How strong to steer for a budget of accuracy: found on validation, so that nobody guesses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.choosing import admissible, metric_of
from steerrec.contrasts import contrast_name, item_contrast
from steerrec.data import Catalogue, Split
from steerrec.errors import DataError
from steerrec.evaluation import capture_held_out, measure_lists, rank, rank_steered
from steerrec.objectives import Objective, group_shares, named_objective
from steerrec.progress import track
from steerrec.recipes import Recipe
from steerrec.recommender import Recommender
from steerrec.sites import Site

COARSE = tuple(2.0**i for i in range(-5, 5))
"""Strengths tried first, in units of the recipe's own."""
FINE = 8
"""Strengths tried then, between the neighbours of the best."""


@dataclass(frozen=True)
class ChosenStrength:
    """A strength, and what was measured on validation to find it.

    Attributes
    ----------
    alpha
        The strength; 0 where none keeps to the budget and lowers the objective.
    objective
        What was lowered.
    budget
        Share of nDCG that could be given.
    tried
        By strength, ascending: validation metrics, and the objective's value under its name.
    """

    alpha: float
    objective: str
    budget: float
    tried: dict[float, dict[str, float]]


def choose_strength(
    rec: Recommender,
    sae: SparseAutoencoder,
    steering: Recipe,
    split: Split,
    *,
    objective: str | Objective = "gini",
    budget: float = 0.05,
    site: Site | None = None,
    k: int = 10,
    mask_seen: bool = False,
    max_users: int | None = 10_000,
    seed: int = 0,
) -> ChosenStrength:
    """The strength of a recipe that does most for an objective within a budget, on validation.

    Admissible is what keeps nDCG at or above ``(1 - budget)`` of the model's own, and nDCG on tail
    targets at or above it. Strengths double from a 32nd of the recipe's own to 16 times, as long as
    the budget may still hold; then those between the neighbours of the best are tried.

    Parameters
    ----------
    rec, sae, steering, split
        What is steered, with what, chosen on whose validation users.
    objective
        See `objective_of`, or an `Objective`.
    budget
        Share of validation nDCG that may be given.
    site
        Where the SAE belongs; the recommender's own site by default.
    k, mask_seen
        See `steerrec.evaluation.measure`.
    max_users, seed
        At most so many validation users, drawn at random.
    """
    if not 0 <= budget < 1:
        raise DataError(f"budget is {budget}; expected a share of nDCG from 0 to below 1")
    if isinstance(objective, str):
        objective = objective_of(objective, rec.catalogue, split)
    goal = objective
    capture = partial(capture_held_out, rec, split, "valid", max_users=max_users, seed=seed)
    users = capture()
    items = len(rec.catalogue)

    def measured(alpha: float) -> dict[str, float]:
        if alpha == 0:
            lists = rank(rec, users, k=k, mask_seen=mask_seen)
        else:
            recipe = steering.with_alpha(alpha)
            lists = rank_steered(
                rec, sae, recipe, users, capture, site=site, k=k, mask_seen=mask_seen
            )
        metrics = measure_lists(rec, users, lists, mask_seen=mask_seen).metrics
        listed = lists.ids[lists.ids >= 0]
        return {**metrics, f"objective {goal.name}": goal.value(_exposure(listed, items))}

    def best(tried: dict[float, dict[str, float]]) -> float:
        strengths = list(tried)  # 0 first
        kept = [strengths[i] for i in admissible(list(tried.values()), budget)]
        return min(kept, key=lambda alpha: (tried[alpha][f"objective {goal.name}"], abs(alpha)))

    tried = {0.0: measured(0.0)}
    if not metric_of(tried[0.0], "ndcg") > 0:
        raise DataError("nDCG of the validation users is 0, and no budget can be taken from it")
    unit, spent = steering.alpha or 1.0, 0
    for step in track(COARSE, "strengths", unit="alpha"):
        tried[step * unit] = measured(step * unit)
        lost = metric_of(tried[step * unit], "ndcg") / metric_of(tried[0.0], "ndcg")
        spent = spent + 1 if lost < 1 - 2 * budget else 0
        if spent == 2:
            break
    strengths = list(tried)  # by size
    at = strengths.index(best(tried))
    low, high = strengths[max(0, at - 1)], strengths[min(len(strengths) - 1, at + 1)]
    for i in track(range(1, FINE + 1), "finer strengths", unit="alpha"):
        alpha = float(f"{low + (high - low) * i / (FINE + 1):.6g}")
        if alpha not in tried:
            tried[alpha] = measured(alpha)
    chosen = best(tried)
    return ChosenStrength(chosen, goal.name, budget, dict(sorted(tried.items())))


def objective_of(
    text: str, catalogue: Catalogue, split: Split, *, users: int | None = None
) -> Objective:
    """An objective in words, for so many users; as many as validation has by default.

    One of `steerrec.objectives.OBJECTIVES`, such as `gini`; or a group of items as contrasts
    describe it, whose share of the list slots is raised (``genres=Horror``), or brought to a share
    (``genres=Horror@0.1``).
    """
    if not any(sign in text for sign in "=<>:"):
        groups = torch.from_numpy(catalogue.groups.labels.copy())
        try:
            return named_objective(
                text,
                torch.from_numpy(split.counts.copy()),
                groups,
                users=len(split.held_out("valid")[0]) if users is None else users,
            )
        except ValueError as error:
            raise DataError(f"{error}, or a group of items such as genres=Horror") from None
    words, _, share = text.partition("@")
    rows = torch.from_numpy(item_contrast(catalogue, words).group_a)
    labels = torch.zeros(len(catalogue), dtype=torch.int64)
    labels[rows] = 1
    if share:
        try:
            wanted = float(share)
        except ValueError:
            wanted = -1.0
        if not 0 <= wanted <= 1:
            raise DataError(f"objective {text!r}: {share!r} is no share between 0 and 1")
        return group_shares(labels, torch.tensor([1 - wanted, wanted], dtype=torch.float64))
    prices = torch.where(labels == 1, -0.5, 0.5)
    return Objective(
        f"share-{contrast_name(words)}",
        lambda _: prices,
        lambda exposure: -float(exposure[labels == 1].sum() / exposure.sum()),
    )


def _exposure(listed: Tensor, items: int) -> Tensor:
    return torch.bincount(listed, minlength=items)
