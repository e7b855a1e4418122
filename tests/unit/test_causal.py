"""Neurons switched off one by one: against brute-force re-ranking of everybody."""

import numpy as np
import pytest
import torch

from steerrec.activations import collect_user_vectors
from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.causal import causal_effects
from steerrec.data import Histories
from steerrec.errors import ArtifactError, DataError
from steerrec.metrics import gini
from steerrec.operations import LatentSteering
from steerrec.recommender import ItemHead
from steerrec.sites import Site

from .small_models import random_sae
from .tiny import TinyRecommender, random_histories, random_recommender

VALUES = np.random.default_rng(0).normal(size=20)
INNER = Site("item_embedding", positions_from="last")


def brute_force(rec, sae, histories, neuron, *, site=None, k=5, mask_seen=False):
    """Metrics with a neuron less those without it, everybody ranked in full both times."""

    def lists():
        scores = rec.item_head.scores(collect_user_vectors(rec, histories))
        if mask_seen:
            for user, items in enumerate(histories):
                scores[user, items] = -torch.inf
        return [row.argsort(descending=True, stable=True)[:k].tolist() for row in scores]

    before = lists()
    with attach(rec, sae, site=site, steering=LatentSteering.ablate(sae, [neuron])):
        after = lists()
    worth = [[np.mean(VALUES[row]) for row in found] for found in (before, after)]
    lost = np.subtract(*worth)
    ginis = [
        gini(torch.bincount(torch.tensor(found).flatten(), minlength=20))
        for found in (before, after)
    ]
    return lost.mean(), lost.std() / len(lost) ** 0.5, ginis[0] - ginis[1]


@pytest.mark.parametrize("site", [None, INNER], ids=["scored", "inner"])
@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("chunk", [1, 50, 4096])
def test_agrees_with_ranking_everybody_again(site, mask_seen, chunk):
    rec, sae, people = random_recommender(), random_sae(4, 12, 3), random_histories()
    found = causal_effects(
        rec, sae, VALUES, people, site=site, k=5, mask_seen=mask_seen, chunk=chunk
    )
    for j in range(12):
        effect, error, unequal = brute_force(rec, sae, people, j, site=site, mask_seen=mask_seen)
        assert float(found.effect[j]) == pytest.approx(effect, abs=1e-9)
        assert float(found.standard_error[j]) == pytest.approx(error, abs=1e-9)
        assert float(found.gini[j]) == pytest.approx(unequal, abs=1e-12)
    assert found.effect.abs().max() > 0.01
    assert found.measured.all()
    latents = sae.encode(collect_user_vectors(rec, people, site)).dense(12)
    assert found.active.tolist() == pytest.approx((latents > 0).double().mean(dim=0).tolist())


def test_by_hand():
    """Without neuron 0 one of two users has item 1, of value 1, and not item 0, of value 4."""
    vectors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.1]])
    rec = TinyRecommender(vectors, vectors, [3, 2, 1])
    sae = SparseAutoencoder(2, 2, 1).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(2))
    sae.W_dec.copy_(torch.eye(2))
    # user 0 is (2, 0): without neuron 0 all scores are 0, and of equals the lowest row is taken
    # user 1 is (.5, .1): scores 1, .1, .26; without neuron 0 (0, .1): 0, .1, .01
    people = Histories.from_lists([[0], [2]])
    found = causal_effects(rec, sae, np.array([4.0, 1.0, 0.0]), people, k=1)
    assert found.effect.tolist() == [1.5, 0.0]  # user 1: 4 - 1; user 0: 4 - 4
    assert found.standard_error.tolist() == pytest.approx([1.5 / 2**0.5, 0.0])
    assert found.active.tolist() == [1.0, 0.0]


def test_only_the_neurons_asked_for():
    rec, sae, people = random_recommender(), random_sae(4, 12, 3), random_histories()
    every = causal_effects(rec, sae, VALUES, people, k=5)
    some = causal_effects(rec, sae, VALUES, people, k=5, neurons=torch.tensor([7, 2]))
    assert some.measured.nonzero().flatten().tolist() == [2, 7]
    for name in ("effect", "standard_error", "gini", "active"):
        found = getattr(some, name)
        assert torch.equal(found[some.measured], getattr(every, name)[some.measured])
        assert not found[~some.measured].any()
    with pytest.raises(ArtifactError, match="neurons 3 to 12 asked for; this SAE has 0 to 11"):
        causal_effects(rec, sae, VALUES, people, neurons=torch.tensor([12, 3]))


def test_no_users_is_an_error():
    with pytest.raises(DataError, match="no users"):
        causal_effects(random_recommender(), random_sae(4), VALUES, Histories.from_lists([]))


def test_a_neuron_of_a_constant_value_has_no_effect():
    rec, sae, people = random_recommender(), random_sae(4, 12, 3), random_histories()
    found = causal_effects(rec, sae, np.full(20, 2.5), people, k=5)
    assert found.effect.abs().max() < 1e-12
    assert found.gini.abs().max() > 0


def test_a_head_that_normalises():
    class Cosine(TinyRecommender):
        @property
        def item_head(self):
            return ItemHead(self.model.item_matrix, scale=5.0, normalize=True)

    embedding, matrix = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    rec = Cosine(embedding, matrix, list(range(20, 0, -1)))
    sae, people = random_sae(4, 12, 3), random_histories()
    found = causal_effects(rec, sae, VALUES, people, k=5)
    for j in (0, 5, 11):
        assert float(found.effect[j]) == pytest.approx(brute_force(rec, sae, people, j)[0])
