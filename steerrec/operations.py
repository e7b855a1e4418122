"""Operations on latents after selection: responses, scale, clamp, ablate, set; and sums of recipes.

Each is one encoding and one sum over the active latents of a row, whose decoder rows or responses
are added to the user vector; at strength 0 nothing changes, at strength 1 the operation is done.
Not here: shifts of pre-activations (`steering`), how responses are learned (`learning`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.compiled import as_arrays, kernels
from steerrec.errors import ArtifactError
from steerrec.recipes import Recipe, Step, Strength, own
from steerrec.steering import Steering

UNLIMITED = float(torch.finfo(torch.float32).max)
"""Upper bound of a latent that has none."""

Neurons = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class ResponseSteering(Recipe):
    """What each neuron adds to the user vector while it is active.

    ``y = x + alpha * (constant + sum_j f_j(x) * vectors[j])`` over the active latents f of x: what
    a user gets depends on what is active in that user. Decoder rows span the vectors, so each is
    an edit of latents too: "while neuron 3 is active, turn 17 up and 40 down".

    Attributes
    ----------
    vectors
        What one unit of each latent adds at strength 1, float32 [d_sae, H].
    constant
        What every user gets, float32 [H].
    alpha, name, provenance, unknown
        See `Recipe`.
    """

    vectors: Tensor
    constant: Tensor
    alpha: float = 1.0
    name: str = "responses"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    operation = "response"

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not bool(self.vectors.isfinite().all()):
            raise ArtifactError("responses are one finite vector per latent, [d_sae, H]")
        width = self.vectors.shape[1:]
        if self.constant.shape != width or not bool(self.constant.isfinite().all()):
            raise ArtifactError(f"what every user gets is one finite vector, {tuple(width)}")

    @property
    def latents(self) -> int:
        """How many latents the SAE has that it is for."""
        return len(self.vectors)

    @property
    def neurons(self) -> Tensor:
        """Numbers of the neurons that take part, ascending."""
        return self.vectors.any(dim=1).nonzero().squeeze(1)

    def only(self, neurons: Tensor) -> ResponseSteering:
        """The same steering by these neurons (and the constant) alone."""
        kept = torch.zeros_like(self.vectors)
        kept[neurons] = self.vectors[neurons]
        return replace(self, vectors=kept)

    def step(self, sae: SparseAutoencoder) -> Step:
        """The step on this SAE."""
        if self.vectors.shape != sae.W_dec.shape:
            raise ArtifactError(
                f"steering {self.name!r} has responses of shape {tuple(self.vectors.shape)}, the "
                f"SAE needs {tuple(sae.W_dec.shape)}; use the SAE that it was made with"
            )
        return ResponseStep(self, sae)


class ResponseStep(Step):
    """Adds the responses of the active latents."""

    vectors: Tensor  # [d_sae, H]
    constant: Tensor  # [H]
    kind = "responses"

    def __init__(self, steering: ResponseSteering, sae: SparseAutoencoder) -> None:
        super().__init__()
        own(self, "vectors", steering.vectors, sae.W_dec)
        own(self, "constant", steering.constant, sae.W_dec)

    def forward(
        self, sae: SparseAutoencoder, x: Tensor, pre_acts: Tensor, strength: Strength
    ) -> Tensor:
        """What is added, [B, H]."""
        fixed = None if sae.threshold is not None else sae.k
        found = None if fixed is None else _decoded(pre_acts, self.vectors, fixed)
        if found is None:
            found = respond(sae.activate(pre_acts), self.vectors)
        return strength * (found + self.constant)


def respond(latents: Latents, vectors: Tensor) -> Tensor:
    """What the active latents add, ``sum_j f_j * vectors[j]``: [B, H]."""
    return F.embedding_bag(latents.indices, vectors, per_sample_weights=latents.values, mode="sum")


def _decoded(pre_acts: Tensor, vectors: Tensor, k: int) -> Tensor | None:
    """`respond` of the k largest of pre-activations [B, d_sae]; None where torch computes it."""
    arrays = as_arrays(pre_acts, vectors)
    loops = None if arrays is None else kernels()
    if arrays is None or loops is None:
        return None
    out = pre_acts.new_empty(len(pre_acts), vectors.shape[1])
    return out if loops.decoded(*arrays, k, out.numpy()) else None


@dataclass(frozen=True, eq=False)
class LatentSteering(Recipe):
    """Latents scaled and bounded: ``f'_j = clip(gain_j * f_j, low_j, high_j)``.

    ``y = x + alpha * sum_j (f'_j - f_j) * W_dec[j]`` over all latents f after selection: which
    latents are active is not decided anew. A latent that is not active counts as 0, so that a lower
    bound above 0 switches it on in every user.

    Attributes
    ----------
    gain, low, high
        Factor and bounds of each latent, float32 [d_sae]; 1, 0 and `UNLIMITED` leave it alone.
    alpha, name, provenance, unknown
        See `Recipe`.
    """

    gain: Tensor
    low: Tensor
    high: Tensor
    alpha: float = 1.0
    name: str = "latents"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    operation = "latents"

    def __post_init__(self) -> None:
        for part in (self.gain, self.low, self.high):
            if part.shape != self.gain.shape[:1] or not bool(part.isfinite().all()):
                raise ArtifactError("gain, low and high are one finite number per latent, [d_sae]")
        if bool((self.low < 0).any()) or bool((self.low > self.high).any()):
            raise ArtifactError("bounds of a latent are 0 <= low <= high")

    @property
    def latents(self) -> int:
        """How many latents the SAE has that it is for."""
        return len(self.gain)

    def step(self, sae: SparseAutoencoder) -> Step:
        """The step on this SAE."""
        self.require(sae)
        return LatentStep(self, sae)

    @classmethod
    def scale(cls, sae: SparseAutoencoder, neurons: Neurons, factor: float) -> LatentSteering:
        """Latents times a factor while they are active: 0 switches them off, 2 doubles them."""
        return cls._of(sae, neurons, "scale", {"factor": factor}, gain=factor)

    @classmethod
    def ablate(cls, sae: SparseAutoencoder, neurons: Neurons) -> LatentSteering:
        """Latents switched off."""
        return cls._of(sae, neurons, "ablate", {}, high=0.0)

    @classmethod
    def clamp(
        cls,
        sae: SparseAutoencoder,
        neurons: Neurons,
        *,
        low: float | Tensor = 0.0,
        high: float | Tensor = UNLIMITED,
    ) -> LatentSteering:
        """Latents kept within bounds, numbers or [n] of them."""
        return cls._of(sae, neurons, "clamp", {}, low=low, high=high)

    @classmethod
    def set_to(
        cls, sae: SparseAutoencoder, neurons: Neurons, values: float | Tensor
    ) -> LatentSteering:
        """Latents set to values, in every user; see `quantiles` for what is usual."""
        return cls._of(sae, neurons, "set", {}, low=values, high=values)

    @classmethod
    def _of(
        cls,
        sae: SparseAutoencoder,
        neurons: Neurons,
        rule: str,
        settings: dict[str, Any],
        **parts: float | Tensor,
    ) -> LatentSteering:
        chosen = torch.as_tensor(neurons, dtype=torch.int64).reshape(-1)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < sae.d_sae:
            raise ArtifactError(
                f"neurons {int(chosen.min())} to {int(chosen.max())} asked for; this SAE has 0 to "
                f"{sae.d_sae - 1}"
            )
        made = {"gain": 1.0, "low": 0.0, "high": UNLIMITED}
        tensors = {name: torch.full((sae.d_sae,), value) for name, value in made.items()}
        for name, value in parts.items():
            tensors[name][chosen] = torch.as_tensor(value, dtype=torch.float32)
        provenance = {"rule": rule, "neurons": chosen.tolist(), **settings}
        return cls(
            tensors["gain"],
            tensors["low"],
            tensors["high"],
            name=rule,
            provenance=provenance,
        )


class LatentStep(Step):
    """Adds what scaling and bounding the latents changes."""

    gain: Tensor  # [d_sae]
    low: Tensor  # [d_sae]
    high: Tensor  # [d_sae]
    constant: Tensor  # [H], what the lower bounds give to users in whom nothing is active
    kind = "operations on latents"

    def __init__(self, steering: LatentSteering, sae: SparseAutoencoder) -> None:
        super().__init__()
        for name in ("gain", "low", "high"):
            own(self, name, getattr(steering, name), sae.W_dec)
        raised = steering.low.to(sae.W_dec)
        own(self, "constant", (raised @ sae.W_dec).detach(), sae.W_dec)

    def forward(
        self, sae: SparseAutoencoder, x: Tensor, pre_acts: Tensor, strength: Strength
    ) -> Tensor:
        """What is added, [B, H]."""
        values, indices = sae.activate(pre_acts)
        low = self.low[indices]
        bounded = (self.gain[indices] * values).clamp(min=low, max=self.high[indices])
        change = sae.directions(Latents(bounded - values - low, indices))
        return strength * (change + self.constant)


# --- sums


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

    def __init__(self, steering: SteeringSum, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.steps = nn.ModuleList([term.step(sae) for term in steering.terms])
        strengths = torch.tensor([term.alpha for term in steering.terms], dtype=torch.float64)
        own(self, "strengths", strengths, sae.W_dec)
        self.kind = " + ".join(cast(Step, step).kind for step in self.steps)

    strengths: Tensor  # [terms]

    def forward(
        self, sae: SparseAutoencoder, x: Tensor, pre_acts: Tensor, strength: Strength
    ) -> Tensor:
        """What is added, [B, H]."""
        total = torch.zeros_like(x)
        for step, own_strength in zip(self.steps, self.strengths, strict=True):
            total = total + step(sae, x, pre_acts, strength * own_strength.reshape(1, 1))
        return total


def refuse_reconstruction(recipe: Recipe) -> None:
    """Raise ArtifactError for a recipe whose result cannot be added to another's."""
    if isinstance(recipe, Steering) and recipe.splice != "delta":
        raise ArtifactError(
            f"steering {recipe.name!r} puts the reconstruction in place of the vector, to which "
            "nothing can be added; expected splice 'delta'"
        )


def added(one: Recipe, other: Recipe) -> Recipe:
    """The sum of two recipes: one of the same kind where that gives exactly the same."""
    for recipe in (one, other):
        refuse_reconstruction(recipe)
    if one.latents != other.latents:
        raise ArtifactError(
            f"steering {one.name!r} is for {one.latents} latents, {other.name!r} for "
            f"{other.latents}; a sum is of recipes for one SAE"
        )
    name, provenance = f"{one.name}-and-{other.name}"[:100], _sources(one, other)
    if isinstance(one, Steering) and isinstance(other, Steering):
        shift = one.alpha * one.shift + other.alpha * other.shift
        return Steering(shift, name=name, provenance=provenance)
    if isinstance(one, ResponseSteering) and isinstance(other, ResponseSteering):
        vectors, constant = (
            one.alpha * getattr(one, part) + other.alpha * getattr(other, part)
            for part in ("vectors", "constant")
        )
        return ResponseSteering(vectors, constant, name=name, provenance=provenance)
    terms = tuple(chain.from_iterable(_terms(recipe) for recipe in (one, other)))
    return SteeringSum(terms, name=name, provenance=provenance)


def _terms(recipe: Recipe) -> tuple[Recipe, ...]:
    if isinstance(recipe, SteeringSum):
        return tuple(term * recipe.alpha for term in recipe.terms)
    return (recipe,)


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
