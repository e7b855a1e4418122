"""Steering: the PopSteer rule, the two splices, and an SAE that lives on a model."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from steerrec.attachment import attach
from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.errors import ArtifactError, SiteError
from steerrec.hooks import edit
from steerrec.recommender import user_vectors
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering, SteerTransform

from .toy_models import hooked, tiny_sasrec


def table(d, std_a, std_b):
    columns = {"cohens_d": d, "std_a": std_a, "std_b": std_b}
    columns = {name: torch.tensor(values) for name, values in columns.items()}
    return AttributionTable(columns, contrast={"name": "popularity"})


def random_sae(d_in=8, d_sae=32, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(d_in, d_sae, k, generator=generator)
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return sae.requires_grad_(False)


def random_steering(d_sae=32, *, alpha=1.0, splice="delta", seed=0):
    shift = torch.randn(d_sae, generator=torch.Generator().manual_seed(seed))
    return Steering(shift, alpha=alpha, splice=splice)


def vectors(users=20, width=8, dtype=torch.float32):
    return torch.randn(users, width, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- the PopSteer rule --------------------------------------------------------------------------

# |d| is 2, 1, .5, 0: the weights (|d| - min) / (max - min) are 1, .5, .25, 0
FOUR = table(d=[2.0, -1.0, 0.5, 0.0], std_a=[3.0, 5.0, 7.0, 9.0], std_b=[4.0, 6.0, 8.0, 10.0])


def test_popsteer_lowers_neurons_of_group_a_and_raises_those_of_group_b():
    steering = Steering.popsteer(FOUR, alpha=1.5)
    assert steering.shift.tolist() == [-1 * 3.0, 0.5 * 6.0, -0.25 * 7.0, 0.0]
    assert steering.shift.dtype == torch.float32
    assert (steering.alpha, steering.splice, steering.name) == (1.5, "delta", "popsteer")
    assert steering.provenance["contrast"] == {"name": "popularity"}
    assert steering.provenance["neurons"] == 4


def test_popsteer_compat_crosses_the_standard_deviations_and_reconstructs():
    steering = Steering.popsteer(FOUR, popsteer_compat=True)
    assert steering.shift.tolist() == [-1 * 4.0, 0.5 * 5.0, -0.25 * 8.0, 0.0]
    assert steering.splice == "reconstruct"
    assert steering.provenance["popsteer_compat"] is True


def test_the_weakest_neuron_of_the_table_gets_no_weight():
    steering = Steering.popsteer(table([3.0, -1.0, 2.0, -2.0], [3.0] * 4, [4.0] * 4))
    assert steering.shift.tolist() == [-3.0, 0.0, -1.5, 2.0]


@pytest.mark.parametrize(
    ("neurons", "expected"),
    [(1, [-3.0, 0, 0, 0]), (2, [-3.0, 3.0, 0, 0]), (4, [-3.0, 3.0, -1.75, 0])],
)
def test_n_neurons_are_the_strongest_with_their_weights_over_all_neurons(neurons, expected):
    assert Steering.popsteer(FOUR, neurons=neurons).shift.tolist() == expected


@pytest.mark.parametrize("d", [[0.0, 0.0, 0.0], [0.7, -0.7, 0.7]], ids=["all zero", "all equal"])
def test_without_any_spread_in_d_nothing_is_steered(d):
    assert not Steering.popsteer(table(d, [1.0] * 3, [1.0] * 3)).shift.any()


def test_a_neuron_with_d_zero_is_left_alone_even_if_others_are_stronger_both_ways():
    assert Steering.popsteer(table([0.0, 1.0], [5.0, 1.0], [5.0, 1.0])).shift.tolist() == [
        0.0,
        -1.0,
    ]


@pytest.mark.parametrize("neurons", [0, -1, 5])
def test_a_number_of_neurons_that_cannot_be(neurons):
    with pytest.raises(ArtifactError, match=f"{neurons} neurons asked for; this SAE has 4"):
        Steering.popsteer(FOUR, neurons=neurons)


def test_popsteer_compat_does_not_go_with_delta():
    with pytest.raises(ValueError, match="implies splice='reconstruct'"):
        Steering.popsteer(FOUR, popsteer_compat=True, splice="delta")
    assert Steering.popsteer(FOUR, splice="reconstruct").splice == "reconstruct"


def test_recipes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="'delta' or 'reconstruct'"):
        Steering(torch.zeros(3), splice="both")
    for shift in (torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf]), torch.zeros(2, 2)):
        with pytest.raises(ArtifactError, match="one finite number per latent"):
            Steering(shift)


def test_with_alpha_changes_the_strength_alone():
    steering = random_steering(splice="reconstruct")
    stronger = steering.with_alpha(3.0)
    assert (stronger.alpha, steering.alpha, stronger.splice) == (3.0, 1.0, "reconstruct")
    assert stronger.shift is steering.shift


# --- the transform, against a dense one ---------------------------------------------------------


def dense_latents(sae, pre_acts):
    """One row at a time: the k largest, clipped at zero, everything else zero."""
    latents = torch.zeros_like(pre_acts)
    for row, z in enumerate(pre_acts.tolist()):
        for j in sorted(range(len(z)), key=lambda j: -z[j])[: sae.k]:
            latents[row, j] = max(z[j], 0.0)
    return latents


def dense_steered(sae, x, shift, alpha, splice):
    sae, x, shift = copy.deepcopy(sae).double(), x.double(), shift.double()
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    before = dense_latents(sae, pre_acts) @ sae.W_dec + sae.b_dec
    after = dense_latents(sae, pre_acts + alpha * shift) @ sae.W_dec + sae.b_dec
    return x + (after - before) if splice == "delta" else after


@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
@pytest.mark.parametrize("alpha", [-1.0, 0.3, 2.0])
@pytest.mark.parametrize("edited", [1, 32])
def test_both_splices_equal_the_dense_formula(splice, alpha, edited):
    sae, x = random_sae(), vectors()
    steering = random_steering(splice=splice)
    steering = replace(steering, shift=steering.shift * (torch.arange(32) < edited) * 3)
    expected = dense_steered(sae, x, steering.shift, alpha, splice)
    steered = SteerTransform(sae, steering)(x, alpha)
    torch.testing.assert_close(steered, expected.float(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, x)


def test_editing_one_latent_changes_which_others_are_active():
    """The case in which summing over the edited latents alone would be wrong."""
    sae = SparseAutoencoder(2, 3, k=1)
    sae.W_enc.data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    x = torch.tensor([[3.0, 2.0]])  # z = 3, 2, 5: latent 2 is active; without it, latent 0
    transform = SteerTransform(sae, Steering(torch.tensor([0.0, 0.0, -4.0])))
    change = torch.tensor([[3.0 - 25.0, 0.0 - 25.0]])
    assert torch.equal(transform(x), x + change)
    transform = SteerTransform(sae, replace(transform.steering, splice="reconstruct"))
    assert torch.equal(transform(x), torch.tensor([[3.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("steering", [random_steering(alpha=0.0), Steering(torch.zeros(32), 2.0)])
def test_delta_with_an_empty_edit_returns_the_input_bit_for_bit(dtype, steering):
    x = vectors(dtype=dtype)
    assert torch.equal(SteerTransform(random_sae(), steering)(x), x)
    assert torch.equal(SteerTransform(random_sae().to(dtype), steering)(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_with_an_empty_edit_is_exact_where_latents_tie(dtype):
    sae = random_sae()
    sae.W_enc.data = sae.W_enc[:, :1].repeat(1, 32)
    sae.b_enc.data.fill_(0.5)
    x = torch.cat([vectors(dtype=dtype), torch.zeros(3, 8, dtype=dtype)])
    assert (sae.pre_acts(x.float()).diff(dim=1) == 0).all()
    assert torch.equal(SteerTransform(sae, random_steering(alpha=0.0))(x), x)


def test_alpha_can_differ_from_user_to_user():
    transform, x = SteerTransform(random_sae(), random_steering()), vectors()
    alpha = torch.linspace(-1, 2, len(x))
    alpha[3] = 0
    steered = transform(x, alpha)
    rows = [transform(x[i : i + 1], float(alpha[i])) for i in range(len(x))]
    torch.testing.assert_close(steered, torch.cat(rows))
    assert torch.equal(steered[3], x[3])


def test_alpha_is_the_recipes_own_unless_given():
    transform, x = SteerTransform(random_sae(), random_steering(alpha=0.7)), vectors()
    assert torch.equal(transform(x), transform(x, 0.7))
    assert torch.equal(transform(x, torch.tensor(0.7)), transform(x, 0.7))
    assert not torch.equal(transform(x, 0.8), transform(x))


def test_alpha_of_another_number_of_users_is_refused():
    transform = SteerTransform(random_sae(), random_steering())
    with pytest.raises(ValueError, match="alpha has 3 values for 20 user vectors"):
        transform(vectors(), torch.ones(3))


@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_input_keeps_its_values_and_the_result_its_dtype(splice, dtype):
    transform, x = (
        SteerTransform(random_sae(), random_steering(splice=splice)),
        vectors(dtype=dtype),
    )
    before = x.clone()
    steered = transform(x)
    assert steered.dtype == dtype
    assert torch.equal(x, before)
    torch.testing.assert_close(steered.float(), transform(x.float()), rtol=0.02, atol=0.02)


def test_autocast_changes_nothing():
    transform, x = SteerTransform(random_sae(), random_steering()), vectors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = transform(x)
    assert torch.equal(inside, transform(x))


def test_moving_or_casting_a_transform_leaves_sae_and_recipe_alone():
    sae, steering, x = random_sae(), random_steering(), vectors()
    expected = SteerTransform(sae, steering)(x)
    double = SteerTransform(sae, steering).double()
    torch.testing.assert_close(double(x), expected)
    assert {p.dtype for p in sae.parameters()} == {steering.shift.dtype} == {torch.float32}
    assert {p.dtype for p in double.parameters()} == {double.step.shift.dtype} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_result_is_on_the_device_of_the_input():
    transform, x = SteerTransform(random_sae(), random_steering()), vectors()
    steered = transform(x.cuda())
    assert steered.is_cuda
    torch.testing.assert_close(steered.cpu(), transform(x))
    on_gpu = SteerTransform(random_sae(), random_steering(alpha=0.0)).cuda()
    assert torch.equal(on_gpu(x.cuda()).cpu(), x)


def test_a_steering_of_another_sae_is_refused():
    with pytest.raises(ArtifactError, match="is for 31 latents, the SAE has 32"):
        SteerTransform(random_sae(), random_steering(31))


def test_vectors_of_another_width_are_refused():
    with pytest.raises(ArtifactError, match="reads vectors of width 8, the site gives 7"):
        SteerTransform(random_sae(), random_steering())(vectors(width=7))


# --- attached to a model ------------------------------------------------------------------------

HISTORIES = Histories.from_lists([[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10], [11, 11]])


@pytest.fixture(params=[True, False], ids=["pre-norm", "post-norm"])
def rec(request):
    return tiny_sasrec(norm_first=request.param)


def scores(rec):
    return rec.score(rec.make_batch(HISTORIES))


def test_observing_leaves_the_scores_of_sasrec_bit_for_bit(rec):
    plain = scores(rec)
    with attach(rec, random_sae()) as attachment:
        assert torch.equal(scores(rec), plain)
        assert attachment.firings == 1
        assert attachment.steering is None
    assert torch.equal(scores(rec), plain)


@pytest.mark.parametrize(
    ("module", "x", "site"),
    [
        (nn.Linear(3, 8), torch.ones(4, 3), Site("0", layout="BH")),
        (
            nn.GRU(3, 8, batch_first=True),
            torch.ones(4, 5, 3),
            Site("0", "output", (0,), "BLH", "all"),
        ),
        (nn.GRU(3, 8), torch.ones(5, 4, 3), Site("0", "output", (1,), "LBH", "all")),
        (nn.LSTM(3, 8), torch.ones(5, 4, 3), Site("0", "output", (1, 0), "LBH", "user", "last")),
        (nn.Conv1d(3, 8, 1), torch.ones(4, 3, 5), Site("0", "output", (), "BHL", "all")),
        (nn.Linear(8, 2), torch.ones(4, 8), Site("0", "input", layout="BH")),
    ],
)
def test_observing_any_module_leaves_its_output_as_it_is(module, x, site):
    model = nn.Sequential(module)
    emitted = []
    module.register_forward_hook(lambda _, __, output: emitted.append(output))
    with torch.no_grad(), attach(model, random_sae(), site=site) as attachment:
        assert model(x) is emitted[0]
    assert attachment.firings == 1


def test_steering_goes_on_over_and_off(rec):
    sae, plain = random_sae(), scores(rec)
    steering = random_steering(alpha=0.8)
    transform = SteerTransform(sae, steering)
    expected = rec.item_head.scores(transform(user_vectors(rec, HISTORIES)))
    attachment = attach(rec, sae)
    assert torch.equal(scores(rec), plain)
    attachment.steering = steering
    assert attachment.steering is steering
    torch.testing.assert_close(scores(rec), expected)
    assert not torch.allclose(scores(rec), plain)
    attachment.steering = steering.with_alpha(0.0)
    assert torch.equal(scores(rec), plain)
    attachment.steering = steering
    attachment.steering = None
    assert torch.equal(scores(rec), plain)
    attachment.remove()
    attachment.remove()
    assert hooked(rec.model) == []


def test_user_vectors_are_read_after_the_attachment(rec):
    sae, plain = random_sae(), user_vectors(rec, HISTORIES)
    steering = random_steering(splice="reconstruct")
    with attach(rec, sae, steering=steering):
        steered = user_vectors(rec, HISTORIES)
    torch.testing.assert_close(steered, SteerTransform(sae, steering)(plain))


def test_an_empty_edit_leaves_the_scores_of_a_bf16_model_bit_for_bit():
    rec = tiny_sasrec()
    rec.model.to(torch.bfloat16)
    plain = scores(rec)
    with attach(rec, random_sae(), steering=random_steering(alpha=0.0)):
        assert torch.equal(scores(rec), plain)
    with attach(rec, random_sae(), steering=random_steering()):
        assert not torch.equal(scores(rec), plain)
        assert scores(rec).dtype == torch.bfloat16


def test_a_layer_in_the_middle_is_steered_at_its_real_positions(rec):
    sae, steering = random_sae(), random_steering()
    site = Site("layers.0", positions="real", positions_from=TokenIds("item_embedding"))
    transform = SteerTransform(sae, steering)
    with edit(rec.model, site, transform):
        expected = scores(rec)
    with attach(rec, sae, site=site, steering=steering):
        assert torch.equal(scores(rec), expected)
    assert not torch.allclose(scores(rec), expected)


def test_steering_never_writes_into_the_models_tensors():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    emitted = []
    model[0].register_forward_hook(lambda _, __, output: emitted.append((output, output.clone())))
    site = Site("0", layout="BH")
    with attach(model, random_sae(), site=site, steering=random_steering()):
        model(torch.ones(4, 3))
    output, before = emitted[0]
    assert torch.equal(output, before)


def test_latents_are_those_before_steering(rec):
    sae = random_sae()
    expected = sae.encode(user_vectors(rec, HISTORIES))
    with attach(rec, sae) as attachment:
        scores(rec)
        assert torch.equal(attachment.latents.indices, expected.indices)
        assert torch.equal(attachment.latents.values, expected.values)
        attachment.steering = random_steering(alpha=5.0)
        scores(rec)
        assert torch.equal(attachment.latents.dense(32), expected.dense(32))


def test_latents_before_the_first_forward_pass_are_an_error(rec):
    with attach(rec, random_sae()) as attachment, pytest.raises(SiteError, match="not fired"):
        _ = attachment.latents


def test_two_attachments_steer_one_after_the_other(rec):
    first, second = random_sae(seed=1), random_sae(seed=2)
    steering = random_steering()
    plain = user_vectors(rec, HISTORIES)
    expected = SteerTransform(second, steering)(SteerTransform(first, steering)(plain))
    with attach(rec, first, steering=steering), attach(rec, second, steering=steering):
        torch.testing.assert_close(user_vectors(rec, HISTORIES), expected)
    assert hooked(rec.model) == []


def test_the_model_keeps_its_state_dict_and_its_copies_are_not_steered(rec):
    plain, state = scores(rec), list(rec.model.state_dict())
    with attach(rec, random_sae(), steering=random_steering()):
        assert list(rec.model.state_dict()) == state
        twin = copy.deepcopy(rec.model)
    assert torch.equal(twin.score(**rec.make_batch(HISTORIES)), plain)


def test_a_recommender_offers_its_own_site_a_bare_module_has_none(rec):
    assert attach(rec, random_sae()).site == rec.site
    with pytest.raises(SiteError, match="no recommended site"):
        attach(rec.model, random_sae())


@pytest.mark.parametrize("steering", [None, random_steering(d_sae=16)])
def test_an_sae_of_the_wrong_width_is_told_and_leaves_the_model_clean(rec, steering):
    plain = scores(rec)
    with (
        pytest.raises(SiteError, match="'final_norm' gives vectors of width 8, the SAE reads 5"),
        attach(rec, random_sae(d_in=5, d_sae=16), steering=steering),
    ):
        scores(rec)
    assert hooked(rec.model) == []
    assert torch.equal(scores(rec), plain)


def test_a_steering_of_another_sae_never_touches_the_model(rec):
    with pytest.raises(ArtifactError, match="31 latents"):
        attach(rec, random_sae(), steering=random_steering(31))
    assert hooked(rec.model) == []


def test_a_steering_of_another_sae_leaves_the_one_in_force(rec):
    steering = random_steering()
    with attach(rec, random_sae(), steering=steering) as attachment:
        expected = scores(rec)
        with pytest.raises(ArtifactError, match="31 latents"):
            attachment.steering = random_steering(31)
        assert attachment.steering is steering
        assert torch.equal(scores(rec), expected)


def test_a_missing_site_leaves_the_model_clean(rec):
    with pytest.raises(SiteError, match=r"no module 'layers\.7'"):
        attach(rec, random_sae(), site=replace(rec.site, path="layers.7"))
    assert hooked(rec.model) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_or_the_forward_pass_leaves_the_model_clean(rec, error):
    def fail(*_):
        raise error("stop")

    with pytest.raises(error, match="stop"), attach(rec, random_sae()):
        raise error("stop")
    assert hooked(rec.model) == []
    handle = rec.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error, match="stop"), attach(rec, random_sae()):
        scores(rec)
    handle.remove()
    assert hooked(rec.model) == []
