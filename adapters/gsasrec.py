"""A live `GSASRec` of gSASRec-pytorch, read without importing it.

Left-padded with N + 1 to the whole window; items are 1..N, and id 0 is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from steerrec.data import Catalogue
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.wrapping import TokenScheme, WrappedRecommender, as_catalogue, unknown_model


def recognises(model: nn.Module) -> bool:
    """Whether this is a gSASRec."""
    expected = ("get_predictions", "item_embedding", "position_embedding", "seq_norm")
    return all(hasattr(model, name) for name in expected)


def from_model(
    model: nn.Module, items: Catalogue | Sequence[int | str], *, source: str | None = None
) -> WrappedRecommender:
    """Make a `Recommender` of a live gSASRec.

    Parameters
    ----------
    model
        With an output embedding of its own, or scoring by the one at the input.
    items
        The catalogue, or the external ids in the order of the model's ids 1 to N.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no gSASRec, or has another number of items.
    """
    if not recognises(model):
        raise unknown_model(model, "gSASRec-pytorch", "get_predictions, item_embedding, seq_norm")
    parts: Any = model
    found = parts.item_embedding.num_embeddings - 2
    catalogue = as_catalogue(items, of=model, found=found)
    pad_id = found + 1
    return WrappedRecommender(
        model,
        catalogue,
        Site("seq_norm", positions_from=TokenIds("item_embedding", pad_id=pad_id)),
        TokenScheme(1, pad_id, "left", parts.position_embedding.num_embeddings, fixed_length=True),
        partial(_scores, parts, found),
        partial(_head, parts, found),
        record={"adapter": "gsasrec", "source": source, "class": type(model).__name__},
    )


def _head(model: Any, items: int) -> ItemHead:
    table = getattr(model, "output_embedding", None) or model.item_embedding
    return ItemHead(table.weight[1 : items + 1])


def _scores(model: Any, items: int, ids: Tensor) -> Tensor:
    """All items, brought from the order of their scores into that of their ids."""
    indices, values = model.get_predictions(ids, items)
    scores: Tensor = values.new_empty(len(ids), items).scatter_(1, indices - 1, values)
    return scores
