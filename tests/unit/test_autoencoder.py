"""The TopK SAE against its formula written out, and normalisation folded into its weights."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerrec.autoencoder import Latents, SparseAutoencoder, fraction_of_variance_unexplained
from steerrec.errors import ArtifactError


def random_sae(d_in=6, d_sae=16, k=4, seed=0):
    """An SAE in which no weight is zero and no two are tied."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(d_in, d_sae, k, generator=generator)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return sae.requires_grad_(False)


def rows(n=10, d_in=6, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def naive_latents(sae, x):
    """ReLU and TopK in numpy, dense [B, d_sae]."""
    z = (x.numpy() - sae.b_dec.numpy()) @ sae.W_enc.numpy() + sae.b_enc.numpy()
    dense = np.zeros_like(z)
    for row, values in enumerate(z):
        active = np.argsort(-values)[: sae.k]
        dense[row, active] = np.maximum(values[active], 0)
    return torch.from_numpy(dense)


def test_pre_activations_are_those_of_the_formula():
    sae, x = random_sae(), rows()
    expected = torch.stack([sae.W_enc.T @ (row - sae.b_dec) + sae.b_enc for row in x])
    torch.testing.assert_close(sae.pre_acts(x), expected)


def test_a_hand_worked_row():
    sae = SparseAutoencoder(2, 3, k=2).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, -4.0, 0.5]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    out = sae(torch.tensor([[3.0, 4.0]]))  # x - b_dec = (2, 3)
    assert out.pre_acts.tolist() == [[2.0, -1.0, -1.5]]
    assert out.latents.dense(3).tolist() == [[2.0, 0.0, 0.0]]  # the second of the two is negative
    assert sorted(out.latents.indices[0].tolist()) == [0, 1]
    assert out.x_hat.tolist() == [[3.0, 1.0]]


@given(st.integers(1, 8), st.integers(1, 24), st.integers(0, 9), st.data())
def test_encode_has_exactly_k_latents_and_none_negative(d_in, d_sae, n, data):
    k = data.draw(st.integers(1, d_sae))
    sae, x = random_sae(d_in, d_sae, k), rows(n, d_in)
    latents = sae.encode(x)
    assert latents.values.shape == latents.indices.shape == (n, k)
    assert all(len(set(row)) == k for row in latents.indices.tolist())
    assert bool((latents.values >= 0).all())
    torch.testing.assert_close(latents.dense(d_sae), naive_latents(sae, x))


def test_decode_is_the_dense_product():
    sae, x = random_sae(), rows()
    latents = sae.encode(x)
    directions = latents.dense(sae.d_sae) @ sae.W_dec
    torch.testing.assert_close(sae.directions(latents), directions)
    torch.testing.assert_close(sae.decode(latents), directions + sae.b_dec)
    torch.testing.assert_close(sae(x).x_hat, directions + sae.b_dec)


def test_latents_become_dense_by_their_indices():
    latents = Latents(torch.tensor([[5.0, 0.0], [1.0, 2.0]]), torch.tensor([[3, 0], [0, 1]]))
    assert latents.dense(4).tolist() == [[0.0, 0.0, 0.0, 5.0], [1.0, 2.0, 0.0, 0.0]]


def test_the_encoder_starts_as_the_transposed_unit_decoder():
    sae = SparseAutoencoder(5, 12, 3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    again = SparseAutoencoder(5, 12, 3, generator=torch.Generator().manual_seed(7))
    other = SparseAutoencoder(5, 12, 3, generator=torch.Generator().manual_seed(8))
    assert torch.equal(sae.W_dec, again.W_dec)
    assert not torch.equal(sae.W_dec, other.W_dec)


def test_making_one_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    SparseAutoencoder(5, 12, 3).fold_normalisation(torch.zeros(5), 2.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("d_in", "d_sae"), [(5, 12), (1, 4), (4, 1)])
def test_encoder_and_decoder_are_apart_in_memory_and_contiguous(d_in, d_sae):
    """As safetensors and a fused Adam resumed from disk want them."""
    sae = SparseAutoencoder(d_in, d_sae, 1)
    assert all(parameter.is_contiguous() for parameter in sae.parameters())
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_folded_normalisation_equals_the_sae_on_normalised_rows(scale):
    sae, x = random_sae(), rows()
    mean = torch.linspace(-2, 2, 6)
    raw = scale * x + mean
    out, folded = sae((raw - mean) / scale), sae.fold_normalisation(mean, scale)(raw)
    assert torch.equal(folded.latents.indices, out.latents.indices)
    torch.testing.assert_close(folded.latents.values, out.latents.values)
    torch.testing.assert_close(folded.pre_acts, out.pre_acts)
    torch.testing.assert_close(folded.x_hat, scale * out.x_hat + mean)


def test_folding_leaves_the_original_alone():
    sae = random_sae()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.fold_normalisation(torch.ones(6), 2.0)
    assert all(torch.equal(sae.state_dict()[name], tensor) for name, tensor in before.items())


def test_rows_of_another_width_are_refused():
    with pytest.raises(ArtifactError, match=r"reads vectors of width 6, the site gives 5"):
        random_sae().encode(rows(d_in=5))


@pytest.mark.parametrize("k", [0, -1, 17])
def test_k_outside_the_latents_is_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}; expected between 1 and .* 16"):
        SparseAutoencoder(6, 16, k)


def test_fraction_of_variance_unexplained_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # mean (1, 2): 1 + 4 + 1 + 4 = 10
    x_hat = torch.tensor([[1.0, 0.0], [2.0, 2.0]])  # 1 + 4 = 5
    assert float(fraction_of_variance_unexplained(x, x_hat)) == 0.5
    assert float(fraction_of_variance_unexplained(x, x)) == 0.0
