"""Live transformers backbones whose words are items: causal (GPT-2, Llama) and masked (BERT).

Three shapes are known: a language model with its own head (`GPT2LMHeadModel`, `BertForMaskedLM`); a
backbone with an item embedding before and a linear `head` after it; and Cornac's, with `item_emb`,
`backbone` and `item_biases`. What the objects do not hold has to be said: the side of the padding
and the id of the mask token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.wrapping import (
    Side,
    TokenScheme,
    WrappedRecommender,
    as_catalogue,
    unknown_model,
    with_mask,
)


def recognises(model: nn.Module) -> bool:
    """Whether this is a transformers backbone with an item embedding and a way to score items."""
    return _is_language_model(model) or _is_cornac(model) or _is_headed(model)


def from_model(
    model: nn.Module,
    items: Catalogue | Sequence[int | str],
    *,
    padding: Side | None = None,
    first_id: int | None = None,
    pad_id: int | None = None,
    mask_id: int | None = None,
    max_length: int | None = None,
    source: str | None = None,
) -> WrappedRecommender:
    """Make a `Recommender` of a live transformers model over item ids.

    Parameters
    ----------
    model
        Of one of the three shapes above.
    items
        The catalogue, or the external ids in the order of the model's ids.
    padding
        The side that the model was trained with; Cornac's is the left one.
    first_id
        The id of the first item: 1 if 0 is the padding, else 0, where there is no other choice.
    pad_id
        By default what the embedding or the configuration says.
    mask_id
        The token at whose place a masked model predicts. A model that reads both ways needs one;
        Cornac's knows it.
    max_length
        How many tokens the model reads; by default as many as it has positions for.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no such model, or something that it does not hold was not said.
    """
    if not recognises(model):
        raise unknown_model(
            model, "transformers", "a language model, or a backbone beside an item embedding"
        )
    parts: Any = model
    name, cornac = type(model).__name__, _is_cornac(model)
    table, backbone = _embedding(parts), _backbone(parts)
    told = (pad_id, table.padding_idx, backbone.config.pad_token_id)
    pad = next((number for number in told if number is not None), None)
    padding = "left" if padding is None and cornac else padding
    if padding is None or pad is None:
        raise ModelError(
            f"{name} does not say how histories are padded; expected padding='left' or 'right', as "
            f"it was trained, and the pad_id, given to {__name__}.from_model"
        )
    if mask_id is None and _reads_both_ways(parts):
        mask_id = parts.mask_idx if cornac else None
        if mask_id is None:
            raise ModelError(
                f"{name} reads both ways, so it predicts at the place of a mask token; expected "
                f"its mask_id, given to {__name__}.from_model"
            )
    catalogue = as_catalogue(items, of=model, found=getattr(model, "item_num", None))
    first = first_id if first_id is not None else 1 if pad == 0 else 0
    last = first + len(items) - 1
    taken = [token for token in (pad, mask_id) if token is not None and first <= token <= last]
    if last >= table.num_embeddings or taken:
        raise ModelError(
            f"{len(items)} items from id {first} on do not fit {name}, which has "
            f"{table.num_embeddings} ids, {pad} for padding and {mask_id} for the mask; expected "
            "other items, or first_id, pad_id and mask_id as it was trained"
        )
    window = max_length or getattr(parts, "maxlen", backbone.config.max_position_embeddings)
    where = TokenIds(_path(model, table), pad_id=pad)
    if _is_language_model(model):
        site = Site(_path(model, parts.get_output_embeddings()), "input", positions_from=where)
    else:
        select = ("last_hidden_state",)
        site = Site(_path(model, backbone), select=select, positions_from=where)
    return WrappedRecommender(
        model,
        catalogue,
        site,
        TokenScheme(first, pad, padding, window - (mask_id is not None), padding == "left"),
        partial(_cornac_scores if cornac else _scores, parts),
        partial(_head, parts, slice(first, last + 1)),
        partial(_inputs, cornac, pad, mask_id),
        columns=first,
        record={"adapter": "huggingface", "source": source, "class": name},
    )


def _is_transformers(module: Any) -> bool:
    return hasattr(getattr(module, "config", None), "model_type")


def _is_language_model(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not _is_transformers(model) or getattr(model.config, "is_encoder_decoder", False):
        return False
    return isinstance(head, nn.Linear)


def _is_cornac(model: nn.Module) -> bool:
    expected = ("encode", "predict", "item_emb", "item_biases")
    return _is_transformers(getattr(model, "backbone", None)) and all(
        hasattr(model, name) for name in expected
    )


def _is_headed(model: nn.Module) -> bool:
    inside = any(_is_transformers(child) for child in model.children())
    outside = any(isinstance(child, nn.Embedding) for child in model.children())
    return inside and outside and isinstance(getattr(model, "head", None), nn.Linear)


def _backbone(model: Any) -> Any:
    if _is_transformers(model):
        return model
    return next(child for child in model.children() if _is_transformers(child))


def _embedding(model: Any) -> nn.Embedding:
    if _is_transformers(model):
        found: nn.Embedding = model.get_input_embeddings()
        return found
    return next(child for child in model.children() if isinstance(child, nn.Embedding))


def _path(model: nn.Module, module: nn.Module) -> str:
    names: dict[int, str] = {id(found): name for name, found in model.named_modules()}
    return names[id(module)]


@torch.no_grad()
def _reads_both_ways(model: Any) -> bool:
    """Whether the first position sees the second."""
    model.eval()
    backbone = model.base_model if _is_transformers(model) else _backbone(model)
    table = _embedding(model)
    ids = torch.tensor([[0, 1], [0, 2]], device=table.weight.device) % table.num_embeddings
    states = backbone(inputs_embeds=table(ids))[0][:, 0]
    return not torch.allclose(states[0], states[1], atol=1e-6)


def _head(model: Any, rows: slice) -> ItemHead:
    if _is_cornac(model):
        return ItemHead(model.item_emb.weight[rows], model.item_biases.weight[rows, 0])
    head = model.get_output_embeddings() if _is_language_model(model) else model.head
    return ItemHead(head.weight[rows], None if head.bias is None else head.bias[rows])


def _inputs(bare: bool, pad_id: int, mask_id: int | None, ids: Tensor) -> Any:
    if mask_id is not None:
        ids = with_mask(ids, mask_id, pad_id=pad_id)
    return ids if bare else {"input_ids": ids, "attention_mask": (ids != pad_id).long()}


def _scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits at the last real position, [B, V]."""
    output = model(**batch)
    logits: Tensor = output if isinstance(output, Tensor) else output[0]
    real = batch["attention_mask"]
    last = (real * torch.arange(real.shape[1], device=real.device)).argmax(dim=1)
    return logits[torch.arange(len(logits), device=logits.device), last]


def _cornac_scores(model: Any, ids: Tensor) -> Tensor:
    scores = torch.from_numpy(model.predict(None, ids))
    return scores.reshape(len(ids), -1).to(ids.device)
