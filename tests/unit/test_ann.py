"""Recall against exact lists, counted by hand; and with a real index, steered and not."""

import math

import numpy as np
import pytest
import torch

from steerrec.ann import ann_recall, faiss_index
from steerrec.errors import DataError, ModelError
from steerrec.serving import retrieval_vectors

from .tiny import random_recommender


@pytest.fixture
def rec():
    return random_recommender(items=20, width=4)


@pytest.fixture
def users():
    return torch.randn(30, 4, generator=torch.Generator().manual_seed(1))


def exact_search(rec):
    items = retrieval_vectors(rec).items.numpy()

    def search(queries, k):
        return np.argsort(-(queries @ items.T), axis=1, kind="stable")[:, :k]

    return search


def test_an_exact_index_finds_everything(rec, users):
    found = ann_recall(rec, exact_search(rec), users, k=5)
    assert found.recall == 1.0
    assert sum(found.slots.values()) == 30 * 5
    assert all(value == 1.0 or math.isnan(value) for value in found.by_group.values())


def test_an_index_without_the_tail_is_seen_in_the_tail_alone(rec, users):
    tail = np.flatnonzero(rec.catalogue.groups.labels == 2)
    exact = exact_search(rec)

    def search(queries, k):
        rows = exact(queries, k)
        return np.where(np.isin(rows, tail), -1, rows)

    found = ann_recall(rec, search, users, k=5)
    lists = exact(users.numpy(), 5)
    in_tail = int(np.isin(lists, tail).sum())
    assert found.slots["tail"] == in_tail > 0
    assert found.by_group["tail"] == 0.0
    assert found.by_group["head"] == found.by_group["mid"] == 1.0
    assert found.recall == pytest.approx(1 - in_tail / 150)


def test_steering_is_in_both_the_queries_and_the_exact_lists(rec, users):
    def turned(vectors):
        return -vectors

    assert ann_recall(rec, exact_search(rec), users, transform=turned).recall == 1.0
    wrong = exact_search(rec)
    found = ann_recall(rec, lambda queries, k: wrong(-queries, k), users, k=5, transform=turned)
    assert found.recall < 0.5


def test_chunks_change_nothing(rec, users):
    search = exact_search(rec)
    assert ann_recall(rec, search, users, chunk=7) == ann_recall(rec, search, users)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (np.zeros((30, 3), np.int64), "expected whole numbers"),
        (np.zeros((30, 5), np.float32), "expected whole numbers"),
        (np.full((30, 5), 20), "the catalogue has 0 to 19"),
    ],
)
def test_what_an_index_gives_is_checked(rec, users, found, message):
    with pytest.raises(ModelError, match=message):
        ann_recall(rec, lambda queries, k: found, users, k=5)


def test_nobody(rec):
    with pytest.raises(DataError, match="at least one user vector"):
        ann_recall(rec, exact_search(rec), torch.empty(0, 4))


def test_faiss():
    pytest.importorskip("faiss")
    rec = random_recommender(items=2000, width=8)
    users = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    vectors = retrieval_vectors(rec)
    flat = ann_recall(rec, faiss_index(vectors, factory="Flat"), users)
    few = ann_recall(rec, faiss_index(vectors, probes=1), users)
    many = ann_recall(rec, faiss_index(vectors, probes=1000), users)
    assert flat.recall == many.recall == 1.0
    assert few.recall < 0.9
    assert few.to_dict()["slots"] == flat.slots
    with pytest.raises(ModelError, match="cannot build 'nothing'"):
        faiss_index(vectors, factory="nothing")
