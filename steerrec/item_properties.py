"""What a contrast asks of each item as one number, and the taste of users for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from steerrec.data import Catalogue, Histories

if TYPE_CHECKING:
    from steerrec.profiles import Contrast


@dataclass(frozen=True, eq=False)
class ItemValues:
    """One number an item, larger the more it is of group A.

    Attributes
    ----------
    values
        Float64 [N].
    counted
        Which items have a part in correlations, bool [N].
    """

    values: NDArray[np.float64]
    counted: NDArray[np.bool_]


def item_values(contrast: Contrast, catalogue: Catalogue) -> ItemValues:
    """The property of items that a contrast is about.

    For popularity it is log(1 + training interactions), of all items. For any other contrast 1 in
    group A, -1 in group B and 0 in neither or both; only items of the groups are counted.

    Parameters
    ----------
    contrast
        Groups A and B.
    catalogue
        Its items.
    """
    if contrast.definition.get("kind") == "popularity":
        values = np.log1p(catalogue.counts.astype(np.float64))
        return ItemValues(values, np.ones(len(catalogue), dtype=bool))
    inside = np.zeros((2, len(catalogue)), dtype=bool)
    inside[0, contrast.group_a] = inside[1, contrast.group_b] = True
    values = inside[0].astype(np.float64) - inside[1]
    return ItemValues(values, inside[0] | inside[1])


def taste(histories: Histories, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean value of the items of each history, [U]; 0 for an empty one."""
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    total = np.bincount(owner, values[histories.items], minlength=len(histories))
    return total / np.maximum(histories.lengths, 1)
