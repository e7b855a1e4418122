"""Recipes by the compiled loop are what torch makes of them, and the loop steps aside in time."""

import copy
import threading
from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec import plans
from steerrec.autoencoder import SparseAutoencoder
from steerrec.gates import NeuronGate, TasteGate, gated
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.recipes import Step
from steerrec.steering import Steering, SteerTransform
from steerrec.sums import SteeringSum


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_sae(latents, width, k, architecture="topk", seed=0):
    sae = SparseAutoencoder(width, latents, k, architecture=architecture)
    for parameter in sae.parameters():
        parameter.data += 0.1 * randn(*parameter.shape, seed=seed)
    if sae.threshold is not None:
        sae.threshold.data += 0.5
    return sae.requires_grad_(False)


def leaf(kind, sae, seed):
    latents, width = sae.W_dec.shape
    if kind == "shift":
        return Steering(0.5 * randn(latents, seed=seed))
    if kind == "response":
        return ResponseSteering(randn(latents, width, seed=seed), randn(width, seed=seed + 1))
    gain, low = 1 + randn(latents, seed=seed), 0.1 * randn(latents, seed=seed + 1).relu()
    return LatentSteering(gain, low, low + 1.0)


def recipes(sae):
    """Sums of terms of any kind, gated one by one or together, in any order and number."""
    width = sae.d_in
    gates = st.one_of(
        st.builds(
            NeuronGate, st.integers(0, sae.d_sae - 1), st.sampled_from([0.0, 0.5]), st.booleans()
        ),
        st.builds(
            lambda seed, bias: TasteGate(randn(width, seed=seed), bias, -1.0, 1.5),
            st.integers(0, 99),
            st.sampled_from([-0.5, 0.0, 1.0]),
        ),
    )
    kinds = st.sampled_from(["shift", "response", "latents"])
    leaves = st.builds(leaf, kinds, st.just(sae), st.integers(0, 999))
    factors = st.sampled_from([-1.5, 0.0, 0.25, 1.0])
    strengths = st.builds(lambda recipe, factor: recipe * factor, leaves, factors)

    def larger(inner):
        return st.one_of(
            st.builds(gated, inner, gates),
            st.builds(lambda parts: reduce(add, parts), st.lists(inner, min_size=2, max_size=3)),
            st.builds(lambda parts: SteeringSum(tuple(parts)), st.lists(inner, min_size=1)),
        )

    return st.recursive(strengths, larger, max_leaves=5)


SIZES = [(512, 16, 5), (600, 13, 7), (100, 7, 3), (40, 5, 40), (64, 64, 1), (130, 9, 33), (8, 3, 2)]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    size=st.sampled_from(SIZES),
    architecture=st.sampled_from(["topk", "jumprelu"]),
    rows=st.sampled_from([0, 1, 2, 3, 6, 9, 131]),
    seed=st.integers(0, 99),
)
def test_any_recipe_is_what_torch_makes_of_it(data, size, architecture, rows, seed):
    sae = random_sae(*size, architecture)
    transform = data.draw(recipes(sae)).transform(sae)
    x = randn(rows, sae.d_in, seed=seed)
    alpha = data.draw(st.sampled_from([1.0, -0.5, 0.0, "one a user"]))
    if alpha == "one a user":
        alpha = randn(rows, seed=seed + 1) * (randn(rows, seed=seed + 2) > 0)
        strength = alpha.reshape(-1, 1)
    else:
        strength = alpha
    found = plans.steered(transform, x, strength)
    assert found is not None
    torch.testing.assert_close(
        found, transform._by_torch(x, strength), atol=1e-4, rtol=1e-4, check_stride=True
    )
    assert torch.equal(transform(x, alpha), found)
    if isinstance(alpha, float) and alpha == 0:
        assert torch.equal(found, x)


def all_terms(sae):
    one, other = TasteGate(0.1 * randn(sae.d_in, seed=7), 1.0), NeuronGate(1, fires=False)
    parts = [leaf(kind, sae, seed) for seed, kind in enumerate(("shift", "response", "latents"))]
    return gated(parts[0] + parts[1], one) + parts[2] + gated(parts[1], other) * 0.5


@pytest.fixture
def transform():
    sae = random_sae(128, 8, 5)
    return all_terms(sae).transform(sae)


X = randn(20, 8, seed=5)


def by_torch(transform, x=X):
    return transform._by_torch(x, transform.steering.alpha)


def require_same(transform, x=X):
    """By the loop, and the same as by torch."""
    found = plans.steered(transform, x, transform.steering.alpha)
    assert found is not None
    torch.testing.assert_close(found, by_torch(transform, x), atol=1e-4, rtol=1e-4)
    return found


def test_what_is_written_to_the_tensors_is_seen(transform):
    before = require_same(transform)
    for name, tensor in [*transform.named_buffers(), *transform.named_parameters()]:
        tensor.mul_(1.1)
        after = require_same(transform)
        if name not in ("sae.b_enc", "sae.b_dec"):  # which are in `bias`
            assert not torch.equal(before, after), name
        before = after


def test_tensors_that_are_exchanged_are_noticed(transform):
    before = require_same(transform)
    for module in (transform.sae, transform.step):
        module.double().float()
        require_same(transform)
        assert plans.steered(transform, X.double(), 1.0) is not None
    for module in transform.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(1.1 * parameter, requires_grad=False))
        for name, tensor in list(module._buffers.items()):
            module._buffers[name] = 1.1 * tensor
    assert not torch.equal(before, require_same(transform))


@pytest.mark.parametrize("latents", [4096, 16384])
def test_an_address_that_comes_back_is_not_taken_for_the_same_tensor(latents):
    """The allocator likes to give memory that was freed to the next that asks."""
    transform = Steering(randn(latents, seed=1)).transform(SparseAutoencoder(64, latents, 8))
    x, weights = randn(4, 64, seed=2), transform.sae.W_enc
    with torch.no_grad():
        transform(x)
        before = weights.data_ptr()
        for _ in range(6):  # until another layout is where that of the plan was
            if weights.is_contiguous():
                weights.data = weights.data.t().contiguous().t()
            else:
                weights.data = weights.data.t().contiguous().t().clone()
            if weights.data_ptr() == before and not weights.is_contiguous():
                break
        found = transform(x)
        torch.testing.assert_close(found, by_torch(transform, x), atol=1e-4, rtol=1e-4)


def test_another_recipe_in_its_place(transform):
    before = require_same(transform)
    other = all_terms(random_sae(128, 8, 5)) * 2.0
    other = other.transform(transform.sae)
    other.step.steps[1].gain.mul_(3.0)
    transform.copy_from(other)
    assert torch.equal(require_same(transform), require_same(other))
    assert not torch.equal(before, require_same(transform))
    shift = leaf("shift", transform.sae, 3)
    require_same(transform.with_steering(shift))
    require_same(transform)


def test_a_copy_has_a_plan_of_its_own(transform):
    before = require_same(transform)
    twin = copy.deepcopy(transform)
    twin.sae.W_dec.mul_(2.0)
    assert not torch.equal(require_same(twin), before)
    assert torch.equal(require_same(transform), before)
    del twin
    assert torch.equal(require_same(transform), before)


@pytest.mark.parametrize("part", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("place", ["x", "buffer", "strength"])
def test_what_is_not_finite_is_left_to_torch(transform, part, place):
    x, alpha = X.clone(), torch.ones(20)
    if place == "x":
        x[3, 2] = part
    elif place == "buffer":
        transform.sae.b_enc[5] = part
        transform.bias[5] = part
    else:
        alpha[7] = part
    strength = alpha.reshape(-1, 1)
    want = transform._by_torch(x, strength)
    found = plans.steered(transform, x, strength)
    assert found is None
    assert torch.equal(transform(x, alpha).isfinite(), want.isfinite())
    torch.testing.assert_close(transform(x, alpha), want, equal_nan=True, atol=0, rtol=0)


def test_a_step_that_cannot_be_taken_apart_is_left_to_torch(transform):
    class Doubling(Step):
        kind = "doubling"

        def forward(self, here, strength):
            return strength * here.x

    transform.step.steps.append(Doubling())
    transform.step.strengths = torch.cat([transform.step.strengths, torch.ones(1)])
    twin = SteerTransform(transform.sae, transform.steering)
    twin.step = transform.step
    assert plans.steered(twin, X, 1.0) is None
    assert twin(X).shape == X.shape


def test_a_gate_of_several_terms_is_asked_for_each(transform):
    sae = transform.sae
    gate = NeuronGate(int(sae.encode(X).indices[0, 0]))
    both = leaf("shift", sae, 1) + leaf("response", sae, 2)
    found = require_same(gated(both, gate).transform(sae))
    fires = (sae.encode(X).dense(sae.d_sae)[:, gate.neuron]) > 0
    assert 0 < int(fires.sum()) < len(X)
    assert torch.equal(found[~fires], X[~fires])
    torch.testing.assert_close(found[fires], require_same(both.transform(sae))[fires])


def test_an_encoder_in_another_layout_is_copied_into_the_usual_one():
    usual = random_sae(64, 8, 4)
    other = copy.deepcopy(usual)
    other.W_enc.data = usual.W_enc.data.T.contiguous().T
    assert not other.W_enc.is_contiguous()
    shift = leaf("shift", usual, 1)
    assert torch.equal(require_same(shift.transform(other)), require_same(shift.transform(usual)))
    assert not other.W_enc.is_contiguous()  # the caller's own is left alone


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_user_is_steered_to_the_same_bits_in_any_batch(size):
    latents, width, k = size
    sae = random_sae(latents, width, k)
    transform, x = leaf("shift", sae, 1).transform(sae), randn(150, width, seed=2)
    whole = require_same(transform, x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 64):
        assert torch.equal(torch.cat([transform(part) for part in x.split(rows)]), whole)
    each = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    assert torch.equal(transform(x[each]), whole[each])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13])
def test_pre_activations_are_the_product(size, rows):
    import numpy as np

    from steerrec.encoder_kernels import _encode
    from steerrec.lanes import ROWS

    latents, width, _ = size
    x, encoder, bias = (randn(*s, seed=4) for s in ((rows, width), (width, latents), (latents,)))
    found = torch.full((rows, latents), torch.nan)
    for first in range(0, rows, ROWS):
        some = min(ROWS, rows - first)
        out = np.full((ROWS, latents), np.nan, np.float32)
        places = encoder.data_ptr(), bias.data_ptr()
        here = x.data_ptr() + 4 * first * width
        _encode(here, some, width, *places, out, np.zeros(ROWS * width, np.float32))
        found[first : first + some] = torch.from_numpy(out[:some])
    expected = (x.double() @ encoder.double() + bias.double()).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_under_inference_mode_and_without(transform, first):
    x = randn(300, 8, seed=1)
    want = by_torch(transform, x)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            torch.testing.assert_close(transform(x), want, atol=1e-4, rtol=1e-4)


def test_threads_have_memory_of_their_own(transform):
    inputs = [randn(200, 8, seed=seed) for seed in range(6)]
    want, wrong = [transform(x) for x in inputs], []

    def run(i):
        if not all(torch.equal(transform(inputs[i]), want[i]) for _ in range(40)):
            wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_steering_in_the_middle_of_steering(transform, monkeypatch):
    """As a garbage collector that runs a finaliser may do it."""
    x, loops, nested = randn(50, 8, seed=1), plans.step_kernels(), []
    want = transform(x)

    class Interrupted:
        def steered(self, *args):
            if not nested:
                nested.append(None)
                nested[0] = transform(randn(50, 8, seed=2))
            return loops.steered(*args)

    monkeypatch.setattr(plans, "step_kernels", lambda: Interrupted())
    assert torch.equal(transform(x), want)
    assert nested
