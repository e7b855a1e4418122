"""How well one number tells two groups of users apart: AUROC and point-biserial correlation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.compiled import kernels

Z_95 = 1.959963984540054
"""The normal quantile of a two-sided interval of 95 %."""

WITHIN = 0.002
"""How far an area may be from exact; that of 2,048 users a group has a standard error of .009."""


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
    area, error = _area(_both_placements(a, b), len(a), len(b))
    return float(area), float(error)


def _both_placements(a: NDArray[np.floating], b: NDArray[np.floating]) -> tuple[int, int, int, int]:
    """`_placements` of A within B, and of B within A; both are sorted in place."""
    a.sort()
    b.sort()
    return *_placements(a, b), *_placements(b, a)


def _placements(values: NDArray[np.floating], others: NDArray[np.floating]) -> tuple[int, int]:
    """Sum, and sum of squares, of twice the number of `others` below each value; both are sorted.

    Equal ones count half.
    """
    if kernels() is None:
        lower, upper = (others.searchsorted(values, side) for side in ("left", "right"))
        twice = lower + upper
        return int(twice.sum()), int((twice * twice).sum())
    from steerrec.separation_kernels import placements

    return placements(values, others)


def _area(placed: Iterable[Any], n_a: int, n_b: int) -> tuple[Any, Any]:
    """AUROC and its standard error from `_both_placements`: whole numbers, or arrays of them."""
    total_a, squares_a, total_b, squares_b = placed
    variance = _spread(total_a, squares_a, n_a, n_b) + _spread(total_b, squares_b, n_b, n_a)
    return total_a / (2 * n_a * n_b), variance**0.5


def _spread(total: Any, squares: Any, n: int, others: int) -> Any:
    """Variance (ddof 1) of the share of the others below each of n values, over n."""
    spread = n * squares - total * total  # whole numbers: exactly 0 where all are equal
    return spread / (n * n * max(n - 1, 1) * (2 * others) ** 2)


@torch.no_grad()
def aurocs(
    sae: SparseAutoencoder,
    group_a: Tensor,
    group_b: Tensor,
    *,
    chunk: int = 64,
    within: float = WITHIN,
) -> tuple[Tensor, Tensor]:
    """`auroc` of the pre-activations of every latent.

    Sorting thousands of users for each of thousands of latents takes longer than the model. They
    are counted in equal parts of the range of a latent instead, and those in one part are taken
    for equal. Pairs in different parts are in their right order, so that half the pairs that share
    a part bounds the error; a latent where that is above `within` is sorted after all.

    Parameters
    ----------
    sae
        The SAE.
    group_a, group_b
        Vectors at its site of users of each group, [n_a, H] and [n_b, H].
    chunk
        Latents at a time: memory is bounded by it times the number of users.
    within
        How far an area may be from exact; 0 sorts them all.

    Returns
    -------
    area, standard_error
        Float64 [d_sae] each.
    """
    n_a, n_b = len(group_a), len(group_b)
    vectors = torch.cat([group.to(sae.W_enc) - sae.b_dec for group in (group_a, group_b)])
    sums = np.full((sae.d_sae, 5), -1, np.int64)  # of `_both_placements`, and pairs that share
    memory = vectors.new_empty(chunk, len(vectors))
    most = 2 * within * n_a * n_b
    for start in range(0, sae.d_sae, chunk):
        # without b_enc: what all users have in common changes no rank
        part = sae.W_enc[:, start : start + chunk]
        out = memory[: part.shape[1]]
        pre_acts = torch.mm(part.T, vectors.T, out=out).float().cpu().numpy()
        placed = sums[start : start + chunk]
        if within > 0 and kernels() is not None:
            from steerrec.separation_kernels import binned_placements

            binned_placements(pre_acts, n_a, placed)
        for row in np.flatnonzero((placed[:, 4] < 0) | (placed[:, 4] > most)):
            placed[row, :4] = _both_placements(pre_acts[row, :n_a], pre_acts[row, n_a:])
    # squares of sums: as Python's numbers where 64 bits would not hold them
    whole = sums if n_a * n_b < 2**30 else sums.astype(object)
    found = (np.asarray(each, np.float64) for each in _area(whole.T[:4], n_a, n_b))
    area, error = (torch.from_numpy(each) for each in found)
    return area, error


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
