"""What lists lose when one neuron is switched off: the ground truth for attribution columns.

Switched off is the latent alone, after selection (`LatentSteering.ablate`): which others are active
is not decided anew. The lists of a user change only by the neurons that are active in that user, so
all neurons together cost as many rankings a user as latents are active at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.activations import collect_user_vectors
from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.errors import ArtifactError, DataError
from steerrec.metrics import gini
from steerrec.operations import LatentSteering
from steerrec.progress import track
from steerrec.ranking import top_k
from steerrec.recommender import Recommender
from steerrec.sites import Site


@dataclass(frozen=True, eq=False)
class CausalEffects:
    """What every neuron does to the lists: the metric with it, less the metric without it.

    Attributes
    ----------
    effect, standard_error
        On the mean value of list slots, over users; float64 [d_sae].
    gini
        On the Gini index of exposure, float64 [d_sae].
    active
        Share of the users in whom it is active, float64 [d_sae].
    measured
        Which neurons were switched off, bool [d_sae]; the others have 0 everywhere.
    """

    effect: Tensor
    standard_error: Tensor
    gini: Tensor
    active: Tensor
    measured: Tensor


@dataclass(frozen=True)
class _Ablated:
    """Users without one of their neurons: neuron [P], user [P], scored vector [P, H]."""

    neurons: Tensor
    users: Tensor
    vectors: Tensor


@torch.no_grad()
def causal_effects(
    rec: Recommender,
    sae: SparseAutoencoder,
    values: NDArray[np.float64],
    histories: Histories,
    *,
    site: Site | None = None,
    neurons: Tensor | None = None,
    k: int = 10,
    mask_seen: bool = False,
    chunk: int = 4096,
) -> CausalEffects:
    """Switch off one neuron after the other and rank again for the users in whom it is active.

    Where the SAE sits on the scored vector, user vectors are captured once and changed; anywhere
    else the model runs again for these users with the SAE attached.

    Parameters
    ----------
    rec, sae
        What is looked at.
    values
        Value of each item, [N]; see `item_values`.
    histories
        The users, such as a sample of the training histories.
    site
        Where the SAE belongs; the recommender's own site by default.
    neurons
        Which to switch off; all by default.
    k, mask_seen
        Length of the lists, and whether items of the history are left out of them.
    chunk
        Rankings at a time.
    """
    if len(histories) == 0:
        raise DataError("no users to switch neurons off in; expected at least one")
    chosen = torch.ones(sae.d_sae, dtype=torch.bool)
    if neurons is not None:
        if len(neurons) and not 0 <= int(neurons.min()) <= int(neurons.max()) < sae.d_sae:
            raise ArtifactError(
                f"neurons {int(neurons.min())} to {int(neurons.max())} asked for; this SAE has 0 "
                f"to {sae.d_sae - 1}"
            )
        chosen = torch.zeros_like(chosen)
        chosen[neurons] = True
    worth = torch.from_numpy(values)
    scored = site is None or site == rec.site
    vectors = collect_user_vectors(rec, histories)
    base = top_k(vectors, rec.item_head, k, seen=histories if mask_seen else None).ids.cpu()
    before = _mean_value(base, worth)
    exposure = _exposure(base, len(worth))
    base_gini = gini(exposure)
    total, square, changed, active = torch.zeros(4, sae.d_sae, dtype=torch.float64)
    if scored:
        parts = _without(sae, vectors, chosen, chunk)
    else:
        assert site is not None
        parts = _run_again(rec, sae, site, histories, chosen)
    for part in parts:
        seen = histories.select(part.users.numpy()) if mask_seen else None
        lists = top_k(part.vectors, rec.item_head, k, seen=seen).ids.cpu()
        lost = before[part.users] - _mean_value(lists, worth)
        total.index_add_(0, part.neurons, lost)
        square.index_add_(0, part.neurons, lost.square())
        found, sizes = part.neurons.unique_consecutive(return_counts=True)
        ends = sizes.cumsum(0).tolist()
        for neuron, start, stop in zip(found.tolist(), [0, *ends], ends, strict=False):
            active[neuron] = (stop - start) / len(histories)
            old, new = base[part.users[start:stop]], lists[start:stop]
            if not torch.equal(old, new):
                change = _exposure(new, len(worth)) - _exposure(old, len(worth))
                changed[neuron] = base_gini - gini(exposure + change)
    users = len(histories)
    mean = total / users
    error = ((square / users - mean.square()).clamp_min(0) / users).sqrt()
    return CausalEffects(mean, error, changed, active, chosen)


def _without(
    sae: SparseAutoencoder, vectors: Tensor, chosen: Tensor, chunk: int
) -> Iterator[_Ablated]:
    """User vectors less what one active latent adds to them; all users of a neuron in one part."""
    users, neurons, latents = _active(sae, vectors, chosen)
    starts = _cuts(neurons, chunk)
    cuts = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(neurons)], strict=True)]
    for part in track(cuts, "switch neurons off", unit="part"):
        rows = vectors[users[part]].to(sae.W_dec)
        directions = sae.W_dec[neurons[part].to(sae.W_dec.device)]
        moved = rows - latents[part].to(rows).unsqueeze(1) * directions
        yield _Ablated(neurons[part], users[part], moved)


def _run_again(
    rec: Recommender, sae: SparseAutoencoder, site: Site, histories: Histories, chosen: Tensor
) -> Iterator[_Ablated]:
    """Scored vectors of a model that runs with one latent switched off."""
    here = collect_user_vectors(rec, histories, site)
    users, neurons, _ = _active(sae, here, chosen)
    found, sizes = neurons.unique_consecutive(return_counts=True)
    parts = list(zip(found.tolist(), users.split(sizes.tolist()), strict=True))
    for neuron, affected in track(parts, "switch neurons off", unit="neuron"):
        off = LatentSteering.ablate(sae, [neuron])
        with attach(rec, sae, site=site, steering=off):
            vectors = collect_user_vectors(rec, histories.select(affected.numpy()))
        yield _Ablated(torch.full_like(affected, neuron), affected, vectors)


def _active(
    sae: SparseAutoencoder, vectors: Tensor, chosen: Tensor, chunk: int = 4096
) -> tuple[Tensor, Tensor, Tensor]:
    """User, neuron and latent wherever a chosen neuron is active, by neuron and then user: [P]."""
    found = []
    for start in range(0, len(vectors), chunk):
        values, indices = (
            part.cpu() for part in sae.encode(vectors[start : start + chunk].to(sae.W_enc))
        )
        user, place = ((values > 0) & chosen[indices]).nonzero(as_tuple=True)
        found.append((user + start, indices[user, place], values[user, place]))
    users, neurons, latents = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = neurons.argsort(stable=True)
    return users[order], neurons[order], latents[order]


def _cuts(neurons: Tensor, chunk: int) -> list[int]:
    """Where parts of about `chunk` rows begin, so that no neuron is in two of them."""
    _, sizes = neurons.unique_consecutive(return_counts=True)
    cuts, end, size = [0], 0, 0
    for count in sizes.tolist():
        if size and size + count > chunk:
            cuts.append(end)
            size = 0
        size += count
        end += count
    return cuts if len(neurons) else []


def _mean_value(lists: Tensor, values: Tensor) -> Tensor:
    """Mean value of the filled slots of lists [U, k]: float64 [U], 0 for an empty list."""
    filled = lists >= 0
    total = (values[lists.clamp_min(0)] * filled).sum(dim=1)
    return total / filled.sum(dim=1).clamp_min(1)


def _exposure(lists: Tensor, items: int) -> Tensor:
    return torch.bincount(lists[lists >= 0], minlength=items)
