"""Fitting an SAE: the losses, the loop and its shuffle, dead latents, exact resume, the report."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from steerrec import training as module
from steerrec.activations import ActivationSampling, ActivationShards
from steerrec.autoencoder import SparseAutoencoder, fraction_of_variance_unexplained
from steerrec.errors import SiteError, TrainingError
from steerrec.sae_steps import auxiliary_loss
from steerrec.training import (
    SAETraining,
    fit_autoencoder,
    reconstruction_report,
    train_autoencoder,
)
from steerrec.warm_start import normalised

from .tiny import random_histories, random_recommender

TRAINING = SAETraining(
    latents=32, k=3, epochs=4, batch_size=64, learning_rate=5e-3, aux_k=8, dead_after=256
)
SHARD_ROWS = 100


def write_shards(folder, part="train", *, rows):
    """A whole shard folder with these rows [R, H]."""
    folder.mkdir(exist_ok=True)
    pieces = rows.split(SHARD_ROWS)
    for number, piece in enumerate(pieces):
        path = folder / f"{part}-{number:05d}.safetensors"
        save_file({"user_vectors": piece.contiguous()}, path)
    manifest = {"width": rows.shape[1], "parts": {part: [len(piece) for piece in pieces]}}
    (folder / "activations.json").write_text(json.dumps(manifest))
    return ActivationShards(folder, part)


def sparse_rows(n=512, d_in=8, atoms=16, active=2, seed=0):
    """Sums of a few rows of a planted dictionary, off the origin; and the dictionary."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(atoms, d_in, generator=generator), dim=1)
    chosen = torch.rand(n, atoms, generator=generator).topk(active, dim=1).indices
    sizes = 0.5 + torch.rand(n, active, generator=generator)
    coefficients = torch.zeros(n, atoms).scatter_(1, chosen, sizes)
    return coefficients @ dictionary * 3 + 5, dictionary


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", rows=sparse_rows()[0])


def weights(sae):
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def equal(one, other):
    return all(torch.equal(weights(one)[name], tensor) for name, tensor in weights(other).items())


# --- losses


def test_auxiliary_loss_by_hand():
    """Two of three dead latents, those with the largest pre-activations, guess the residual."""
    sae = SparseAutoencoder(2, 4, k=1).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, -1.0, -2.0, -9.0], [0.0, 0.0, 0.0, 0.0]]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, -0.8], [1.0, 0.0]]))
    x = torch.tensor([[1.0, 2.0]])
    out = sae(x)
    assert out.x_hat.tolist() == [[1.0, 0.0]]  # latent 0; the residual is (0, 2)
    # pre-activations -1 and -2 and not -9: -1 * (0, -1) - 2 * (.6, -.8) = (-1.2, 2.6)
    loss = auxiliary_loss(sae, x, out, torch.tensor([1, 2, 3]), aux_k=2)
    assert float(loss) == pytest.approx((1.2**2 + 0.6**2) / 4)


def test_auxiliary_loss_uses_all_dead_latents_where_there_are_fewer_than_aux_k():
    sae = SparseAutoencoder(4, 8, 2)
    x = torch.randn(10, 4)
    few, many = (auxiliary_loss(sae, x, sae(x), torch.tensor([1, 5]), aux_k=k) for k in (2, 99))
    assert torch.equal(few, many)


def test_without_dead_latents_there_is_no_auxiliary_loss():
    sae = SparseAutoencoder(4, 8, 2)
    x = torch.randn(10, 4)
    assert float(auxiliary_loss(sae, x, sae(x), torch.tensor([], dtype=torch.int64), 4)) == 0.0


def test_only_the_auxiliary_loss_reaches_the_encoder_of_a_relu_dead_latent():
    sae = SparseAutoencoder(4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_enc[5] = -100
    out = sae(x)
    assert bool((out.pre_acts[:, 5] < 0).all())
    main = torch.autograd.grad(
        fraction_of_variance_unexplained(x, out.x_hat), [sae.W_enc, sae.b_enc]
    )
    assert not main[0][:, 5].any()  # although k = 8 selects every latent
    assert not main[1][5]
    aux = auxiliary_loss(sae, x, sae(x), torch.tensor([5]), aux_k=4)
    revived = torch.autograd.grad(aux, [sae.W_enc, sae.b_enc])
    assert bool((revived[0][:, 5] != 0).all())
    assert bool(revived[1][5])
    assert not revived[0][:, :5].any()  # and it reaches no live latent


# --- dead latents


@pytest.mark.parametrize(("aux_weight", "revived"), [(1 / 32, True), (0.0, False)])
def test_training_revives_a_dead_latent_by_the_auxiliary_loss_alone(
    tmp_path, shards, aux_weight, revived
):
    training = replace(TRAINING, epochs=40, aux_weight=aux_weight)
    run = module._Run(shards, training, tmp_path, torch.device("cpu"))
    with torch.no_grad():
        run.sae.b_enc[7] = -8  # normalised rows are not that long
    run.save()
    rows = shards.gather(np.arange(len(shards)))
    start = run.sae.fold_normalisation(run.mean, run.scale)
    assert bool((start.pre_acts(rows)[:, 7] < 0).all())
    sae, _ = train_autoencoder(shards, training, work=tmp_path)
    assert bool((sae.encode(rows).dense(32)[:, 7] > 0).any()) is revived


def test_a_latent_is_dead_once_it_has_not_fired_in_that_many_rows(tmp_path, shards):
    run = module._Run(shards, replace(TRAINING, dead_after=128), tmp_path, torch.device("cpu"))
    with torch.no_grad():
        run.sae.b_enc[[3, 9]] = -1000
    rows = (shards.gather(np.arange(128)) - run.mean) / run.scale
    run.step(rows[:64])
    assert run.dead.tolist() == []
    assert run.rows_since_fired[[3, 9]].tolist() == [64, 64]
    assert int(run.rows_since_fired.min()) == 0
    run.step(rows[64:])
    assert {3, 9} <= set(run.dead.tolist())
    run.rows_since_fired[3] = 0
    assert 3 not in run.dead.tolist()


def test_with_fewer_rows_than_dead_after_an_epoch_is_enough(tmp_path, shards):
    run = module._Run(shards, replace(TRAINING, dead_after=10**9), tmp_path, torch.device("cpu"))
    with torch.no_grad():
        run.sae.b_enc[3] = -1000
    run.train_epoch()
    assert 3 in run.dead.tolist()
    assert run.log[-1]["dead"] == len(run.dead)


# --- decoder


def test_the_decoder_gradient_loses_its_radial_part_alone():
    sae = SparseAutoencoder(4, 8, 2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    fraction_of_variance_unexplained(x, sae(x).x_hat).backward()
    rows, before = sae.W_dec.detach(), sae.W_dec.grad.clone()
    module._project_decoder_gradient(sae)
    after, removed = sae.W_dec.grad, before - sae.W_dec.grad
    assert float((before * rows).sum(dim=1).abs().max()) > 1e-3
    torch.testing.assert_close((after * rows).sum(dim=1), torch.zeros(8))
    torch.testing.assert_close(removed, (removed * rows).sum(dim=1, keepdim=True) * rows)


def test_the_optimizer_sees_the_projected_gradient(tmp_path, shards):
    run = module._Run(shards, TRAINING, tmp_path, torch.device("cpu"))
    before = run.sae.W_dec.detach().clone()
    run.step((shards.gather(np.arange(64)) - run.mean) / run.scale)
    momentum = run.optimizer.state[run.sae.W_dec]["exp_avg"]
    assert bool(momentum.any())
    torch.testing.assert_close((momentum * before).sum(dim=1), torch.zeros(32))


def test_decoder_rows_keep_unit_length_in_training_and_are_scaled_once_at_the_end(tmp_path, shards):
    run = module._Run(shards, TRAINING, tmp_path, torch.device("cpu"))
    before = run.sae.W_dec.detach().clone()
    for rows in np.arange(192).reshape(3, 64):
        run.step((shards.gather(rows) - run.mean) / run.scale)
        torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(32))
    assert not torch.allclose(run.sae.W_dec, before, atol=1e-3)
    sae, _ = train_autoencoder(shards, TRAINING, work=tmp_path / "other")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((32,), run.scale))


# --- the loop


def test_a_planted_sparse_dictionary_is_recovered(tmp_path):
    rows, dictionary = sparse_rows(n=2304, d_in=16, atoms=24)
    shards = write_shards(tmp_path / "shards", rows=rows[:2048])
    training = SAETraining(latents=48, k=2, epochs=30, batch_size=256, learning_rate=1e-2)
    sae, summary = train_autoencoder(shards, training, work=tmp_path)
    sae.requires_grad_(False)
    unseen = rows[2048:]
    assert float(fraction_of_variance_unexplained(unseen, sae(unseen).x_hat)) < 0.05
    likeness = F.normalize(sae.W_dec, dim=1) @ dictionary.T
    assert float(likeness.amax(dim=0).min()) > 0.95  # every atom has its latent
    assert summary["log"][-1]["fvu"] < summary["log"][0]["fvu"] / 4
    assert summary["rows"] == 2048


def test_an_epoch_is_a_shuffle_of_all_rows_across_shards(tmp_path, shards, monkeypatch):
    run = module._Run(shards, TRAINING, tmp_path, torch.device("cpu"))
    gather, seen = shards.gather, []
    monkeypatch.setattr(shards, "gather", lambda rows: (seen.append(rows), gather(rows))[1])
    run.train_epoch()
    first, seen = seen, []
    run.train_epoch()
    assert [len(rows) for rows in first] == [64] * 8
    for epoch in (first, seen):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(512))
    assert np.concatenate(first).tolist() != np.concatenate(seen).tolist()
    # 64 rows out of 6 shards of 100 and less: a shuffle has nearly all of them in every batch
    assert all(len(set(rows // SHARD_ROWS)) >= 5 for rows in first)


def test_the_first_reconstructions_have_the_length_that_fits_best(tmp_path, shards):
    """The encoder differs from the decoder's transpose by one factor, that of least squares."""
    run = module._Run(shards, TRAINING, tmp_path, torch.device("cpu"))
    factor = run.sae.W_enc / run.sae.W_dec.T
    torch.testing.assert_close(factor, factor.mean().expand_as(factor))
    x = (shards.gather(np.arange(len(shards))) - run.mean) / run.scale
    x_hat = run.sae(x).x_hat
    torch.testing.assert_close((x * x_hat).sum(), x_hat.square().sum())


def test_the_learning_rate_warms_up_stays_and_falls_over_the_second_half(tmp_path, shards):
    training = replace(TRAINING, epochs=10, learning_rate=2.0)
    run = module._Run(shards, training, tmp_path, torch.device("cpu"))

    def rate(step):
        run.set_learning_rate(step, steps_per_epoch=100)
        return run.optimizer.param_groups[0]["lr"]

    assert [rate(step) for step in (0, 49, 99, 300, 500)] == pytest.approx([0.02, 1.0, 2, 2, 2])
    assert [rate(step) for step in (750, 950)] == pytest.approx([1.0, 0.2])


def test_one_seed_gives_one_sae_whatever_the_global_random_state(tmp_path, shards):
    torch.manual_seed(1)
    one, summary = train_autoencoder(shards, TRAINING, work=tmp_path / "one")
    torch.manual_seed(2)
    same, again = train_autoencoder(shards, TRAINING, work=tmp_path / "same")
    other, _ = train_autoencoder(shards, replace(TRAINING, seed=1), work=tmp_path / "other")
    assert equal(one, same)
    assert summary == again
    assert not equal(one, other)


def test_the_seed_decides_the_first_directions_too(tmp_path, shards):
    one, other = (
        module._Run(shards, replace(TRAINING, seed=seed), tmp_path, torch.device("cpu"))
        for seed in (0, 1)
    )
    assert not torch.equal(one.sae.W_dec, other.sae.W_dec)


# --- from a warm start


def fvu(sae, rows):
    return float(fraction_of_variance_unexplained(rows, sae(rows).x_hat))


@pytest.fixture
def moved(tmp_path):
    """The rows of a model that was retrained: a little turned and stretched, and moved far."""
    rows, _ = sparse_rows()
    turn = torch.eye(8) + 0.05 * torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    return write_shards(tmp_path / "moved", rows=(rows - 5) @ turn * 1.1 + 4)


def test_a_warm_start_begins_with_what_the_sae_computes_and_with_rows_of_length_1(tmp_path, shards):
    sae, _ = train_autoencoder(shards, TRAINING, work=tmp_path / "first")
    rows = shards.gather(np.arange(len(shards)))
    begun = normalised(sae, rows.mean(dim=0), 2.5)
    torch.testing.assert_close(begun.W_dec.norm(dim=1), torch.ones(32))
    found, expected = begun.fold_normalisation(rows.mean(dim=0), 2.5)(rows), sae(rows)
    torch.testing.assert_close(found.x_hat, expected.x_hat, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.latents.dense(32) > 0, expected.latents.dense(32) > 0)


def test_a_warm_start_follows_vectors_that_were_only_moved(tmp_path, shards):
    sae, _ = train_autoencoder(shards, replace(TRAINING, epochs=40), work=tmp_path / "first")
    rows = shards.gather(np.arange(len(shards)))
    moved = write_shards(tmp_path / "moved", rows=rows - 1)
    run = module._Run(moved, TRAINING, tmp_path / "warm", torch.device("cpu"), sae)
    begun = run.sae.fold_normalisation(run.mean, run.scale)
    own, lost, found = fvu(sae, rows), fvu(sae, rows - 1), fvu(begun, rows - 1)
    assert found < own + 0.3 * (lost - own)


def test_a_warm_start_is_ahead_of_a_fresh_one_for_as_many_epochs(tmp_path, shards, moved):
    long = replace(TRAINING, epochs=40)
    sae, _ = train_autoencoder(shards, long, work=tmp_path / "first")
    rows = moved.gather(np.arange(len(moved)))
    kept = weights(sae)
    short = replace(TRAINING, epochs=8)
    fresh, _ = train_autoencoder(moved, short, work=tmp_path / "fresh")
    warm, _ = train_autoencoder(moved, short, work=tmp_path / "warm", warm_start=sae)
    assert fvu(warm, rows) < fvu(sae, rows)
    assert fvu(warm, rows) < fvu(fresh, rows)
    assert all(torch.equal(kept[name], tensor) for name, tensor in sae.state_dict().items())


def test_a_warm_start_is_short_by_default_and_reports_what_it_began_with():
    rec, histories = random_recommender(), random_histories(users=200)
    training = SAETraining(latents=12, k=3, epochs=6, batch_size=64)
    sae, _ = fit_autoencoder(rec, histories, training=training)
    warm, summary = fit_autoencoder(rec, histories, warm_start=sae)
    assert summary["training"] | {"epochs": 5, "latents": 12, "k": 3} == summary["training"]
    assert summary["warm_start"].keys() == summary["reconstruction"].keys()
    assert summary["reconstruction"]["fvu"] < summary["warm_start"]["fvu"]
    assert not equal(warm, sae)


def test_a_warm_start_of_another_size_is_refused_before_anything_is_captured(tmp_path, shards):
    rec, histories = random_recommender(), random_histories()
    with pytest.raises(SiteError, match="vectors of width 4, the SAE reads 5"):
        fit_autoencoder(rec, histories, work=tmp_path, warm_start=SparseAutoencoder(5, 8, 2))
    assert not (tmp_path / "activations").exists()
    message = "width 8, 16 latents and k 3; expected 8, 32 and 3"
    with pytest.raises(TrainingError, match=message):
        train_autoencoder(shards, TRAINING, work=tmp_path, warm_start=SparseAutoencoder(8, 16, 3))


def test_a_warm_start_goes_on_only_from_its_own_checkpoint(tmp_path, shards):
    one, other = (
        SparseAutoencoder(8, 32, 3, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    first, _ = train_autoencoder(shards, TRAINING, work=tmp_path, warm_start=one)
    again, _ = train_autoencoder(shards, TRAINING, work=tmp_path, warm_start=one)
    assert equal(first, again)
    for start in (other, None):
        with pytest.raises(TrainingError, match="checkpoint of other settings"):
            train_autoencoder(shards, TRAINING, work=tmp_path, warm_start=start)


# --- interruption and bad input


@pytest.mark.parametrize("steps", [3, 8, 13, 31])
def test_a_run_that_was_interrupted_ends_in_the_weights_of_one_that_was_not(
    tmp_path, shards, monkeypatch, steps
):
    """Eight steps an epoch: before, at and after the first checkpoint, and in the last epoch."""
    whole, summary = train_autoencoder(shards, TRAINING, work=tmp_path / "whole")
    step, left = module._Run.step, iter(range(steps))

    def interrupted_step(run, *given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(run, *given)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(shards, TRAINING, work=tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists() is (steps >= 8)
    resumed, again = train_autoencoder(shards, TRAINING, work=tmp_path / "cut")
    assert equal(whole, resumed)
    assert summary == again


def test_a_finished_run_is_not_trained_again(tmp_path, shards, monkeypatch):
    sae, summary = train_autoencoder(shards, TRAINING, work=tmp_path)
    monkeypatch.setattr(module._Run, "step", None)
    again, same = train_autoencoder(shards, TRAINING, work=tmp_path)
    assert equal(sae, again)
    assert summary == same


@pytest.mark.parametrize("change", [{"seed": 1}, {"k": 2}, {"epochs": 5}, {"learning_rate": 1e-4}])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, shards, change):
    train_autoencoder(shards, TRAINING, work=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="checkpoint of other settings or data"):
        train_autoencoder(shards, replace(TRAINING, **change), work=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(tmp_path, shards):
    train_autoencoder(shards, TRAINING, work=tmp_path)
    other = write_shards(tmp_path / "other", rows=sparse_rows(seed=1)[0])
    with pytest.raises(TrainingError, match="checkpoint of other settings or data"):
        train_autoencoder(other, TRAINING, work=tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path, shards):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half a check")
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is not a usable checkpoint"):
        train_autoencoder(shards, TRAINING, work=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_checkpoint(tmp_path, shards):
    training = replace(TRAINING, learning_rate=1e38)
    with pytest.raises(TrainingError, match=r"loss became nan in epoch 1; lower the learning rate"):
        train_autoencoder(shards, training, work=tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_too_few_rows_are_refused(tmp_path):
    shards = write_shards(tmp_path, rows=sparse_rows(n=7)[0])
    with pytest.raises(TrainingError, match="only 7 rows of activations; expected at least 8"):
        train_autoencoder(shards, TRAINING, work=tmp_path)


@pytest.mark.parametrize("k", [0, 33])
def test_k_outside_the_latents_is_refused_before_anything_is_captured(k):
    with pytest.raises(TrainingError, match=f"k is {k}; expected between 1 and .* 32"):
        SAETraining(latents=32, k=k)


def test_rows_that_are_all_equal_are_refused(tmp_path):
    shards = write_shards(tmp_path, rows=torch.full((100, 4), 0.1))
    with pytest.raises(TrainingError, match="all activations are equal"):
        train_autoencoder(shards, TRAINING, work=tmp_path)


# --- the report


def test_reconstruction_report_by_hand(tmp_path):
    """Four latents, k = 2, that read (x, y, -x, nothing) and write it back."""
    sae = SparseAutoencoder(2, 4, k=2).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, 0.0, 0.0, -1.0]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5], [-1.0, 0.0], [0.0, 1.0]]))
    # reconstructed as (1, 1), (3, 0), (0, 0): residuals (0, 1), (0, 0), (0, -2), 5 together;
    # the mean is (4/3, 0), what is about it 1/9 + 4 + 25/9 + 16/9 + 4 = 38/3
    unseen = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, -2.0]])
    seen = torch.tensor([[-1.0, 0.0]])  # the only one to wake the third latent
    report = reconstruction_report(
        sae,
        write_shards(tmp_path / "unseen", "held_out", rows=unseen),
        write_shards(tmp_path / "seen", rows=seen),
    )
    assert report == {
        "fvu": pytest.approx(5 / (38 / 3)),
        "l0": 1.0,  # 2 + 1 + 0 over three rows
        "dead_share": 0.25,  # the fourth
        "rows": 3,
    }


# --- from a recommender


def test_fit_autoencoder_reads_trains_and_reports(tmp_path):
    rec, train = random_recommender(), random_histories(users=80)
    sampling = ActivationSampling(rows=256, held_out_users=0.2)
    sae, summary = fit_autoencoder(rec, train, training=TRAINING, sampling=sampling, work=tmp_path)
    assert (sae.d_in, sae.d_sae, sae.k) == (4, 32, 3)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["sampling"]["rows"] == summary["rows"] == 256
    assert len(summary["log"]) == TRAINING.epochs
    unseen = ActivationShards(tmp_path / "activations", "held_out")
    rows = unseen.gather(np.arange(len(unseen)))
    fvu = float(fraction_of_variance_unexplained(rows, sae.requires_grad_(False)(rows).x_hat))
    assert summary["reconstruction"]["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert summary["reconstruction"]["rows"] == len(unseen)


def test_fit_autoencoder_without_a_work_folder_leaves_nothing_behind(tmp_path, monkeypatch):
    rec, train = random_recommender(), random_histories(users=80)
    kept, summary = fit_autoencoder(rec, train, training=TRAINING, work=tmp_path / "kept")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    sae, same = fit_autoencoder(rec, train, training=TRAINING)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert equal(kept, sae)
    assert summary == same
