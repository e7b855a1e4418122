"""A strength for each user, read from the user vector or the latents: gates and rules of taste.

A gate gives a factor on the strength of a recipe, so that steering stays one step on user vectors.
Strengths that are known per user already, such as a setting of an account, are passed as `alpha`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from steerrec.activations import collect_user_vectors
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.errors import ArtifactError, DataError
from steerrec.recipes import Encoding, Recipe, Step, Strength, own
from steerrec.recommender import Recommender
from steerrec.sums import refuse_reconstruction
from steerrec.terms import Factor, Term


class Gate(ABC):
    """A factor on the strength, for each user."""

    kind: ClassVar[str]

    @abstractmethod
    def step(self, sae: SparseAutoencoder) -> GateStep:
        """The gate as a module beside this SAE."""


class GateStep(torch.nn.Module, ABC):
    """What a gate computes."""

    @abstractmethod
    def forward(self, here: Encoding) -> Tensor:
        """Factors of a batch of user vectors, [B, 1]."""

    def factor(self) -> Factor | None:
        """The same for the compiled loop; None where it cannot be put so."""
        return None


@dataclass(frozen=True)
class NeuronGate(Gate):
    """Steer only users in whom a neuron fires, or only those in whom it does not.

    Attributes
    ----------
    neuron
        Its number.
    threshold
        It fires where its latent, after selection, is above this.
    fires
        Whether to steer where it fires, or where it does not.
    """

    neuron: int
    threshold: float = 0.0
    fires: bool = True

    kind = "neuron"

    def __post_init__(self) -> None:
        if self.neuron < 0 or not 0 <= self.threshold < np.inf:
            raise ArtifactError(
                f"a gate has a neuron from 0 and a threshold from 0; got {self.neuron} and "
                f"{self.threshold}"
            )

    def step(self, sae: SparseAutoencoder) -> GateStep:
        """The gate as a module."""
        if self.neuron >= sae.d_sae:
            raise ArtifactError(f"the gate reads neuron {self.neuron}; the SAE has {sae.d_sae}")
        return _NeuronStep(self)


class _NeuronStep(GateStep):
    def __init__(self, gate: NeuronGate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, here: Encoding) -> Tensor:
        values, indices = here.latents
        active = (indices == self.gate.neuron) & (values > self.gate.threshold)
        fired = active.any(dim=1, keepdim=True)
        return (fired if self.gate.fires else ~fired).to(here.x)

    def factor(self) -> Factor:
        """Whether the neuron fires, or does not."""
        gate = self.gate
        return Factor("neuron", (), gate.neuron, gate.threshold, gate.fires)


@dataclass(frozen=True, eq=False)
class TasteGate(Gate):
    """A factor linear in the user vector, within bounds: ``clip(x . weights + bias, low, high)``.

    Made by `fit_taste`: 1 for a user of average taste, more or less for a fan of popular items.

    Attributes
    ----------
    weights
        Float32 [H].
    bias, low, high
        Numbers.
    """

    weights: Tensor
    bias: float
    low: float = 0.0
    high: float = 2.0

    kind = "taste"

    def __post_init__(self) -> None:
        if self.weights.ndim != 1 or not bool(self.weights.isfinite().all()):
            raise ArtifactError("a rule of taste has finite weights, [H]")
        if not -np.inf < self.low <= self.high < np.inf or not np.isfinite(self.bias):
            raise ArtifactError("a rule of taste has a finite bias, and bounds low <= high")

    def step(self, sae: SparseAutoencoder) -> GateStep:
        """The rule as a module."""
        if len(self.weights) != sae.d_in:
            raise ArtifactError(
                f"the rule of taste reads vectors of width {len(self.weights)}, the SAE {sae.d_in}"
            )
        return _TasteStep(self, sae)


class _TasteStep(GateStep):
    weights: Tensor  # [H]
    numbers: Tensor  # bias, low, high

    def __init__(self, gate: TasteGate, sae: SparseAutoencoder) -> None:
        super().__init__()
        own(self, "weights", gate.weights, sae.W_dec)
        own(self, "numbers", torch.tensor([gate.bias, gate.low, gate.high]), sae.W_dec)

    def forward(self, here: Encoding) -> Tensor:
        bias, low, high = self.numbers
        return torch.clamp((here.x @ self.weights + bias).unsqueeze(1), min=low, max=high)

    def factor(self) -> Factor:
        """Weights, bias and bounds."""
        return Factor("taste", ((self, "weights"), (self, "numbers")))


@dataclass(frozen=True, eq=False)
class GatedSteering(Recipe):
    """A recipe whose strength a gate decides for each user.

    Attributes
    ----------
    recipe
        What is done; its own strength counts as a factor.
    gate
        By how much, for each user.
    alpha, name, provenance, unknown
        See `Recipe`.
    """

    recipe: Recipe
    gate: Gate
    alpha: float = 1.0
    name: str = "gated"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    operation = "gated"

    def __post_init__(self) -> None:
        refuse_reconstruction(self.recipe)

    @property
    def latents(self) -> int:
        """How many latents the SAE has that it is for."""
        return self.recipe.latents

    def step(self, sae: SparseAutoencoder) -> Step:
        """The step on this SAE."""
        return GatedStep(self, sae)


def gated(recipe: Recipe, gate: Gate) -> GatedSteering:
    """A recipe with a gate, of the recipe's name."""
    return GatedSteering(recipe, gate, name=recipe.name, provenance=dict(recipe.provenance))


class GatedStep(Step):
    """The step of the recipe at the strength that the gate gives."""

    strength: Tensor  # [], the recipe's own

    def __init__(self, steering: GatedSteering, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.inner, self.gate = steering.recipe.step(sae), steering.gate.step(sae)
        own(self, "strength", torch.tensor(steering.recipe.alpha), sae.W_dec)
        self.kind = f"{self.inner.kind}, gated by {steering.gate!r}"
        if isinstance(steering.gate, TasteGate):
            self.kind = f"{self.inner.kind}, gated by taste"

    def forward(self, here: Encoding, strength: Strength) -> Tensor:
        """What is added, [B, H]."""
        factor = self.gate(here) * self.strength
        found: Tensor = self.inner(here, strength * factor)
        return found

    def terms(self) -> tuple[Term, ...] | None:
        """Those of the recipe, with the gate."""
        inner, gate = self.inner.terms(), self.gate.factor()
        if inner is None or gate is None:
            return None
        number = Factor("number", ((self, "strength"),))
        return tuple(term.times(number, gate) for term in inner)


@torch.no_grad()
def fit_taste(
    rec: Recommender,
    train: Histories,
    *,
    slope: float = 0.5,
    low: float = 0.0,
    high: float = 2.0,
    ridge: float = 1e-2,
    users: int = 20_000,
    seed: int = 0,
) -> TasteGate:
    """A rule that reads a user's taste for popular items from the user vector.

    Taste is the mean of log(1 + training interactions) over a history, in standard deviations from
    its mean over users; it is regressed on user vectors (ridge regression). The factor is
    ``1 + slope * taste``, within bounds.

    Parameters
    ----------
    rec
        The frozen recommender.
    train
        Training histories.
    slope
        How much stronger fans of popular items are steered; negative: fans of rare items.
    low, high
        Bounds of the factor.
    ridge
        Penalty, as a share of the mean variance of the dimensions.
    users, seed
        At most so many users, drawn at random, are learned from.
    """
    some = np.flatnonzero(train.lengths > 0)
    if len(some) < 2:
        raise DataError(f"{len(some)} training histories; expected at least 2 to learn taste from")
    if len(some) > users:
        some = np.sort(np.random.default_rng(seed).choice(some, users, replace=False))
    people = train.select(some)
    windows = people.truncate(rec.max_length)
    x = collect_user_vectors(rec, windows, description="taste").double().cpu()
    owner = np.repeat(np.arange(len(windows)), windows.lengths)
    weights = np.log1p(rec.catalogue.counts.astype(np.float64))[windows.items]
    mean = np.bincount(owner, weights, minlength=len(windows)) / windows.lengths
    taste = torch.from_numpy(mean)
    taste = (taste - taste.mean()) / taste.std(correction=0).clamp_min(1e-12)
    centre = x.mean(dim=0)
    centred = x - centre
    gram = centred.T @ centred
    size = gram.diagonal().mean().clamp_min(1e-12)  # 0 where all users are alike
    penalty = ridge * size * torch.eye(len(gram), dtype=gram.dtype)
    found = torch.linalg.solve(gram + penalty, centred.T @ taste)
    bias = 1.0 - slope * float(centre @ found)
    return TasteGate((slope * found).float(), bias, low, high)
