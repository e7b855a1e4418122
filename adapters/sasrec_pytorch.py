"""A live `SASRec` of SASRec.pytorch (pmixer), read without importing it.

Left-padded with 0 to the whole window, items are 1..N; `predict` takes NumPy arrays only. Whether
the model normalises before or after its layers, which its checkpoints do not tell, is in its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from steerrec.data import Catalogue
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.wrapping import TokenScheme, WrappedRecommender, as_catalogue, unknown_model

PAD = 0


def recognises(model: nn.Module) -> bool:
    """Whether this is a SASRec of SASRec.pytorch."""
    expected = ("log2feats", "predict", "item_emb", "pos_emb", "last_layernorm")
    return all(hasattr(model, name) for name in expected)


def from_model(
    model: nn.Module,
    items: Catalogue | Sequence[int | str],
    *,
    max_length: int | None = None,
    source: str | None = None,
) -> WrappedRecommender:
    """Make a `Recommender` of a live SASRec of SASRec.pytorch.

    Parameters
    ----------
    model
        Of any version: positions from 0, or from 1 with a row for padding.
    items
        The catalogue, or the external ids in the order of the model's ids 1 to N.
    max_length
        The `maxlen` that it was trained with, where that is less than its position embedding has.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no such model, or has another number of items.
    """
    if not recognises(model):
        raise unknown_model(model, "SASRec.pytorch", "log2feats, predict, item_emb and pos_emb")
    parts: Any = model
    catalogue = as_catalogue(items, of=model, found=parts.item_emb.num_embeddings - 1)
    positions = parts.pos_emb
    window = max_length or positions.num_embeddings - (positions.padding_idx is not None)
    return WrappedRecommender(
        model,
        catalogue,
        Site("last_layernorm", positions_from=TokenIds("item_emb", pad_id=PAD)),
        TokenScheme(1, PAD, "left", window, fixed_length=True),
        partial(_scores, parts),
        lambda: ItemHead(parts.item_emb.weight[1:]),
        lambda ids: ids.cpu().numpy(),
        record={"adapter": "sasrec_pytorch", "source": source, "class": type(model).__name__},
    )


def _scores(model: Any, log_seqs: np.ndarray[Any, Any]) -> Tensor:
    items = np.arange(1, model.item_emb.num_embeddings)
    scores: Tensor = model.predict(np.arange(len(log_seqs)), log_seqs, items)
    return scores.reshape(len(log_seqs), -1)
