"""Training of topk, batchtopk and jumprelu: gradients, targets, resume, warm start."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from steerrec import sae_rules
from steerrec.activations import ActivationShards
from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import TrainingError
from steerrec.sae_rules import rule_of
from steerrec.sae_steps import by_torch, step
from steerrec.thresholds import largest_so_far
from steerrec.training import SAETraining, reconstruction_report, train_autoencoder

from .test_sae_training import equal, sparse_rows, write_shards

D, F, K = 12, 64, 5
ALL = ("topk", "batchtopk", "jumprelu")
TRAINING = SAETraining(
    latents=32, k=3, epochs=12, batch_size=64, learning_rate=1e-2, aux_k=8, dead_after=256
)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", rows=sparse_rows(n=1024)[0])


def case(architecture, dead):
    generator = torch.Generator().manual_seed(3)
    sae = SparseAutoencoder(D, F, K, generator=generator)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1, generator=generator)
        sae.b_dec.normal_(std=0.3, generator=generator)
        sae.b_enc[dead] -= 50
    x = 2 * torch.randn(40, D, generator=generator)
    cpu = torch.device("cpu")
    rule = rule_of(architecture, K, F, bandwidth=0.3, weight=0.5, device=cpu)
    rule.begin(sae.pre_acts(x).detach())
    for parameter in rule.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(F, generator=generator))
    return sae, rule, x


@pytest.mark.parametrize("dead", [[], [3, 9, 20]])
@pytest.mark.parametrize("architecture", ALL)
def test_the_loops_make_the_gradients_that_torch_makes(architecture, dead):
    sae, rule, x = case(architecture, dead)
    found = step(sae, rule, x, torch.tensor(dead, dtype=torch.int64), aux_k=2, aux_weight=0.3)
    parameters = [*sae.parameters(), *rule.parameters()]
    ours = [parameter.grad.clone() for parameter in parameters]
    with torch.no_grad():
        entries = rule.entries(sae.pre_acts(x))
    dead_ones = torch.tensor(dead, dtype=torch.int64)
    fvu = by_torch(sae, rule, x, entries, dead_ones, 2, 0.3)
    torch.testing.assert_close(found.fvu, fvu)
    for parameter, gradient in zip(parameters, ours, strict=True):
        assert bool(gradient.any())
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ALL)
def test_without_loops_torch_finds_the_same_entries(architecture, monkeypatch):
    sae, rule, x = case(architecture, [])
    z = sae.pre_acts(x).detach()
    ours = rule.entries(z)
    ours = type(ours)(*(tensor.clone() for tensor in ours))
    monkeypatch.setattr(sae_rules, "jump_kernels", lambda: None)
    monkeypatch.setattr("steerrec.selection.kernels", lambda: None)
    theirs = rule.entries(z)

    def dense(found):
        rows = torch.repeat_interleave(torch.arange(len(x)), found.offsets.diff())
        return torch.zeros_like(z).index_put((rows, found.columns), found.values)

    assert torch.equal(dense(ours), dense(theirs))
    assert torch.equal(ours.offsets, theirs.offsets)


def test_batchtopk_takes_the_largest_of_the_whole_batch():
    _, rule, _ = case("batchtopk", [])
    for seed in range(4):  # the bound of one batch is too high, or too low, for the next
        z = torch.randn(30, F, generator=torch.Generator().manual_seed(seed)) * 4 ** (seed % 2)
        found = rule.entries(z)
        expected = z.relu().flatten().topk(K * 30).values.sort().values
        assert torch.equal(found.values.sort().values, expected)
    assert len(set(found.offsets.diff().tolist())) > 1  # rows have different numbers


def test_thresholds_move_together_towards_k_and_those_of_dead_latents_fall():
    _, rule, _ = case("jumprelu", [])
    before = rule.log_threshold.detach().clone()
    rule.after_step(torch.tensor([2]), active=1.5 * K)
    moved = torch.full((F,), 0.05 * 0.5)
    moved[2] -= 0.01
    torch.testing.assert_close(rule.log_threshold - before, moved)
    rule.after_step(torch.tensor([], dtype=torch.int64), active=1.5 * K)
    rule.after_step(torch.tensor([], dtype=torch.int64), active=0.0)  # too few: down again
    rule.after_step(torch.tensor([2]), active=9.0 * K)  # no further than by a twentieth
    moved += 0.05 * (0.5 - 1 + 1)
    moved[2] -= 0.01
    torch.testing.assert_close(rule.log_threshold - before, moved)


def test_the_largest_of_chunks_are_the_largest_of_all():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    found = None
    for part in values.split(70):
        found = largest_so_far(part, 60, found)
    assert torch.equal(found, values.sort().values[-60:])
    assert len(largest_so_far(values, 10_000)) == int((values > 0).sum())


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_trained_to_the_number_of_latents_asked_for(tmp_path, shards, architecture):
    training = replace(TRAINING, architecture=architecture, epochs=30)
    sae, summary = train_autoencoder(shards, training, work=tmp_path)
    report = reconstruction_report(sae, shards, ActivationShards(shards.folder))
    assert sae.architecture == "jumprelu"
    assert summary["training"]["architecture"] == architecture
    assert report["l0"] == pytest.approx(3, abs=0.1 if architecture == "batchtopk" else 0.15)
    assert report["fvu"] < 0.5 * summary["log"][0]["fvu"]
    assert not sae.threshold.requires_grad
    if architecture == "batchtopk":
        assert len(sae.threshold.unique()) == 1


@pytest.mark.parametrize("architecture", ALL)
def test_same_seed_same_weights_and_resumed_ones_too(tmp_path, shards, architecture):
    training = replace(TRAINING, architecture=architecture, epochs=3)
    whole = train_autoencoder(shards, training, work=tmp_path / "whole")[0]

    class Stop(Exception):
        pass

    from steerrec import training as module

    class Interrupted(module._Run):
        def save(self):
            super().save()
            if self.epoch == 2:
                raise Stop

    original = module._Run
    module._Run = Interrupted
    try:
        with pytest.raises(Stop):
            train_autoencoder(shards, training, work=tmp_path / "parts")
    finally:
        module._Run = original
    assert equal(train_autoencoder(shards, training, work=tmp_path / "parts")[0], whole)


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_a_warm_start_goes_on_from_what_was_learned(tmp_path, shards, architecture):
    training = replace(TRAINING, architecture=architecture, epochs=20)
    sae, summary = train_autoencoder(shards, training, work=tmp_path / "first")
    again = SAETraining.going_on(sae)
    assert (again.architecture, again.k) == ("jumprelu", 3)
    again = replace(again, batch_size=64, epochs=1, learning_rate=1e-4, dead_after=256)
    warm, more = train_autoencoder(shards, again, work=tmp_path / "second", warm_start=sae)
    assert more["log"][0]["fvu"] < 1.3 * summary["log"][-1]["fvu"]
    report = reconstruction_report(warm, shards, ActivationShards(shards.folder))
    assert report["l0"] == pytest.approx(3, abs=1.2)


def test_a_warm_start_of_an_sae_that_does_not_say_its_k_asks_for_it():
    sae = SparseAutoencoder(4, 8, 2, architecture="jumprelu")
    sae = SparseAutoencoder.from_weights(sae.state_dict(), None)
    with pytest.raises(TrainingError, match="how many latents are active on average; give k"):
        SAETraining.going_on(sae)
    assert SAETraining.going_on(sae, k=2).k == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "expected one of topk, batchtopk, jumprelu"),
        ({"bandwidth": 0.0}, "a bandwidth between 0 and 2"),
        ({"sparsity_weight": 0.0}, "a positive weight"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(TrainingError, match=message):
        replace(TRAINING, **changes)


def test_weights_that_are_not_finite_end_the_run(tmp_path, shards):
    training = replace(TRAINING, architecture="batchtopk", epochs=1)
    from steerrec import training as module

    run = module._Run(shards, training, tmp_path, torch.device("cpu"))
    with torch.no_grad():
        run.sae.W_enc.fill_(np.nan)
    with pytest.raises(TrainingError, match="loss became nan"):
        run.train_epoch()
