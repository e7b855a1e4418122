"""How histories become what a model takes: padded ids, and columns padded beside them.

Not here: which ids and padding a model has (`wrapping.py` finds that out, adapters know it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec.data import Histories
from steerrec.errors import ModelError

Side = Literal["left", "right"]


@dataclass(frozen=True)
class TokenScheme:
    """How a model's own ids stand for catalogue rows.

    Attributes
    ----------
    first_id
        The id of catalogue row 0; the others follow.
    pad_id
        The id of padding.
    padding
        On which side.
    max_length
        Window of the model, in items.
    fixed_length
        Whether batches are always as wide as the window, and not only as their longest history.
    """

    first_id: int
    pad_id: int
    padding: Side
    max_length: int
    fixed_length: bool = False

    def encode(self, histories: Histories) -> Tensor:
        """Ids [B, L] of the latest items, padded."""
        rows = torch.from_numpy(histories.padded(self._width(histories), -1, side=self.padding))
        return torch.where(rows < 0, self.pad_id, rows + self.first_id)

    def column(self, histories: Histories, name: str, pad: float = 0) -> Tensor:
        """What a column has for the latest items, [B, L], padded as the ids are.

        In its own precision: int64 or float64.
        """
        width = self._width(histories)
        return torch.from_numpy(histories.padded(width, pad, side=self.padding, column=name))

    def _width(self, histories: Histories) -> int:
        longest = min(int(histories.lengths.max(initial=1)), self.max_length)
        return self.max_length if self.fixed_length else longest


def with_mask(ids: Tensor, mask_id: int, *, pad_id: int) -> Tensor:
    """Padded ids [B, L] with a mask token after the last real one of each row: [B, L + 1]."""
    steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    ends = ((ids != pad_id) * steps).amax(dim=1, keepdim=True)
    return F.pad(ids, (0, 1), value=pad_id).scatter(1, ends, mask_id)


def as_reads(
    reads: Sequence[str] | Mapping[str, float], make_inputs: Callable[..., Any] | None
) -> dict[str, float]:
    """The columns that a model reads, each with its padding: 0 unless it is given.

    Raises
    ------
    ModelError
        If `make_inputs` is not one that takes the ids and these columns.
    """
    if isinstance(reads, str):
        raise ModelError(f"reads is {reads!r}; expected a list of columns, [{reads!r}]")
    pads = reads if isinstance(reads, Mapping) else dict.fromkeys(reads, 0)
    found: dict[str, float] = {**pads}
    wanted = f"make_batch(ids, {', '.join(found)})" if found else "make_batch(ids)"
    if make_inputs is None:
        if found:
            raise ModelError(f"nothing takes the columns that the model reads; expected {wanted}")
        return found
    try:
        inspect.signature(make_inputs).bind(None, *found)
    except TypeError as error:
        raise ModelError(
            f"make_batch cannot be called as {wanted} ({error}); expected one that takes the ids "
            "and, one by one, the columns that reads names"
        ) from None
    except ValueError:
        pass  # nothing tells what it takes
    return found
