"""What values of a latent are usual: its quantiles over real users.

For `LatentSteering.set_to` and `LatentSteering.clamp`: "neuron 812 as strong as in its fans".
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError
from steerrec.operations import Neurons, chosen_neurons


@torch.no_grad()
def latent_quantiles(
    sae: SparseAutoencoder,
    user_vectors: Tensor,
    q: float,
    neurons: Neurons,
    *,
    where_active: bool = True,
    chunk: int = 4096,
) -> Tensor:
    """The q-quantile of latents over users, linear between two neighbours.

    A latent is 0 in most users, so that of all users only high quantiles say anything: by default
    those in whom it is active count. One that is active in nobody has 0.

    Parameters
    ----------
    sae
        The SAE.
    user_vectors
        Real users, [U, H].
    q
        Between 0 and 1.
    neurons
        Which latents, n of them.
    where_active
        Over the users in whom the latent is active, or over all.
    chunk
        Users encoded at a time.

    Returns
    -------
    Tensor
        Float32 [n].
    """
    if not 0 <= q <= 1:
        raise ArtifactError(f"quantile {q} asked for; expected one between 0 and 1")
    chosen = chosen_neurons(sae, neurons)
    place = torch.full((sae.d_sae,), -1)
    place[chosen] = torch.arange(len(chosen))
    found = []
    for part in user_vectors.split(chunk):
        values, indices = (t.flatten().cpu() for t in sae.encode(part.to(sae.W_enc)))
        at = place[indices]
        kept = (at >= 0) & (values > 0)
        found.append((at[kept], values[kept]))
    at, values = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
    order = values.argsort()
    order = order[at[order].argsort(stable=True)]  # by neuron, then by value
    values = torch.cat([values[order].float(), torch.zeros(1)])
    active = torch.bincount(at, minlength=len(chosen))
    start = active.cumsum(0) - active
    idle = torch.zeros_like(active) if where_active else len(user_vectors) - active  # zeros, first

    def entry(rank: Tensor) -> Tensor:
        """The value of this rank of each latent, [n]."""
        inside = (rank >= idle) & (active > 0)
        return torch.where(inside, values[torch.where(inside, start + rank - idle, 0)], 0.0)

    rank = q * (active + idle - 1).clamp_min(0).double()
    below = rank.floor().long()
    low, high = entry(below), entry(rank.ceil().long())
    return (low + (high - low) * (rank - below)).float()[place[chosen]]
