"""What re-rankers choose from, gathered once in one pass over the scores for all methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from steerrec.data import Catalogue, Histories
from steerrec.errors import DataError, ModelError
from steerrec.metrics import GROUP_NAMES
from steerrec.ranking import Best, Rescore, score_chunks, top_k
from steerrec.recommender import ItemHead
from steerrec.rerank.filling import GroupLists

NUM_GROUPS = len(GROUP_NAMES)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Users and their best items, made by `gather_candidates`; all tensors are on the CPU.

    Attributes
    ----------
    ids
        The pool: each user's best items, catalogue rows, int64 [U, m]; -1 where none is left.
    scores
        Their scores, float32 [U, m]; minus infinity where none is left.
    lowest
        Lowest score of each user over the whole catalogue, float32 [U].
    grouped
        The k best items of each popularity group, head, mid and tail, over the whole catalogue.
    vectors, head
        User vectors [U, H] and the item head that scores them, for methods that rank the whole
        catalogue anew.
    seen
        What is left out of the lists of each user, or None.
    histories
        What each user has taken.
    counts
        Training interactions of each item, int64 [N].
    labels
        Popularity group of each item: 0 head, 1 mid, 2 tail; int64 [N].
    k
        Length of the lists to make.
    seed
        Of whatever a method draws.
    chunks
        How many users and items are scored at a time. Ranking anew is done in the same chunks, so
        that unchanged scores are the same to the last bit.
    """

    ids: Tensor
    scores: Tensor
    lowest: Tensor
    grouped: GroupLists
    vectors: Tensor
    head: ItemHead
    seen: Histories | None
    histories: Histories
    counts: Tensor
    labels: Tensor
    k: int
    seed: int
    chunks: tuple[int, int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pool(self) -> int:
        """How many items each user's pool holds, m."""
        return self.ids.shape[1]

    @property
    def base(self) -> Tensor:
        """The lists as they are without any re-ranking, [U, k]."""
        return self.ids[:, : self.k]

    @cached_property
    def group_sizes(self) -> Tensor:
        """Items of each group, int64 [G]."""
        return torch.bincount(self.labels, minlength=NUM_GROUPS)

    @cached_property
    def shares(self) -> Tensor:
        """Share of each group in each user's history, float64 [U, G].

        For a user without a history that of all training interactions.
        """
        lengths = self.histories.lengths
        owner = np.repeat(np.arange(len(self)), lengths)
        cells = owner * NUM_GROUPS + self.labels.numpy()[self.histories.items]
        taken = np.bincount(cells, minlength=len(self) * NUM_GROUPS).reshape(-1, NUM_GROUPS)
        training = np.bincount(self.labels.numpy(), self.counts.numpy(), minlength=NUM_GROUPS)
        taken = np.where(lengths[:, None] > 0, taken, training)
        return torch.from_numpy(taken / taken.sum(axis=1, keepdims=True))

    @cached_property
    def relevance(self) -> Tensor:
        """`relative` scores of `grouped`, float64 [U, G, k]."""
        scores = self.grouped.scores.flatten(1)
        return self.relative(scores).view(self.grouped.scores.shape)

    def relative(self, scores: Tensor) -> Tensor:
        """Scores [U, C] on each user's own scale: 0 is the lowest, 1 the highest; float64.

        0 for a user whose scores are all the same, and for minus infinity.
        """
        low, high = self.lowest.double()[:, None], self.scores[:, :1].double()
        spread = torch.where(high > low, high - low, torch.inf)
        return ((scores.double() - low) / spread).clamp(min=0).nan_to_num(0.0)

    def rank(self, *, vectors: Tensor | None = None, rescore: Rescore | None = None) -> Tensor:
        """Lists [U, k] over the whole catalogue, from other vectors or other scores.

        Parameters
        ----------
        vectors
            User vectors [U, H]; those of the candidates by default.
        rescore
            See `steerrec.ranking.top_k`.
        """
        vectors = self.vectors if vectors is None else vectors
        user_chunk, item_chunk = self.chunks
        lists = top_k(
            vectors,
            self.head,
            self.k,
            seen=self.seen,
            rescore=rescore,
            user_chunk=user_chunk,
            item_chunk=item_chunk,
        )
        return lists.ids.cpu()


@torch.no_grad()
def gather_candidates(
    vectors: Tensor,
    head: ItemHead,
    histories: Histories,
    catalogue: Catalogue,
    *,
    k: int = 10,
    pool: int = 200,
    mask_seen: bool = False,
    seed: int = 0,
    labels: ArrayLike | None = None,
    user_chunk: int = 1024,
    item_chunk: int = 16_384,
) -> Candidates:
    """Gather what re-rankers choose from, in one pass over the scores of the whole catalogue.

    Memory is O(U * (pool + 3 k)) and one chunk of scores.

    Parameters
    ----------
    vectors
        User vectors at the scored site, [U, H].
    head
        Item head of N items.
    histories
        What the same U users have taken.
    catalogue
        The N items with their training counts.
    k
        Length of the lists.
    pool
        How many of each user's best items are kept, at most N.
    mask_seen
        Leave out every item of a user's history.
    seed
        Of whatever a method draws.
    labels
        Popularity group of each item: 0 head, 1 mid, 2 tail; [N]. By default the catalogue's.
    user_chunk, item_chunk
        Users and items scored at a time.

    Raises
    ------
    DataError
        If k is not within 1..N, or larger than the pool, or vectors, histories, catalogue and head
        do not fit each other.
    ModelError
        If a score is NaN or plus infinity.
    """
    items = len(catalogue)
    groups = torch.as_tensor(np.array(catalogue.groups.labels if labels is None else labels)).long()
    _check(vectors, head, histories, items, groups, k, pool)
    pool = min(pool, items)
    users = len(vectors)
    ids = torch.empty(users, pool, dtype=torch.int64)
    scores = torch.empty(users, pool)
    lowest = torch.empty(users)
    by_group = torch.full((users, NUM_GROUPS, k), -1)
    group_scores = torch.full((users, NUM_GROUPS, k), -torch.inf)
    present = groups.unique().tolist()
    seen = histories if mask_seen else None
    chunks = score_chunks(vectors, head, seen=seen, user_chunk=user_chunk, item_chunk=item_chunk)
    for rows, parts in chunks:
        best, of_group = Best(pool), {group: Best(k) for group in present}
        low = torch.full((rows.stop - rows.start,), torch.inf)
        for part, chunk in parts:
            best.add(chunk, part)
            for group, found in of_group.items():
                columns = (groups[part.cpu()] == group).nonzero()[:, 0].to(part.device)
                if len(columns):
                    found.add(chunk[:, columns], part[columns])
            finite = chunk.masked_fill(chunk == -torch.inf, torch.inf)
            low = torch.minimum(low, finite.amin(dim=1).float().cpu())
        ids[rows], scores[rows] = best.ids.cpu(), best.values.float().cpu()
        lowest[rows] = low
        for group, found in of_group.items():
            by_group[rows, group] = found.ids.cpu()
            group_scores[rows, group] = found.values.float().cpu()
    if bool((scores == torch.inf).any()):
        raise ModelError("a score is infinite; check the model's weights")
    return Candidates(
        ids=ids,
        scores=scores,
        lowest=lowest.masked_fill(lowest == torch.inf, 0.0),  # everything is left out
        grouped=GroupLists(
            by_group, group_scores, _order(by_group, group_scores), _ranks(ids, groups, k)
        ),
        vectors=vectors,
        head=head,
        seen=seen,
        histories=histories,
        counts=torch.from_numpy(catalogue.counts.astype(np.int64)),
        labels=groups,
        k=k,
        seed=seed,
        chunks=(user_chunk, item_chunk),
    )


def _order(ids: Tensor, scores: Tensor) -> Tensor:
    """Place of each of [U, G, k] among the user's G * k, by score, then by row."""
    flat, values = ids.flatten(1), scores.flatten(1)
    by_id = flat.argsort(dim=1)
    by_score = values.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    order = by_id.gather(1, by_score)  # [U, G * k], the best first
    places = torch.empty_like(order)
    places.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return places.view(ids.shape)


def _ranks(pool: Tensor, labels: Tensor, k: int) -> Tensor:
    """Place in the pool [U, m] of the k best of each group, and m where they are not in it."""
    groups = labels[pool.clamp(min=0)].masked_fill(pool < 0, -1)
    nth = torch.arange(1, k + 1).repeat(len(pool), 1)
    ranks = [
        torch.searchsorted((groups == group).cumsum(dim=1), nth) for group in range(NUM_GROUPS)
    ]
    return torch.stack(ranks, dim=1)


def _check(
    vectors: Tensor,
    head: ItemHead,
    histories: Histories,
    items: int,
    labels: Tensor,
    k: int,
    pool: int,
) -> None:
    if not 1 <= k <= items:
        raise DataError(
            f"k is {k} but the catalogue has {items} items; choose k between 1 and {items}"
        )
    if k > pool:
        raise DataError(
            f"k is {k} but the pool holds {pool} items a user; ask for a pool of at least k"
        )
    if len(head) != items:
        raise DataError(f"the item head has {len(head)} items, the catalogue {items}")
    if vectors.ndim != 2 or vectors.shape[1] != head.width:
        raise ModelError(
            f"user vectors have shape {tuple(vectors.shape)}; the item head expects "
            f"[users, {head.width}]"
        )
    if len(histories) != len(vectors):
        raise DataError(
            f"{len(histories)} histories for {len(vectors)} user vectors; pass one history per "
            "user, in the same order"
        )
    if len(histories.items) and not 0 <= histories.items.min() <= histories.items.max() < items:
        raise DataError(
            f"histories hold catalogue rows {histories.items.min()} to {histories.items.max()}; "
            f"the catalogue has rows 0 to {items - 1}"
        )
    if labels.shape != (items,) or not 0 <= labels.min() <= labels.max() < NUM_GROUPS:
        raise DataError(
            f"labels have shape {tuple(labels.shape)}; expected one of 0 (head), 1 (mid) and 2 "
            f"(tail) for each of {items} items"
        )
