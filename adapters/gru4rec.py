"""A live `GRU4RecModel` of the official GRU4Rec in PyTorch, read without importing it.

Items are 0..N-1 and there is no padding: the model takes one item of each session a step and keeps
the states. Sessions are put side by side so that all end at the last step; only there are items
scored, and that is the call at whose input the user vector is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerrec.data import Catalogue
from steerrec.recommender import ItemHead
from steerrec.sites import Site
from steerrec.wrapping import TokenScheme, WrappedRecommender, as_catalogue, unknown_model

BEFORE = -1  # a session has not begun


def recognises(model: nn.Module) -> bool:
    """Whether this is the network of an official GRU4Rec."""
    expected = ("embed", "hidden_step", "score_items", "G", "Wy", "By")
    return all(hasattr(model, name) for name in expected)


def from_model(
    model: nn.Module,
    items: Catalogue | Sequence[int | str],
    *,
    max_length: int = 50,
    source: str | None = None,
) -> WrappedRecommender:
    """Make a `Recommender` of a live GRU4Rec.

    Parameters
    ----------
    model
        ``gru.model`` of a fitted `GRU4Rec`, with any of its three kinds of input.
    items
        The catalogue, or the external ids in the order of ``itemidmap``.
    max_length
        How many of a session's latest items are read; the model itself sets no bound.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If it is no such model, or has another number of items.
    """
    if not recognises(model):
        raise unknown_model(model, "the official GRU4Rec", "embed, hidden_step and score_items")
    parts: Any = model
    found = getattr(model, "n_items", parts.Wy.num_embeddings)
    return WrappedRecommender(
        model,
        as_catalogue(items, of=model, found=found),
        Site("", method="score_items", at="input", select=(0,), layout="BH"),
        TokenScheme(0, BEFORE, "left", max_length),
        partial(_scores, parts),
        lambda: ItemHead(parts.Wy.weight[:found], parts.By.weight[:found, 0]),
        record={"adapter": "gru4rec", "source": source, "class": type(model).__name__},
    )


def _scores(model: Any, ids: Tensor) -> Tensor:
    """What `forward` gives at the last step, without scoring at the steps before."""
    widths = [cell.hidden_size for cell in model.G]
    if getattr(model, "start", 0):  # the first layer is the embedding
        widths = [model.GE.Wh0.shape[0], *widths]
    states = [torch.zeros(len(ids), width, device=ids.device) for width in widths]
    begun = (ids != BEFORE).unsqueeze(-1)  # [B, L, 1]
    steps = ids.clamp_min(0)
    for step in range(ids.shape[1] - 1):
        model.hidden_step(model.embed(steps[:, step], states)[0], states)
        for i, state in enumerate(states):
            states[i] = state * begun[:, step]
    scores: Tensor = model.forward(steps[:, -1], states, None, training=False)
    return scores
