"""Many strengths at once are, bit for bit, one strength after another."""

import pytest
import torch

from steerrec import many_strengths as strengths
from steerrec.autoencoder import SparseAutoencoder
from steerrec.gates import NeuronGate, gated
from steerrec.operations import ResponseSteering
from steerrec.steering import Steering, SteerTransform

ALPHAS = (0.5, 1.0, -2.0, 0.0)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipes():
    shift = Steering(randn(64, seed=1))
    response = ResponseSteering(randn(64, 8, seed=2), randn(8, seed=3))
    return {
        "delta": shift,
        "reconstruct": Steering(shift.shift, splice="reconstruct"),
        "response": response,
        "gated": gated(shift + response, NeuronGate(3)),
    }


@pytest.mark.parametrize("kind", ["delta", "reconstruct", "response", "gated"])
@pytest.mark.parametrize("held", [1, 10**9])
def test_many_strengths_are_one_after_another(kind, held, monkeypatch):
    monkeypatch.setattr(strengths, "HELD", held)
    sae = SparseAutoencoder(8, 64, 4).requires_grad_(False)
    transform = SteerTransform(sae, recipes()[kind])
    x = randn(300, 8, seed=4)
    found = list(strengths.steered_at(x, transform, ALPHAS))
    assert len(found) == len(ALPHAS)
    for alpha, steered in zip(ALPHAS, found, strict=True):
        assert torch.equal(steered, transform(x, alpha))


def test_without_compiled_loops(monkeypatch):
    sae = SparseAutoencoder(8, 64, 4).requires_grad_(False)
    transform = SteerTransform(sae, recipes()["delta"])
    x = randn(20, 8, seed=4)
    expected = list(strengths.steered_at(x, transform, ALPHAS))
    monkeypatch.setattr("steerrec.plans.step_kernels", lambda: None)
    for one, other in zip(expected, strengths.steered_at(x, transform, ALPHAS), strict=True):
        torch.testing.assert_close(one, other)


def test_an_overflow_is_left_to_torch():
    sae = SparseAutoencoder(8, 64, 4).requires_grad_(False)
    transform = SteerTransform(sae, recipes()["delta"])
    x = randn(3, 8, seed=4)
    (found,) = strengths.steered_at(x, transform, (1e39,))
    torch.testing.assert_close(found, transform(x, 1e39), equal_nan=True)
