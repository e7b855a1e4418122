"""Streaming mean and variance of the columns of a tensor, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance of each column over batches of rows, in float64 (Chan et al. 1979)."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Add a batch of rows [R, width]."""
        n = len(rows)
        if n == 0:
            return
        mean = rows.mean(dim=0, dtype=torch.float64).cpu()
        # centred in the rows' own dtype first: the squares then lose nothing to the mean
        centred = rows - mean.to(rows)
        drift = centred.mean(dim=0, dtype=torch.float64).cpu()
        squares = centred.square().sum(dim=0, dtype=torch.float64).cpu() - n * drift.square()
        delta = mean - self.mean
        total = self.n + n
        self._squares += squares + delta.square() * (self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total

    @property
    def variance(self) -> Tensor:
        """Population variance (ddof 0) of each column, float64 [width]."""
        return (self._squares / max(self.n, 1)).clamp_min(0)
