"""Who has the list slots: the share of each value of an item attribute, such as a genre."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from steerrec.contrasts import attribute_column, attribute_values
from steerrec.data import Catalogue


def slot_shares(ids: Tensor, catalogue: Catalogue, column: str) -> dict[str, float]:
    """The share of list slots whose item has each value of an attribute, in order of the values.

    An item may have several values, so that shares can sum to more than 1.

    Parameters
    ----------
    ids
        Catalogue rows of the lists, [U, k]; -1 in empty slots.
    catalogue
        Items and their attributes.
    column
        The attribute, such as `genres`.
    """
    listed = ids[ids >= 0]
    slots = torch.bincount(listed, minlength=len(catalogue)).numpy()
    values = attribute_values(attribute_column(catalogue, column)).unique()
    counted = values.with_columns(pl.Series("slots", slots).gather(values["row"]))
    totals = counted.group_by("value").agg(pl.col("slots").sum()).sort("value")
    return {value: count / max(len(listed), 1) for value, count in totals.rows()}
