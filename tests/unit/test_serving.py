"""Retrieval vectors reproduce a model's scores; what cannot be served on vectors is refused."""

import pytest
import torch
import torch.nn.functional as F

from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import SiteError
from steerrec.recommender import ItemHead
from steerrec.serving import (
    Querying,
    QueryTransform,
    querying_of_record,
    require_scored,
    retrieval_vectors,
    scoring_record,
)
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering, SteerTransform

from .tiny import random_recommender


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEADS = {
    "dot": ItemHead(randn(20, 4)),
    "scale": ItemHead(randn(20, 4), scale=2.5),
    "bias": ItemHead(randn(20, 4), bias=randn(20, seed=1)),
    "cosine": ItemHead(randn(20, 4), normalize=True, scale=10.0),
    "cosine and bias": ItemHead(randn(20, 4), bias=randn(20, seed=1), normalize=True, scale=0.5),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_inner_products_are_the_scores_of_the_head(head):
    vectors, users = retrieval_vectors(head), randn(7, 4, seed=2)
    queries = vectors.queries(users)
    assert queries.shape == (7, vectors.width)
    torch.testing.assert_close(queries @ vectors.items.T, head.scores(users))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_steered_queries_rank_as_the_steered_model(head):
    sae = SparseAutoencoder(4, 12, 3)
    transform = SteerTransform(sae, Steering(randn(12, seed=3)))
    vectors, users = retrieval_vectors(head), randn(7, 4, seed=2)
    queries = QueryTransform(transform, vectors.queries)(users, 0.7)
    torch.testing.assert_close(queries @ vectors.items.T, head.scores(transform(users, 0.7)))


def test_a_bias_is_one_more_dimension():
    vectors = retrieval_vectors(ItemHead(torch.eye(2), bias=torch.tensor([3.0, 4.0])))
    assert vectors.items.tolist() == [[1, 0, 3], [0, 1, 4]]
    assert vectors.queries(torch.tensor([[5.0, 6.0]])).tolist() == [[5, 6, 1]]


def test_cosine_is_normalised_after_steering():
    found = Querying(normalize=True)(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(found, F.normalize(torch.tensor([[3.0, 4.0]])))
    assert "unit length" in Querying(normalize=True).reason
    assert "bias" in Querying(constant=True).reason
    assert "inner product" in Querying().reason


def test_the_record_of_a_model_says_how_it_is_asked():
    rec = random_recommender()
    record = scoring_record(rec)
    assert Site.from_dict(record["site"]) == rec.site
    assert querying_of_record(record) == Querying.of(rec.item_head) == Querying()
    assert querying_of_record({"normalize": True, "bias": True}) == Querying(True, True)


def test_a_site_below_the_scored_one_is_refused():
    rec = random_recommender()
    inside = Site("item_embedding", positions_from=TokenIds("item_embedding"))
    require_scored(rec.site, rec.site)
    for scored in (rec.site, rec.site.to_dict()):
        with pytest.raises(SiteError, match=r"item_embedding.*scores from the vector at 'mean'"):
            require_scored(inside, scored)
