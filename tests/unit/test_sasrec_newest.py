"""The reference SASRec with its last layer run for the newest item alone: the same scores."""

import pytest
import torch
import torch.nn.functional as F

from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.conformance import check_conformance
from steerrec.data import Histories
from steerrec.errors import SiteError
from steerrec.recommender import user_vectors
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering

from .toy_models import tiny_sasrec

LISTS = [[2, 0, 3, 0, 4, 8], [1, 6, 0], [7], []]
SETTINGS = [
    {},
    {"num_attention_heads": 4, "embedding_norm": True, "num_hidden_layers": 1},
    {"final_norm": True, "positions_from_end": True, "max_position_embeddings": 7},
    {"zero_padding": True},
    {"padding_side": "left", "zero_padding": True, "max_position_embeddings": 8},
    {"padding_side": "left", "max_position_embeddings": 8},
]


def recommender(norm_first=True, **settings):
    return tiny_sasrec(norm_first=norm_first, **settings)


@pytest.mark.parametrize("norm_first", [True, False, "queries"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_scores_are_the_same(norm_first, settings):
    rec = recommender(norm_first, **settings)
    rec.model.double()
    batch = rec.make_batch(Histories.from_lists(LISTS))
    full = rec.score(batch)
    rec.model.newest_only = True
    torch.testing.assert_close(rec.score(batch), full)


def test_the_last_layer_sees_one_row_of_each_history():
    rec = recommender()
    rec.model.newest_only = True
    shapes = []
    layer = rec.model.layers[-1].feed_forward
    layer.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    rec.score(rec.make_batch(Histories.from_lists(LISTS)))
    assert shapes == [(len(LISTS), 1, rec.item_head.width)]


@pytest.mark.parametrize("lists", [LISTS, LISTS[:1], LISTS[2:3], LISTS[3:]])
def test_user_vectors_are_read_and_steered_as_ever(lists):
    rec = recommender()
    histories = Histories.from_lists(lists)
    batch = rec.make_batch(histories)
    sae = SparseAutoencoder(rec.item_head.width, 32, 4)
    steering = Steering(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    vectors = user_vectors(rec, histories)
    with attach(rec, sae, steering=steering):
        steered = rec.score(batch)
    rec.model.newest_only = True
    check_conformance(rec)
    torch.testing.assert_close(user_vectors(rec, histories), vectors)
    with attach(rec, sae) as attachment:
        bare = rec.score(batch)
        attachment.steering = steering
        torch.testing.assert_close(rec.score(batch), steered)
    assert torch.equal(rec.score(batch), bare)


def test_an_earlier_layer_is_as_it_was():
    rec = recommender()
    site = Site("layers.0", positions_from=TokenIds("item_embedding"))
    histories = Histories.from_lists(LISTS)
    before = user_vectors(rec, histories, site)
    rec.model.newest_only = True
    assert torch.equal(user_vectors(rec, histories, site), before)


def test_all_real_positions_of_the_last_layer_are_not_to_be_had():
    rec = recommender()
    rec.model.newest_only = True
    site = Site("layers.1", positions="real", positions_from=TokenIds("item_embedding"))
    sae = SparseAutoencoder(rec.item_head.width, 32, 4)
    with pytest.raises(SiteError, match="expected the same batch"):
        attach(rec, sae, site=site)


def test_training_is_of_all_positions():
    model = recommender().model
    model.newest_only = True
    ids = F.pad(torch.tensor([[3, 1, 4]]), (0, 1))
    assert model(ids).last_hidden_state.shape[1] == 4
