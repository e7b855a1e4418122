"""The sparse autoencoder: encode, decode, and its sparse latents; topk or jumprelu.

Training it is in `training`, editing its pre-activations in `steering`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from steerrec.errors import ArtifactError
from steerrec.graphs import is_graphed
from steerrec.selection import largest
from steerrec.thresholds import active_above

Architecture = Literal["topk", "batchtopk", "jumprelu"]
"""How an SAE is trained; one trained as batchtopk is a jumprelu from then on."""


class Latents(NamedTuple):
    """The active latents of each row.

    `values` [B, w] are non-negative, `indices` [B, w] say which latents they are. One of value 0 is
    not active. Under topk w is k, and a latent whose pre-activation is not positive has value 0;
    under jumprelu w is the most that a row of the batch has, and shorter rows are filled up.
    """

    values: Tensor
    indices: Tensor

    def dense(self, d_sae: int) -> Tensor:
        """The latents as [B, d_sae], zero where inactive."""
        out = self.values.new_zeros(len(self.values), d_sae)
        return out.scatter_add(1, self.indices, self.values)

    @classmethod
    def joined(cls, parts: Sequence[Latents]) -> Latents:
        """Rows of several batches one after the other, filled up to the widest: [sum B, w]."""
        width = max(part.values.shape[1] for part in parts)
        filled = [
            [
                F.pad(each, (0, width - each.shape[1])) if each.shape[1] < width else each
                for each in part
            ]
            for part in parts
        ]
        return cls(*(torch.cat(tensors) for tensors in zip(*filled, strict=True)))


@dataclass(frozen=True)
class Reconstruction:
    """What `SparseAutoencoder.forward` returns.

    Attributes
    ----------
    x_hat
        The reconstruction, [B, d_in].
    latents
        The active latents that it is made of.
    pre_acts
        Pre-activations of all latents, [B, d_sae].
    """

    x_hat: Tensor
    latents: Latents
    pre_acts: Tensor


class SparseAutoencoder(nn.Module):
    """Sparse autoencoder.

    ``z = (x - b_dec) @ W_enc + b_enc``, ``x_hat = f @ W_dec + b_dec``, where of the latents

    - topk: ``f = TopK(ReLU(z))`` (Gao et al. 2024, "Scaling and evaluating sparse autoencoders");
    - jumprelu: ``f_j = ReLU(z_j)`` where ``z_j > threshold_j``, else 0 (Rajamanoharan et al. 2024,
      "Jumping ahead").

    Parameters
    ----------
    d_in
        Width of the vectors.
    d_sae
        Number of latents.
    k
        How many latents are active at once: exactly under topk, on average under jumprelu.
    architecture
        `topk`, or `jumprelu` with all thresholds 0 to begin with.
    generator
        Seeds the initial decoder directions; a fixed seed by default.

    Attributes
    ----------
    threshold
        [d_sae] under jumprelu, None under topk.
    k
        As above; None under jumprelu where the files of another library do not say it.
    """

    threshold: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        architecture: Literal["topk", "jumprelu"] = "topk",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if architecture not in ("topk", "jumprelu"):
            raise ValueError(f"architecture is 'topk' or 'jumprelu'; got {architecture!r}")
        self.d_in, self.d_sae = d_in, d_sae
        self._set_k(k)
        # a generator of its own: making an SAE must not move the caller's random stream
        generator = generator or torch.Generator().manual_seed(0)
        directions = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        thresholds = nn.Parameter(torch.zeros(d_sae)) if architecture == "jumprelu" else None
        self.register_parameter("threshold", thresholds)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], k: int | None) -> SparseAutoencoder:
        """The frozen SAE of these very tensors: nothing is drawn, copied or cast.

        Parameters
        ----------
        weights
            `W_enc` [d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in]; with
            `threshold` [d_sae] it is a jumprelu.
        k
            How many latents are active at once; may be None for a jumprelu.
        """
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        sae.d_in, sae.d_sae = weights["W_enc"].shape
        sae.register_parameter("threshold", None)
        for name in (
            "W_dec",
            "W_enc",
            "b_enc",
            "b_dec",
            *(["threshold"] * ("threshold" in weights)),
        ):
            sae.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))
        sae._set_k(k)
        return sae

    def _set_k(self, k: int | None) -> None:
        if k is None and self.threshold is not None:
            self.k: int | None = None
            return
        if k is None or not 0 < k <= self.d_sae:
            raise ValueError(
                f"k is {k}; expected between 1 and the number of latents, {self.d_sae}"
            )
        self.k = k

    @property
    def architecture(self) -> Literal["topk", "jumprelu"]:
        """How latents become active."""
        return "topk" if self.threshold is None else "jumprelu"

    def pre_acts(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Pre-activations [B, d_sae] of `x` [B, d_in].

        `bias` is ``b_enc - b_dec @ W_enc`` where the caller has it already.
        """
        self.require_width(x)
        # one matrix product with a fused bias: (x - b_dec) W + b = x W + (b - b_dec W)
        if bias is None:
            bias = self.b_enc - self.b_dec @ self.W_enc
        return torch.addmm(bias, x, self.W_enc)

    def require_width(self, x: Tensor) -> None:
        """Raise ArtifactError unless vectors `x` [..., d_in] are as wide as the SAE reads them."""
        if x.shape[-1] != self.d_in:
            raise ArtifactError(
                f"the SAE reads vectors of width {self.d_in}, the site gives {x.shape[-1]}; attach "
                "it where it was trained, or train one for this site"
            )

    def activate(self, pre_acts: Tensor) -> Latents:
        """What is active of pre-activations [B, d_sae].

        Under topk the k largest of each row, clipped at zero; under jumprelu what is above its
        threshold.
        """
        if self.threshold is not None:
            return Latents(*active_above(pre_acts, self.threshold))
        assert self.k is not None
        values, indices = largest(pre_acts, self.k)
        return Latents(values.relu(), indices)

    def encode(self, x: Tensor) -> Latents:
        """The active latents of `x` [B, d_in]."""
        return self.activate(self.pre_acts(x))

    def directions(self, latents: Latents) -> Tensor:
        """The sum of decoder rows weighted by the latents, without bias: [B, d_in]."""
        if self.threshold is not None and latents.indices.shape[1] == self.d_sae:
            return latents.dense(self.d_sae) @ self.W_dec
        if not is_graphed() and self._by_gathering(latents):
            rows = self.W_dec.index_select(0, latents.indices.reshape(-1))
            picked = rows.view(*latents.indices.shape, self.d_in)  # [B, k, d_in]
            return (latents.values.unsqueeze(2) * picked).sum(dim=1)
        return F.embedding_bag(
            latents.indices, self.W_dec, per_sample_weights=latents.values, mode="sum"
        )

    @staticmethod
    def _by_gathering(latents: Latents) -> bool:
        """Whether a derivative may be wanted that embedding_bag has not: forward, or a second one.

        Rows that are gathered take memory: second derivatives are for a few user vectors.
        """
        few = len(latents.indices) <= 8 and latents.values.requires_grad
        return few or forward_ad._current_level >= 0

    def decode(self, latents: Latents) -> Tensor:
        """Reconstruction [B, d_in] from the active latents."""
        return self.directions(latents) + self.b_dec

    def forward(self, x: Tensor) -> Reconstruction:
        """Encode and decode `x` [B, d_in]."""
        pre_acts = self.pre_acts(x)
        latents = self.activate(pre_acts)
        return Reconstruction(self.decode(latents), latents, pre_acts)

    @torch.no_grad()
    def fold_normalisation(self, mean: Tensor, scale: Tensor | float) -> SparseAutoencoder:
        """An SAE of raw vectors, equal to this one applied to ``(x - mean) / scale``.

        Its reconstruction is ``scale * x_hat + mean``. Latents and their order are unchanged, so
        decoder rows get length `scale` and must not be re-normalised.
        """
        weights = {
            "W_enc": self.W_enc / scale,
            "b_enc": self.b_enc.clone(),
            "W_dec": self.W_dec * scale,
            "b_dec": self.b_dec * scale + mean,
        }
        if self.threshold is not None:
            weights["threshold"] = self.threshold.clone()
        return SparseAutoencoder.from_weights(weights, self.k)

    def config(self) -> dict[str, Any]:
        """The SAELens-compatible `cfg.json` of this SAE, less its metadata."""
        own = {} if self.k is None else {"k": self.k}
        if self.architecture == "topk":
            own["rescale_acts_by_decoder_norm"] = False
        return {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            **own,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
        }


def fraction_of_variance_unexplained(x: Tensor, x_hat: Tensor) -> Tensor:
    """FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2, over all rows of [B, d_in]."""
    return (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()
