"""Live models of RePlay (tested with 0.22), read without importing it.

Left-padded; items are 0..N-1, N is the padding, and a mask goes with the ids. There are the legacy
`SasRecModel` and `Bert4RecModel` (what their Lightning modules hold as `_model`) and the newer
`SasRec` and `TwoTower`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.recommender import ItemHead
from steerrec.sites import RealMask, Site, TokenIds
from steerrec.wrapping import (
    TokenScheme,
    WrappedRecommender,
    as_catalogue,
    unknown_model,
    with_mask,
)


def recognises(model: nn.Module) -> bool:
    """Whether this is a sequential model of RePlay."""
    return _is_new(model) or _is_legacy(model)


def from_model(
    model: nn.Module, items: Catalogue | Sequence[int | str], *, source: str | None = None
) -> WrappedRecommender:
    """Make a `Recommender` of a live RePlay model.

    Parameters
    ----------
    model
        The torch model, not the Lightning module around it.
    items
        The catalogue, or the external ids in the order of the encoded ones, 0 to N - 1.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no such model, has another number of items, or reads more than items.
    """
    if not recognises(model):
        raise unknown_model(model, "RePlay", "get_query_embeddings and _head, or body and head")
    parts: Any = model
    found = len(_head(parts))
    catalogue = as_catalogue(items, of=model, found=found)
    masked = _is_legacy(model) and hasattr(parts, "transformer_blocks")
    feature, others = _features(parts)
    if others or getattr(parts, "ti_modification", False):
        raise ModelError(
            f"{type(model).__name__} reads {', '.join(others) or 'timestamps'} besides {feature}; "
            "expected a model of item ids only, which is all that a history here has"
        )
    return WrappedRecommender(
        model,
        catalogue,
        _site(parts, found, feature),
        TokenScheme(0, found, "left", _window(parts) - masked, fixed_length=True),
        partial(_scores, parts),
        partial(_head, parts),
        partial(_masked_inputs if masked else _inputs, feature, found),
        record={"adapter": "replay", "source": source, "class": type(model).__name__},
    )


def _is_new(model: nn.Module) -> bool:
    body = getattr(model, "body", None)
    return hasattr(model, "head") and any(
        hasattr(body, name) for name in ("embedding_aggregator", "query_tower")
    )


def _is_legacy(model: nn.Module) -> bool:
    layers = hasattr(model, "sasrec_layers") or hasattr(model, "transformer_blocks")
    expected = ("get_query_embeddings", "item_embedder", "_head", "forward_step")
    return layers and all(hasattr(model, name) for name in expected)


def _tower(model: Any) -> Any:
    return getattr(model.body, "query_tower", model.body)


def _site(model: Any, pad_id: int, feature: str) -> Site:
    if not _is_new(model) and hasattr(model, "transformer_blocks"):
        passes = getattr(model, "num_passes_over_block", 1)
        real = RealMask("", select=(1,), method="forward_step")
        site = Site("transformer_blocks.-1", positions_from=real)
        return replace(site, call=passes - 1) if passes > 1 else site
    if not _is_new(model):
        ids = TokenIds("item_embedder.item_emb", pad_id=pad_id)
        return Site("output_normalization", positions_from=ids)
    if hasattr(model.body, "query_tower"):
        real = RealMask("", select=("padding_mask",))
        return Site("body.query_tower.output_normalization", positions_from=real)
    ids = TokenIds(f"body.embedder.feature_embedders.{feature}.emb", pad_id=pad_id)
    return Site("body.output_normalization", positions_from=ids)


def _window(model: Any) -> int:
    if _is_new(model):
        return int(_tower(model).embedding_aggregator.pe.num_embeddings)
    embedder = model.item_embedder
    positions = getattr(embedder, "pos_emb", None) or getattr(embedder, "position", None)
    return int(positions.pe.num_embeddings if positions is not None else model.max_len)


def _features(model: Any) -> tuple[str, list[str]]:
    """The feature that holds item ids, and all others."""
    if not _is_new(model) and not hasattr(model.item_embedder, "cat_embeddings"):
        return getattr(model, "item_feature_name", "item_id"), []
    if _is_new(model):
        embedder = _tower(model).embedder
        names, item = list(embedder.feature_embedders), getattr(embedder, "_item_feature_name", "")
    else:
        names = list(model.item_embedder.cat_embeddings)
        item = getattr(getattr(model, "schema", None), "item_id_feature_name", "")
    item = item or names[0]
    return item, [name for name in names if name != item]


@torch.no_grad()
def _head(model: Any) -> ItemHead:
    if _is_new(model):
        tower = getattr(model.body, "item_tower", None)
        return ItemHead(model.body.embedder.get_item_weights() if tower is None else tower())
    if not hasattr(model, "transformer_blocks"):
        return ItemHead(model.item_embedder.item_emb.weight[:-1])
    if hasattr(model._head, "linear"):
        return ItemHead(model._head.linear.weight, model._head.linear.bias)
    return ItemHead(model._head.get_item_embeddings(), model._head.out_bias)


def _inputs(feature: str, pad_id: int, ids: Tensor) -> dict[str, Any]:
    return {"features": {feature: ids}, "masks": [ids != pad_id]}


def _masked_inputs(feature: str, pad_id: int, ids: Tensor) -> dict[str, Any]:
    """With a place to predict at the end; neither it nor padding has an id in the model."""
    ids = with_mask(ids, pad_id + 1, pad_id=pad_id)
    items = ids.masked_fill(ids >= pad_id, 0)
    return {"features": {feature: items}, "masks": [ids != pad_id, ids < pad_id]}


def _scores(model: Any, batch: dict[str, Any]) -> Tensor:
    scores: Tensor
    if _is_new(model):
        (real,) = batch["masks"]
        scores = model(feature_tensors=batch["features"], padding_mask=real)["logits"]
    else:
        scores = model.predict(batch["features"], *batch["masks"])
    return scores
