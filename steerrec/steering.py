"""Steering as a recipe (`Steering`) and as a pure step on user vectors (`SteerTransform`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError, SiteError
from steerrec.graphs import is_graphed
from steerrec.plans import ROWS_AT_ONCE, Plan, steered
from steerrec.recipes import Encoding, Recipe, Step, Strength, own
from steerrec.terms import Term

if TYPE_CHECKING:
    from steerrec.attribution import AttributionTable

Splice = Literal["delta", "reconstruct"]


@dataclass(frozen=True, eq=False)
class Steering(Recipe):
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

    operation = "shift"

    def describe(self) -> dict[str, Any]:
        """Name, operation, splice and provenance, JSON-able."""
        return {**super().describe(), "splice": self.splice}

    @property
    def latents(self) -> int:
        """How many latents the SAE has that it is for."""
        return len(self.shift)

    def step(self, sae: SparseAutoencoder) -> Step:
        """The step on this SAE."""
        self.require(sae)
        return ShiftStep(self, sae) if self.splice == "delta" else ReconstructStep(self, sae)

    @classmethod
    def toward(cls, table: AttributionTable, *, neurons: int | None = None) -> Steering:
        """More of group A of a contrast: the PopSteer rule the other way round.

        For recipes that add and subtract: ``toward(popularity) * -0.8 + toward(horror) * 0.3`` is
        the PopSteer rule at strength 0.8, and more horror.
        """
        usual = cls.popsteer(table, neurons=neurons)
        provenance = {**usual.provenance, "rule": "toward"}
        return replace(usual, shift=-usual.shift, name=table.name, provenance=provenance)

    @classmethod
    def popsteer(
        cls,
        table: AttributionTable,
        *,
        alpha: float = 1.0,
        neurons: int | None = None,
        splice: Splice | None = None,
        popsteer_compat: bool = False,
        by: str = "cohens_d",
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
        by
            Another column of the table in the place of d, `logit_attribution` say; the paper's rule
            is by Cohen's d.
        """
        if popsteer_compat and splice == "delta":
            raise ValueError("popsteer_compat implies splice='reconstruct'; got 'delta'")
        if neurons is not None and not 0 < neurons <= len(table):
            raise ArtifactError(
                f"{neurons} neurons asked for; this SAE has {len(table)}, and at least 1 is needed"
            )
        d = table.signed(by).double()
        size = d.abs()
        spread = (size.max() - size.min()).clamp_min(torch.finfo(torch.float64).tiny)
        weight = (size - size.min()) / spread
        std_a, std_b = table["std_a"].double(), table["std_b"].double()
        if popsteer_compat:
            std_a, std_b = std_b, std_a
        shift = torch.where(d > 0, -weight * std_a, weight * std_b) * (d != 0)
        if neurons is not None:
            chosen = torch.zeros(len(table), dtype=torch.bool)
            chosen[table.strongest(neurons, by=by)] = True
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
                **({} if by == "cohens_d" else {"by": by}),
            },
        )


class ShiftStep(Step):
    """Pre-activations become ``z + strength * shift``; the change of the decoded latents is added.

    Parameters
    ----------
    steering
        What to do.
    sae
        The SAE.
    """

    shift: Tensor  # [d_sae], what strength 1 adds to each pre-activation
    kind = "a shift, spliced by 'delta'"

    def __init__(self, steering: Steering, sae: SparseAutoencoder) -> None:
        super().__init__()
        own(self, "shift", steering.shift, sae.W_enc)

    def forward(self, here: Encoding, strength: Strength) -> Tensor:
        """What is added, or with `ReconstructStep` stands in place: [B, H]."""
        moved = here.pre_acts + strength * self.shift
        change = here.sae.directions(here.sae.activate(moved))
        return change if self.replaces else change - here.sae.directions(here.latents)

    def terms(self) -> tuple[Term, ...]:
        """The shift."""
        return (Term("shift", ((self, "shift"),)),)


class ReconstructStep(ShiftStep):
    """The same, but what the shifted latents decode to stands in place of the vector."""

    replaces = True
    kind = "a shift, spliced by 'reconstruct'"


class SteerTransform(nn.Module):
    """A recipe as a pure function of user vectors, [B, H] to [B, H]: no hook, no host model.

    Computed in the SAE's dtype; the result has the dtype and device of the input, which is never
    written to.

    Parameters
    ----------
    sae
        The SAE of the site that the vectors come from.
    steering
        What to do; a `Recipe` of any kind.
    """

    bias: Tensor  # [d_sae]

    def __init__(self, sae: SparseAutoencoder, steering: Recipe) -> None:
        super().__init__()
        # a copy: moving or casting the transform must not touch the caller's SAE
        self.sae = copy.deepcopy(sae).requires_grad_(False)
        for parameter in self.sae.parameters():
            parameter.data = parameter.data.contiguous()  # as the compiled loop reads them
        here = self.sae
        bias = (here.b_enc - here.b_dec @ here.W_enc).detach()  # (x - b_dec) W + b = x W + bias
        self.register_buffer("bias", bias, persistent=False)
        self._set(steering)

    @torch.inference_mode(False)  # tensors made under it could not be changed outside
    def _set(self, steering: Recipe) -> None:
        self.step = steering.step(self.sae)
        self.steering = steering
        self._plan: Plan | None = None

    def with_steering(self, steering: Recipe) -> SteerTransform:
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
            If it is of another kind, or spliced in another way, which is part of the graph.
        """
        here, there = self.step.kind, other.step.kind
        if here != there:
            raise SiteError(
                f"the compiled model steers by {here}; expected the same of steering "
                f"{other.steering.name!r}, which steers by {there}: attach it before compiling"
            )
        self.steering = other.steering
        self.step.copy_from(other.step)

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
            strength = strength.to(self.bias).reshape(-1, 1)
        device = "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(device):  # it would mix the dtypes
            with torch.autocast(device, enabled=False):
                return self._steered(x, strength)
        return self._steered(x, strength)

    def _steered(self, x: Tensor, strength: Strength) -> Tensor:
        found = steered(self, x, strength)
        return self._by_torch(x, strength) if found is None else found

    def _by_torch(self, x: Tensor, strength: Strength) -> Tensor:
        if not is_graphed() and x.device.type == "cpu" and len(x) > ROWS_AT_ONCE:
            parts = x.split(ROWS_AT_ONCE)
            if isinstance(strength, Tensor) and len(strength) > 1:
                strengths: Iterable[Strength] = strength.split(ROWS_AT_ONCE)
            else:
                strengths = repeat(strength)
            pairs = zip(parts, strengths, strict=False)
            return torch.cat([self._by_torch(*part) for part in pairs])
        vectors = x.to(self.bias)
        pre_acts = self.sae.pre_acts(vectors, self.bias)  # [B, d_sae]
        out: Tensor = self.step(Encoding(self.sae, vectors, pre_acts), strength)
        return (out + self.sae.b_dec).to(x) if self.step.replaces else x + out.to(x)
