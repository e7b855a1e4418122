"""The k best items of the whole catalogue for every user, in chunks, with seen items masked.

Not here: what the lists are worth (`steerrec.metrics`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steerrec.data import Histories
from steerrec.errors import DataError, ModelError
from steerrec.recommender import ItemHead


@dataclass(frozen=True)
class TopK:
    """Ranked lists, best item first.

    Attributes
    ----------
    ids
        Catalogue rows, int64 [U, k]; -1 in slots for which no item was left.
    scores
        Their scores, float32 [U, k]; minus infinity in the empty slots.
    """

    ids: Tensor
    scores: Tensor


@torch.no_grad()
def top_k(
    user_vectors: Tensor,
    head: ItemHead,
    k: int,
    *,
    seen: Histories | None = None,
    user_chunk: int = 1024,
    item_chunk: int = 16_384,
) -> TopK:
    """Rank the full catalogue for every user and keep the k best items.

    Equal scores are ranked by catalogue row, the lower one first, so the lists depend neither on
    `user_chunk` nor on `item_chunk` (as far as the matrix product itself does not: it may round
    the last bit of a score differently for another shape). Half precision is ranked exactly as
    scored; with its many equal scores the tie rule is at work in most lists.

    Parameters
    ----------
    user_vectors
        [U, H], on any device and in any floating dtype; brought to those of the head chunk by
        chunk.
    head
        Item head of N items.
    k
        Length of the lists, at most N.
    seen
        Histories of the same U users; their items are left out of the lists. None masks nothing.
    user_chunk, item_chunk
        Users and items scored at a time: memory is bounded by their product.

    Returns
    -------
    TopK
        Lists on the head's device. An item whose score is minus infinity is never recommended.

    Raises
    ------
    DataError
        If k is not within 1..N, or `seen` belongs to other users or another catalogue.
    ModelError
        If the vectors do not fit the head, or a score is NaN.
    """
    num_users, num_items = len(user_vectors), len(head)
    _check(user_vectors, head, k, seen)
    if user_chunk < 1 or item_chunk < 1:
        raise ValueError(f"chunks must hold a row at least, got {user_chunk=} and {item_chunk=}")

    ids = torch.empty(num_users, k, dtype=torch.int64, device=head.weight.device)
    scores = torch.empty(num_users, k, dtype=torch.float32, device=head.weight.device)
    for first in range(0, num_users, user_chunk):
        users = slice(first, min(first + user_chunk, num_users))
        vectors = user_vectors[users].to(head.weight)  # [B, H]
        mask = None if seen is None else _seen_cells(seen, users)
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, num_items, item_chunk):
            stop = min(start + item_chunk, num_items)
            chunk = _chunk_scores(vectors, head.chunk(start, stop), mask, start)  # [B, stop-start]
            values, columns = _best_columns(chunk, min(k, stop - start))
            found = values, columns + start
            best = found if best is None else _merge(best, found, k)
        assert best is not None  # N >= k >= 1
        scores[users] = best[0]
        ids[users] = best[1].masked_fill(best[0] == -torch.inf, -1)
    return TopK(ids=ids, scores=scores)


def _chunk_scores(
    vectors: Tensor, head: ItemHead, mask: tuple[np.ndarray, np.ndarray] | None, start: int
) -> Tensor:
    scores = head.scores(vectors)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()  # exact, and selection in half precision is slow on a CPU
    if mask is not None:
        users, items = mask
        inside = (items >= start) & (items < start + len(head))
        rows = torch.from_numpy(users[inside]).to(scores.device)
        columns = torch.from_numpy(items[inside] - start).to(scores.device)
        scores[rows, columns] = -torch.inf
    return scores


def _best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns [B, k] of the k best of [B, C], equal values by column ascending."""
    values, columns = scores.topk(k, dim=1)
    if values[:, 0].isnan().any():  # topk takes NaN for the largest value of all
        raise ModelError(
            "a score is NaN: the user vectors, the item matrix or its bias hold NaN or infinite "
            "values; check the model's weights and the strength of the steering"
        )
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)

    # Which of the items that equal the k-th value topk picks is its own affair: pick again.
    threshold = values[:, -1:]
    undecided = (scores == threshold).sum(dim=1) > (values == threshold).sum(dim=1)
    if not undecided.any():
        return values, columns
    rows = undecided.nonzero().squeeze(1)
    scores, threshold, width = scores[rows], threshold[rows], scores.shape[1]
    lower_is_larger = torch.arange(width, 0, -1, dtype=torch.int32, device=scores.device)
    tied = torch.where(scores == threshold, lower_is_larger, 0).topk(k, dim=1).indices
    above = (values[rows] > threshold).sum(dim=1, keepdim=True)
    slots = torch.arange(k, device=scores.device) - above  # 0 in the first slot of a tied item
    columns[rows] = torch.where(slots < 0, columns[rows], tied.gather(1, slots.clamp(min=0)))
    return values, columns


def _merge(
    best: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """The k best of two ranked lists; all rows of `best` are lower than those of `found`."""
    values = torch.cat([best[0], found[0]], dim=1)
    ids = torch.cat([best[1], found[1]], dim=1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k])


def _seen_cells(seen: Histories, users: slice) -> tuple[np.ndarray, np.ndarray]:
    """Row within the chunk and catalogue row of every seen item of a chunk of users."""
    offsets = seen.offsets[users.start : users.stop + 1]
    rows = np.repeat(np.arange(users.stop - users.start), np.diff(offsets))
    return rows, seen.items[offsets[0] : offsets[-1]]


def _check(user_vectors: Tensor, head: ItemHead, k: int, seen: Histories | None) -> None:
    if not 1 <= k <= len(head):
        raise DataError(
            f"k is {k} but the catalogue has {len(head)} items; choose k between 1 and {len(head)}"
        )
    if user_vectors.ndim != 2 or user_vectors.shape[1] != head.width:
        raise ModelError(
            f"user vectors have shape {tuple(user_vectors.shape)}; the item head expects "
            f"[users, {head.width}]"
        )
    if seen is None:
        return
    if len(seen) != len(user_vectors):
        raise DataError(
            f"seen holds {len(seen)} histories for {len(user_vectors)} user vectors; "
            "pass one history per user, in the same order"
        )
    if len(seen.items) and not 0 <= seen.items.min() <= seen.items.max() < len(head):
        raise DataError(
            f"seen holds catalogue rows {seen.items.min()} to {seen.items.max()}; "
            f"the item head has rows 0 to {len(head) - 1}"
        )
