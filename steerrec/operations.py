"""Operations on latents after selection: responses, scale, clamp, ablate, set.

Each is one encoding and one sum over the active latents of a row, whose decoder rows or responses
are added to the user vector; at strength 0 nothing changes, at strength 1 the operation is done.
Not here: shifts of pre-activations (`steering`), how responses are learned (`learning`), sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.compiled import as_arrays, kernels
from steerrec.errors import ArtifactError
from steerrec.recipes import Encoding, Recipe, Step, Strength, own
from steerrec.terms import Term

if TYPE_CHECKING:
    from steerrec.attribution import AttributionTable

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

    def forward(self, here: Encoding, strength: Strength) -> Tensor:
        """What is added, [B, H]."""
        return strength * (respond(here.latents, self.vectors) + self.constant)

    def terms(self) -> tuple[Term, ...]:
        """Responses and what every user gets."""
        return (Term("response", ((self, "vectors"), (self, "constant"))),)


def respond(latents: Latents, vectors: Tensor) -> Tensor:
    """What the active latents add, ``sum_j f_j * vectors[j]``: [B, H]."""
    arrays = as_arrays(latents.values, vectors)
    loops = None if arrays is None or not latents.indices.is_contiguous() else kernels()
    if arrays is None or loops is None:
        weights = latents.values
        return F.embedding_bag(latents.indices, vectors, per_sample_weights=weights, mode="sum")
    out = latents.values.new_empty(len(latents.values), vectors.shape[1])
    loops.summed(arrays[0], latents.indices.numpy(), arrays[1], out.numpy())
    return out


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
        """Latents set to values, numbers or [n] of them, in every user.

        `steerrec.latent_quantiles` says what values are usual in real users.
        """
        return cls._of(sae, neurons, "set", {}, low=values, high=values)

    @classmethod
    def from_column(
        cls, table: AttributionTable, *, by: str = "logit_attribution", strength: float = 1.0
    ) -> LatentSteering:
        """Active latents scaled down the more they carry A: ``gain_j = exp(-strength * v_j)``.

        Those that carry B are scaled up, and latents that are not active stay so. Not linear in
        strength: make a recipe for each.

        Parameters
        ----------
        table
            Attribution table of the contrast.
        by
            The column v, its neutral value taken off. One of correlations means the same in any
            SAE; Cohen's d and effects do not.
        strength
            How much; negative for more of group A.
        """
        gain = (-strength * table.signed(by).double()).exp().float()
        return cls(
            gain,
            torch.zeros_like(gain),
            torch.full_like(gain, UNLIMITED),
            name="column",
            provenance={
                "rule": "column",
                "by": by,
                "strength": strength,
                "contrast": table.contrast,
            },
        )

    @classmethod
    def _of(
        cls,
        sae: SparseAutoencoder,
        neurons: Neurons,
        rule: str,
        settings: dict[str, Any],
        **parts: float | Tensor,
    ) -> LatentSteering:
        chosen = chosen_neurons(sae, neurons)
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


def chosen_neurons(sae: SparseAutoencoder, neurons: Neurons) -> Tensor:
    """Numbers of neurons [n], all of which the SAE has."""
    chosen = torch.as_tensor(neurons, dtype=torch.int64).reshape(-1).cpu()
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < sae.d_sae:
        raise ArtifactError(
            f"neurons {int(chosen.min())} to {int(chosen.max())} asked for; this SAE has 0 to "
            f"{sae.d_sae - 1}"
        )
    return chosen


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

    def forward(self, here: Encoding, strength: Strength) -> Tensor:
        """What is added, [B, H]."""
        values, indices = here.latents
        low = self.low[indices]
        found = (self.gain[indices] * values).clamp(min=low, max=self.high[indices])
        change = here.sae.directions(Latents(found - values - low, indices))
        return strength * (change + self.constant)

    def terms(self) -> tuple[Term, ...]:
        """Factors, bounds, and what the lower ones give to everyone."""
        names = ("gain", "low", "high", "constant")
        return (Term("latents", tuple((self, name) for name in names)),)
