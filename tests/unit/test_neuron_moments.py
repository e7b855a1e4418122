"""Moments of pre-activations from those of vectors: equal to those of the pre-activations."""

import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.neuron_moments import FiringCounts, NeuronMoments


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(6, 40, 4, generator=generator).requires_grad_(False)
    sae.b_enc.copy_(torch.randn(40, generator=generator))
    sae.b_dec.copy_(torch.randn(6, generator=generator))
    return sae


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_moments_of_the_pre_activations(sae, offset, batch):
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1)) + offset
    moments = NeuronMoments(sae)
    for part in x.split(batch):
        moments.update(part)
    moments.update(x[:0])
    z = (x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    assert moments.n == 100
    torch.testing.assert_close(moments.mean, z.mean(dim=0))
    torch.testing.assert_close(moments.variance, z.var(dim=0, correction=0))


def test_one_vector_over_and_over_has_no_variance(sae):
    moments = NeuronMoments(sae)
    for _ in range(3):
        moments.update(torch.full((5, 6), 0.1))
    assert float(moments.variance.max()) < 1e-28


def test_nothing_seen(sae):
    assert float(NeuronMoments(sae).variance.sum()) == 0.0


@pytest.mark.parametrize("batch", [7, 300])
def test_who_fires(sae, batch):
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    fired = FiringCounts(sae)
    for part in x.split(batch):
        fired.update(part)
    z = (x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    bound = z.topk(4, dim=1).values[:, -1:].clamp_min(0)
    assert fired.counts.tolist() == ((z >= bound) & (z > 0)).sum(dim=0).tolist()
