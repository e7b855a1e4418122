"""Steering: recipe (`Steering`), pure step (`SteerTransform`), and live on a model (`attach`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.errors import ArtifactError, SiteError
from steerrec.hooks import SiteHook
from steerrec.recommender import Recommender
from steerrec.sites import Site

if TYPE_CHECKING:
    from steerrec.attribution import AttributionTable

Splice = Literal["delta", "reconstruct"]


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
    """

    shift: Tensor
    alpha: float = 1.0
    splice: Splice = "delta"
    name: str = "steering"
    provenance: Mapping[str, Any] = field(default_factory=dict)

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

    shift: Tensor

    def __init__(self, sae: SparseAutoencoder, steering: Steering) -> None:
        super().__init__()
        if len(steering.shift) != sae.d_sae:
            raise ArtifactError(
                f"steering {steering.name!r} is for {len(steering.shift)} latents, the SAE has "
                f"{sae.d_sae}; use the SAE that it was made with"
            )
        # a copy: moving or casting the transform must not touch the caller's SAE
        self.sae = copy.deepcopy(sae).requires_grad_(False)
        self.steering = steering
        self.register_buffer("shift", steering.shift.to(sae.W_enc, copy=True))

    def forward(self, x: Tensor, alpha: float | Tensor | None = None) -> Tensor:
        """Steered user vectors.

        Parameters
        ----------
        x
            User vectors [B, H].
        alpha
            Strength: one number, or one per user [B]; the recipe's own by default.
        """
        strength = self.steering.alpha if alpha is None else alpha
        if isinstance(strength, Tensor):
            if strength.ndim == 1 and len(strength) != len(x):
                raise ValueError(
                    f"alpha has {len(strength)} values for {len(x)} user vectors; expected one "
                    "number or one per user"
                )
            strength = strength.to(self.shift).reshape(-1, 1)
        with torch.autocast(self.shift.device.type, enabled=False):  # it would mix the dtypes
            pre_acts = self.sae.pre_acts(x.to(self.shift))  # [B, d_sae]
            after = self.sae.activate(pre_acts + strength * self.shift)
            if self.steering.splice == "reconstruct":
                return self.sae.decode(after).to(x)
            change = self.sae.directions(after) - self.sae.directions(self.sae.activate(pre_acts))
            return x + change.to(x)


class Attachment:
    """An SAE on a live model, with or without steering; made by `attach`.

    Without steering it observes: the model's outputs stay the very same objects. Setting
    `steering` turns it on, None turns it off again, `remove` takes the hooks off. It is a context
    manager that removes itself on every exit.
    """

    def __init__(
        self, model: nn.Module, sae: SparseAutoencoder, site: Site, steering: Steering | None
    ) -> None:
        self.sae = sae
        self.site = site
        self.steering = steering
        self._observed: Tensor | None = None
        self._hook = SiteHook(model, site, self._on_rows)

    @property
    def steering(self) -> Steering | None:
        """The recipe in force; None while observing only."""
        return None if self._transform is None else self._transform.steering

    @steering.setter
    def steering(self, steering: Steering | None) -> None:
        self._transform = None if steering is None else SteerTransform(self.sae, steering)

    @property
    def firings(self) -> int:
        """How often the site has fired since the SAE was attached."""
        return self._hook.firings

    @property
    def latents(self) -> Latents:
        """Active latents of the latest forward pass, as they were before any steering."""
        if self._observed is None:
            raise SiteError(
                f"site {self.site.path!r} has not fired since the SAE was attached; run the model "
                "first"
            )
        with torch.no_grad():
            return self.sae.encode(self._observed.to(self.sae.W_enc))

    def remove(self) -> None:
        """Take the hooks off the model; harmless when done twice."""
        self._hook.remove()

    def _on_rows(self, rows: Tensor) -> Tensor | None:
        if rows.shape[-1] != self.sae.d_in:
            raise SiteError(
                f"site {self.site.path!r} gives vectors of width {rows.shape[-1]}, the SAE reads "
                f"{self.sae.d_in}; attach it where it was trained"
            )
        self._observed = rows.detach().clone()
        if self._transform is None:
            return None
        if self._transform.shift.device != rows.device:
            self._transform.to(rows.device)  # once, not to and fro at every forward
        steered: Tensor = self._transform(rows)
        return steered

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def attach(
    model: nn.Module | Recommender,
    sae: SparseAutoencoder,
    *,
    site: Site | None = None,
    steering: Steering | None = None,
) -> Attachment:
    """Attach an SAE to a layer of a frozen model through a forward hook.

    Parameters
    ----------
    model
        A torch module, or a `Recommender`, whose recommended site is then the default.
    sae
        The SAE; it must read vectors of the site's width.
    site
        Where to attach it.
    steering
        What to do there; observe only if None.

    Returns
    -------
    Attachment
        Live until its `remove`, or the end of its `with` block.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4))
    >>> sae = SparseAutoencoder(4, 8, k=2)
    >>> with attach(model, sae, site=Site("0", layout="BH")) as attachment:
    ...     _ = model(torch.ones(5, 3))
    >>> attachment.firings
    1
    """
    if isinstance(model, nn.Module):
        if site is None:
            raise SiteError("a bare torch module has no recommended site; pass site=Site(...)")
        return Attachment(model, sae, site, steering)
    return Attachment(model.model, sae, site or model.site, steering)
