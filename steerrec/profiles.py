"""Contrasts between two groups of items, and the synthetic users built from each group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steerrec.activations import sample_prefixes
from steerrec.data import HEAD, TAIL, Catalogue, Histories
from steerrec.errors import DataError
from steerrec.item_properties import item_values, taste


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two groups of items, A and B, whose difference is looked for in the neurons.

    Attributes
    ----------
    name
        File name of the attribution table and what the command line calls it.
    group_a, group_b
        Catalogue rows of each group.
    label_a, label_b
        What the groups are called in tables: `popular` and `unpopular`, say.
    definition
        How the groups were made, JSON-able; stored with the table.
    """

    name: str
    group_a: NDArray[np.int64]
    group_b: NDArray[np.int64]
    label_a: str
    label_b: str
    definition: dict[str, Any]

    def __post_init__(self) -> None:
        for label, group in ((self.label_a, self.group_a), (self.label_b, self.group_b)):
            if not len(group):
                raise DataError(
                    f"contrast {self.name!r}: no items are {label}; expected at least one"
                )

    def describe(self) -> dict[str, Any]:
        """Name, groups and definition, JSON-able."""
        return {
            "name": self.name,
            "group_a": {"label": self.label_a, "items": len(self.group_a)},
            "group_b": {"label": self.label_b, "items": len(self.group_b)},
            "definition": self.definition,
        }


def popularity_contrast(catalogue: Catalogue) -> Contrast:
    """Popular (A: head) against unpopular items (B: tail), by training interactions.

    The groups are those of Ahmadov & Mansoury (arXiv 2508.17297): the fewest leading items that
    hold at most a fifth of the interactions, and the same from the other end.
    """
    labels = catalogue.groups.labels
    return Contrast(
        name="popularity",
        group_a=np.flatnonzero(labels == HEAD),
        group_b=np.flatnonzero(labels == TAIL),
        label_a="popular",
        label_b="unpopular",
        definition={"kind": "popularity", "head_share": 0.2, "tail_share": 0.2},
    )


def synthetic_users(
    train: Histories,
    group: NDArray[np.int64],
    *,
    n: int = 8192,
    max_length: int,
    seed: int = 0,
) -> Histories:
    """Users of realistic length whose items all come from one group.

    The length of each is that of a training prefix, at most `max_length`; its items are drawn
    uniformly with replacement from the group (arXiv 2508.17297). Where the histories have columns,
    such as times, a synthetic user keeps those of the prefix, position by position: only the items
    are exchanged, so that the two groups of a contrast differ in nothing else.

    Parameters
    ----------
    train
        Training histories, for the lengths and the columns.
    group
        Catalogue rows to draw from.
    n
        How many users.
    max_length
        The model's window.
    seed
        The same seed gives the same lengths and columns for any group.
    """
    lengths_rng, items_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    users, lengths = sample_prefixes(train, n, lengths_rng)
    prefixes = train.prefixes(users, lengths, max_length)
    items = items_rng.choice(group, len(prefixes.items))
    return replace(prefixes, items=items, user_ids=pl.Series("user_id", np.arange(n)))


def users_by_taste(
    train: Histories,
    catalogue: Catalogue,
    *,
    max_length: int,
    share: float = 0.2,
    contrast: Contrast | None = None,
) -> tuple[Histories, Histories]:
    """Real users with the most and with the least of a contrast in their history: two groups.

    For popularity, taste is the mean of log(1 + training interactions) over the items of a history;
    for any other contrast the share of items of group A less that of group B. Users of equal taste
    are in the order of their rows.

    Parameters
    ----------
    train
        Training histories.
    catalogue
        Their items.
    max_length
        The model's window.
    share
        How many of the users are in each group.
    contrast
        Popularity by default.
    """
    some = np.flatnonzero(train.lengths > 0)
    values = item_values(contrast or popularity_contrast(catalogue), catalogue).values
    order = some[np.argsort(taste(train, values)[some], kind="stable")]
    n = max(1, int(share * len(order)))
    least, most = (train.select(np.sort(part)) for part in (order[:n], order[-n:]))
    return most.truncate(max_length), least.truncate(max_length)
