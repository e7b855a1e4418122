"""One training step of an SAE: loss and gradients.

On a CPU only the entries that are active take part in gradients, by compiled loops; elsewhere torch
differentiates the same loss. Which entries those are is in `sae_rules`; the loop, the optimiser and
which latents are dead in `training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec.autoencoder import (
    Latents,
    Reconstruction,
    SparseAutoencoder,
    fraction_of_variance_unexplained,
)
from steerrec.beside import beside, shares
from steerrec.compiled import as_arrays, jump_kernels
from steerrec.sae_rules import Entries, Rule
from steerrec.selection import largest

_ENTRIES = 10_000
"""Entries that are worth handing to several threads."""


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
    loss.backward()
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
        offsets, *entries, decoder, sums = _arrays(
            found.offsets, found.columns, latents, self.decoder, out
        )
        calls = []
        for rows in _shares(len(out), len(latents)):
            here = offsets[rows.start : rows.stop + 1], *entries, decoder
            calls.append(partial(self.loops.sums_of_rows, *here, sums[rows.start : rows.stop]))
        beside(calls)
        return out

    def add(self, found: Entries, latents: Tensor, passes: Tensor, upstream: Tensor) -> Tensor:
        """Take in the gradients of `sums` [B, H]; returns those of the latents, [N]."""
        to_latents = torch.empty_like(latents)
        arrays = (
            *_arrays(found.offsets, found.columns, latents, passes, upstream, self.centred),
            *_arrays(self.decoder, self.to_decoder, self.to_encoder, self.to_bias, to_latents),
        )
        parts = _shares(self.sae.d_sae, len(latents))
        add = self.loops.add_gradients
        beside([partial(add, *arrays, part.start, part.stop) for part in parts])
        return to_latents

    def give(self, upstream: Tensor) -> None:
        """Write them where the optimiser reads them."""
        sae = self.sae
        sae.W_dec.grad, sae.b_enc.grad = self.to_decoder, self.to_bias
        sae.W_enc.grad = self.to_encoder.T.contiguous()
        sae.b_dec.grad = upstream.sum(dim=0) - sae.W_enc @ self.to_bias


def _shares(number: int, entries: int) -> list[range]:
    """Numbers 0 to `number` shared among threads if there are entries enough."""
    return shares(number, 1) if entries >= _ENTRIES else [range(number)]


def _arrays(*tensors: Tensor) -> Sequence[Any]:
    return [tensor.contiguous().numpy() for tensor in tensors]
