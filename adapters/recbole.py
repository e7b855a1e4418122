"""Live sequential models of RecBole (tested with 1.2), read without importing it.

Right-padded with 0, items are 1..N in the order of the dataset's `field2id_token`. What scores is
`full_sort_predict`, which calls the model's `forward` directly. Checkpoints are in
`recbole_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.conformance import conformance
from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.wrapping import TokenScheme, WrappedRecommender, as_catalogue, unknown_model, wrap

PAD = 0


def recognises(model: nn.Module) -> bool:
    """Whether this is a sequential model of RecBole."""
    expected = ("full_sort_predict", "ITEM_SEQ", "ITEM_SEQ_LEN", "n_items", "max_seq_length")
    return all(hasattr(model, name) for name in expected)


def from_model(
    model: nn.Module, items: Catalogue | Sequence[int | str], *, source: str | None = None
) -> WrappedRecommender:
    """Make a `Recommender` of a live RecBole model.

    SASRec, BERT4Rec, GRU4Rec, NARM and CORE are known; of any other sequential model that scores
    items by a dot product or cosine, the site is looked for. Each is checked against its own
    scores.

    Parameters
    ----------
    model
        A trained model, such as `trainer.model`.
    items
        The catalogue, or the item tokens from id 1 on: ``dataset.field2id_token["item_id"][1:]``.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no sequential model, has another number of items, needs more than a history of
        items, or scores in a way that is no item head on a user vector.
    """
    if not recognises(model):
        raise unknown_model(model, "RecBole's sequential ones", "full_sort_predict and ITEM_SEQ")
    parts: Any = model
    catalogue = as_catalogue(items, of=model, found=parts.n_items - 1)
    record = {"adapter": "recbole", "source": source, "class": type(model).__name__}
    for marks, site, head in _KNOWN:
        if all(hasattr(model, name) for name in marks):
            rec = WrappedRecommender(
                model,
                catalogue,
                site,
                TokenScheme(1, PAD, "right", parts.max_seq_length),
                partial(_scores, parts),
                partial(head, parts),
                partial(_interaction, parts),
                columns=1,
                record=record,
            )
            if conformance(rec).ok:
                return rec
            break
    _refuse_more_than_items(parts)
    found = wrap(
        model,
        catalogue,
        score=partial(_scores, parts),
        make_batch=partial(_interaction, parts),
        max_length=parts.max_seq_length,
        first_id=1,
        pad_id=PAD,
        padding="right",
    )
    found.record = record
    return found


@torch.no_grad()
def _refuse_more_than_items(model: Any) -> None:
    table = next(model.parameters())
    ids = torch.ones(1, model.max_seq_length, dtype=torch.int64, device=table.device)
    try:
        _scores(model.eval(), _interaction(model, ids))
    except KeyError as error:
        raise ModelError(
            f"RecBole's {type(model).__name__} reads {error} besides {model.ITEM_SEQ!r} and "
            f"{model.ITEM_SEQ_LEN!r}; expected a model of item ids only, which is all that a "
            "history here has"
        ) from error


def _interaction(model: Any, ids: Tensor) -> dict[str, Tensor]:
    return {model.ITEM_SEQ: ids, model.ITEM_SEQ_LEN: (ids != PAD).sum(dim=1)}


def _scores(model: Any, interaction: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model.full_sort_predict(interaction)
    return scores.reshape(len(interaction[model.ITEM_SEQ]), -1)


def _dot(model: Any) -> ItemHead:
    bias = getattr(model, "output_bias", None)
    weight = model.item_embedding.weight[1 : model.n_items]
    return ItemHead(weight, bias[1:] if isinstance(bias, Tensor) else None)


def _core(model: Any) -> ItemHead:
    """Cosine, but the vectors have unit length already where they can be read or replaced."""
    weight = model.item_embedding.weight[1 : model.n_items]
    return ItemHead(F.normalize(weight, dim=-1), scale=1 / model.temperature)


def _site(path: str) -> Site:
    return Site(path, positions_from=TokenIds("item_embedding", pad_id=PAD))


_KNOWN: tuple[tuple[tuple[str, ...], Site, Callable[[Any], ItemHead]], ...] = (
    (("reconstruct_test_data", "output_ln"), _site("output_ln"), _dot),
    (("reconstruct_test_data", "trm_encoder"), _site("trm_encoder.layer.-1"), _dot),
    (("net", "sess_dropout", "temperature"), Site("", method="forward", layout="BH"), _core),
    (("a_1", "a_2", "v_t", "ct_dropout", "b"), Site("b", layout="BH"), _dot),
    (("gru_layers", "dense"), _site("dense"), _dot),
    (("trm_encoder", "position_embedding"), _site("trm_encoder.layer.-1"), _dot),
)
"""What marks a known model, where its user vector is, and how it scores items."""
