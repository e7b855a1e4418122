"""Going on from a trained SAE on the vectors of a retrained model: where training begins then."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder, fraction_of_variance_unexplained
from steerrec.errors import TrainingError

_STEPS = 5


def check_size(sae: SparseAutoencoder, width: int, latents: int, k: int) -> None:
    """Raise TrainingError unless an SAE has the size that is to be trained."""
    found, expected = (sae.d_in, sae.d_sae, sae.k or k), (width, latents, k)
    if found != expected:
        raise TrainingError(
            "the SAE to start from has width {}, {} latents and k {}; ".format(*found)
            + "expected {}, {} and {}: train one from scratch".format(*expected)
        )


@torch.no_grad()
def normalised(sae: SparseAutoencoder, mean: Tensor, scale: float) -> SparseAutoencoder:
    """A trainable copy of an SAE of raw vectors for ``(x - mean) / scale``, on the CPU.

    Its decoder rows have length 1. It computes what the SAE computes as long as that has decoder
    rows all of one length; else the encoder makes up for theirs, and TopK may select otherwise.
    """
    W_dec = sae.W_dec.float().cpu() / scale
    length = W_dec.norm(dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)  # [d_sae]
    weights = {
        "W_enc": sae.W_enc.float().cpu() * scale * length,
        "b_enc": sae.b_enc.float().cpu() * length,
        "W_dec": F.normalize(W_dec, dim=1),
        "b_dec": (sae.b_dec.float().cpu() - mean) / scale,
    }
    if sae.threshold is not None:  # as long as what it is compared with
        weights["threshold"] = sae.threshold.float().cpu() * length
    return SparseAutoencoder.from_weights(weights, sae.k).requires_grad_(True)


@torch.no_grad()
def recentre(sae: SparseAutoencoder, x: Tensor) -> None:
    """Let `b_dec` follow the mean of the vectors `x` [B, d_in], which retraining has moved.

    An SAE whose `b_dec` is moved along with its vectors reconstructs as before; how far they have
    moved is what its reconstructions lack on average, found in a few steps.
    """
    tried: list[tuple[float, int, Tensor]] = []
    for step in range(_STEPS):
        x_hat = sae(x).x_hat
        fvu = float(fraction_of_variance_unexplained(x, x_hat))
        tried.append((fvu, step, sae.b_dec.clone()))
        sae.b_dec.add_((x - x_hat).mean(dim=0))
    sae.b_dec.copy_(min(tried)[2])


def digest(sae: SparseAutoencoder) -> str:
    """A hash of an SAE: whether a run goes on from the one that it began with."""
    sha = hashlib.sha256()
    for tensor in sae.state_dict().values():
        sha.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
