"""Item matrices in bfloat16 and int8: half and a quarter of the memory, and what they get wrong.

Scores are computed in float32 from one chunk of the matrix at a time, so that the only error is
the rounding of the items themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steerrec.errors import ModelError
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead, Recommender

ItemDtype = Literal["float32", "bfloat16", "int8"]

_STEPS = 127  # of int8, on either side of zero


@dataclass(frozen=True)
class CompactItemHead(ItemHead):
    """An item head whose matrix is held in bfloat16 or int8, made by `compact`.

    Attributes
    ----------
    row_scale
        What a step of int8 is worth in each row, float32 [N]; None for bfloat16.
    """

    row_scale: Tensor | None = None

    def cast(self, user_vectors: Tensor) -> Tensor:
        """User vectors in float32, which scores are computed in."""
        return user_vectors.to(self.weight.device, torch.float32)

    def scores(self, user_vectors: Tensor) -> Tensor:
        """Scores [B, N] of every item for `user_vectors` [B, H], float32."""
        weight = self.weight.float()
        if self.row_scale is not None:
            weight.mul_(self.row_scale[:, None])
        return ItemHead(weight, self.bias, self.scale, self.normalize).scores(user_vectors)

    def chunk(self, start: int, stop: int) -> ItemHead:
        """The head of the catalogue rows from `start` up to, not including, `stop`."""
        part = super().chunk(start, stop)
        assert isinstance(part, CompactItemHead)
        scale = None if self.row_scale is None else self.row_scale[start:stop]
        return replace(part, row_scale=scale)


@torch.no_grad()
def compact(head: ItemHead, dtype: ItemDtype, *, chunk: int = 65_536) -> ItemHead:
    """The head with its item matrix in another dtype; float32 gives it back as it is.

    int8 has one scale a row: the largest entry of a row becomes 127.

    Raises
    ------
    ModelError
        If the dtype is none of those, or an entry is not finite.
    """
    if dtype not in get_args(ItemDtype):
        known = ", ".join(get_args(ItemDtype))
        raise ModelError(f"the item matrix cannot be held in {dtype!r}; expected {known}")
    if dtype == "float32":
        return head
    bias = None if head.bias is None else head.bias.float()
    if dtype == "bfloat16":
        return CompactItemHead(head.weight.bfloat16(), bias, head.scale, head.normalize)
    codes = torch.empty(head.weight.shape, dtype=torch.int8, device=head.weight.device)
    scale = torch.empty(len(head), device=head.weight.device)
    for start in range(0, len(head), chunk):
        rows = head.weight[start : start + chunk].float()
        largest = rows.abs().amax(dim=1)
        if not bool(largest.isfinite().all()):
            raise ModelError("an entry of the item matrix is not finite; check the model's weights")
        step = torch.where(largest > 0, largest / _STEPS, 1.0)
        codes[start : start + chunk] = (rows / step[:, None]).round_().to(torch.int8)
        scale[start : start + chunk] = step
    return CompactItemHead(codes, bias, head.scale, head.normalize, scale)


class WithItemHead:
    """A recommender whose items are scored by another head; all else is its own."""

    def __init__(self, rec: Recommender, head: ItemHead) -> None:
        self._rec = rec
        self._head = head

    @property
    def item_head(self) -> ItemHead:
        """The other head."""
        return self._head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rec, name)


def with_item_dtype(rec: Recommender, dtype: ItemDtype) -> Recommender:
    """A recommender that ranks by its item matrix in another dtype; itself for float32."""
    found: Any = rec if dtype == "float32" else WithItemHead(rec, compact(rec.item_head, dtype))
    recommender: Recommender = found
    return recommender


def item_dtype_error(
    head: ItemHead, other: ItemHead, user_vectors: Tensor, *, k: int = 10
) -> dict[str, Any]:
    """What ranking by another item matrix gets wrong.

    Parameters
    ----------
    head
        The head as it is.
    other
        That of the same items in another dtype.
    user_vectors
        Whom to rank for, [U, H].
    k
        Length of the lists.

    Returns
    -------
    dict
        `recall@k`, the mean share of a user's true list that is in the other one; `same_lists`,
        the share of users with the same list in the same order; `score_error`, the largest
        difference between the scores in one place of both lists, and `relative_score_error`,
        that over the largest score; `bytes` of both matrices; `users`.
    """
    true, found = top_k(user_vectors, head, k), top_k(user_vectors, other, k)
    shared = (true.ids[:, :, None] == found.ids[:, None, :]).any(dim=2)
    error = float((true.scores - found.scores).abs().max())
    return {
        "users": len(user_vectors),
        f"recall@{k}": float(shared.double().mean()),
        "same_lists": float((true.ids == found.ids).all(dim=1).double().mean()),
        "score_error": error,
        "relative_score_error": error / max(float(true.scores.abs().max()), 1e-30),
        "bytes": {"float32": _bytes(head), "other": _bytes(other)},
    }


def _bytes(head: ItemHead) -> int:
    scale = getattr(head, "row_scale", None)
    return sum(t.numel() * t.element_size() for t in (head.weight, scale) if t is not None)
