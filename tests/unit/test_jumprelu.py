"""SAEs with thresholds: what is active, steering, every recipe, graphs, folding, saving."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec import compiled
from steerrec.artifacts import Artifact, load_artifact
from steerrec.attribution import score_neurons
from steerrec.autoencoder import Latents, SparseAutoencoder
from steerrec.errors import ArtifactError
from steerrec.gates import NeuronGate, gated
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.profiles import popularity_contrast
from steerrec.steering import Steering, SteerTransform

from .tiny import random_histories, random_recommender

D, F = 6, 40


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def jumprelu(d_in=D, d_sae=F, dtype=torch.float32):
    weights = {
        "W_enc": randn(d_in, d_sae, seed=1),
        "b_enc": randn(d_sae, seed=2),
        "W_dec": randn(d_sae, d_in, seed=3),
        "b_dec": randn(d_in, seed=4),
        "threshold": randn(d_sae, seed=5) + 1.5,  # some below 0, which counts as 0
    }
    return SparseAutoencoder.from_weights({n: t.to(dtype) for n, t in weights.items()}, None)


def dense(sae, pre_acts):
    """The formula of Rajamanoharan et al., written out."""
    return torch.where(pre_acts > sae.threshold, pre_acts.clamp_min(0), 0.0)


@pytest.fixture
def sae():
    return jumprelu()


@pytest.fixture(params=["loops", "torch"])
def either_way(request, monkeypatch):
    """The same by compiled loops, and where there are none."""
    if request.param == "torch":
        for module in ("thresholds", "plans", "operations", "selection"):
            for name in ("kernels", "jump_kernels", "step_kernels"):
                monkeypatch.setattr(f"steerrec.{module}.{name}", lambda: None, raising=False)


# --- what is active


def test_by_hand(either_way):
    sae = SparseAutoencoder(1, 4, 2, architecture="jumprelu").requires_grad_(False)
    sae.threshold.copy_(torch.tensor([1.0, 1.0, -3.0, 0.0]))
    z = torch.tensor([[1.0, 1.5, -2.0, 0.5], [0.9, -1.0, -4.0, 0.0]])
    values, indices = sae.activate(z)
    assert values.shape == indices.shape == (2, 2)
    # 1.0 is not above its threshold; -2 is above -3, and ReLU makes 0 of it
    assert Latents(values, indices).dense(4).tolist() == [[0, 1.5, 0, 0.5], [0, 0, 0, 0]]
    assert (sae.k, sae.architecture) == (2, "jumprelu")


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 5), width=st.integers(1, 90), seed=st.integers(0, 999))
def test_what_is_active_is_what_the_formula_says(rows, width, seed):
    sae = jumprelu(3, width)
    z = randn(rows, width, seed=seed) * 2
    latents = sae.activate(z)
    assert torch.equal(latents.dense(width), dense(sae, z))
    most = int((dense(sae, z) > 0).sum(dim=1).max()) if rows else 0
    assert latents.values.shape == (rows, max(1, most))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_go_unseen(sae, bad, either_way):
    z = randn(3, F, seed=0)
    z[1, 7] = bad
    sums = sae.directions(sae.activate(z))
    assert not bool(sums[1].isfinite().any())
    assert bool(sums[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    sae = jumprelu(dtype=dtype)
    x = randn(9, D, seed=0).to(dtype)
    out = sae(x)
    assert torch.equal(out.latents.dense(F), dense(sae, out.pre_acts))
    assert out.x_hat.dtype == dtype


def test_gradients_flow_through_active_latents_alone(either_way):
    sae = jumprelu()
    z = randn(5, F, seed=0).requires_grad_(True)
    sae.activate(z).values.sum().backward()
    assert torch.equal(z.grad, (dense(sae, z) > 0).to(z))


def test_batches_of_different_widths_are_joined(sae):
    z = randn(30, F, seed=0)
    z[10:20] -= 3
    parts = [sae.activate(part) for part in z.split(10)]
    assert len({part.values.shape[1] for part in parts}) > 1
    assert torch.equal(Latents.joined(parts).dense(F), dense(sae, z))


def test_reconstruction_and_folding(sae):
    x = randn(20, D, seed=0)
    out = sae(x)
    expected = dense(sae, out.pre_acts) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(out.x_hat, expected)
    mean, scale = randn(D, seed=8), 2.5
    folded = sae.fold_normalisation(mean, scale)
    torch.testing.assert_close(folded(x * scale + mean).x_hat, out.x_hat * scale + mean)
    assert torch.equal(folded.threshold, sae.threshold)


def test_k_may_be_unknown_only_with_thresholds():
    weights = {n: t for n, t in jumprelu().state_dict().items() if n != "threshold"}
    with pytest.raises(ValueError, match="k is None; expected between 1"):
        SparseAutoencoder.from_weights(weights, None)
    with pytest.raises(ValueError, match="'topk' or 'jumprelu'; got 'batchtopk'"):
        SparseAutoencoder(4, 8, 2, architecture="batchtopk")


# --- steering


def naive_shift(sae, x, shift, alpha, delta):
    z = sae.pre_acts(x)
    after = dense(sae, z + alpha * shift) @ sae.W_dec
    return x + after - dense(sae, z) @ sae.W_dec if delta else after + sae.b_dec


@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_shift_is_what_the_formula_says(sae, splice, rows, either_way):
    x, shift = randn(rows, D, seed=0), randn(F, seed=1)
    transform = SteerTransform(sae, Steering(shift, splice=splice))
    for alpha in (0.7, randn(rows, seed=2)):
        factor = alpha if isinstance(alpha, float) else alpha[:, None]
        expected = naive_shift(sae, x, shift, factor, splice == "delta")
        torch.testing.assert_close(transform(x, alpha), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_empty_edit_returns_the_vector_bit_for_bit(dtype, either_way):
    sae, x = jumprelu(dtype=dtype), randn(200, D, seed=0).to(dtype)
    assert torch.equal(SteerTransform(sae, Steering(torch.zeros(F)))(x), x)
    moved = SteerTransform(sae, Steering(randn(F, seed=1)))
    assert torch.equal(moved(x, 0.0), x)
    assert not torch.equal(moved(x, 1.0), x)


def test_a_shift_changes_the_latents_that_it_moves_and_no_others(sae):
    """Unlike topk: the sum runs over what is edited alone."""
    x, shift = randn(50, D, seed=0), torch.zeros(F)
    shift[3] = 5.0
    change = SteerTransform(sae, Steering(shift))(x) - x
    row = sae.W_dec[3] / sae.W_dec[3].norm()
    torch.testing.assert_close(change, (change @ row)[:, None] * row, rtol=1e-4, atol=1e-4)
    assert bool(change.any())


def test_every_operation_on_latents(sae, either_way):
    x = randn(60, D, seed=0)
    z = sae.pre_acts(x)
    f = dense(sae, z)
    low = f.clone()
    low[:, 4] = low[:, 4].clamp_min(0.5)
    cases = [
        (LatentSteering.scale(sae, [1, 2], 3.0), torch.cat([f[:, :1], f[:, 1:3] * 3, f[:, 3:]], 1)),
        (LatentSteering.ablate(sae, range(F)), f * 0),
        (LatentSteering.clamp(sae, [4], low=0.5), low),
    ]
    for recipe, after in cases:
        expected = x + (after - f) @ sae.W_dec
        torch.testing.assert_close(recipe.transform(sae)(x), expected, rtol=1e-4, atol=1e-4)
    vectors, constant = randn(F, D, seed=6), randn(D, seed=7)
    responses = ResponseSteering(vectors, constant)
    expected = x + f @ vectors + constant
    torch.testing.assert_close(responses.transform(sae)(x), expected, rtol=1e-4, atol=1e-4)
    gate = gated(responses, NeuronGate(4)).transform(sae)(x)
    fires = f[:, 4] > 0
    assert 0 < int(fires.sum()) < len(x)
    torch.testing.assert_close(gate[fires], expected[fires], rtol=1e-4, atol=1e-4)
    assert torch.equal(gate[~fires], x[~fires])
    both = (Steering(randn(F, seed=1)) + responses).transform(sae)(x)
    shifted = naive_shift(sae, x, randn(F, seed=1), 1.0, True)
    torch.testing.assert_close(both, shifted + expected - x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
def test_graphs(sae, splice):
    x, shift = randn(8, D, seed=0), randn(F, seed=1)
    transform = SteerTransform(sae, Steering(shift, splice=splice)).eval()
    expected = transform(x)
    compiled_transform = torch.compile(transform, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled_transform(x), expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(transform, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
    per_row = torch.vmap(lambda row: transform(row[None])[0])(x)
    torch.testing.assert_close(per_row, expected, rtol=1e-4, atol=1e-4)


# --- attribution, saving


def test_an_attribution_table_with_firing_rates():
    rec = random_recommender()
    sae = jumprelu(4, 12)
    table = score_neurons(
        rec, sae, popularity_contrast(rec.catalogue), random_histories(), users=64
    )
    rates = table["firing_rate_a"]
    assert bool((rates > 0).any())
    assert bool((rates < 1).any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [5, None])
def test_it_comes_back_bit_for_bit_and_two_saves_are_equal(tmp_path, dtype, k):
    rec = random_recommender()
    sae = SparseAutoencoder.from_weights(jumprelu(4, 12, dtype).state_dict(), k)
    for name in ("one", "two"):
        Artifact.create(rec, sae).save(tmp_path / name)
    here = load_artifact(tmp_path / "one").at()
    assert (here.sae.architecture, here.sae.k, here.unknown) == ("jumprelu", k, {})
    for name, tensor in sae.state_dict().items():
        assert torch.equal(here.sae.state_dict()[name], tensor)
        assert here.sae.state_dict()[name].dtype == dtype
    x = randn(9, 4, seed=0).to(dtype)
    assert torch.equal(here.sae(x).x_hat, sae(x).x_hat)
    files = [f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*") if f.is_file()]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "threshold"),
        ({"architecture": "batchtopk"}, "expected 'topk' or 'jumprelu'"),
        ({"k": 0}, "k is 0; expected a positive integer"),
        ({"k": 13}, "k is 13, more than the 12 latents"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    rec = random_recommender()
    weights = jumprelu(4, 12).state_dict()
    Artifact.create(rec, SparseAutoencoder.from_weights(weights, 3)).save(tmp_path)
    file = tmp_path / rec.site.folder / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


def test_the_loops_are_there():
    """Else half of the tests above would be of torch twice."""
    assert compiled.jump_kernels() is not None
