"""How well one number tells two groups of users apart: AUROC and point-biserial correlation."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.compiled import kernels

Z_95 = 1.959963984540054
"""The normal quantile of a two-sided interval of 95 %."""


def auroc(a: NDArray[np.floating], b: NDArray[np.floating]) -> tuple[float, float]:
    """Chance that a value of A is above one of B, ties counting half, with its standard error.

    The standard error is that of DeLong, DeLong & Clarke-Pearson (1988), which supposes nothing of
    the distributions; it is 0 where the groups do not overlap.

    Parameters
    ----------
    a, b
        Values [n_a] and [n_b]; they are sorted in place.

    Returns
    -------
    area, standard_error
        0.5 says that the groups do not differ; 1, that all of A are above all of B.
    """
    a.sort()
    b.sort()
    area, variance_a = _placements(a, b)  # of each of A the share of B below it
    _, variance_b = _placements(b, a)
    return area, math.sqrt(variance_a / len(a) + variance_b / len(b))


def _placements(values: NDArray[np.floating], others: NDArray[np.floating]) -> tuple[float, float]:
    """Mean and variance (ddof 1) of the share of `others` below each value; both are sorted.

    Equal ones count half.
    """
    if kernels() is None:
        lower, upper = (others.searchsorted(values, side) for side in ("left", "right"))
        twice = lower + upper
        total, squares = int(twice.sum()), int((twice * twice).sum())
    else:
        from steerrec.separation_kernels import placements

        total, squares = placements(values, others)
    n, most = len(values), 2 * len(others)
    spread = n * squares - total * total  # whole numbers: exactly 0 where all are equal
    variance = spread / (n * (n - 1) * most**2) if n > 1 else 0.0
    return total / (n * most), variance


@torch.no_grad()
def aurocs(
    sae: SparseAutoencoder, group_a: Tensor, group_b: Tensor, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """`auroc` of the pre-activations of every latent.

    Parameters
    ----------
    sae
        The SAE.
    group_a, group_b
        Vectors at its site of users of each group, [n_a, H] and [n_b, H].
    chunk
        Latents at a time: memory is bounded by it times the number of users.

    Returns
    -------
    area, standard_error
        Float64 [d_sae] each.
    """
    found = np.empty((2, sae.d_sae))
    for start in range(0, sae.d_sae, chunk):
        part = slice(start, start + chunk)
        sides = []
        for vectors in (group_a, group_b):
            centred = vectors.to(sae.W_enc) - sae.b_dec
            pre_acts = centred @ sae.W_enc[:, part] + sae.b_enc[part]  # [n, chunk]
            sides.append(pre_acts.T.float().contiguous().cpu().numpy())
        for offset, (a, b) in enumerate(zip(*sides, strict=True)):
            found[:, start + offset] = auroc(a, b)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def point_biserial(
    mean_a: Tensor, mean_b: Tensor, var_a: Tensor, var_b: Tensor, n_a: int, n_b: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pearson correlation of values with being in group A, and its interval of 95 %.

    The interval is Fisher's: ``tanh(artanh(r) ± 1.96 / sqrt(n - 3))``. Where nothing varies r is 0.

    Parameters
    ----------
    mean_a, mean_b, var_a, var_b
        Means and population variances (ddof 0) of each group, [D].
    n_a, n_b
        Users in each group.

    Returns
    -------
    r, low, high
        [D] each, between -1 and 1.
    """
    n = n_a + n_b
    between = mean_a - mean_b
    share = n_a * n_b / n**2
    total = (n_a * var_a + n_b * var_b) / n + share * between.square()
    tiny = torch.finfo(total.dtype).tiny
    r = torch.where(total > 0, share**0.5 * between / total.clamp_min(tiny).sqrt(), 0.0)
    r = r.clamp(-1, 1)
    centre = r.clamp(-1 + 1e-12, 1 - 1e-12).atanh()
    half = Z_95 / max(n - 3, 1) ** 0.5
    return r, (centre - half).tanh(), (centre + half).tanh()
