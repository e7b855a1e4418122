"""Ablations: each variant changes one thing, and is measured as a sweep would measure it."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from steerrec import ablations
from steerrec.ablations import ablate, blocks, reaching
from steerrec.activations import ActivationSampling
from steerrec.adapters.sasrec import SASRecConfig, SASRecModel, SASRecRecommender
from steerrec.attribution import score_groups, score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.choosing import choose, hypervolume
from steerrec.data import Histories, leave_one_out
from steerrec.errors import MethodError, SiteError
from steerrec.evaluation import capture_held_out, measure
from steerrec.profiles import popularity_contrast, synthetic_users, users_by_taste
from steerrec.report import plot_ablations
from steerrec.steering import Steering
from steerrec.tradeoff import sweep
from steerrec.training import SAETraining

from .tiny import catalogue, random_histories, random_recommender

ITEMS, WIDTH, LATENTS, K = 60, 6, 24, 4
QUICK = {
    "k": 5,
    "users": 60,
    "training": SAETraining(epochs=2, batch_size=64),
    "sampling": ActivationSampling(rows=200),
}


@pytest.fixture(scope="module")
def rec():
    return random_recommender(items=ITEMS, width=WIDTH)


@pytest.fixture(scope="module")
def split():
    return leave_one_out(random_histories(300, ITEMS, shortest=3), num_items=ITEMS)


@pytest.fixture(scope="module")
def sae():
    generator = torch.Generator().manual_seed(1)
    return SparseAutoencoder(WIDTH, LATENTS, K, generator=generator).requires_grad_(False)


def rows(found, study):
    return {row.label: row for row in found.rows if row.study == study}


@pytest.fixture(scope="module")
def found(rec, split, sae):
    return ablate(rec, split, sae, studies=("neurons", "splice", "contrast", "controls"), **QUICK)


def test_the_unvaried_one_is_a_sweep_of_the_rule(rec, split, sae, found):
    table = score_neurons(rec, sae, popularity_contrast(rec.catalogue), split.train, users=60)
    usual = found.rows[0]
    swept = sweep(rec, sae, Steering.popsteer(table), split, alphas=usual.alphas, k=5)
    assert usual.valid == [point.valid.metrics for point in swept.points]
    assert usual.test == [point.test.metrics for point in swept.points]
    for budget in (0.01, 0.05, 0.1):
        assert usual.at(budget) == usual.test[choose(usual.valid, budget)]
    assert usual.hypervolume["ltc"] == hypervolume(usual.valid, usual.test, "ltc")


def test_what_changes_nothing_gives_the_same(found):
    usual = found.rows[0]
    for study, label in (
        ("neurons", f"all {LATENTS}"),
        ("splice", "delta"),
        ("contrast", "synthetic users"),
    ):
        same = rows(found, study)[label]
        assert (same.alphas, same.valid, same.test) == (usual.alphas, usual.valid, usual.test)


def test_what_changes_something_does_not(found):
    usual = found.rows[0]
    for study, label in (
        ("neurons", "1"),
        ("splice", "reconstruct"),
        ("contrast", "real users, by taste"),
        ("controls", "neurons shuffled, seed 0"),
        ("controls", "random directions, seed 1"),
        ("controls", "untrained SAE"),
    ):
        assert rows(found, study)[label].test != usual.test, label


def test_all_methods_begin_with_the_unsteered_model(found):
    for row in found.rows:
        assert row.alphas[0] == 0
        assert row.test[0] == found.rows[0].test[0]
        assert len(row.alphas) == len(row.valid) == len(row.test) == ablations.SETTINGS + 1


def test_controls_keep_the_sizes_of_the_shifts(rec, split, sae):
    bench = ablations._Bench(
        rec, split, sae, rec.site, SAETraining(), ActivationSampling(), 60, 0, None, "cpu"
    )
    usual = bench.rule(sae).shift
    assert torch.equal(bench.signs(3).shift.abs(), usual.abs())
    assert not torch.equal(bench.signs(3).shift, usual)
    assert torch.equal(bench.shuffled(3).shift.sort().values, usual.sort().values)
    assert not torch.equal(bench.shuffled(3).shift, usual)


def test_trained_variants_differ_in_what_is_varied(rec, split, sae):
    found = ablate(rec, split, sae, studies=("k", "latents", "fvu", "seeds"), **QUICK)
    assert list(rows(found, "k")) == ["4", "8", "16"]
    assert list(rows(found, "latents")) == ["24", "48", "96", "192", "768"]
    assert list(rows(found, "fvu")) == ["1 epochs", "2 epochs"]
    assert list(rows(found, "seeds")) == [
        *("SAE 0", "SAE 1", "SAE 2"),
        *("synthetic users 1", "synthetic users 2"),
    ]
    l0 = {label: row.facts["l0"] for label, row in rows(found, "k").items()}
    assert l0["4"] < l0["8"]
    as_they_are = (("k", "4"), ("latents", "24"), ("seeds", "SAE 0"))
    same = [rows(found, study)[label] for study, label in as_they_are]
    assert len({row.facts["fvu"] for row in same}) == 1
    assert len({row.facts["fvu"] for row in rows(found, "seeds").values() if row.facts}) == 3


def test_sites_are_the_blocks_of_the_model_at_one_position_or_all():
    config = SASRecConfig(
        num_items=ITEMS, hidden_size=8, num_hidden_layers=2, max_position_embeddings=6
    )
    torch.manual_seed(0)
    model = SASRecModel(config).eval().requires_grad_(False)
    histories = random_histories(80, ITEMS, shortest=3)
    split = leave_one_out(histories, num_items=ITEMS)
    rec = SASRecRecommender(model, catalogue(split.counts.tolist()))
    paths = blocks(rec)
    assert len(paths) == 2
    sae = SparseAutoencoder(8, LATENTS, K).requires_grad_(False)
    found = ablate(rec, split, sae, studies=("site",), **QUICK)
    expected = [
        f"{path}, {where}" for path in paths for where in ("the user's position", "every position")
    ]
    expected.append(f"{rec.site.path}, the user's position")  # nothing reads its others
    assert list(rows(found, "site")) == expected
    deep = rows(found, "site")[f"{paths[0]}, every position"]
    assert deep.test != rows(found, "site")[f"{paths[0]}, the user's position"].test
    only = ablate(rec, split, sae, studies=("site",), layers=[paths[1]], **QUICK)
    assert len(rows(only, "site")) == 3


def test_an_sae_that_does_not_say_how_many_are_active(rec, split):
    """An imported jumprelu is varied with the k of the training that was asked for."""
    generator = torch.Generator().manual_seed(1)
    sae = SparseAutoencoder(WIDTH, LATENTS, K, architecture="jumprelu", generator=generator)
    weights = {name: value.detach() for name, value in sae.state_dict().items()}
    imported = SparseAutoencoder.from_weights(weights, None)
    assert imported.k is None
    training = SAETraining(epochs=1, batch_size=64, k=K)
    options = {**QUICK, "training": training}
    found = ablate(rec, split, imported, studies=("k", "controls"), **options)
    assert f"{K}" in rows(found, "k")
    assert found.protocol["training"]["k"] == K
    assert found.protocol["training"]["architecture"] == "jumprelu"
    assert "untrained SAE" in rows(found, "controls")


def test_a_sample_of_the_users_is_the_same_for_all_variants(rec, split, sae):
    found = ablate(rec, split, sae, studies=("splice",), max_users=50, **QUICK)
    assert found.protocol["users"] == 50
    users = capture_held_out(rec, split, "test", max_users=50, seed=0)
    unsteered = measure(rec, users, k=5).metrics
    for row in found.rows:
        assert row.test[0] == pytest.approx(unsteered, nan_ok=True)


def test_a_model_without_blocks_is_told_of(rec, split, sae):
    with pytest.raises(SiteError, match="no list of blocks; name the layers"):
        ablate(rec, split, sae, studies=("site",), **QUICK)


def test_an_unknown_study(rec, split, sae):
    with pytest.raises(MethodError, match="no study 'neuron'; there are neurons, k, latents"):
        ablate(rec, split, sae, studies=("neuron",), **QUICK)


def test_what_is_done_is_not_done_again(rec, split, sae, tmp_path, monkeypatch):
    measured = []
    own = ablations._measure
    monkeypatch.setattr(
        ablations, "_measure", lambda *a, **o: measured.append(a[1].label) or own(*a, **o)
    )
    first = ablate(rec, split, sae, studies=("splice",), folder=tmp_path, **QUICK)
    assert len(measured) == 4
    again = ablate(rec, split, sae, studies=("splice",), folder=tmp_path, **QUICK)
    assert len(measured) == 4
    assert again.to_dict() == first.to_dict()
    (tmp_path / "variants" / next(iter((tmp_path / "variants").iterdir())).name).write_text("{")
    ablate(rec, split, sae, studies=("splice",), folder=tmp_path, **QUICK)
    assert len(measured) == 5
    other = SparseAutoencoder(WIDTH, LATENTS, K, generator=torch.Generator().manual_seed(7))
    ablate(rec, split, other.requires_grad_(False), studies=("splice",), folder=tmp_path, **QUICK)
    assert len(measured) == 9


def test_everything_is_json_and_can_be_drawn(found, tmp_path):
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["protocol"]["k"] == 5
    assert document["rows"][0]["chosen"]["5%"] == ablations.plain(found.rows[0].at(0.05))
    plot_ablations(found, tmp_path / "a.png", title="Parts")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- the strength that goes far enough


@pytest.mark.parametrize("wanted", [0.02, 0.3, 1.0, 7.3, 900.0])
def test_a_strength_that_loses_about_so_much(wanted):
    alpha = reaching(lambda a: min(1.0, 0.12 * a / wanted), 0.12)
    assert wanted <= alpha <= 1.5 * wanted


def test_where_nothing_is_ever_lost_the_search_ends():
    assert reaching(lambda a: 0.0, 0.12) == ablations.STRONGEST


def test_where_all_is_lost_at_once_the_search_ends():
    assert 0 < reaching(lambda a: 1.0, 0.12) <= ablations.WEAKEST


# --- real users


def lists(histories):
    return [histories.items[a:b].tolist() for a, b in pairwise(histories.offsets)]


def test_users_by_taste_by_hand():
    items = catalogue([100, 50, 10, 1])
    train = Histories.from_lists([[0, 0], [3], [1, 2], [], [0, 3], [2, 3]])
    popular, rare = users_by_taste(train, items, max_length=5, share=0.4)
    mean = [math.log(101), math.log(2), math.log(51 * 11) / 2, math.log(202) / 2, math.log(22) / 2]
    assert sorted(mean, reverse=True)[:2] == [mean[0], mean[2]]
    assert lists(popular) == [[0, 0], [1, 2]]
    assert lists(rare) == [[3], [2, 3]]


def test_users_by_taste_read_no_more_than_the_model_does():
    train = Histories.from_lists([[0] * 9, [1] * 9])
    for people in users_by_taste(train, catalogue([5, 3]), max_length=4, share=0.5):
        assert people.lengths.tolist() == [4]


def test_a_table_of_given_users_is_that_of_the_synthetic_ones_if_they_are_those(rec, sae, split):
    contrast = popularity_contrast(rec.catalogue)
    people = [
        synthetic_users(split.train, group, n=50, max_length=rec.max_length, seed=3)
        for group in (contrast.group_a, contrast.group_b)
    ]
    given = score_groups(rec, sae, *people, contrast=contrast.describe())
    drawn = score_neurons(rec, sae, contrast, split.train, users=50, seed=3)
    assert all(torch.equal(given[name], drawn[name]) for name in drawn.columns)
    assert np.isclose(given.provenance["n_a"], 50)
