"""Gradients entry by entry: what differentiation gives, and the same bits with more threads."""

import pytest
import torch
import torch.nn.functional as F

from steerrec import beside, sae_steps
from steerrec.autoencoder import SparseAutoencoder
from steerrec.compiled import jump_kernels
from steerrec.sae_rules import Entries

ROWS, WIDTH, LATENTS = 50, 6, 40


def gradients():
    """Those of the sums times a weight, by the loops; and what they are of."""
    draw = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(WIDTH, LATENTS, 4)
    x, weight = torch.randn(2, ROWS, WIDTH, generator=draw)
    counts = torch.randint(0, 9, (ROWS,), generator=draw)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    columns = torch.randint(0, LATENTS, (int(offsets[-1]),), generator=draw)
    values = torch.randn(len(columns), generator=draw)
    entries = Entries(offsets, columns, values)
    found = sae_steps._Gradients(jump_kernels(), sae, x - sae.b_dec.detach())
    sums = found.sums(entries, values)
    passes = values > 0
    to_values = found.add(entries, values, passes, weight)
    parts = sums, found.to_decoder, found.to_encoder, found.to_bias, to_values
    return sae, x, weight, entries, passes, parts


def test_they_are_what_differentiation_gives():
    sae, x, weight, (offsets, columns, values), passes, parts = gradients()
    pre_acts = (x - sae.b_dec.detach()) @ sae.W_enc + sae.b_enc
    rows = torch.repeat_interleave(torch.arange(ROWS), offsets.diff())
    ours = values.clone().requires_grad_()
    # the values are those of the entries, their gradients those of the pre-activations that pass
    through = torch.where(passes, pre_acts[rows, columns], 0.0)
    latents = ours + through - through.detach()
    sums = torch.zeros(ROWS, WIDTH).index_add(0, rows, latents[:, None] * sae.W_dec[columns])
    (sums * weight).sum().backward()
    expected = sums.detach(), sae.W_dec.grad, sae.W_enc.grad.T, sae.b_enc.grad, ours.grad
    for one, other in zip(parts, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, threads):
    alone = gradients()[-1]
    monkeypatch.setattr(sae_steps, "_ENTRIES", 1)
    monkeypatch.setattr(beside, "_MOST", threads)
    begun = []

    def counted(calls):
        begun.append(len(calls))
        return beside.beside(calls)

    monkeypatch.setattr(sae_steps, "beside", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = gradients()[-1]
    finally:
        torch.set_num_threads(before)
    assert begun == [threads, threads]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
