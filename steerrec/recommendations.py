"""Lists as a table: one row a recommendation, with the data's own ids and titles."""

from __future__ import annotations

import numpy as np
import polars as pl

from steerrec.data import Catalogue
from steerrec.ranking import TopK


def recommendation_frame(catalogue: Catalogue, user_ids: pl.Series, lists: TopK) -> pl.DataFrame:
    """Columns `user_id`, `rank` (from 1), `item_id`, `title` and `score`; no row for empty slots.

    Parameters
    ----------
    catalogue
        The items.
    user_ids
        External ids of the U users.
    lists
        Their lists [U, k], on the CPU.
    """
    users, k = lists.ids.shape
    frame = pl.DataFrame(
        {
            "user_id": user_ids.gather(np.repeat(np.arange(users), k)),
            "rank": np.tile(np.arange(1, k + 1), users),
            "row": lists.ids.flatten().numpy(),
            "score": lists.scores.flatten().numpy(),
        }
    ).filter(pl.col("row") >= 0)
    items = catalogue.frame.select("item_id", "title")[frame["row"]]
    frame = pl.concat([frame.drop("row"), items], how="horizontal")
    return frame.select("user_id", "rank", "item_id", "title", "score")
