"""What neurons do to the scores of items, by their decoder rows: no forward pass of the model.

Only for an SAE at the vector that the scores are computed from.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.item_properties import ItemValues
from steerrec.progress import track
from steerrec.recommender import ItemHead
from steerrec.selection import largest

CELLS = 4_000_000
"""At most so many scores are held at once: users of a batch times items."""

SHARPNESS = 12
"""The edge of a soft list is this much narrower than the scores from half its length to twice."""


@torch.no_grad()
def logit_slopes(
    sae: SparseAutoencoder, head: ItemHead, items: ItemValues, *, chunk: int = 65_536
) -> tuple[Tensor, Tensor]:
    """How the scores that a decoder row adds go with the values of items.

    Row j adds ``e_ji = W_dec[j] . E_i`` to the score of item i, with E_i the row of the item
    matrix, of unit length if the head normalises; a bias is the same with and without it.
    Covariance and variance over items are computed from the mean and the covariance [H, H] of the
    rows E_i: the effects [d_sae, N] are never made.

    Parameters
    ----------
    sae
        The SAE.
    head
        How items are scored.
    items
        Their values.
    chunk
        Items at a time.

    Returns
    -------
    correlation, slope
        Correlation of e_j with the values over the counted items; covariance over the standard
        deviation of the values, in units of score. Float64 [d_sae], 0 where nothing varies.
    """
    rows = torch.from_numpy(np.flatnonzero(items.counted))
    values = torch.from_numpy(items.values)[rows]
    centred = values - values.mean()
    width = head.width
    mean = torch.zeros(width, dtype=torch.float64)
    for part in rows.split(chunk):
        mean += _directions(head, part).sum(dim=0)
    mean /= len(rows)
    cross = torch.zeros(width, dtype=torch.float64)
    spread = torch.zeros(width, width, dtype=torch.float64)
    for part, value in zip(rows.split(chunk), centred.split(chunk), strict=True):
        vectors = _directions(head, part) - mean
        cross += value @ vectors
        spread += vectors.T @ vectors
    decoder = sae.W_dec.detach().cpu().double()
    covariance = decoder @ cross / len(rows)
    deviation = ((decoder @ spread * decoder).sum(dim=1) / len(rows)).clamp_min(0).sqrt()
    sigma = float(centred.square().mean().sqrt())
    product = deviation * sigma
    moves = product > 1e-12 * product.max().clamp_min(torch.finfo(torch.float64).tiny)
    correlation = torch.where(moves, covariance / torch.where(moves, product, 1.0), 0.0)
    slope = head.scale * covariance / sigma if sigma else torch.zeros_like(covariance)
    return correlation.clamp(-1, 1), slope


def _directions(head: ItemHead, rows: Tensor) -> Tensor:
    """Rows of the item matrix as scores use them, float64 [R, H] on the CPU."""
    weight = head.weight.detach()[rows.to(head.weight.device)].cpu().double()
    return F.normalize(weight, dim=-1) if head.normalize else weight


@torch.no_grad()
def mean_latents(
    sae: SparseAutoencoder, user_vectors: Tensor, *, unit: bool = False, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Mean of every latent over users, zero where it is not active, and the share it is active in.

    Parameters
    ----------
    sae
        The SAE.
    user_vectors
        [U, H].
    unit
        Measure latents in lengths of the user vector: what they weigh under a head that normalises.
    chunk
        Users at a time.

    Returns
    -------
    mean, firing_rate
        Float64 [d_sae] each.
    """
    total = torch.zeros(sae.d_sae, dtype=torch.float64)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in user_vectors.split(chunk):
        values, indices = sae.encode(part.to(sae.W_enc))
        fired += torch.bincount(indices[values > 0].cpu(), minlength=sae.d_sae)
        if unit:
            values = values / part.to(values).norm(dim=1, keepdim=True).clamp_min(1e-12)
        total.index_add_(0, indices.flatten().cpu(), values.flatten().double().cpu())
    return total / len(user_vectors), fired / len(user_vectors)


def grad_attribution(
    sae: SparseAutoencoder,
    head: ItemHead,
    values: NDArray[np.float64],
    user_vectors: Tensor,
    *,
    k: int = 10,
    seen: Histories | None = None,
    cells: int = CELLS,
) -> Tensor:
    """Mean over users of ``f_j * dO/df_j``: to first order, what O loses without the neuron.

    O is the mean value v of a user's soft list, ``O = sum_i q_i * v_i / k``, in which item i of
    score s_i is to the degree ``q_i = sigmoid((s_i - theta) / tau)``. The threshold theta lies
    midway between the scores of ranks k and k + 1 and moves so that the sum of all q stays, so that
    ``dO/ds_i = w_i * (v_i - mean_w(v)) / k`` with ``w_i = q_i * (1 - q_i) / tau``: what counts are
    the items at the edge of the list. tau is a twelfth of what lies between the scores of ranks k/2
    and 2k. Spliced in as a delta, a latent moves the user vector along its decoder row, so that
    ``dO/df_j = W_dec[j] . dO/dx``.

    Parameters
    ----------
    sae
        The SAE.
    head
        How items are scored; differentiated as it is, cosine and scale included.
    values
        Value v of each item, [N].
    user_vectors
        Users, [U, H].
    k
        Length of the lists.
    seen
        Histories of these users, if their items are left out of the lists.
    cells
        At most so many scores at a time.

    Returns
    -------
    Tensor
        Float64 [d_sae], in units of v.
    """
    total = torch.zeros(sae.d_sae, dtype=torch.float64)
    if k >= len(head):  # every list holds all items, whatever the scores
        return total
    worth = torch.from_numpy(values).to(head.weight.device, torch.float32)
    size = max(1, min(1024, cells // len(head)))
    for rows in track(torch.arange(len(user_vectors)).split(size), "gradients", unit="batch"):
        x = user_vectors[rows].to(head.weight).requires_grad_()
        scores = head.scores(x).float()
        with torch.no_grad():
            slope = _edge(scores, None if seen is None else _cells(seen, rows), k)
            mean = (slope @ worth) / slope.sum(dim=1).clamp_min(1e-30)
            by_score = slope * (worth - mean.unsqueeze(1)) / k  # [B, N]
        (by_vector,) = torch.autograd.grad(scores, x, by_score)
        with torch.no_grad():
            latents, indices = sae.encode(x.detach().to(sae.W_enc))
            picked = sae.W_dec[indices]  # [B, k, H]
            along = (picked @ by_vector.to(picked).unsqueeze(2)).squeeze(2)  # [B, k]
            total.index_add_(0, indices.flatten().cpu(), (latents * along).flatten().double().cpu())
    return total / len(user_vectors)


def _edge(scores: Tensor, masked: tuple[Tensor, Tensor] | None, k: int) -> Tensor:
    """How fast each item enters the soft list of each user as its score rises: w [B, N]."""
    if masked is not None:
        scores = scores.index_put(masked, scores.new_tensor(-torch.inf))
    theta, tau = _threshold(scores, k)
    soft = ((scores - theta) / tau).sigmoid()
    return soft * (1 - soft) / tau


def _threshold(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Threshold and width of the edge of each user's list of k: [B, 1] each."""
    near = largest(scores, min(2 * k, scores.shape[1]))[0].sort(dim=1, descending=True).values
    near = near.clamp_min(torch.finfo(near.dtype).min / 4)  # what is masked
    theta = near[:, k - 1 : k + 1].mean(dim=1, keepdim=True)
    width = near[:, (k - 1) // 2, None] - near[:, -1:]
    return theta, (width / SHARPNESS).clamp_min(1e-6)


def _cells(seen: Histories, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row within the batch and catalogue row of every seen item."""
    part = seen.select(rows.numpy())
    owner = np.repeat(np.arange(len(part)), part.lengths)
    return torch.from_numpy(owner), torch.from_numpy(part.items)
