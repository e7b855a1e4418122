"""Responses: their arithmetic by hand, strengths per user, and what does not fit."""

import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError
from steerrec.explaining import neuron_effects
from steerrec.operations import ResponseSteering
from steerrec.recommender import ItemHead
from steerrec.steering import SteerTransform


def axis_sae(k=2):
    """Three latents that read and write the axes of three dimensions."""
    sae = SparseAutoencoder(3, 3, k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    return sae.requires_grad_(False)


def responses(alpha=1.0, constant=(0.0, 0.0, 0.0)):
    vectors = torch.tensor([[0.0, 10.0, 0.0], [0.0, 0.0, 100.0], [7.0, 0.0, 0.0]])
    return ResponseSteering(vectors, torch.tensor(constant), alpha)


def test_each_active_neuron_adds_its_vector_in_proportion():
    x = torch.tensor([[3.0, 2.0, 1.0], [-1.0, 2.0, 5.0]])
    # active: neurons 0 (3) and 1 (2); neurons 1 (2) and 2 (5)
    want = x + torch.tensor([[0.0, 30.0, 200.0], [35.0, 0.0, 200.0]])
    assert torch.equal(SteerTransform(axis_sae(), responses())(x), want)


def test_the_constant_is_for_every_user_and_strength_scales_both():
    x = torch.tensor([[3.0, 2.0, 1.0]])
    transform = SteerTransform(axis_sae(), responses(alpha=0.5, constant=(1.0, 0.0, -2.0)))
    assert torch.equal(transform(x), x + 0.5 * torch.tensor([[1.0, 30.0, 198.0]]))


def test_strength_per_user_is_each_user_alone():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, -1.0])
    transform = SteerTransform(axis_sae(), responses(constant=(1.0, 2.0, 3.0)))
    alone = torch.cat([transform(x[i : i + 1], float(alpha[i])) for i in range(6)])
    torch.testing.assert_close(transform(x, alpha), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_strength_0_changes_no_bit_and_nothing_is_written_in_place(dtype):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = x.clone()
    out = SteerTransform(axis_sae(), responses(alpha=0.0))(x)
    assert torch.equal(out, kept)
    assert out.dtype == dtype
    SteerTransform(axis_sae(), responses())(x)
    assert torch.equal(x, kept)


def test_only_some_neurons():
    x = torch.tensor([[3.0, 2.0, 1.0]])
    part = responses().only(torch.tensor([1]))
    assert part.neurons.tolist() == [1]
    assert responses().neurons.tolist() == [0, 1, 2]
    assert torch.equal(SteerTransform(axis_sae(), part)(x), torch.tensor([[3.0, 2.0, 201.0]]))


def test_what_does_not_fit_is_said():
    with pytest.raises(ArtifactError, match=r"shape \(4, 3\), the SAE needs \(3, 3\)"):
        SteerTransform(axis_sae(), ResponseSteering(torch.zeros(4, 3), torch.zeros(3)))
    with pytest.raises(ArtifactError, match="one finite vector per latent"):
        ResponseSteering(torch.tensor([[float("nan")]]), torch.zeros(1))
    with pytest.raises(ArtifactError, match="what every user gets"):
        ResponseSteering(torch.zeros(4, 3), torch.zeros(2))
    transform = SteerTransform(axis_sae(), responses())
    with pytest.raises(ValueError, match="expected user vectors"):
        transform(torch.zeros(3))
    with pytest.raises(ValueError, match="one number or one per user"):
        transform(torch.zeros(2, 3), torch.zeros(3))


def test_neuron_effects_by_hand():
    x = torch.tensor([[3.0, 2.0, 1.0], [-1.0, 2.0, 5.0]])
    head = ItemHead(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0], [1.0, 0, 0]]))
    found = neuron_effects(responses(), axis_sae(), head, x, neurons=2, items=1)
    # root mean squares of the latents: sqrt(9/2), 2, sqrt(25/2); lengths 10, 100, 7
    sizes = [4.5**0.5 * 10, 200.0, 12.5**0.5 * 7]
    assert [effect.neuron for effect in found] == [1, 2]
    assert found[0].share == pytest.approx(200 / sum(sizes))
    assert [effect.firing_rate for effect in found] == [1.0, 0.5]
    assert [effect.raises.tolist() for effect in found] == [[2], [3]]
    assert found[0].lowers.tolist() == [1]
