"""Responses and operations on latents, by hand; what is usual; what does not fit."""

import pytest
import torch

from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.errors import ArtifactError
from steerrec.explaining import neuron_effects
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.quantiles import latent_quantiles
from steerrec.recipes import Encoding
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


# --- latents scaled, bounded, switched off, set

X = torch.tensor([[3.0, 2.0, 1.0], [-1.0, 2.0, 5.0]])  # active: 0 (3), 1 (2); 1 (2), 2 (5)


def steered(recipe, x=X):
    return SteerTransform(axis_sae(), recipe)(x)


def test_scale_is_for_latents_that_are_active():
    found = steered(LatentSteering.scale(axis_sae(), [0, 2], 0.5))
    assert torch.equal(found, torch.tensor([[1.5, 2.0, 1.0], [-1.0, 2.0, 2.5]]))
    assert torch.equal(
        steered(LatentSteering.scale(axis_sae(), [1], 3.0))[:, 1], torch.full((2,), 6.0)
    )


def test_ablate_switches_off_and_strength_1_half_does_half_of_it():
    recipe = LatentSteering.ablate(axis_sae(), [1])
    assert steered(recipe)[:, 1].tolist() == [0.0, 0.0]
    assert steered(recipe * 0.5)[:, 1].tolist() == [1.0, 1.0]
    assert recipe.provenance == {"rule": "ablate", "neurons": [1]}


def test_clamp_keeps_within_bounds_and_raises_what_is_not_active():
    recipe = LatentSteering.clamp(axis_sae(), [0, 2], low=0.5, high=torch.tensor([2.0, 4.0]))
    # user 0: latent 0 from 3 to 2, latent 2 (not active) to 0.5; user 1: 0 to 0.5, 2 from 5 to 4
    assert torch.equal(steered(recipe), torch.tensor([[2.0, 2.0, 1.5], [-0.5, 2.0, 4.0]]))


def test_set_to_holds_in_every_user():
    recipe = LatentSteering.set_to(axis_sae(), torch.tensor([2, 0]), torch.tensor([4.0, 1.0]))
    assert torch.equal(steered(recipe), torch.tensor([[1.0, 2.0, 5.0], [0.0, 2.0, 4.0]]))


def test_a_latent_of_pre_activation_below_0_counts_as_not_active():
    """One of its k = 2 is clipped to 0: it is raised as one that was not selected at all."""
    x = torch.tensor([[3.0, -1.0, -2.0]])
    recipe = LatentSteering.set_to(axis_sae(), [1, 2], 5.0)
    assert torch.equal(steered(recipe, x), torch.tensor([[3.0, 4.0, 3.0]]))


def test_padded_latents_change_nothing():
    """An SAE may fill up its selection with zeros, of any index, more than once."""
    sae = axis_sae()
    sae.activate = lambda z: Latents(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0, 0, 2]]))
    recipes = [
        (LatentSteering.set_to(sae, [0, 2], 1.0), [-2.0, 0.0, 1.0]),
        (responses(), [0.0, 30.0, 0.0]),
    ]
    for recipe, change in recipes:
        step = recipe.step(sae)
        found = step(Encoding(sae, torch.zeros(1, 3), torch.zeros(1, 3)), 1.0)
        assert found.tolist() == [change]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((torch.ones(3), torch.zeros(2), torch.ones(3)), "one finite number per latent"),
        ((torch.ones(3), torch.zeros(3), torch.full((3,), torch.inf)), "one finite number"),
        ((torch.ones(3, 1), torch.zeros(3, 1), torch.ones(3, 1)), "one finite number"),
        ((torch.ones(3), torch.full((3,), -1.0), torch.ones(3)), "0 <= low <= high"),
        ((torch.ones(3), torch.full((3,), 2.0), torch.ones(3)), "0 <= low <= high"),
    ],
)
def test_operations_that_make_no_sense_are_refused(parts, message):
    with pytest.raises(ArtifactError, match=message):
        LatentSteering(*parts)


def test_neurons_that_the_sae_does_not_have_are_refused():
    with pytest.raises(ArtifactError, match="neurons 1 to 3 asked for; this SAE has 0 to 2"):
        LatentSteering.ablate(axis_sae(), [1, 3])
    with pytest.raises(ArtifactError, match="neurons -1 to 0"):
        LatentSteering.scale(axis_sae(), [0, -1], 2.0)


# --- what is usual


def test_quantiles_by_hand():
    sae = axis_sae(k=3)
    x = torch.tensor([[1.0, 0.0, -1.0], [3.0, 2.0, -1.0], [5.0, 0.0, -1.0], [0.0, 0.0, -1.0]])
    assert latent_quantiles(sae, x, 0.5, [0, 1, 2]).tolist() == [3.0, 2.0, 0.0]
    assert latent_quantiles(sae, x, 0.25, [1, 0]).tolist() == [2.0, 2.0]
    assert latent_quantiles(sae, x, 0.5, [0, 1], where_active=False).tolist() == [2.0, 0.0]
    with pytest.raises(ArtifactError, match=r"quantile 1\.5"):
        latent_quantiles(sae, x, 1.5, [0])


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("where_active", [True, False])
def test_quantiles_are_those_of_torch(q, where_active):
    sae = SparseAutoencoder(6, 20, 5)
    x = torch.randn(97, 6, generator=torch.Generator().manual_seed(0))
    dense = sae.encode(x).dense(20).detach()
    want = []
    for column in dense.T:
        values = column[column > 0] if where_active else column
        want.append(float(values.quantile(q)) if len(values) else 0.0)
    found = latent_quantiles(sae, x, q, range(20), where_active=where_active, chunk=10)
    torch.testing.assert_close(found, torch.tensor(want))


def test_set_to_a_quantile_of_real_users():
    sae = axis_sae(k=3)
    x = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    recipe = LatentSteering.set_to(sae, [0], latent_quantiles(sae, x, 1.0, [0]))
    assert SteerTransform(sae, recipe)(x)[:, 0].tolist() == [5.0, 5.0, 5.0]
