"""A RecBole SASRec checkpoint as the reference SASRec: RecBole is not needed, nothing is executed.

RecBole (1.x) saves its `Config` as a pickle beside the weights; only the tensors and the plain
settings are read. Its SASRec is a post-norm encoder over right-padded ids 1..N with a layer norm
on the embeddings, which `SASRecModel` computes exactly. Its other models have to be wrapped as live
objects (`steerrec.adapters.recbole`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from steerrec.adapters.sasrec import SASRecConfig, SASRecModel, SASRecRecommender
from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.unpickling import find_state_dict, read_checkpoint

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
    weights = find_state_dict(checkpoint)
    needed = "trm_encoder.layer.0.multi_head_attention.query.weight"
    if "item_embedding.weight" not in weights or needed not in weights:
        found = ", ".join(sorted(weights)[:4])
        raise ModelError(
            f"{path} is not a RecBole SASRec checkpoint: it has {found}, …; expected "
            f"item_embedding.weight and {needed}. Open other RecBole models with RecBole and wrap "
            "the live object"
        )
    if not {name.split(".")[0] for name in weights} <= _OWN:
        others = sorted({name.split(".")[0] for name in weights} - _OWN)
        raise ModelError(
            f"{path} has {', '.join(others[:3])} besides what RecBole's SASRec has: it is another "
            "model; open it with RecBole and wrap the live object"
        )
    settings = _settings(checkpoint)
    num_items, width = weights["item_embedding.weight"].shape
    num_items -= 1
    if items is None:
        items = _numbered(num_items)
    elif len(items) != num_items:
        raise ModelError(
            f"{path} has {num_items} items, the catalogue has {len(items)}; give the data that it "
            "was trained on with the same k-core (--k-core), or the order of its items (--item-map)"
        )
    config = SASRecConfig(
        num_items=num_items,
        hidden_size=width,
        num_hidden_layers=_count_layers(weights),
        num_attention_heads=_setting(path, settings, "n_heads", heads),
        intermediate_size=len(weights[_LAYER.format(0) + "feed_forward.dense_1.weight"]),
        hidden_act=_setting(path, settings, "hidden_act", hidden_act),
        max_position_embeddings=len(weights["position_embedding.weight"]),
        norm_first=False,
        embedding_norm=True,
        layer_norm_eps=float(settings.get("layer_norm_eps", 1e-12)),
    )
    model = SASRecModel(config)
    try:
        model.load_state_dict(_translated(weights, config.num_hidden_layers))
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[2].strip() or str(error)
        raise ModelError(f"{path} does not fit RecBole's SASRec: {reason}") from error
    model.to(torch.device(device))  # type: ignore[arg-type]
    return SASRecRecommender(model, items, source=f"recbole:{path}")


_OWN = {"item_embedding", "position_embedding", "trm_encoder", "LayerNorm"}


def _translated(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """RecBole's weights under the names of `SASRecModel`."""
    new = {
        "item_embedding.weight": weights["item_embedding.weight"],
        "position_embedding.weight": weights["position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        new[f"embedding_norm.{kind}"] = weights[f"LayerNorm.{kind}"]
        for number in range(layers):
            theirs, ours = _LAYER.format(number), f"layers.{number}."
            new[f"{ours}attention.qkv.{kind}"] = torch.cat(
                [weights[f"{theirs}multi_head_attention.{p}.{kind}"] for p in _PROJECTIONS]
            )
            for own, other in _PARTS.items():
                new[f"{ours}{own}.{kind}"] = weights[f"{theirs}{other}.{kind}"]
    return new


_PROJECTIONS = ("query", "key", "value")


def _count_layers(weights: Mapping[str, Tensor]) -> int:
    prefix = "trm_encoder.layer."
    return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith(prefix))


def _settings(checkpoint: Any) -> dict[str, Any]:
    """The plain settings inside the pickled `Config`, as far as there are any."""
    config = checkpoint.get("config") if isinstance(checkpoint, Mapping) else None
    state = getattr(config, "state", config)
    if isinstance(state, Mapping):
        inner = state.get("final_config_dict", state)
        if isinstance(inner, Mapping):
            return dict(inner)
    return {}


def _setting(path: str | Path, settings: Mapping[str, Any], name: str, given: Any) -> Any:
    if given is not None:
        return given
    if name not in settings:
        raise ModelError(
            f"{path} does not say {name}, which its weights do not show; expected RecBole's config "
            f"in the checkpoint, or the setting as an argument of load()"
        )
    return settings[name]


def _numbered(num_items: int) -> Catalogue:
    """A catalogue that knows of each item only its number in RecBole."""
    rows = pl.int_range(num_items, dtype=pl.Int64, eager=True)
    frame = pl.DataFrame({"row": rows, "item_id": rows + 1})
    return Catalogue(
        frame.with_columns(
            pl.lit(None, dtype=pl.String).alias("title"), pl.lit(0, dtype=pl.Int64).alias("count")
        )
    )
