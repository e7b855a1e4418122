"""Recipes of every kind on one small random SAE, and what each does by a formula in dense torch."""

import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.gates import GatedSteering, NeuronGate, TasteGate, gated
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.steering import Steering
from steerrec.sums import SteeringSum

D_IN, D_SAE, K = 8, 32, 4


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_sae():
    sae = SparseAutoencoder(D_IN, D_SAE, K)
    for seed, parameter in enumerate(sae.parameters()):
        parameter.data += 0.1 * randn(*parameter.shape, seed=seed)
    return sae.requires_grad_(False)


def users(count=50):
    return randn(count, D_IN, seed=7)


def shift(alpha=1.0, seed=3):
    return Steering(randn(D_SAE, seed=seed), alpha=alpha, name="shift")


def response(alpha=1.0, seed=4):
    vectors, constant = randn(D_SAE, D_IN, seed=seed), randn(D_IN, seed=seed + 1)
    return ResponseSteering(vectors, constant, alpha, "response")


def latents(alpha=1.0):
    low = torch.zeros(D_SAE)
    low[:4] = 0.7
    high = torch.full((D_SAE,), 1.2)
    return LatentSteering(1 + randn(D_SAE, seed=6), low, high, alpha, "latents")


def all_kinds(alpha=1.0):
    """A recipe of each kind, by name."""
    taste = TasteGate(randn(D_IN, seed=9), 0.4, 0.0, 1.5)
    made = {
        "shift": shift(),
        "response": response(),
        "latents": latents(),
        "sum": shift(0.5) + response(-0.25) + latents(2.0),
        "gated": gated(response(0.5), NeuronGate(int(most_active()))),
        "taste": gated(shift(0.7), taste),
        "nested": gated(shift(0.5) + latents(), taste) * 0.3 + response(0.2),
    }
    return {name: recipe * alpha for name, recipe in made.items()}


def most_active():
    return torch.bincount(random_sae().encode(users()).indices.flatten()).argmax()


def change(recipe, sae, x, strength):
    """What a recipe adds to x [B, H], every latent written out; strength is [B, 1]."""
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = active(z, sae.k)
    match recipe:
        case Steering():
            return (active(z + strength * recipe.shift, sae.k) - f) @ sae.W_dec
        case ResponseSteering():
            return strength * (f @ recipe.vectors + recipe.constant)
        case LatentSteering():
            new = torch.minimum(torch.maximum(recipe.gain * f, recipe.low), recipe.high)
            return strength * ((new - f) @ sae.W_dec)
        case SteeringSum():
            return sum(change(term, sae, x, strength * term.alpha) for term in recipe.terms)
        case GatedSteering(recipe=inner, gate=NeuronGate() as gate):
            on = (f[:, gate.neuron] > gate.threshold) == gate.fires
            return change(inner, sae, x, strength * inner.alpha * on.unsqueeze(1).float())
        case GatedSteering(recipe=inner, gate=TasteGate() as gate):
            factor = (x @ gate.weights + gate.bias).clip(gate.low, gate.high).unsqueeze(1)
            return change(inner, sae, x, strength * inner.alpha * factor)


def active(z, k):
    kept = torch.zeros_like(z).scatter_(1, z.topk(k, dim=1).indices, 1.0)
    return z.relu() * kept
