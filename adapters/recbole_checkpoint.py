"""A RecBole SASRec checkpoint as the reference SASRec: RecBole is not needed, nothing is executed.

RecBole (1.x) saves its `Config` as a pickle beside the weights; only the tensors and the plain
settings are read. Its SASRec is a post-norm encoder over right-padded ids 1..N with a layer norm
on the embeddings, which `SASRecModel` computes exactly. Its other models have to be wrapped as live
objects (`steerrec.adapters.recbole`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerrec.adapters.rebuilding import count_layers, items_for, rebuild, table_of, weights_of
from steerrec.adapters.sasrec import SASRecConfig, SASRecRecommender
from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.specs import join_spec
from steerrec.unpickling import read_checkpoint

_LAYER = "trm_encoder.layer.{}."
_PARTS = {
    "attention.out": "multi_head_attention.dense",
    "attention_norm": "multi_head_attention.LayerNorm",
    "feed_forward.0": "feed_forward.dense_1",
    "feed_forward.2": "feed_forward.dense_2",
    "feed_forward_norm": "feed_forward.LayerNorm",
}


def load(
    path: str | Path,
    *,
    items: Catalogue | None = None,
    device: str | torch.device = "cpu",
    heads: int | None = None,
    hidden_act: str | None = None,
) -> SASRecRecommender:
    """Load a RecBole SASRec checkpoint (``.pth``) as the reference SASRec.

    Parameters
    ----------
    path
        What RecBole's trainer saved.
    items
        The items in the order of RecBole's ids 1..N, which the checkpoint does not hold. Without
        it an item's id is its number in RecBole, and nothing is known of its popularity.
    device
        Where the model goes.
    heads, hidden_act
        Settings that the weights do not show, where the checkpoint's own are missing or wrong.

    Raises
    ------
    ModelError
        If it is no such checkpoint, a setting is missing, or `items` are more or fewer than its
        own.
    """
    checkpoint = read_checkpoint(path)
    needed = ("item_embedding.weight", _LAYER.format(0) + "multi_head_attention.query.weight")
    weights = weights_of(path, checkpoint, "RecBole", needed=needed, own=_OWN)
    rows, width = table_of(path, weights, "item_embedding.weight")
    layers = count_layers(path, weights, "trm_encoder.layer")
    settings = _settings(checkpoint)
    if (name := settings.get("model", "SASRec")) != "SASRec":
        raise ModelError(
            f"{path} is a RecBole {str(name)[:60]!r}, which names its weights as a SASRec does; "
            "only SASRec is rebuilt: open it with RecBole and wrap the live object"
        )
    inner = _LAYER.format(0) + "feed_forward.dense_1.weight"
    config = SASRecConfig(
        num_items=rows - 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=_setting(path, settings, "n_heads", "heads", heads),
        intermediate_size=table_of(path, weights, inner)[0],
        hidden_act=_setting(path, settings, "hidden_act", "hidden_act", hidden_act),
        max_position_embeddings=table_of(path, weights, "position_embedding.weight")[0],
        norm_first=False,
        embedding_norm=True,
        layer_norm_eps=_epsilon(path, settings.get("layer_norm_eps", 1e-12)),
    )
    return rebuild(
        path,
        "RecBole",
        config,
        weights,
        partial(_translated, layers=layers),
        items_for(path, items, rows - 1),
        source=join_spec("recbole", path, heads=heads, hidden_act=hidden_act),
        device=device,
    )


_OWN = {"item_embedding", "position_embedding", "trm_encoder", "LayerNorm"}


def _translated(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """RecBole's weights under the names of `SASRecModel`."""
    new = {
        "item_embedding.weight": weights.pop("item_embedding.weight"),
        "position_embedding.weight": weights.pop("position_embedding.weight"),
    }
    for kind in ("weight", "bias"):
        new[f"embedding_norm.{kind}"] = weights.pop(f"LayerNorm.{kind}")
        for number in range(layers):
            theirs, ours = _LAYER.format(number), f"layers.{number}."
            new[f"{ours}attention.qkv.{kind}"] = torch.cat(
                [weights.pop(f"{theirs}multi_head_attention.{p}.{kind}") for p in _PROJECTIONS]
            )
            for own, other in _PARTS.items():
                new[f"{ours}{own}.{kind}"] = weights.pop(f"{theirs}{other}.{kind}")
    return new


_PROJECTIONS = ("query", "key", "value")


def _settings(checkpoint: Any) -> dict[str, Any]:
    """The plain settings inside the pickled `Config`, as far as there are any."""
    config = checkpoint.get("config") if isinstance(checkpoint, Mapping) else None
    state = getattr(config, "state", config)
    if isinstance(state, Mapping):
        inner = state.get("final_config_dict", state)
        if isinstance(inner, Mapping):
            return dict(inner)
    return {}


def _epsilon(path: str | Path, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = -1.0
    if not 0 < found < 1:
        raise ModelError(f"{path} has layer_norm_eps {value!r}; expected a small positive number")
    return found


def _setting(
    path: str | Path, settings: Mapping[str, Any], name: str, ours: str, given: Any
) -> Any:
    if given is not None:
        return given
    kind = int if ours == "heads" else str
    if type(found := settings.get(name)) is not kind:
        raise ModelError(
            f"{path} does not say {name}, which its weights do not show; open it as "
            f"recbole:{path},{ours}=… with what RecBole's configuration had"
        )
    return found
