"""Steering as a recipe (`Steering`) and as a pure step on user vectors (`SteerTransform`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from steerrec.autoencoder import SparseAutoencoder
from steerrec.compiled import as_arrays, kernels
from steerrec.errors import ArtifactError, SiteError
from steerrec.graphs import is_graphed

if TYPE_CHECKING:
    from steerrec.attribution import AttributionTable

Splice = Literal["delta", "reconstruct"]

ROWS_AT_ONCE = 128
"""On a CPU so many user vectors are steered at once: their pre-activations stay in its cache."""


@dataclass(frozen=True, eq=False)
class Steering:
    """Which latents are turned, which way and how far at strength 1.

    Pre-activations become ``z + alpha * shift``, then ReLU, TopK and decode as always.

    Attributes
    ----------
    shift
        What strength 1 adds to each pre-activation, float32 [d_sae].
    alpha
        Strength.
    splice
        `delta`: ``y = x + (decode(f') - decode(f))``, exact when nothing is edited.
        `reconstruct`: ``y = decode(f')``, as in the paper.
    name
        What an artifact calls it.
    provenance
        Rule and settings that made it, JSON-able.
    unknown
        What a newer steerrec stored with it, which an artifact keeps.
    """

    shift: Tensor
    alpha: float = 1.0
    splice: Splice = "delta"
    name: str = "steering"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.splice not in get_args(Splice):
            raise ValueError(f"splice is 'delta' or 'reconstruct'; got {self.splice!r}")
        if self.shift.ndim != 1 or not bool(self.shift.isfinite().all()):
            raise ArtifactError("a steering's shift is one finite number per latent, [d_sae]")

    def with_alpha(self, alpha: float) -> Steering:
        """The same steering at another strength."""
        return replace(self, alpha=alpha)

    @classmethod
    def popsteer(
        cls,
        table: AttributionTable,
        *,
        alpha: float = 1.0,
        neurons: int | None = None,
        splice: Splice | None = None,
        popsteer_compat: bool = False,
    ) -> Steering:
        """The PopSteer rule (Ahmadov & Mansoury, arXiv 2508.17297).

        The neurons with the largest ``|d|`` are shifted by ``alpha * w_j * s_j``, downwards where
        ``d_j > 0`` and upwards where ``d_j < 0``, with ``w_j = (|d_j| - min|d|) / (max|d| -
        min|d|)`` over all neurons and ``s_j`` the standard deviation over the group that the
        neuron belongs to: A for ``d_j > 0``, B for ``d_j < 0``.

        Parameters
        ----------
        table
            Attribution table of the contrast.
        alpha
            Strength. It does not transfer between SAEs: compare at equal nDCG.
        neurons
            How many take part; all of them by default.
        splice
            `delta` by default.
        popsteer_compat
            Do what the authors' published code does: the standard deviations of the two groups
            crossed, and the reconstruction in place of the vector.
        """
        if popsteer_compat and splice == "delta":
            raise ValueError("popsteer_compat implies splice='reconstruct'; got 'delta'")
        if neurons is not None and not 0 < neurons <= len(table):
            raise ArtifactError(
                f"{neurons} neurons asked for; this SAE has {len(table)}, and at least 1 is needed"
            )
        d = table["cohens_d"].double()
        size = d.abs()
        spread = (size.max() - size.min()).clamp_min(torch.finfo(torch.float64).tiny)
        weight = (size - size.min()) / spread
        std_a, std_b = table["std_a"].double(), table["std_b"].double()
        if popsteer_compat:
            std_a, std_b = std_b, std_a
        shift = torch.where(d > 0, -weight * std_a, weight * std_b) * (d != 0)
        if neurons is not None:
            chosen = torch.zeros(len(table), dtype=torch.bool)
            chosen[table.strongest(neurons)] = True
            shift = shift * chosen
        return cls(
            shift=shift.float(),
            alpha=alpha,
            splice=splice or ("reconstruct" if popsteer_compat else "delta"),
            name="popsteer-compat" if popsteer_compat else "popsteer",
            provenance={
                "rule": "popsteer",
                "contrast": table.contrast,
                "neurons": len(table) if neurons is None else neurons,
                "popsteer_compat": popsteer_compat,
            },
        )


class SteerTransform(nn.Module):
    """Steering as a pure function of user vectors, [B, H] to [B, H]: no hook, no host model.

    Computed in the SAE's dtype; the result has the dtype and device of the input, which is never
    written to.

    Parameters
    ----------
    sae
        The SAE of the site that the vectors come from.
    steering
        What to do.
    """

    bias: Tensor  # [d_sae]
    shift: Tensor  # [d_sae], what strength 1 adds to each pre-activation

    def __init__(self, sae: SparseAutoencoder, steering: Steering) -> None:
        super().__init__()
        # a copy: moving or casting the transform must not touch the caller's SAE
        self.sae = copy.deepcopy(sae).requires_grad_(False)
        bias = (sae.b_enc - sae.b_dec @ sae.W_enc).detach()  # (x - b_dec) W + b = x W + bias
        self.register_buffer("bias", bias, persistent=False)
        self._set(steering)

    @torch.inference_mode(False)  # tensors made under it could not be changed outside
    def _set(self, steering: Steering) -> None:
        if len(steering.shift) != self.sae.d_sae:
            raise ArtifactError(
                f"steering {steering.name!r} is for {len(steering.shift)} latents, the SAE has "
                f"{self.sae.d_sae}; use the SAE that it was made with"
            )
        self.steering = steering
        # a tensor of its own, contiguous: graphs keep it, and it is written to
        shift = steering.shift.to(self.sae.W_enc).clone(memory_format=torch.contiguous_format)
        self.register_buffer("shift", shift, persistent=False)

    def with_steering(self, steering: Steering) -> SteerTransform:
        """Another recipe on the same SAE, which the two share."""
        twin = SteerTransform.__new__(SteerTransform)
        nn.Module.__init__(twin)
        twin.sae = self.sae
        twin.register_buffer("bias", self.bias, persistent=False)
        twin._set(steering)
        return twin

    def copy_from(self, other: SteerTransform) -> None:
        """Take over another's recipe into the tensors that are here, which a compiled graph reads.

        Raises
        ------
        SiteError
            If it is spliced in another way, which is part of the graph.
        """
        if other.steering.splice != self.steering.splice:
            raise SiteError(
                f"the compiled model splices by {self.steering.splice!r}; expected the same of "
                f"steering {other.steering.name!r}, which says {other.steering.splice!r}: attach "
                "it before compiling"
            )
        self.steering = other.steering
        self.shift.copy_(other.shift)

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
                given = f"{len(strength)} values" if strength.ndim == 1 else "more than one axis"
                raise ValueError(
                    f"alpha has {given} for {len(x)} user vectors; expected one number or one per "
                    "user"
                )
            strength = strength.to(self.shift).reshape(-1, 1)
        if torch.is_autocast_enabled(x.device.type):  # it would mix the dtypes
            with torch.autocast(x.device.type, enabled=False):
                return self._steered(x, strength)
        return self._steered(x, strength)

    def _steered(self, x: Tensor, strength: float | Tensor) -> Tensor:
        if not is_graphed() and x.device.type == "cpu" and len(x) > ROWS_AT_ONCE:
            parts = x.split(ROWS_AT_ONCE)
            if isinstance(strength, Tensor) and len(strength) > 1:
                strengths: Iterable[float | Tensor] = strength.split(ROWS_AT_ONCE)
            else:
                strengths = repeat(strength)
            return torch.cat([self._steered(*part) for part in zip(parts, strengths, strict=False)])
        sae, delta = self.sae, self.steering.splice == "delta"
        pre_acts = sae.pre_acts(x.to(self.shift), self.bias)  # [B, d_sae]
        change = _compiled(pre_acts, self.shift, strength, sae, delta)
        if change is None:
            before = sae.directions(sae.activate(pre_acts)) if delta else None
            moved = pre_acts + strength * self.shift
            change = sae.directions(sae.activate(moved))
            change = change if before is None else change - before
        return x + change.to(x) if delta else (change + sae.b_dec).to(x)


def _compiled(
    pre_acts: Tensor,
    shift: Tensor,
    strength: float | Tensor,
    sae: SparseAutoencoder,
    delta: bool,
) -> Tensor | None:
    """What shifted pre-activations decode to, less what they do themselves if `delta`: [B, H].

    None where torch has to compute it.
    """
    given = (strength,) if isinstance(strength, Tensor) else ()
    arrays = as_arrays(pre_acts, shift, sae.W_dec, *given)
    loops = None if arrays is None else kernels()
    if arrays is None or loops is None:
        return None
    acts, step, decoder = arrays[:3]
    with np.errstate(over="ignore"):  # torch says what comes of it
        alpha = arrays[3].ravel() if given else np.array([strength], np.float32)
    change = pre_acts.new_empty(len(pre_acts), sae.d_in)
    done = loops.steered(acts, step, alpha, decoder, sae.k, delta, change.numpy())
    return change if done else None
