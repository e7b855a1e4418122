"""The k best items of the whole catalogue for every user, in chunks, with seen items masked.

Not here: what the lists are worth (`steerrec.metrics`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from steerrec.beside import beside, shares
from steerrec.compiled import as_arrays, kernels
from steerrec.data import Histories
from steerrec.errors import DataError, ModelError
from steerrec.recommender import ItemHead

Rescore = Callable[[Tensor, slice, slice], Tensor]
"""Scores [B, C] of a chunk of users and a chunk of catalogue rows to other scores [B, C]."""


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
    rescore: Rescore | None = None,
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
    rescore
        Makes other scores of a chunk's, seen items not yet left out; it may write to what it gets.

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
    check_ranking(user_vectors, head, k, seen)
    device = head.weight.device
    ids = torch.empty(len(user_vectors), k, dtype=torch.int64, device=device)
    scores = torch.empty(len(user_vectors), k, dtype=torch.float32, device=device)
    chunks = score_chunks(
        user_vectors,
        head,
        seen=seen,
        user_chunk=user_chunk,
        item_chunk=item_chunk,
        rescore=rescore,
    )
    for users, parts in chunks:
        best = Best(k)
        for items, chunk in parts:
            best.add(chunk, items)
        ids[users], scores[users] = best.ids, best.values
    return TopK(ids=ids, scores=scores)


@torch.no_grad()
def score_chunks(
    user_vectors: Tensor,
    head: ItemHead,
    *,
    seen: Histories | None = None,
    user_chunk: int = 1024,
    item_chunk: int = 16_384,
    rescore: Rescore | None = None,
) -> Iterator[tuple[slice, Iterator[tuple[Tensor, Tensor]]]]:
    """The scores of all users and items, a chunk at a time; see `top_k` for the options.

    Yields
    ------
    users : slice
        A chunk of users.
    parts : iterator
        Catalogue rows, ascending, [C], and the users' scores of them, [B, C], minus infinity for
        what is left out. The scores are of this chunk alone and may be written to.
    """
    if user_chunk < 1 or item_chunk < 1:
        raise ValueError(f"chunks must hold a row at least, got {user_chunk=} and {item_chunk=}")

    def parts(users: slice) -> Iterator[tuple[Tensor, Tensor]]:
        vectors = head.cast(user_vectors[users])  # [B, H]
        mask = None if seen is None else _seen_cells(seen, users)
        for start in range(0, len(head), item_chunk):
            items = slice(start, min(start + item_chunk, len(head)))
            scores = head.chunk(items.start, items.stop).scores(vectors)  # [B, C]
            if scores.dtype in (torch.float16, torch.bfloat16):
                scores = scores.float()  # exact, and selection in half precision is slow on a CPU
            if rescore is not None:
                scores = rescore(scores, users, items)
            if mask is not None:
                _leave_out(scores, mask, items)
            yield torch.arange(items.start, items.stop, device=scores.device), scores

    for first in range(0, len(user_vectors), user_chunk):
        users = slice(first, min(first + user_chunk, len(user_vectors)))
        yield users, parts(users)


INSERTED = 64
"""Lists of at most so many items are made by inserting one after the other."""

_SHARE = 400_000
"""A thread is given at least so many scores, or handing them over would cost what it saves."""

_NAN = (
    "a score is NaN: the user vectors, the item matrix or its bias hold NaN or infinite values; "
    "check the model's weights and the strength of the steering"
)


class Best:
    """The k best items of a chunk of users so far, fed a chunk of items at a time."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._best: tuple[Tensor, Tensor] | None = None

    def add(self, scores: Tensor, items: Tensor) -> None:
        """Add the scores [B, C] of catalogue rows [C], ascending and above all added before."""
        if self.k <= INSERTED and self._inserted(scores, items):
            return
        values, columns = _best_columns(scores, min(self.k, len(items)))
        found = values, items[columns]
        self._best = found if self._best is None else _merge(self._best, found, self.k)

    def _inserted(self, scores: Tensor, items: Tensor) -> bool:
        """Add them by a compiled loop, if that can be."""
        arrays = as_arrays(scores)
        loops = None if arrays is None else kernels()
        if arrays is None or loops is None:
            return False
        if self._best is None:
            shape = len(scores), self.k
            self._best = scores.new_full(shape, -torch.inf), items.new_full(shape, -1)
        best = self.values.contiguous(), self.ids.contiguous()
        values, ids = (part.numpy() for part in best)
        calls = []
        for share in shares(len(scores), max(1, _SHARE // len(items))):
            rows = slice(share.start, share.stop)
            calls.append(
                partial(loops.best, arrays[0][rows], items.numpy(), values[rows], ids[rows])
            )
        if not all(beside(calls)):
            raise ModelError(_NAN)
        self._best = best
        return True

    @property
    def values(self) -> Tensor:
        """Scores of the k best, [B, k]; minus infinity in slots for which no item was left."""
        return self._padded(self._found[0], -torch.inf)

    @property
    def ids(self) -> Tensor:
        """Their catalogue rows, best first, int64 [B, k]; -1 in the empty slots."""
        values, ids = self._found
        return self._padded(ids.masked_fill(values == -torch.inf, -1), -1)

    @property
    def _found(self) -> tuple[Tensor, Tensor]:
        assert self._best is not None
        return self._best

    def _padded(self, found: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(found, (0, self.k - found.shape[1]), value=value)


def _leave_out(scores: Tensor, mask: tuple[np.ndarray, np.ndarray], items: slice) -> None:
    users, rows = mask
    inside = (rows >= items.start) & (rows < items.stop)
    cells = torch.from_numpy(users[inside]), torch.from_numpy(rows[inside] - items.start)
    scores[cells[0].to(scores.device), cells[1].to(scores.device)] = -torch.inf


def _best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns [B, k] of the k best of [B, C], equal values by column ascending."""
    values, columns = scores.topk(k, dim=1)
    if values[:, 0].isnan().any():  # topk takes NaN for the largest value of all
        raise ModelError(_NAN)
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


def check_ranking(user_vectors: Tensor, head: ItemHead, k: int, seen: Histories | None) -> None:
    """Raise an error unless lists of k items can be made for these users."""
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
