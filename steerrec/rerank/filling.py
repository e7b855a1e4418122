"""Lists filled place by place from the best items of each popularity group, all users at once.

A method that sees nothing of an item but its score and its group, and likes a higher score better,
only ever takes the next best item of some group. The k best of each group are then as good as the
whole catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GroupLists:
    """The k best items of each group for each user, best first.

    Attributes
    ----------
    ids
        Catalogue rows, int64 [U, G, k]; -1 where the group has no more.
    scores
        Their scores, float32 [U, G, k]; minus infinity where the group has no more.
    order
        Where each comes among the G * k by score, equal ones by row, from 0; int64 [U, G, k].
    ranks
        Place of each in the user's pool, from 0, and the size of the pool for what is not in it;
        int64 [U, G, k].
    """

    ids: Tensor
    scores: Tensor
    order: Tensor
    ranks: Tensor

    def next(self, values: Tensor, taken: Tensor) -> Tensor:
        """Of `values` [U, G, k] those of each group's next item, [U, G].

        Parameters
        ----------
        values
            One of the tensors above, or another of their shape.
        taken
            How many items of each group a user has already, [U, G], below k.
        """
        return values.gather(2, taken.unsqueeze(2)).squeeze(2)


Utility = Callable[[int, Tensor], Tensor]
"""Place from 0 and items taken so far [U, G] to what each group's next item is worth, [U, G]."""

SAME = 1e-12
"""Items whose worth differs by less are worth the same: the rest is rounding."""

Then = Callable[[int, Tensor, Tensor], None]
"""Told after each place from which group it was filled, [U, 1], and whether it was, [U, 1]."""


def fill(
    lists: GroupLists,
    utility: Utility,
    *,
    chosen: Tensor | None = None,
    taken: Tensor | None = None,
    then: Then | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill places one by one with the item that is worth most, equal ones by score, then row.

    Parameters
    ----------
    lists
        What to choose from.
    utility
        What each group's next item is worth; with minus infinity for all groups a place is left
        empty.
    chosen, taken
        Lists of which only the empty places (-1) are filled, [U, k], and how many items of each
        group they hold, [U, G]; empty lists by default. They are not written to.
    then
        Called after each place.

    Returns
    -------
    chosen, taken
        As above.
    """
    users, groups, k = lists.ids.shape
    chosen = torch.full((users, k), -1) if chosen is None else chosen.clone()
    taken = torch.zeros(users, groups, dtype=torch.int64) if taken is None else taken.clone()
    for place in range(k):
        at = taken.clamp(max=k - 1)  # who has all k of a group has a full list
        ids = lists.next(lists.ids, at)
        worth = utility(place, at).masked_fill(ids < 0, -torch.inf)
        best = worth.amax(dim=1, keepdim=True)
        order = lists.next(lists.order, at).masked_fill(worth < best - SAME, groups * k)
        group = order.argmin(dim=1, keepdim=True)  # [U, 1]
        filled = (chosen[:, [place]] < 0) & (best > -torch.inf)
        chosen[:, [place]] = torch.where(filled, ids.gather(1, group), chosen[:, [place]])
        taken.scatter_add_(1, group, filled.long())
        if then is not None:
            then(place, group, filled)
    return chosen, taken
