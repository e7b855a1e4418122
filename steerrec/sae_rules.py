"""Which latents are active in training, by architecture: topk, batchtopk, jumprelu.

A rule finds the entries of a batch of pre-activations that take part in a step. What a step makes
of them is in `sae_steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from steerrec.autoencoder import Architecture
from steerrec.compiled import as_arrays, jump_kernels
from steerrec.selection import largest
from steerrec.thresholds import largest_so_far

_FALL = 0.01  # what a step takes off the logarithm of a dead latent's threshold
_PULL = 0.05  # what it adds to those of all latents where twice as many are active as should be


class Entries(NamedTuple):
    """Pre-activations of a batch that matter to a step, row after row.

    Row r has `columns` [N] and `values` [N] from ``offsets[r]`` to ``offsets[r + 1]`` [B + 1].
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor


class Rule:
    """How latents become active in training: TopK, the k largest pre-activations of each row.

    Parameters
    ----------
    k
        How many of a row.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def parameters(self) -> list[nn.Parameter]:
        """What is trained beside the SAE."""
        return []

    def begin(self, pre_acts: Tensor) -> None:
        """Look at pre-activations of the untrained SAE, [R, d_sae]."""

    def entries(self, pre_acts: Tensor) -> Entries:
        """The entries that take part in a step, of pre-activations [B, d_sae]."""
        values, indices = largest(pre_acts, self.k)
        offsets = torch.arange(0, indices.numel() + 1, self.k, device=indices.device)
        return Entries(offsets, indices.flatten(), values.flatten())

    def latents(self, values: Tensor, columns: Tensor) -> Tensor:
        """The latents that pre-activations [N] in `columns` [N] make, differentiable."""
        return values.relu()

    def active(self, found: Entries) -> Tensor:
        """Which entries are active, [N]."""
        return found.values > 0

    def penalty(self, values: Tensor, columns: Tensor, rows: int) -> Tensor | None:
        """What is added to the loss of a batch of `rows` rows, differentiable."""
        return None

    def give_gradients(self, found: Entries, rows: int, to_latents: Tensor) -> None:
        """Gradients of `parameters`, given those of the latents of all entries [N]."""

    def after_step(self, dead: Tensor, active: float) -> None:
        """What is done once the optimiser has made its step.

        Parameters
        ----------
        dead
            Numbers of the latents that are dead, [D].
        active
            How many were active in a row of the batch, on average.
        """


class BatchTopK(Rule):
    """The largest pre-activations of a whole batch, k times its rows (Bussmann et al. 2024)."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.floor = 0.0
        self.room = Room()

    def begin(self, pre_acts: Tensor) -> None:
        """A bound to begin with, so that the first step looks at few entries."""
        found = largest_so_far(pre_acts, self.k * len(pre_acts))
        self.floor = 0.8 * float(found[0]) if len(found) else 0.0

    def entries(self, pre_acts: Tensor) -> Entries:
        """The entries that take part in a step: all that are active, and no others."""
        count = self.k * len(pre_acts)
        found = self.room.above(pre_acts, self.floor)
        if found is not None and len(found.values) < count and self.floor > 0:
            found = self.room.above(pre_acts, 0.0)  # a bound of the batch before was too high
        if found is None:
            flat = pre_acts.relu().flatten()
            places = flat.topk(min(count, len(flat)), sorted=False).indices.sort().values
            return _row_by_row(pre_acts, places)
        if len(found.values) <= count:
            return found
        least = np.partition(found.values.numpy(), -count)[-count]
        self.floor = 0.8 * float(least)
        kept = found.values >= least  # of several that are equal to the least, all
        ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return Entries(ends[found.offsets], found.columns[kept], found.values[kept])


class JumpReLU(Rule):
    """What is above a threshold of its latent, which is learned (Rajamanoharan et al. 2024).

    A dead latent gets no gradient: its threshold falls by a hundredth a step until it fires. Other
    thresholds get pseudo-gradients from pre-activations within half a bandwidth of them, and
    ``weight * (L0 / k - 1)^2`` is added to the loss. The gradients of the error push against that,
    so that it would settle at fewer than k: after each step all thresholds are moved together by
    ``(L0 / k - 1) / 20`` of themselves, which at the end of training, where gradients move them no
    more, leaves k latents active on average.

    Parameters
    ----------
    k
        How many of a row on average.
    width
        Number of latents.
    bandwidth
        As a share of each threshold.
    weight
        Of the penalty.
    device
        Where the thresholds are.
    """

    def __init__(
        self, k: int, width: int, bandwidth: float, weight: float, device: torch.device
    ) -> None:
        super().__init__(k)
        self.bandwidth, self.weight = bandwidth, weight
        self.log_threshold = nn.Parameter(torch.zeros(width, device=device))
        self.room = Room()

    def parameters(self) -> list[nn.Parameter]:
        """The logarithms of the thresholds: these stay positive."""
        return [self.log_threshold]

    @torch.no_grad()
    def begin(self, pre_acts: Tensor) -> None:
        """One threshold for all latents, above which k of a row are active on average."""
        found = largest_so_far(pre_acts, self.k * len(pre_acts))
        least = found[0] if len(found) else pre_acts.new_tensor(1.0)
        self.log_threshold.copy_(least.log().expand_as(self.log_threshold))

    def start_from(self, threshold: Tensor) -> None:
        """Begin with these thresholds, [d_sae]."""
        with torch.no_grad():
            self.log_threshold.copy_(threshold.clamp_min(1e-6).log())

    @torch.no_grad()
    def entries(self, pre_acts: Tensor) -> Entries:
        """The entries that take part in a step: those above a threshold, and those just below."""
        floor = self.log_threshold.exp() * (1 - self.bandwidth / 2)
        found = self.room.above(pre_acts, floor)
        if found is None:
            found = _row_by_row(pre_acts, (pre_acts > floor).flatten().nonzero().squeeze(1))
        return found

    def latents(self, values: Tensor, columns: Tensor) -> Tensor:
        """Values above their thresholds, else 0."""
        thresholds = self.log_threshold.exp()[columns]
        jumped: Tensor = _JUMP(values, thresholds, self.bandwidth)
        return jumped

    @torch.no_grad()
    def active(self, found: Entries) -> Tensor:
        """Which entries are above their thresholds, [N]."""
        return found.values > self.log_threshold.exp()[found.columns]

    def penalty(self, values: Tensor, columns: Tensor, rows: int) -> Tensor:
        """How far the mean number of active latents is from k."""
        thresholds = self.log_threshold.exp()[columns]
        steps: Tensor = _STEP(values, thresholds, self.bandwidth)
        return self.weight * (steps.sum() / (rows * self.k) - 1).square()

    @torch.no_grad()
    def give_gradients(self, found: Entries, rows: int, to_latents: Tensor) -> None:
        """Of the thresholds, as torch's of `latents` and `penalty` would be."""
        threshold = self.log_threshold.exp()
        here = threshold[found.columns]
        excess = float(self.active(found).sum()) / (rows * self.k) - 1
        inside = (found.values - here).abs() < self.bandwidth / 2 * here
        columns = found.columns[inside]
        # d latent / d log threshold = -threshold / bandwidth, the bandwidth a share of it
        slope = to_latents[inside] * here[inside] + 2 * self.weight * excess / (rows * self.k)
        total = torch.bincount(columns, slope.double(), minlength=len(threshold))
        self.log_threshold.grad = (-total / self.bandwidth).to(threshold)

    @torch.no_grad()
    def after_step(self, dead: Tensor, active: float) -> None:
        """Move all thresholds together towards k active latents, and lower those of dead ones."""
        self.log_threshold.add_(_PULL * min(active / self.k - 1, 1.0))
        self.log_threshold[dead] -= _FALL


class _Jump(torch.autograd.Function):
    """``value if value > threshold else 0``, of bandwidth ``share * threshold``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, thresholds: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(values, thresholds)
        ctx.share = share
        return values * (values > thresholds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        values, thresholds = ctx.saved_tensors
        inside = (values - thresholds).abs() < ctx.share / 2 * thresholds
        return grad * (values > thresholds), -grad * inside / ctx.share, None


class _Step(torch.autograd.Function):
    """``1 if value > threshold else 0``, of the same bandwidth; values get no gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, thresholds: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(values, thresholds)
        ctx.share = share
        return (values > thresholds).to(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        values, thresholds = ctx.saved_tensors
        inside = (values - thresholds).abs() < ctx.share / 2 * thresholds
        return None, -grad * inside / (ctx.share * thresholds), None


_JUMP: Callable[..., Tensor] = _Jump.apply
_STEP: Callable[..., Tensor] = _Step.apply


def rule_of(
    architecture: Architecture,
    k: int,
    width: int,
    *,
    bandwidth: float,
    weight: float,
    device: torch.device,
) -> Rule:
    """The rule of an architecture."""
    if architecture == "topk":
        return Rule(k)
    if architecture == "batchtopk":
        return BatchTopK(k)
    return JumpReLU(k, width, bandwidth, weight, device)


class Room:
    """Memory that is used from step to step for the entries above a bound."""

    def __init__(self) -> None:
        self.columns = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(0)

    def above(self, pre_acts: Tensor, floor: Tensor | float) -> Entries | None:
        """All entries above `floor`, of each latent [d_sae]; None where torch has to find them."""
        if not isinstance(floor, Tensor):
            floor = pre_acts.new_full(pre_acts.shape[1:], floor)
        arrays = as_arrays(pre_acts.detach(), floor.detach())
        loops = None if arrays is None else jump_kernels()
        if arrays is None or loops is None:
            return None
        offsets = torch.empty(len(pre_acts) + 1, dtype=torch.int64)
        while True:
            room = self.columns.numpy(), self.values.numpy()
            count = loops.listed_above(*arrays, offsets.numpy(), *room)
            if count <= len(self.columns):
                return Entries(offsets, self.columns[:count], self.values[:count])
            self.columns = torch.empty(count + count // 4, dtype=torch.int64)
            self.values = torch.empty(len(self.columns))


def _row_by_row(pre_acts: Tensor, places: Tensor) -> Entries:
    """Entries at ascending places [N] in flattened pre-activations [B, d_sae]."""
    width = pre_acts.shape[1]
    starts = torch.arange(len(pre_acts) + 1, device=places.device) * width
    offsets = torch.searchsorted(places, starts)
    return Entries(offsets, places % width, pre_acts.flatten()[places])
