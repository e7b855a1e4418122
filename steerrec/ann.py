"""How much of the exact lists an approximate index finds, steered and not, by popularity group.

Steering moves queries to where items are rarely asked for, and those are what the probes of an
inverted file miss: measure recall under steering, not only without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.errors import DataError, ModelError
from steerrec.progress import track
from steerrec.ranking import top_k
from steerrec.recommender import Recommender
from steerrec.serving import Querying, RetrievalVectors

Search = Callable[[NDArray[np.float32], int], NDArray[np.int64]]
"""Queries [B, D] and k to the catalogue rows found, best first, [B, k]; -1 in empty slots."""

_GROUPS = ("head", "mid", "tail")  # in the order of their labels


@dataclass(frozen=True)
class AnnRecall:
    """How much of the exact lists was found.

    Attributes
    ----------
    k, users
        Length of the lists, and for how many users.
    recall
        Share of all slots of the exact lists whose item was found.
    by_group
        The same over the slots that hold an item of the head, the middle or the tail; NaN where
        the exact lists hold none.
    slots
        How many slots of the exact lists hold an item of each group.
    """

    k: int
    users: int
    recall: float
    by_group: dict[str, float]
    slots: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is undefined becomes null."""
        groups = {name: None if value != value else value for name, value in self.by_group.items()}
        return {
            "k": self.k,
            "users": self.users,
            "recall": self.recall,
            "by_group": groups,
            "slots": self.slots,
        }


@torch.no_grad()
def ann_recall(
    rec: Recommender,
    search: Search,
    user_vectors: Tensor,
    *,
    k: int = 10,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 1024,
) -> AnnRecall:
    """Recall of an index against exact top-k, both for the same queries.

    Parameters
    ----------
    rec
        The recommender: its item head makes the exact lists, its catalogue knows the groups.
    search
        Asks the index over `retrieval_vectors(rec).items`; `faiss_index` makes one, any other
        library will do.
    user_vectors
        [U, H], unsteered.
    k
        Length of the lists.
    transform
        Steering; none by default.
    chunk
        Users asked for at once.

    Raises
    ------
    ModelError
        If `search` gives anything but k rows of the catalogue, or -1, for each user.
    """
    head = rec.item_head
    labels = torch.from_numpy(rec.catalogue.groups.labels.copy()).long()
    querying = Querying.of(head)
    slots, hits = (torch.zeros(3, dtype=torch.int64) for _ in range(2))
    for part in track(user_vectors.split(chunk), "recall", unit="chunk"):
        vectors = part if transform is None else transform(part)
        exact = top_k(vectors, head, k).ids.cpu()  # [B, k]
        queries = np.ascontiguousarray(querying(vectors.float()).cpu().numpy())
        found = _checked(search(queries, k), (len(part), k), len(head))
        hit = (exact[:, :, None] == found[:, None, :]).any(dim=2)  # [B, k]
        real = exact >= 0
        groups = labels[exact.clamp_min(0)]
        slots += torch.bincount(groups[real], minlength=3)
        hits += torch.bincount(groups[real & hit], minlength=3)
    total = int(slots.sum())
    if not total:
        raise DataError("no users to measure recall on; expected at least one user vector")
    share = hits / slots  # 0 / 0 is NaN
    return AnnRecall(
        k,
        len(user_vectors),
        int(hits.sum()) / total,
        dict(zip(_GROUPS, share.tolist(), strict=True)),
        dict(zip(_GROUPS, slots.tolist(), strict=True)),
    )


def _checked(found: Any, shape: tuple[int, int], items: int) -> Tensor:
    rows = np.asarray(found)
    if rows.shape != shape or not np.issubdtype(rows.dtype, np.integer):
        raise ModelError(
            f"the index gave {rows.dtype} {rows.shape}; expected whole numbers {shape}, catalogue "
            "rows for each user"
        )
    if rows.size and not -1 <= rows.min() <= rows.max() < items:
        raise ModelError(
            f"the index gave rows {rows.min()} to {rows.max()}; the catalogue has 0 to {items - 1}"
        )
    return torch.from_numpy(rows.astype(np.int64))


def faiss_index(
    vectors: RetrievalVectors, *, factory: str | None = None, probes: int = 8, seed: int = 0
) -> Search:
    """A faiss index by inner product over the items, as a function.

    Parameters
    ----------
    vectors
        From `retrieval_vectors`.
    factory
        What to build, in faiss's words (``IVF256,Flat``, ``HNSW32``, ``Flat``, …); by default an
        inverted file with about 4 sqrt(N) lists, and no list with too few items to learn it from.
    probes
        How many lists of an inverted file are looked into.
    seed
        Of the clustering.

    Raises
    ------
    ModelError
        If faiss is not installed, or cannot build that.
    """
    try:
        import faiss
    except ImportError as error:
        raise ModelError("faiss is not installed: pip install 'steerrec[ann]'") from error
    items = np.ascontiguousarray(vectors.items.numpy())
    lists = max(1, min(round(4 * len(items) ** 0.5), len(items) // 39))
    try:
        index = faiss.index_factory(
            vectors.width, factory or f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT
        )
        if isinstance(index, faiss.IndexIVF):
            index.cp.seed = seed
            index.nprobe = probes
        index.train(items)
        index.add(items)
    except Exception as error:  # faiss raises what its C++ throws
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"faiss cannot build {factory!r} over {len(items)} items: {reason}"
        ) from error

    def search(queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        found: NDArray[np.int64] = index.search(queries, k)[1]
        return found

    return search
