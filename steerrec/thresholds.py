"""Latents that are active above a threshold of their own: what is active, and shifts of it.

For SAEs of architecture jumprelu, ``f_j = ReLU(z_j) if z_j > threshold_j else 0`` (Rajamanoharan et
al. 2024, arXiv 2407.14435): nothing is selected, and how many latents are active varies by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerrec.compiled import as_arrays, jump_kernels
from steerrec.graphs import has_values
from steerrec.selection import largest


def active_above(pre_acts: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The pre-activations above their thresholds, and where they are.

    Parameters
    ----------
    pre_acts
        [B, d_sae].
    threshold
        [d_sae]; one below 0 is as good as 0.

    Returns
    -------
    values, indices
        [B, w] each, w the most that a row of this batch has (at least 1): rows with fewer are
        filled up with value 0. Gradients flow through `values`. Where torch records a graph, w is
        d_sae.
    """
    floor = threshold.detach().clamp_min(0)
    arrays = as_arrays(pre_acts.detach(), floor)
    loops = None if arrays is None else jump_kernels()
    if arrays is not None and loops is not None:
        width = loops.most_above(*arrays)
        if width >= 0:
            values = pre_acts.new_zeros(len(pre_acts), max(1, width))
            indices = values.new_zeros(values.shape, dtype=torch.int64)
            loops.above(*arrays, values.detach().numpy(), indices.numpy())
            if pre_acts.requires_grad and torch.is_grad_enabled():
                values = pre_acts.gather(1, indices) * (values > 0)
            return values, indices
    # what is not a number is above everything: it must not go unseen
    dense = torch.where(pre_acts <= floor, 0.0, pre_acts)
    if not has_values(pre_acts):
        return dense, torch.arange(dense.shape[1], device=dense.device).expand(dense.shape)
    width = int((dense != 0).sum(dim=1).max()) if len(dense) else 0
    return largest(dense, max(1, width))


@torch.no_grad()
def largest_so_far(values: Tensor, count: int, found: Tensor | None = None) -> Tensor:
    """The `count` largest of positive values, and of those found in chunks before.

    Parameters
    ----------
    values
        Of any shape.
    count
        How many are wanted.
    found
        What came of the chunks before.

    Returns
    -------
    Tensor
        At most `count` of them, [n], ascending.
    """
    full = found is not None and len(found) == count
    least = found[0] if found is not None and full else values.new_zeros(())
    more = values[values > least]
    pool = more if found is None else torch.cat([found, more])
    return pool.topk(min(count, len(pool))).values.flip(0)
