"""Gathering candidates: against plain sorting, whatever the chunks; and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec.data import HEAD, MID, TAIL, Histories
from steerrec.errors import DataError, ModelError
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead
from steerrec.rerank import gather_candidates
from steerrec.rerank.filling import fill

from .rerank_cases import GROUPS, random_worlds, world
from .tiny import catalogue


def test_by_hand():
    # items:         0    1    2    3    4    5
    scores = [[5.0, 1.0, 4.0, 2.0, 2.0, 3.0], [0.0, 6.0, 6.0, 1.0, 9.0, 2.0]]
    labels = [HEAD, HEAD, MID, MID, TAIL, TAIL]
    made = world(scores, labels=labels, k=2, pool=4, histories=[[0, 4, 4, 5], []]).candidates

    assert made.ids.tolist() == [[0, 2, 5, 3], [4, 1, 2, 5]]
    assert made.scores.tolist() == [[5, 4, 3, 2], [9, 6, 6, 2]]
    assert made.base.tolist() == [[0, 2], [4, 1]]
    assert made.lowest.tolist() == [1, 0]
    assert made.grouped.ids.tolist() == [[[0, 1], [2, 3], [5, 4]], [[1, 0], [2, 3], [4, 5]]]
    # equal scores by row: of user 0's items 3 and 4 (both 2.0) 3 comes first
    assert made.grouped.order.tolist() == [[[0, 5], [1, 3], [2, 4]], [[1, 5], [2, 4], [0, 3]]]
    # place in the pool of four, and 4 for what is not in it
    assert made.grouped.ranks.tolist() == [[[0, 4], [1, 3], [2, 4]], [[1, 4], [2, 4], [0, 3]]]
    assert made.group_sizes.tolist() == [2, 2, 2]
    # counts 6, 5, 4, 3, 2, 1: user 1, without a history, has the training shares
    assert made.shares.tolist() == [[0.25, 0, 0.75], [11 / 21, 7 / 21, 3 / 21]]
    assert made.relevance[0].tolist() == [[1, 0], [0.75, 0.25], [0.5, 0.25]]
    assert (len(made), made.pool, made.k) == (2, 4, 2)


def test_against_sorting():
    for case in random_worlds(300):
        made = case.candidates
        for user in range(len(made)):
            ranking = case.ranking(user)
            pool = ranking[: made.pool]
            assert made.ids[user].tolist() == pool + [-1] * (made.pool - len(pool))
            of_group = [[i for i in ranking if case.labels[i] == g][: case.k] for g in GROUPS]
            assert made.grouped.ids[user].tolist() == [case.padded(items) for items in of_group]
            listed = [item for items in of_group for item in items]
            by_score = sorted(listed, key=ranking.index)
            for g, items in enumerate(of_group):
                order = made.grouped.order[user, g, : len(items)].tolist()
                assert order == [by_score.index(item) for item in items]
                ranks = made.grouped.ranks[user, g, : len(items)].tolist()
                assert ranks == [min(ranking.index(item), made.pool) for item in items]
                relevance = made.relevance[user, g, : len(items)].tolist()
                assert relevance == pytest.approx([case.relevance(user)[i] for i in items])
            assert made.shares[user].tolist() == pytest.approx(case.shares(user))


@settings(max_examples=50)
@given(
    st.integers(1, 20), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16), st.booleans()
)
def test_chunks_do_not_matter_and_the_base_is_the_plain_ranking(
    users, user_chunk, item_chunk, seed, mask_seen
):
    generator = torch.Generator().manual_seed(seed)
    # whole numbers: a matrix product of other shape rounds nothing
    vectors = torch.randint(-3, 4, (users, 4), generator=generator).float()
    head = ItemHead(torch.randint(-3, 4, (30, 4), generator=generator).float())
    taken = torch.randint(0, 30, (users, 5), generator=generator).tolist()
    histories = Histories.from_lists(taken)
    items = catalogue(list(range(30, 0, -1)))
    made = gather_candidates(vectors, head, histories, items, k=4, pool=9, mask_seen=mask_seen)
    other = gather_candidates(
        vectors,
        head,
        histories,
        items,
        k=4,
        pool=9,
        mask_seen=mask_seen,
        user_chunk=user_chunk,
        item_chunk=item_chunk,
    )
    for name in ("ids", "scores", "lowest"):
        assert torch.equal(getattr(made, name), getattr(other, name))
    for name in ("ids", "scores", "order", "ranks"):
        assert torch.equal(getattr(made.grouped, name), getattr(other.grouped, name))
    plain = top_k(vectors, head, 4, seen=histories if mask_seen else None)
    assert torch.equal(made.base, plain.ids)
    assert torch.equal(made.rank(), plain.ids)


def test_the_pool_is_at_most_the_catalogue():
    assert world([[1.0, 2.0, 3.0]], pool=500).candidates.pool == 3


def test_everything_seen_leaves_nothing():
    made = world([[1.0, 2.0]], histories=[[0, 1]], k=1, mask_seen=True).candidates
    assert made.ids.tolist() == [[-1, -1]]
    assert (made.grouped.ids == -1).all()
    assert made.relevance.eq(0).all()
    assert made.lowest.tolist() == [0.0]


def test_constant_scores_are_worth_nothing_and_ranked_by_row():
    made = world([[2.0] * 5], k=3).candidates
    assert made.base.tolist() == [[0, 1, 2]]
    assert made.relevance.eq(0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, DataError, "k is 0 but the catalogue has 4 items"),
        ({"k": 5}, DataError, "k is 5 but the catalogue has 4 items"),
        ({"k": 3, "pool": 2}, DataError, "k is 3 but the pool holds 2"),
        ({"labels": [0, 1, 2]}, DataError, "expected one of 0"),
        ({"labels": [0, 1, 2, 3]}, DataError, "expected one of 0"),
        ({"histories": [[0]]}, DataError, "1 histories for 2 user vectors"),
        ({"histories": [[0], [4]]}, DataError, "catalogue rows 0 to 4"),
        ({"counts": [1, 2, 3]}, DataError, "the item head has 4 items, the catalogue 3"),
        ({"scores": math.nan}, ModelError, "a score is NaN"),
        ({"scores": math.inf}, ModelError, "a score is infinite"),
    ],
)
def test_what_is_refused(change, error, message):
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2)
    vectors, matrix = torch.eye(2), scores.T.contiguous()
    if "scores" in change:  # given to one user by one item
        vectors, matrix = torch.tensor([[1.0], [1.0]]), scores[:1].T.contiguous()
        matrix[2] = change.pop("scores")
    options = {"k": 2, "pool": 4, "histories": [[0], []], "counts": [4, 3, 2, 1]} | change
    histories = Histories.from_lists(options.pop("histories"))
    items = catalogue(options.pop("counts"))
    with pytest.raises(error, match=message):
        gather_candidates(vectors, ItemHead(matrix), histories, items, **options)


def test_vectors_of_another_width():
    with pytest.raises(ModelError, match="expects \\[users, 3\\]"):
        gather_candidates(
            torch.ones(1, 2),
            ItemHead(torch.ones(4, 3)),
            Histories.from_lists([[]]),
            catalogue([1, 1, 1, 1]),
            k=1,
        )


# --- filling


def test_a_place_that_nobody_wants_stays_empty_and_can_be_filled_later():
    grouped = world([[4.0, 3.0, 2.0]], labels=[HEAD, MID, TAIL], k=3).candidates.grouped

    def only_mid(place, taken):
        return torch.where(torch.arange(3) == MID, 1.0, -math.inf).double().expand(1, 3)

    chosen, taken = fill(grouped, only_mid)
    assert chosen.tolist() == [[1, -1, -1]]
    assert taken.tolist() == [[0, 1, 0]]
    again, all_taken = fill(grouped, lambda *_: torch.zeros(1, 3), chosen=chosen, taken=taken)
    assert again.tolist() == [[1, 0, 2]]
    assert all_taken.tolist() == [[1, 1, 1]]
    assert chosen.tolist() == [[1, -1, -1]]  # not written to


def test_a_worth_apart_by_rounding_alone_is_the_same():
    grouped = world([[4.0, 3.0, 2.0]], labels=[HEAD, MID, TAIL], k=1).candidates.grouped
    worth = torch.tensor([[0.3, 0.1 + 0.2, 0.0]], dtype=torch.float64)
    assert worth[0, 1] > worth[0, 0]
    assert fill(grouped, lambda *_: worth)[0].tolist() == [[0]]  # by score
