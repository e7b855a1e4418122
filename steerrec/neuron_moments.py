"""Mean and variance of every pre-activation, from those of the user vectors; and who fires.

Pre-activations are affine in the vector, ``z = x W + b``, so that ``mean(z) = mean(x) W + b`` and
``var(z_j) = W_j' cov(x) W_j``, exactly: a batch costs a product [H, H] instead of passes over
[B, d_sae].
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.plans import ROWS_AT_ONCE


class NeuronMoments:
    """Moments of all pre-activations over batches of user vectors, in float64.

    Nothing is read back from the device of the vectors before it is asked for.

    Parameters
    ----------
    sae
        Whose pre-activations.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self.n = 0
        self._mean = sae.W_enc.new_zeros(sae.d_in, dtype=torch.float64)
        self._products = sae.W_enc.new_zeros(sae.d_in, sae.d_in, dtype=torch.float64)

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Add user vectors [B, H] (Chan et al. 1979, for a matrix of products)."""
        n = len(vectors)
        if n == 0:
            return
        rows = vectors.to(self._mean)
        mean = rows.mean(dim=0)
        centred = rows - mean
        delta, total = mean - self._mean, self.n + n
        self._products.addmm_(centred.T, centred)
        self._products.addr_(delta, delta, alpha=self.n * n / total)
        self._mean += delta * (n / total)
        self.n = total

    @property
    def mean(self) -> Tensor:
        """Mean of each pre-activation, float64 [d_sae]."""
        weight, bias = self._encoder()
        return (self._mean @ weight + bias).cpu()

    @property
    def variance(self) -> Tensor:
        """Population variance (ddof 0) of each pre-activation, float64 [d_sae]."""
        weight, _ = self._encoder()
        squares = ((self._products @ weight) * weight).sum(dim=0)
        return (squares / max(self.n, 1)).clamp_min(0).cpu()

    @torch.no_grad()
    def _encoder(self) -> tuple[Tensor, Tensor]:
        """Weight [H, d_sae] and bias [d_sae] of the pre-activations, in float64."""
        weight, shift, offset = (
            part.detach().double() for part in (self.sae.W_enc, self.sae.b_dec, self.sae.b_enc)
        )
        return weight, offset - shift @ weight


class FiringCounts:
    """In how many user vectors each neuron is active, counted where the SAE is.

    Parameters
    ----------
    sae
        Whose neurons.
    """

    @torch.no_grad()
    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self._bias = sae.b_enc - sae.b_dec @ sae.W_enc
        self._pre_acts = sae.W_enc.new_empty(0, sae.d_sae)
        self._counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Add user vectors [B, H]; on a CPU a few at a time, which stay in its cache."""
        rows = ROWS_AT_ONCE if vectors.device.type == "cpu" else max(1, len(vectors))
        for part in vectors.split(rows):
            if len(part) > len(self._pre_acts):
                # kept: new memory costs more than what is written into it
                self._pre_acts = part.new_empty(len(part), self.sae.d_sae)
            pre_acts = self._pre_acts[: len(part)]
            torch.addmm(self._bias, part, self.sae.W_enc, out=pre_acts)
            latents = self.sae.activate(pre_acts)
            active = (latents.values > 0).long()
            self._counts.scatter_add_(0, latents.indices.flatten(), active.flatten())

    @property
    def counts(self) -> Tensor:
        """Vectors in which each neuron was active, int64 [d_sae]."""
        return self._counts.cpu()
