"""Operations beyond a shift of pre-activations: responses, one steering vector for each neuron.

Not here: how responses are learned (`steerrec.learning`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.errors import ArtifactError


@dataclass(frozen=True, eq=False)
class ResponseSteering:
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
    alpha
        Strength.
    name
        What an artifact calls it.
    provenance
        Rule and settings that made it, JSON-able.
    """

    vectors: Tensor
    constant: Tensor
    alpha: float = 1.0
    name: str = "responses"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not bool(self.vectors.isfinite().all()):
            raise ArtifactError("responses are one finite vector per latent, [d_sae, H]")
        width = self.vectors.shape[1:]
        if self.constant.shape != width or not bool(self.constant.isfinite().all()):
            raise ArtifactError(f"what every user gets is one finite vector, {tuple(width)}")

    def with_alpha(self, alpha: float) -> ResponseSteering:
        """The same steering at another strength."""
        return replace(self, alpha=alpha)

    @property
    def neurons(self) -> Tensor:
        """Numbers of the neurons that take part, ascending."""
        return self.vectors.any(dim=1).nonzero().squeeze(1)

    def only(self, neurons: Tensor) -> ResponseSteering:
        """The same steering by these neurons (and the constant) alone."""
        kept = torch.zeros_like(self.vectors)
        kept[neurons] = self.vectors[neurons]
        return replace(self, vectors=kept)


class ResponseTransform(nn.Module):
    """Responses as a pure function of user vectors, [B, H] to [B, H]: no hook, no host model.

    One encoding and one sum of k vectors a row; computed in the SAE's dtype. The result has the
    dtype and device of the input, which is never written to.

    Parameters
    ----------
    sae
        The SAE of the site that the vectors come from.
    steering
        What to do.
    """

    vectors: Tensor  # [d_sae, H]
    constant: Tensor  # [H]

    def __init__(self, sae: SparseAutoencoder, steering: ResponseSteering) -> None:
        super().__init__()
        if steering.vectors.shape != sae.W_dec.shape:
            raise ArtifactError(
                f"steering {steering.name!r} has responses of shape "
                f"{tuple(steering.vectors.shape)}, the SAE needs {tuple(sae.W_dec.shape)}; use the "
                "SAE that it was made with"
            )
        # a copy: moving or casting the transform must not touch the caller's SAE
        self.sae = copy.deepcopy(sae).requires_grad_(False)
        self.steering = steering
        like = sae.W_dec.detach()
        self.register_buffer("vectors", steering.vectors.to(like), persistent=False)
        self.register_buffer("constant", steering.constant.to(like), persistent=False)

    def forward(self, x: Tensor, alpha: float | Tensor | None = None) -> Tensor:
        """Steered user vectors.

        Parameters
        ----------
        x
            User vectors [B, H].
        alpha
            Strength: one number, or one per user [B]; the recipe's own by default.
        """
        if x.ndim != 2:
            raise ValueError(f"got shape {tuple(x.shape)}; expected user vectors [B, H]")
        strength = self.steering.alpha if alpha is None else alpha
        if isinstance(strength, Tensor):
            if strength.ndim > 1 or (strength.ndim == 1 and strength.shape[0] != x.shape[0]):
                raise ValueError(
                    f"alpha has shape {tuple(strength.shape)} for {len(x)} user vectors; expected "
                    "one number or one per user"
                )
            strength = strength.to(self.vectors).reshape(-1, 1)
        latents = self.sae.encode(x.to(self.vectors))
        return x + (strength * respond(latents, self.vectors, self.constant)).to(x)


def respond(latents: Latents, vectors: Tensor, constant: Tensor) -> Tensor:
    """What strength 1 adds, ``constant + sum_j f_j * vectors[j]``: [B, H]."""
    return constant + F.embedding_bag(
        latents.indices, vectors, per_sample_weights=latents.values, mode="sum"
    )
