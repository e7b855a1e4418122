"""Live torch networks of RecTools (tested with 0.19), read without importing it.

Left-padded with 0 to the whole window. The transformer backbone is what a fitted model holds as
`torch_model`; its items start after the extra tokens: at 1 for SASRec, at 2 for BERT4Rec, whose
id 1 is the mask. The flat network of `rectools.fast_transformers` has items from 1.

An HSTU with time attention reads the time of each interaction, in seconds, and that of the request,
which is taken to come at the time of the latest interaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerrec.data import TIME, Catalogue
from steerrec.errors import DataError, ModelError
from steerrec.handles import FastPathOff
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.wrapping import (
    TokenScheme,
    WrappedRecommender,
    as_catalogue,
    unknown_model,
    with_mask,
)

PAD, MASK = 0, 1
_SECONDS = 1e11  # in the year 5138


def recognises(model: nn.Module) -> bool:
    """Whether this is a transformer backbone or a flat network of RecTools."""
    return _is_backbone(model) or _is_flat(model)


def from_model(
    model: nn.Module,
    items: Catalogue | Sequence[int | str],
    *,
    max_length: int | None = None,
    source: str | None = None,
) -> WrappedRecommender:
    """Make a `Recommender` of a live RecTools network.

    Parameters
    ----------
    model
        ``fitted.torch_model`` of a `SASRecModel` or `BERT4RecModel`, or a `FlatSASRecNet`.
    items
        The catalogue, or the external ids in the order of the internal ones, extra tokens left out:
        ``fitted.data_preparator.item_id_map.external_ids[n_item_extra_tokens:]``.
    max_length
        The model's `session_max_len`, where it has no position embedding to tell.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no such network, has another number of items, or its window is not known.
    """
    parts: Any = model
    record = {"adapter": "rectools", "source": source, "class": type(model).__name__}
    if _is_flat(model):
        catalogue = as_catalogue(items, of=model, found=parts.item_emb.num_embeddings - 1)
        return WrappedRecommender(
            model,
            catalogue,
            Site("final_ln", positions_from=TokenIds("item_emb", pad_id=PAD)),
            TokenScheme(1, PAD, "left", parts.pos_emb.num_embeddings, fixed_length=True),
            partial(_flat_scores, parts),
            lambda: ItemHead(parts.item_emb.weight[1:]),
            record=record,
        )
    if not _is_backbone(model):
        raise unknown_model(model, "RecTools", "a torch_model, or a flat network with encode_last")
    with torch.no_grad():
        rows = len(parts.item_model.get_all_embeddings())
    timed = any(getattr(module, "relative_time_attention", False) for module in model.modules())
    masked = not getattr(parts, "use_causal_attn", True)
    catalogue = as_catalogue(items, of=model, found=rows - 1 - masked)
    window = max_length or _window(parts)
    first = 2 if masked else 1
    layers = "transformer_layers"
    norm = hasattr(parts.transformer_layers, "last_layernorm")
    return WrappedRecommender(
        model,
        catalogue,
        Site(f"{layers}.last_layernorm" if norm else layers, positions_from="last"),
        TokenScheme(first, PAD, "left", window - masked, fixed_length=True),
        partial(_backbone_scores, parts),
        partial(_backbone_head, parts, first),
        _timed_batch
        if timed
        else lambda ids: {"x": with_mask(ids, MASK, pad_id=PAD) if masked else ids},
        columns=first,
        record=record,
        reads={TIME: 0} if timed else {},
    )


def _is_backbone(model: nn.Module) -> bool:
    parts = ("item_model", "pos_encoding_layer", "transformer_layers", "similarity_module")
    return hasattr(model, "encode_sessions") and all(hasattr(model, name) for name in parts)


def _is_flat(model: nn.Module) -> bool:
    parts = ("encode_last", "all_item_embeddings", "item_emb", "pos_emb", "final_ln")
    return all(hasattr(model, name) for name in parts)


def _window(model: Any) -> int:
    positions = getattr(model.pos_encoding_layer, "pos_emb", None)
    blocks = getattr(model.transformer_layers, "stu_blocks", None)
    found = getattr(positions, "num_embeddings", None)
    if found is None and blocks is not None:
        found = getattr(blocks[0], "session_max_len", None)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} has no position embedding, so its window is not known; "
            "expected max_length, the session_max_len that it was trained with"
        )
    return int(found)


def _is_cosine(model: Any) -> bool:
    distance = getattr(model.similarity_module, "distance", None)
    return str(getattr(distance, "value", distance)) == "cosine"


def _timed_batch(ids: Tensor, time: Tensor) -> dict[str, Tensor]:
    """Ids and times [B, L] as an HSTU takes them: with the time of the request, [B, L + 1].

    As `recommend` pads: with the time of the oldest interaction.
    """
    latest = float(time.max()) if time.numel() else 0.0
    if latest > _SECONDS:
        raise DataError(
            f"time goes up to {latest:.3g}; RecTools reads seconds since 1970: dates are read as "
            "microseconds, so divide the time of the interactions by 1,000,000"
        )
    time = time.long()
    oldest = time.gather(1, (ids != PAD).long().argmax(dim=1, keepdim=True))
    seen = torch.where(ids != PAD, time, oldest)
    return {"x": ids, "unix_ts": torch.cat([seen, seen[:, -1:]], dim=1)}


def _backbone_scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As `recommend` does: the last position, by the similarity module's distance."""
    item_embs = model.item_model.get_all_embeddings()
    users = model.encode_sessions(batch, item_embs)[:, -1, :]
    users = model.similarity_module.session_tower_forward(users)
    if hasattr(model.similarity_module, "item_tower_forward"):
        item_embs = model.similarity_module.item_tower_forward(item_embs)
    return ItemHead(item_embs, normalize=_is_cosine(model)).scores(users)


def _backbone_head(model: Any, first: int) -> ItemHead:
    weight = model.item_model.get_all_embeddings()[first:]
    return ItemHead(weight, normalize=_is_cosine(model))


def _flat_scores(model: Any, ids: Tensor) -> Tensor:
    """Without torch's fast path for multi-head attention, which gives NaN where rows are padded."""
    off = FastPathOff()
    try:
        users = model.encode_last(ids)
    finally:
        off.remove()
    scores: Tensor = users @ model.all_item_embeddings().T
    return scores
