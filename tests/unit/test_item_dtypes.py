"""Item matrices in bfloat16 and int8: the rounding by hand, the lists, and the error told."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steerrec.errors import ModelError
from steerrec.evaluation import capture_users, measure, rank
from steerrec.item_dtypes import CompactItemHead, compact, item_dtype_error, with_item_dtype
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead

from .tiny import random_histories, random_recommender


def head_of(items=500, width=16, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(items, width, generator=generator)
    return ItemHead(weight * torch.rand(items, 1, generator=generator), **options)


def vectors_of(users=40, width=16):
    return torch.randn(users, width, generator=torch.Generator().manual_seed(9))


def test_int8_by_hand():
    """Steps of 2 / 127 and of 1; a row of zeros stays one."""
    head = ItemHead(torch.tensor([[2.0, -1.0], [127.0, 3.4], [0.0, 0.0]]))
    found = compact(head, "int8")
    assert isinstance(found, CompactItemHead)
    assert found.weight.dtype == torch.int8
    assert found.weight.tolist() == [[127, -64], [127, 3], [0, 0]]  # -63.5 goes to the even one
    expected = torch.tensor([[2.0 + 10 * (-64 * 2 / 127), 127.0 + 30, 0.0]])
    assert torch.allclose(found.scores(torch.tensor([[1.0, 10.0]])), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 3.0, "normalize": True},
        {"bias": torch.linspace(-1, 1, 500)},
    ],
)
def test_scores_are_those_of_the_rounded_items_whatever_the_chunks(dtype, options):
    head = head_of(**options)
    found = compact(head, dtype)
    rounded = head.weight.bfloat16().float()
    if dtype == "int8":
        step = head.weight.abs().amax(dim=1, keepdim=True) / 127
        rounded = (head.weight / step).round() * step
    vectors = vectors_of()
    expected = top_k(vectors, ItemHead(rounded, head.bias, head.scale, head.normalize), 10)
    lists = top_k(vectors, found, 10, item_chunk=37, user_chunk=7)
    assert torch.equal(lists.ids, expected.ids)
    assert torch.allclose(lists.scores, expected.scores, atol=1e-5)
    bound = {"bfloat16": 2**-8, "int8": 0.5 / 127}[dtype]  # of the largest entry, an entry
    assert float((rounded - head.weight).abs().max() / head.weight.abs().max()) <= bound


def test_int8_is_the_same_in_any_chunk():
    whole, parts = compact(head_of(), "int8"), compact(head_of(), "int8", chunk=7)
    assert torch.equal(whole.weight, parts.weight)
    assert torch.equal(whole.row_scale, parts.row_scale)


def test_half_precision_vectors_are_scored_in_single():
    found = compact(head_of(), "int8")
    half = top_k(vectors_of().half(), found, 5)
    assert torch.equal(half.ids, top_k(vectors_of().half().float(), found, 5).ids)


def test_the_error_is_that_of_the_lists():
    """One of two lists has changed places, the other one item."""
    head = ItemHead(torch.eye(4))
    other = ItemHead(torch.eye(4)[[1, 0, 2, 3]])
    vectors = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 4.0, 3.0, 2.0]])
    found = item_dtype_error(head, other, vectors, k=2)
    assert found["recall@2"] == pytest.approx((1 + 0.5) / 2)
    assert found["same_lists"] == 0.0
    assert found["score_error"] == pytest.approx(0.0)
    assert found["users"] == 2
    assert found["bytes"] == {"float32": 64, "other": 64}


def test_smaller_matrices_have_larger_errors_and_less_bytes():
    head, vectors = head_of(5000, 64), vectors_of(200, 64)
    errors = [item_dtype_error(head, compact(head, d), vectors) for d in ("bfloat16", "int8")]
    recalls = [error["recall@10"] for error in errors]
    assert all(0.9 < recall < 1 for recall in recalls)
    assert [error["bytes"]["other"] for error in errors] == [2 * 5000 * 64, (64 + 4) * 5000]
    assert all(0 < error["relative_score_error"] < 0.02 for error in errors)


def test_a_recommender_that_ranks_in_int8_says_so_and_is_itself_otherwise():
    rec = random_recommender(items=50, width=8)
    other = with_item_dtype(rec, "int8")
    assert with_item_dtype(rec, "float32") is rec
    assert other.catalogue is rec.catalogue
    users = capture_users(rec, random_histories(items=50))
    assert measure(other, users, k=5).protocol["item_dtype"] == "int8"
    assert "item_dtype" not in measure(rec, users, k=5).protocol
    shared = np.isin(rank(other, users, k=5).ids.numpy(), rank(rec, users, k=5).ids.numpy())
    assert shared.mean() > 0.9


def test_what_cannot_be_held():
    with pytest.raises(ModelError, match="expected float32, bfloat16, int8"):
        compact(head_of(), "int4")
    with pytest.raises(ModelError, match="not finite"):
        compact(ItemHead(torch.tensor([[1.0, torch.inf]])), "int8")


def test_cosine_normalises_the_rounded_items():
    head = head_of(scale=2.0, normalize=True)
    found = compact(head, "bfloat16").scores(vectors_of())
    expected = 2 * F.normalize(vectors_of()) @ F.normalize(head.weight.bfloat16().float()).T
    assert torch.allclose(found, expected, atol=1e-6)
