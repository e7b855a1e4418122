"""A live `BERTModel` of BERT4Rec-VAE-Pytorch, read without importing it.

Left-padded with 0 to the whole window, items are 1..N, and the mask N + 1 comes last. Items are
scored by a linear layer of its own, whose column 0 is the padding's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from steerrec.data import Catalogue
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.wrapping import (
    TokenScheme,
    WrappedRecommender,
    as_catalogue,
    unknown_model,
    with_mask,
)

PAD = 0


def recognises(model: nn.Module) -> bool:
    """Whether this is a BERT4Rec of BERT4Rec-VAE-Pytorch."""
    bert: Any = getattr(model, "bert", None)
    out = getattr(model, "out", None)
    return (
        isinstance(out, nn.Linear)
        and hasattr(bert, "transformer_blocks")
        and hasattr(getattr(bert, "embedding", None), "token")
    )


def from_model(
    model: nn.Module, items: Catalogue | Sequence[int | str], *, source: str | None = None
) -> WrappedRecommender:
    """Make a `Recommender` of a live BERT4Rec of BERT4Rec-VAE-Pytorch.

    Parameters
    ----------
    model
        A `BERTModel`.
    items
        The catalogue, or the external ids in the order of the model's ids 1 to N (its `smap`).
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no such model, or has another number of items.
    """
    if not recognises(model):
        raise unknown_model(model, "BERT4Rec-VAE-Pytorch", "bert.embedding.token and out")
    parts: Any = model
    found = parts.bert.embedding.token.num_embeddings - 2
    return WrappedRecommender(
        model,
        as_catalogue(items, of=model, found=found),
        Site("bert", positions_from=TokenIds("", pad_id=PAD)),
        TokenScheme(1, PAD, "left", _window(parts) - 1, fixed_length=True),
        lambda seqs: parts(seqs)[:, -1],
        lambda: ItemHead(parts.out.weight[1:], parts.out.bias[1:]),
        partial(with_mask, mask_id=found + 1, pad_id=PAD),
        columns=1,
        record={"adapter": "bert4rec_vae", "source": source, "class": type(model).__name__},
    )


def _window(model: Any) -> int:
    table: Tensor = model.bert.embedding.position.pe.weight
    return len(table)
