"""Attribution tables: by hand, against numpy on all users at once, and what must not matter."""

import json

import numpy as np
import pytest
import scipy.stats
import torch

from steerrec import attribution
from steerrec.activations import collect_user_vectors
from steerrec.attribution import AttributionTable, score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.profiles import Contrast, popularity_contrast, synthetic_users
from steerrec.separation import WITHIN
from steerrec.sites import Site

from .tiny import TinyRecommender, random_histories, random_recommender

CONTRAST = Contrast("made-up", np.array([0, 1]), np.array([2, 3]), "these", "those", {"kind": "x"})


def random_sae(d_in=4, d_sae=12, k=3):
    generator = torch.Generator().manual_seed(5)
    sae = SparseAutoencoder(d_in, d_sae, k, generator=generator).requires_grad_(False)
    sae.b_enc.copy_(0.3 * torch.randn(d_sae, generator=generator))
    return sae


def reading_sae(width, k=1):
    """One latent for each coordinate, which it reads as it is."""
    sae = SparseAutoencoder(width, width, k).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(width))
    return sae


def single_items(vectors):
    """A recommender whose user vector for a history of one item is that item's row."""
    vectors = torch.tensor(vectors)
    return TinyRecommender(vectors, vectors, [1] * len(vectors))


def score_single_items(monkeypatch, vectors, *, k=1):
    """The table of items 0 and 1 against 2 and 3, with one synthetic user for each item."""
    people = {0: [[0], [1]], 2: [[2], [3]]}
    monkeypatch.setattr(
        attribution,
        "synthetic_users",
        lambda train, group, **_: Histories.from_lists(people[group[0]]),
    )
    rec = single_items(vectors)
    return score_neurons(rec, reading_sae(len(vectors[0]), k), CONTRAST, random_histories(items=4))


def test_two_neurons_by_hand(monkeypatch):
    table = score_single_items(monkeypatch, [[1.0, 4.0], [3.0, 0.0], [0.0, 6.0], [-2.0, 12.0]])
    assert table["mean_a"].tolist() == [2.0, 2.0]
    assert table["mean_b"].tolist() == [-1.0, 9.0]
    assert table["std_a"].tolist() == [1.0, 2.0]  # ddof 0
    assert table["std_b"].tolist() == [1.0, 3.0]
    assert table["auroc"].tolist() == [1.0, 0.0]  # all of A above all of B, and below
    d = [3 / 1, -7 / 6.5**0.5]
    assert table["cohens_d"].tolist() == pytest.approx(d)
    # (n_a + n_b) / (n_a n_b) + d^2 / (2 (n_a + n_b)) with two users each
    assert table["cohens_d_se"].tolist() == pytest.approx([(1 + x**2 / 8) ** 0.5 for x in d])
    assert table["firing_rate_a"].tolist() == [0.5, 0.5]  # k = 1: the larger of the two fires
    assert table["firing_rate_b"].tolist() == [0.0, 1.0]
    assert table["zero_variance"].tolist() == [0.0, 0.0]
    assert table.provenance["n_a"] == table.provenance["n_b"] == 2


def test_a_selected_latent_that_is_not_positive_does_not_fire(monkeypatch):
    table = score_single_items(
        monkeypatch, [[1.0, -1.0], [-1.0, -2.0], [0.0, -1.0], [0.0, 1.0]], k=2
    )
    assert table["firing_rate_a"].tolist() == [0.5, 0.0]
    assert table["firing_rate_b"].tolist() == [0.0, 0.5]


def test_zero_variance_is_flagged_and_gives_d_zero(monkeypatch):
    rows = [[7.0, 1.0, 0.0, 2.0], [7.0, 1.0, 0.0, 2.0], [7.0, 5.0, 0.0, 3.0], [7.0, 5.0, 0.0, 5.0]]
    table = score_single_items(monkeypatch, rows)
    # constant everywhere; constant in each group; zero; constant in one group only
    assert table["zero_variance"].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert table["cohens_d"].tolist() == pytest.approx([0.0, 0.0, 0.0, -2 / 0.5**0.5])
    assert table["auroc"].tolist() == [0.5, 0.5, 0.5, 0.0]
    assert table.signed("auroc").tolist() == [0.0, 0.0, 0.0, -0.5]
    assert all(bool(column.isfinite().all()) for column in table.columns.values())


def test_a_constant_with_rounding_noise_has_no_variance():
    """The mean of several 0.1 is not always 0.1."""
    vectors = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    vectors[:, 0] = 0.1
    rec = TinyRecommender(vectors, vectors, list(range(20, 0, -1)), max_length=50)
    train = random_histories(longest=60)
    assert len(collect_user_vectors(rec, train)[:, 0].unique()) > 1
    contrast = popularity_contrast(rec.catalogue)
    table = score_neurons(rec, reading_sae(2), contrast, train, users=200)
    assert table["zero_variance"].tolist() == [1.0, 0.0]
    assert table["cohens_d"][0] == 0.0
    assert table["cohens_d"][1] != 0.0


def test_agrees_with_numpy_on_all_synthetic_users_at_once():
    rec, sae, train = random_recommender(), random_sae(), random_histories()
    contrast = popularity_contrast(rec.catalogue)
    table = score_neurons(rec, sae, contrast, train, users=300, seed=3, batch_size=32)
    z, firing = [], []
    for group in (contrast.group_a, contrast.group_b):
        people = synthetic_users(train, group, n=300, max_length=rec.max_length, seed=3)
        embedding = rec.model.item_embedding.weight[1:].double().numpy()
        vectors = np.stack([embedding[items].mean(axis=0) for items in people])
        weights = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
        pre_acts = (vectors - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        kth = np.sort(pre_acts, axis=1)[:, [-sae.k]]
        z.append(pre_acts)
        firing.append(((pre_acts >= kth) & (pre_acts > 0)).mean(axis=0))
    a, b = z
    d = (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt((a.var(axis=0) + b.var(axis=0)) / 2)
    expected = {
        "cohens_d": d,
        "cohens_d_se": np.sqrt(600 / 90_000 + d**2 / 1200),
        "mean_a": a.mean(axis=0),
        "mean_b": b.mean(axis=0),
        "std_a": a.std(axis=0),
        "std_b": b.std(axis=0),
        "firing_rate_a": firing[0],
        "firing_rate_b": firing[1],
        "zero_variance": np.zeros(12),
    }
    labels = np.r_[np.ones(300), np.zeros(300)]
    both = np.concatenate([a, b])
    pearson = [scipy.stats.pearsonr(both[:, j], labels) for j in range(12)]
    intervals = [found.confidence_interval(0.95) for found in pearson]
    ranked = scipy.stats.mannwhitneyu(a, b).statistic
    expected |= {
        "point_biserial": np.array([found.statistic for found in pearson]),
        "point_biserial_low": np.array([interval.low for interval in intervals]),
        "point_biserial_high": np.array([interval.high for interval in intervals]),
        "auroc": ranked / 90_000,
    }
    assert set(table.columns) == {*expected, "auroc_se"}
    assert 0.005 < table["auroc_se"].max() < 0.03
    for name, values in expected.items():
        assert table[name].dtype == torch.float32
        within = WITHIN if name == "auroc" else 1e-6
        np.testing.assert_allclose(table[name].numpy(), values, 1e-4, within, err_msg=name)
    assert 0 < firing[0].mean() < 1


def score(rec, **options):
    contrast = popularity_contrast(rec.catalogue)
    return score_neurons(rec, random_sae(), contrast, random_histories(), users=100, **options)


def test_one_seed_gives_one_table():
    one, again, other = (score(random_recommender(), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one.columns)
    assert not torch.equal(one["cohens_d"], other["cohens_d"])
    assert one.provenance == again.provenance


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_does_not_matter(batch_size):
    one = score(random_recommender())
    other = score(random_recommender(), batch_size=batch_size)
    for name in one.columns:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5, msg=name)


def test_another_site_than_the_recommended_one_can_be_scored():
    rec = random_recommender()
    last_item = Site("item_embedding", positions_from="last")
    one, other = score(rec), score(rec, site=last_item)
    assert not torch.equal(one["mean_a"], other["mean_a"])


def test_the_table_says_what_it_was_made_of():
    rec = random_recommender(max_length=5)
    table = score(rec, seed=4)
    assert len(table) == 12
    assert table.name == "popularity"
    assert table.contrast == popularity_contrast(rec.catalogue).describe()
    assert table.provenance == {
        "n_a": 100,
        "n_b": 100,
        "seed": 4,
        "max_length": 5,
        "synthetic_users": 100,
    }
    assert json.loads(json.dumps(table.provenance)) == table.provenance


def test_strongest_neurons_come_by_absolute_value_equals_by_number():
    columns = {
        "cohens_d": torch.tensor([0.5, -2.0, 0.0, 2.0, 1.0]),
        "mean_a": torch.tensor([9.0, 0.0, 0.0, 1.0, -10.0]),
    }
    table = AttributionTable(columns, {"name": "made-up"})
    assert table.strongest(3).tolist() == [1, 3, 4]
    assert table.strongest(2, by="mean_a").tolist() == [4, 0]
    assert table.strongest(99).tolist() == [1, 3, 4, 0, 2]


def test_users_are_the_same_in_any_batches():
    rec, sae, train = random_recommender(), random_sae(), random_histories()
    contrast = popularity_contrast(rec.catalogue)
    one, other = (
        score_neurons(rec, sae, contrast, train, users=300, batch_size=size) for size in (300, 7)
    )
    for name in one.columns:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4, msg=name)


def test_ranks_are_those_of_a_sample_of_many_users(monkeypatch):
    whole = score(random_recommender())
    monkeypatch.setattr(attribution, "RANKED_USERS", 60)
    sample = score(random_recommender())
    assert torch.equal(sample["cohens_d"], whole["cohens_d"])
    assert not torch.equal(sample["auroc"], whole["auroc"])
    assert (sample["auroc"] - whole["auroc"]).abs().max() < 0.25
    assert sample["auroc_se"].mean() > whole["auroc_se"].mean()


def test_neurons_are_ranked_by_the_gradient_where_it_is_known():
    d, gradient = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([0.1, 0.2, -0.3])
    table = AttributionTable({"cohens_d": d, "grad_attribution": gradient}, {"name": "made-up"})
    assert table.ranking == "grad_attribution"
    assert table.strongest(3).tolist() == [2, 1, 0]
    assert table.strongest(3, by="cohens_d").tolist() == [0, 1, 2]
