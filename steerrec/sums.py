"""Sums of recipes: ``popularity * -0.8 + horror * 0.3``.

Shifts add up before selection and responses add up as they are, each to one recipe of its kind;
whatever else there is stays a term of its own. So the order of a sum does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError
from steerrec.graphs import has_values
from steerrec.operations import ResponseSteering
from steerrec.recipes import Encoding, Recipe, Step, Strength, own
from steerrec.steering import Steering
from steerrec.terms import Factor, Term


@dataclass(frozen=True, eq=False)
class SteeringSum(Recipe):
    """Several recipes at once: what each adds to the user vector is added up.

    Made by ``one + other`` where the two are not of one kind. All see the unsteered user vector,
    and share one encoding; the strength of each is its own times that of the sum.

    Attributes
    ----------
    terms
        Recipes, none of them spliced by `reconstruct`.
    alpha, name, provenance, unknown
        See `Recipe`.
    """

    terms: tuple[Recipe, ...]
    alpha: float = 1.0
    name: str = "sum"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    operation = "sum"

    def __post_init__(self) -> None:
        if len({term.latents for term in self.terms}) != 1:
            raise ArtifactError("a sum is of recipes for one SAE, of equal numbers of latents")
        for term in self.terms:
            refuse_reconstruction(term)

    @property
    def latents(self) -> int:
        """How many latents the SAE has that it is for."""
        return self.terms[0].latents

    def step(self, sae: SparseAutoencoder) -> Step:
        """The step on this SAE."""
        return SumStep(self, sae)


class SumStep(Step):
    """Adds what all terms add."""

    strengths: Tensor  # [terms], of each its own

    def __init__(self, steering: SteeringSum, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.steps = nn.ModuleList([term.step(sae) for term in steering.terms])
        strengths = torch.tensor([term.alpha for term in steering.terms], dtype=torch.float64)
        own(self, "strengths", strengths, sae.W_dec)
        self.kind = " + ".join(cast(Step, step).kind for step in self.steps)

    def forward(self, here: Encoding, strength: Strength) -> Tensor:
        """What is added, [B, H]."""
        _ = here.latents  # selected before any term, so that none does so by itself
        total: Tensor | None = None
        for step, own_strength in zip(self.steps, self._strengths(), strict=True):
            part: Tensor = step(here, strength * own_strength)
            total = part if total is None else total + part
        assert total is not None
        return total

    def terms(self) -> tuple[Term, ...] | None:
        """Those of all steps, each at its own strength."""
        found: list[Term] = []
        for entry, step in enumerate(self.steps):
            inner = cast(Step, step).terms()
            if inner is None:
                return None
            own_strength = Factor("number", ((self, "strengths"),), entry)
            found += [term.times(own_strength) for term in inner]
        return tuple(found)

    def _strengths(self) -> list[Strength]:
        """Numbers where Python may look at them: arithmetic with tensors costs microseconds."""
        if has_values(self.strengths) and self.strengths.device.type == "cpu":
            return cast(list[Strength], self.strengths.tolist())
        return [strength.reshape(1, 1) for strength in self.strengths]


def refuse_reconstruction(recipe: Recipe) -> None:
    """Raise ArtifactError for a recipe whose result cannot be added to another's."""
    if isinstance(recipe, Steering) and recipe.splice != "delta":
        raise ArtifactError(
            f"steering {recipe.name!r} puts the reconstruction in place of the vector, to which "
            "nothing can be added; expected splice 'delta'"
        )


def added(one: Recipe, other: Recipe) -> Recipe:
    """The sum of two recipes, of as few terms as there are kinds in it."""
    for recipe in (one, other):
        refuse_reconstruction(recipe)
    if one.latents != other.latents:
        raise ArtifactError(
            f"steering {one.name!r} is for {one.latents} latents, {other.name!r} for "
            f"{other.latents}; a sum is of recipes for one SAE"
        )
    terms: list[Recipe] = []
    for term in (*_terms(one), *_terms(other)):
        place = next((i for i, there in enumerate(terms) if _is_one_kind(there, term)), None)
        if place is None:
            terms.append(term)
        else:
            terms[place] = _merged(terms[place], term)
    name, provenance = f"{one.name}-and-{other.name}"[:100], _sources(one, other)
    if len(terms) == 1:
        return terms[0]._with(name=name, provenance=provenance, unknown={})
    return SteeringSum(tuple(terms), name=name, provenance=provenance)


def _terms(recipe: Recipe) -> tuple[Recipe, ...]:
    if isinstance(recipe, SteeringSum):
        return tuple(term * recipe.alpha for term in recipe.terms)
    return (recipe,)


def _is_one_kind(one: Recipe, other: Recipe) -> bool:
    """Whether the sum of two recipes is one of the same kind."""
    return type(one) is type(other) and isinstance(one, Steering | ResponseSteering)


def _merged(one: Recipe, other: Recipe) -> Recipe:
    def total(part: str) -> Tensor:
        whole: Tensor = one.alpha * getattr(one, part) + other.alpha * getattr(other, part)
        return whole

    name, provenance = f"{one.name}-and-{other.name}"[:100], _sources(one, other)
    if isinstance(one, Steering):
        return Steering(total("shift"), name=name, provenance=provenance)
    vectors, constant = total("vectors"), total("constant")
    return ResponseSteering(vectors, constant, name=name, provenance=provenance)


def _sources(*recipes: Recipe) -> dict[str, Any]:
    """Provenance of a sum: that of each term, with its strength."""
    found = []
    for recipe in recipes:
        if recipe.provenance.get("rule") == "sum":
            found += [
                {**term, "alpha": term["alpha"] * recipe.alpha}
                for term in recipe.provenance["terms"]
            ]
        else:
            found.append({"name": recipe.name, "alpha": recipe.alpha, **recipe.provenance})
    return {"rule": "sum", "terms": found}
