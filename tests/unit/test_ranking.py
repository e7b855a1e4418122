"""Full-catalogue top-k: against a naive sort, whatever the chunks, ties, masks and dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec.data import Histories
from steerrec.errors import DataError, ModelError
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead


def naive_top_k(scores, k, seen=None):
    """Sort (-score, row) pairs in plain Python."""
    ids, values = [], []
    for user, row in enumerate(scores.tolist()):
        hidden = set() if seen is None else set(seen[user])
        pairs = sorted((-s, item) for item, s in enumerate(row) if item not in hidden)[:k]
        pairs = [(s, item) for s, item in pairs if s != float("inf")]
        ids.append([item for _, item in pairs] + [-1] * (k - len(pairs)))
        values.append([-s for s, _ in pairs] + [-float("inf")] * (k - len(pairs)))
    return ids, values


def score_rows(*rows):
    """Vectors and a head that give exactly these scores: one-hot users, scores as weights."""
    scores = torch.tensor(rows, dtype=torch.float32)
    return torch.eye(len(rows)), ItemHead(weight=scores.T.contiguous())


def test_hand_worked_lists():
    vectors, head = score_rows([0.1, 0.4, 0.3, 0.2], [5.0, 6.0, 8.0, 7.0])
    top = top_k(vectors, head, 3)
    assert top.ids.tolist() == [[1, 2, 3], [2, 3, 1]]
    assert top.ids.dtype == torch.int64
    assert top.scores.dtype == torch.float32
    assert torch.equal(top.scores, torch.tensor([[0.4, 0.3, 0.2], [8.0, 7.0, 6.0]]))


def test_equal_scores_go_to_the_lower_row_inside_the_list_and_at_its_end():
    vectors, head = score_rows([1, 2, 2, 1, 3, 1, 2, 1], [7, 7, 7, 7, 7, 7, 7, 7])
    for item_chunk in (1, 2, 3, 5, 8):
        top = top_k(vectors, head, 5, item_chunk=item_chunk)
        assert top.ids.tolist() == [[4, 1, 2, 6, 0], [0, 1, 2, 3, 4]]


def test_ties_among_very_many_items():
    """A list that ends inside a run of equal scores, in a row too long to be sorted by accident."""
    scores = torch.zeros(2, 5000)
    scores[0, 1234::7] = 1.0
    vectors, head = torch.eye(2), ItemHead(weight=scores.T.contiguous())
    ids = top_k(vectors, head, 20, item_chunk=777).ids
    assert ids.tolist() == [list(range(1234, 1234 + 140, 7)), list(range(20))]


def test_seen_items_are_left_out_and_slots_that_stay_empty_are_marked():
    vectors, head = score_rows([4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1])
    seen = Histories.from_lists([[0, 2, 0], [], [3, 2, 1, 0]])  # a repeat; nothing; everything
    top = top_k(vectors, head, 3, seen=seen, user_chunk=2, item_chunk=3)
    assert top.ids.tolist() == [[1, 3, -1], [0, 1, 2], [-1, -1, -1]]
    assert top.scores.tolist() == [
        [3.0, 1.0, -torch.inf],
        [4.0, 3.0, 2.0],
        [-torch.inf, -torch.inf, -torch.inf],
    ]


def test_an_item_of_score_minus_infinity_is_never_recommended():
    vectors, head = score_rows([1.0, 2.0])
    head = ItemHead(weight=head.weight, bias=torch.tensor([0.0, -torch.inf]))
    assert top_k(vectors, head, 2).ids.tolist() == [[0, -1]]


@st.composite
def rankings(draw):
    """Small-integer vectors and heads: scores are exact in every shape, and ties abound."""
    users, items = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.integers(1, 3))
    vectors = torch.from_numpy(rng.integers(-2, 3, (users, width))).float()
    weight = torch.from_numpy(rng.integers(-2, 3, (items, width))).float()
    bias = torch.from_numpy(rng.integers(-2, 3, items)).float() if draw(st.booleans()) else None
    seen = None
    if draw(st.booleans()):
        lengths = rng.integers(0, 2 * items, users)
        seen = [rng.integers(0, items, length).tolist() for length in lengths]
    return vectors, weight, bias, seen, draw(st.integers(1, items))


@settings(deadline=None)
@given(
    rankings(),
    st.integers(1, 9),
    st.integers(1, 21),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_agrees_with_a_naive_sort_however_it_is_chunked(ranking, user_chunk, item_chunk, dtype):
    vectors, weight, bias, seen, k = ranking
    scores = vectors @ weight.T + (0 if bias is None else bias)
    head = ItemHead(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))
    histories = None if seen is None else Histories.from_lists(seen)
    before = vectors.clone()
    top = top_k(vectors, head, k, seen=histories, user_chunk=user_chunk, item_chunk=item_chunk)
    ids, values = naive_top_k(scores, k, seen)
    assert top.ids.tolist() == ids
    assert top.scores.tolist() == values
    assert top.scores.dtype == torch.float32
    assert torch.equal(vectors, before)


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_are_those_of_the_head(normalize):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    vectors = torch.randn(7, 8, generator=generator, requires_grad=True)
    head = ItemHead(weight=weight, scale=3.0, normalize=normalize)
    top = top_k(vectors, head, 50, user_chunk=3, item_chunk=11)
    assert not top.scores.requires_grad
    scores = head.scores(vectors).detach()
    torch.testing.assert_close(top.scores, scores.gather(1, top.ids))
    torch.testing.assert_close(top.scores, scores.sort(dim=1, descending=True).values)


def test_bfloat16_is_ranked_as_scored_with_ties_by_row():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 16, generator=generator).bfloat16()
    weight = torch.randn(3000, 16, generator=generator).bfloat16()
    head = ItemHead(weight=weight)
    scores = head.scores(vectors).float()
    ids, values = naive_top_k(scores, 25)
    assert any(len(set(row)) < 25 for row in values)  # rounding made ties inside the lists
    top = top_k(vectors, head, 25)
    assert top.ids.tolist() == ids
    assert top.scores.tolist() == values


def test_float64_is_not_rounded_before_it_is_ranked():
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    head = ItemHead(weight=scores.T.contiguous())
    top = top_k(torch.ones(1, 1, dtype=torch.float64), head, 2)
    assert top.ids.tolist() == [[1, 0]]
    assert top.scores.tolist() == [[1.0, 1.0]]


def test_no_users_give_no_lists():
    _, head = score_rows([1.0, 2.0])
    top = top_k(torch.empty(0, 1), head, 2, seen=Histories.from_lists([]))
    assert top.ids.shape == top.scores.shape == (0, 2)


@pytest.mark.parametrize("k", [0, -1, 5, 100])
def test_k_outside_the_catalogue_is_refused(k):
    vectors, head = score_rows([1, 2, 3, 4])
    with pytest.raises(DataError, match=f"k is {k} but the catalogue has 4 items"):
        top_k(vectors, head, k)


@pytest.mark.parametrize("item_chunk", [1, 2, 100])
@pytest.mark.parametrize("where", [0, 3])
def test_a_score_that_is_nan_is_refused(where, item_chunk):
    vectors, head = score_rows([1.0, 2.0, 3.0, 4.0, 5.0])
    head.weight[where] = torch.nan
    with pytest.raises(ModelError, match="a score is NaN"):
        top_k(vectors, head, 2, item_chunk=item_chunk)


def test_input_that_does_not_fit_is_refused():
    vectors, head = score_rows([1, 2, 3], [4, 5, 6])
    with pytest.raises(ModelError, match=r"\(2, 3\).*\[users, 2\]"):
        top_k(torch.zeros(2, 3), head, 1)
    with pytest.raises(ModelError, match=r"\(2,\)"):
        top_k(torch.zeros(2), head, 1)
    with pytest.raises(DataError, match="1 histories for 2 user vectors"):
        top_k(vectors, head, 1, seen=Histories.from_lists([[0]]))
    with pytest.raises(DataError, match="rows 1 to 3; the item head has rows 0 to 2"):
        top_k(vectors, head, 1, seen=Histories.from_lists([[1], [3]]))
    with pytest.raises(ValueError, match="item_chunk=0"):
        top_k(vectors, head, 1, item_chunk=0)
