"""What one training step of an SAE computes, by architecture: active latents, loss, gradients.

The loop, the optimiser and dead latents are in `training`. On a CPU only the entries that are
active take part in gradients, by compiled loops; elsewhere torch differentiates the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.autoencoder import (
    Architecture,
    Latents,
    Reconstruction,
    SparseAutoencoder,
    fraction_of_variance_unexplained,
)
from steerrec.compiled import as_arrays, jump_kernels
from steerrec.selection import largest
from steerrec.thresholds import largest_so_far


class Entries(NamedTuple):
    """Pre-activations of a batch that matter to a step, row after row.

    Row r has `columns` [N] and `values` [N] from ``offsets[r]`` to ``offsets[r + 1]`` [B + 1].
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor


class Losses(NamedTuple):
    """What a step came to: FVU of the batch, and the numbers of the latents that were active."""

    fvu: Tensor
    fired: Tensor


def auxiliary_loss(
    sae: SparseAutoencoder, x: Tensor, out: Reconstruction, dead: Tensor, aux_k: int
) -> Tensor:
    """AuxK: the share of the residual that the dead latents fail to explain (Gao et al. 2024, A.2).

    The `aux_k` dead latents with the largest raw pre-activations reconstruct what the live ones
    left over. No ReLU: a latent whose pre-activations are negative everywhere would otherwise
    never see a gradient again.

    Parameters
    ----------
    sae
        The SAE in training.
    x
        Batch [B, d_in].
    out
        Its reconstruction.
    dead
        Numbers of the dead latents, [D].
    aux_k
        How many to use for each row.
    """
    if len(dead) == 0:
        return x.new_zeros(())
    residual = (x - out.x_hat).detach()
    values, order = out.pre_acts[:, dead].topk(min(aux_k, len(dead)), dim=-1, sorted=False)
    guess = sae.directions(Latents(values, dead[order]))
    return (residual - guess).square().sum() / residual.square().sum().clamp_min(1e-12)


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

    Thresholds get pseudo-gradients from pre-activations within half a bandwidth of them, and
    ``weight * (L0 / k - 1)^2`` is added to the loss, so that k latents are active on average.

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
        jumped: Tensor = _Jump.apply(values, thresholds, self.bandwidth)  # type: ignore[no-untyped-call]
        return jumped

    @torch.no_grad()
    def active(self, found: Entries) -> Tensor:
        """Which entries are above their thresholds, [N]."""
        return found.values > self.log_threshold.exp()[found.columns]

    def penalty(self, values: Tensor, columns: Tensor, rows: int) -> Tensor:
        """How far the mean number of active latents is from k."""
        thresholds = self.log_threshold.exp()[columns]
        steps: Tensor = _Step.apply(values, thresholds, self.bandwidth)  # type: ignore[no-untyped-call]
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


class _Jump(torch.autograd.Function):
    """``value if value > threshold else 0``, of bandwidth ``share * threshold``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, thresholds: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(values, thresholds)
        ctx.share = share
        return values * (values > thresholds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
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
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        values, thresholds = ctx.saved_tensors
        inside = (values - thresholds).abs() < ctx.share / 2 * thresholds
        return None, -grad * inside / (ctx.share * thresholds), None


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


# --- one step


def step(
    sae: SparseAutoencoder,
    rule: Rule,
    x: Tensor,
    dead: Tensor,
    *,
    aux_k: int,
    aux_weight: float,
) -> Losses:
    """Gradients of FVU, AuxK and the rule's penalty into `.grad` of all parameters.

    Parameters
    ----------
    sae
        The SAE in training.
    rule
        What is active.
    x
        Batch [B, d_in].
    dead
        Numbers of the dead latents, [D].
    aux_k, aux_weight
        Of the auxiliary loss.
    """
    with torch.no_grad():
        pre_acts = sae.pre_acts(x)
        found = rule.entries(pre_acts)
        active = rule.active(found)
    losses = _by_loops(sae, rule, x, pre_acts, found, active, dead, aux_k, aux_weight)
    if losses is None:
        losses = by_torch(sae, rule, x, found, dead, aux_k, aux_weight)
    return Losses(losses, found.columns[active])


def by_torch(
    sae: SparseAutoencoder,
    rule: Rule,
    x: Tensor,
    found: Entries,
    dead: Tensor,
    aux_k: int,
    aux_weight: float,
) -> Tensor:
    """The gradients by torch's differentiation; returns the FVU."""
    pre_acts = sae.pre_acts(x)
    columns = found.columns
    rows = torch.repeat_interleave(torch.arange(len(x), device=x.device), found.offsets.diff())
    values = pre_acts.flatten()[rows * sae.d_sae + columns]
    latents = rule.latents(values, columns)
    sums = F.embedding_bag(
        columns, sae.W_dec, found.offsets[:-1], per_sample_weights=latents, mode="sum"
    )
    x_hat = sums + sae.b_dec
    fvu = fraction_of_variance_unexplained(x, x_hat)
    loss = fvu
    if len(dead):
        out = Reconstruction(x_hat, Latents(latents, columns), pre_acts)
        loss = loss + aux_weight * auxiliary_loss(sae, x, out, dead, aux_k)
    penalty = rule.penalty(values, columns, len(x))
    if penalty is not None:
        loss = loss + penalty
    for parameter in (*sae.parameters(), *rule.parameters()):
        parameter.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    return fvu.detach()


@torch.no_grad()
def _by_loops(
    sae: SparseAutoencoder,
    rule: Rule,
    x: Tensor,
    pre_acts: Tensor,
    found: Entries,
    active: Tensor,
    dead: Tensor,
    aux_k: int,
    aux_weight: float,
) -> Tensor | None:
    """The same gradients from the entries alone; None where torch has to make them."""
    arrays = as_arrays(x, sae.W_dec.detach(), pre_acts, found.values)
    loops = None if arrays is None else jump_kernels()
    if loops is None:
        return None
    gradients = _Gradients(loops, sae, (x - sae.b_dec))
    latents = found.values * active
    error = gradients.sums(found, latents) + sae.b_dec - x
    spread = (x - x.mean(dim=0)).square().sum()
    fvu = error.square().sum() / spread
    upstream = 2 * error / spread
    to_latents = gradients.add(found, latents, active, upstream)
    if len(dead):
        values, order = largest(pre_acts[:, dead], min(aux_k, len(dead)))
        offsets = torch.arange(0, values.numel() + 1, values.shape[1])
        guessing = Entries(offsets, dead[order].flatten(), values.flatten())
        everything = torch.ones(len(guessing.values), dtype=torch.bool)
        left = gradients.sums(guessing, guessing.values) + error  # less the residual, -error
        scale = 2 * aux_weight / error.square().sum().clamp_min(1e-12)
        gradients.add(guessing, guessing.values, everything, scale * left)
    rule.give_gradients(found, len(x), to_latents)
    gradients.give(upstream)
    return fvu


class _Gradients:
    """Gradients of an SAE, added up entry by entry."""

    def __init__(self, loops: Any, sae: SparseAutoencoder, centred: Tensor) -> None:
        self.loops, self.sae, self.centred = loops, sae, centred
        self.decoder = sae.W_dec.detach()
        self.to_decoder, self.to_encoder = torch.zeros(2, sae.d_sae, sae.d_in)
        self.to_bias = torch.zeros(sae.d_sae)

    def sums(self, found: Entries, latents: Tensor) -> Tensor:
        """What the latents [N] decode to, less the bias: [B, H]."""
        out = torch.empty_like(self.centred)
        self.loops.sums_of_rows(*_arrays(found.offsets, found.columns, latents, self.decoder, out))
        return out

    def add(self, found: Entries, latents: Tensor, passes: Tensor, upstream: Tensor) -> Tensor:
        """Take in the gradients of `sums` [B, H]; returns those of the latents, [N]."""
        to_latents = torch.empty_like(latents)
        self.loops.add_gradients(
            *_arrays(found.offsets, found.columns, latents, passes, upstream, self.centred),
            *_arrays(self.decoder, self.to_decoder, self.to_encoder, self.to_bias, to_latents),
        )
        return to_latents

    def give(self, upstream: Tensor) -> None:
        """Write them where the optimiser reads them."""
        sae = self.sae
        sae.W_dec.grad, sae.b_enc.grad = self.to_decoder, self.to_bias
        sae.W_enc.grad = self.to_encoder.T.contiguous()
        sae.b_dec.grad = upstream.sum(dim=0) - sae.W_enc @ self.to_bias


def _arrays(*tensors: Tensor) -> Sequence[Any]:
    return [tensor.contiguous().numpy() for tensor in tensors]


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
