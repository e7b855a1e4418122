"""The last places of every list for the least exposed items: a control, no method to use.

It wins any exposure metric at a small price in nDCG, and says what such a win is worth: what it
puts there has nothing to do with the user. The places of all users are dealt out so that the items
that the rest of the lists shows least come up to one level; nobody gets an item twice, or one that
is left out for them. O(U * k + N) a setting, and a sort of the places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerrec.rerank.base import Need, Reranker, check_range
from steerrec.rerank.candidates import Candidates

_ROUNDS = 100


@dataclass(frozen=True)
class SlotFilling(Reranker):
    """Places for the least exposed items.

    Attributes
    ----------
    share
        The share of each list, from its end, that they get; 0 changes nothing. Where that is no
        whole number of places, some users give one more than others.
    """

    name: ClassVar[str] = "slot-filling"
    strength: ClassVar[str] = "share"
    settings: ClassVar[tuple[float, ...]] = tuple(n / 20 for n in range(20))
    needs: ClassVar[tuple[Need, ...]] = ("pool",)
    control: ClassVar[bool] = True

    share: float = 0.1

    def __post_init__(self) -> None:
        check_range("share", self.share, 0, 1)

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists with filled places, [U, k]."""
        generator = torch.Generator().manual_seed(candidates.seed)
        lists = candidates.base.clone()
        users, k = lists.shape
        total = round(self.share * k * users)
        given = torch.full((users,), total // max(users, 1))
        given[torch.randperm(users, generator=generator)[: total - int(given.sum())]] += 1
        user, place = (torch.arange(k) >= k - given[:, None]).nonzero(as_tuple=True)  # [total]
        lists[user, place] = -1
        exposure = torch.bincount(lists[lists >= 0], minlength=len(candidates.labels))
        items = _least_exposed(exposure, total, generator)
        taken = _taken(candidates, lists)
        items = _without_repeats(items, user, taken, len(exposure), generator)
        lists[user, place] = items
        return _from_the_pool(lists, candidates)


def _least_exposed(exposure: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """Items [total] that bring the least exposed ones up to one level, in random order."""
    ordered = exposure.sort().values
    # how many places it takes to bring all lower ones up to the n-th
    needed = ordered * torch.arange(len(ordered)) - (ordered.cumsum(0) - ordered)
    lower = int(torch.searchsorted(needed, total, right=True))  # items that get places
    level = (total + int(ordered[:lower].sum())) // lower
    missing = (level - exposure).clamp(min=0)
    shuffled = torch.randperm(len(exposure), generator=generator)
    over = shuffled[exposure[shuffled] <= level][: total - int(missing.sum())]
    missing[over] += 1
    items = torch.repeat_interleave(torch.arange(len(exposure)), missing)
    return items[torch.randperm(total, generator=generator)]


def _taken(candidates: Candidates, lists: Tensor) -> Tensor:
    """User * N + item, sorted, of what a user cannot be given: listed already, or left out."""
    items = len(candidates.labels)
    user, place = (lists >= 0).nonzero(as_tuple=True)
    pairs = [user * items + lists[user, place]]
    if candidates.seen is not None:
        lengths = torch.from_numpy(candidates.seen.lengths.copy())
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        pairs.append(owner * items + torch.from_numpy(candidates.seen.items.copy()))
    return torch.cat(pairs).sort().values


def _without_repeats(
    items: Tensor, user: Tensor, taken: Tensor, num_items: int, generator: torch.Generator
) -> Tensor:
    """The same items dealt out again where a user could not be given theirs; -1 if that fails."""
    items = items.clone()
    for _ in range(_ROUNDS):
        clash = _clashes(items, user, taken, num_items)
        if not len(clash):
            return items
        others = torch.randint(len(items), (len(clash),), generator=generator)
        again = torch.cat([clash, others]).unique()
        items[again] = items[again[torch.randperm(len(again), generator=generator)]]
    items[_clashes(items, user, taken, num_items)] = -1
    return items


def _clashes(items: Tensor, user: Tensor, taken: Tensor, num_items: int) -> Tensor:
    pairs, order = (user * num_items + items).sort(stable=True)
    repeated = torch.zeros(len(pairs), dtype=torch.bool)
    repeated[1:] = pairs[1:] == pairs[:-1]
    if len(taken):
        at = torch.searchsorted(taken, pairs).clamp(max=len(taken) - 1)
        repeated |= taken[at] == pairs
    return order[repeated]


def _from_the_pool(lists: Tensor, candidates: Candidates) -> Tensor:
    """Empty places filled with the user's best items that are not listed yet, best first."""
    users = (lists < 0).any(dim=1).nonzero()[:, 0]
    rows, pool = lists[users], candidates.ids[users]  # [R, k], [R, m]
    listed = rows.sort(dim=1).values
    at = torch.searchsorted(listed, pool).clamp(max=rows.shape[1] - 1)
    free = (pool >= 0) & (listed.gather(1, at) != pool)
    pool = pool.masked_fill(~free, -1)
    pool = pool.gather(1, free.byte().argsort(dim=1, descending=True, stable=True))
    empty = rows < 0
    nth = (empty.cumsum(dim=1) - 1).clamp(min=0)  # of a user's empty places
    lists[users] = torch.where(empty, _nth(pool, nth), rows)
    return lists


def _nth(values: Tensor, nth: Tensor) -> Tensor:
    """The n-th of each row [R, m], -1 beyond its end, [R, k]."""
    found = values.gather(1, nth.clamp(max=values.shape[1] - 1))
    return found.masked_fill(nth >= values.shape[1], -1)
