"""A gSASRec-pytorch checkpoint as the reference SASRec, without that library's code.

The checkpoint is a bare state dict. The model has the blocks of the paper's own code (only the
queries are normalised) without a projection after attention, pads on the left with id N + 1, which
no item attends to, and numbers its items 1..N. Padding that is never seen may as well be on the
right, so that only positions have to count from the end of the window. The number of heads is in
the training configuration alone and has to be said.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from steerrec.adapters.rebuilding import count_layers, items_for, rebuild, table_of, weights_of
from steerrec.adapters.sasrec import SASRecConfig, SASRecRecommender
from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.specs import join_spec
from steerrec.unpickling import read_checkpoint

_BLOCK = "transformer_blocks.{}."
_NEEDED = ("item_embedding.weight", _BLOCK.format(0) + "multihead_attention.query_proj.weight")
_OWN = {"item_embedding", "output_embedding", "position_embedding"} | {
    *("transformer_blocks", "seq_norm")
}
_PARTS = {
    "attention_norm": "first_norm",
    "feed_forward_norm": "second_norm",
    "feed_forward.0": "dense1",
    "feed_forward.2": "dense2",
}
_PROJECTIONS = ("query_proj", "key_proj", "val_proj")


def load(
    path: str | Path,
    *,
    items: Catalogue | None = None,
    device: str | torch.device = "cpu",
    heads: int | None = None,
    hidden_act: str | None = None,
) -> SASRecRecommender:
    """Load a gSASRec-pytorch checkpoint (``.pt``) as the reference SASRec.

    Parameters
    ----------
    path
        The state dict that the training script saved.
    items
        The items in the order of the model's ids 1..N, which the checkpoint does not hold. Without
        it an item's id is its number, and nothing is known of its popularity.
    device
        Where the model goes.
    heads
        Number of attention heads, `num_heads` of its training configuration; nothing else tells.
    hidden_act
        The activation, "relu" if not given; "linear" for the first code, which had none.

    Raises
    ------
    ModelError
        If it is no such checkpoint, `heads` is missing, or `items` are more or fewer than its own.
    """
    library = "gSASRec-pytorch"
    weights = weights_of(path, read_checkpoint(path), library, needed=_NEEDED, own=_OWN)
    rows, width = table_of(path, weights, "item_embedding.weight")
    layers = count_layers(path, weights, "transformer_blocks")
    if rows < 3:
        raise ModelError(f"{path} has {rows} ids, two of which are no items; expected more")
    if heads is None:
        raise ModelError(
            f"{path} does not say its number of attention heads, which its weights do not show; "
            f"open it as gsasrec:{path},heads=… with num_heads of its training configuration"
        )
    config = SASRecConfig(
        num_items=rows - 2,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=table_of(path, weights, _BLOCK.format(0) + "dense1.weight")[0],
        hidden_act=hidden_act or "relu",
        max_position_embeddings=table_of(path, weights, "position_embedding.weight")[0],
        norm_first="queries",
        zero_padding=True,
        positions_from_end=True,
        layer_norm_eps=1e-5,
        tie_word_embeddings="output_embedding.weight" not in weights,
    )
    return rebuild(
        path,
        library,
        config,
        weights,
        partial(_translated, config=config),
        items_for(path, items, rows - 2),
        source=join_spec("gsasrec", path, heads=heads, hidden_act=hidden_act),
        device=device,
    )


def _translated(weights: dict[str, Tensor], config: SASRecConfig) -> dict[str, Tensor]:
    """gSASRec's weights under the names of `SASRecModel`; padding N + 1 becomes 0."""
    items = weights.pop("item_embedding.weight")[:-1].clone()
    items[0] = 0.0
    new = {
        "item_embedding.weight": items,
        "position_embedding.weight": weights.pop("position_embedding.weight"),
    }
    if not config.tie_word_embeddings:
        new["output_embedding.weight"] = weights.pop("output_embedding.weight")[1:-1]
    width = config.hidden_size
    for number in range(config.num_hidden_layers):
        theirs, ours = _BLOCK.format(number), f"layers.{number}."
        new[f"{ours}attention.out.weight"] = torch.eye(width)  # there is no such projection
        new[f"{ours}attention.out.bias"] = torch.zeros(width)
        for kind in ("weight", "bias"):
            new[f"{ours}attention.qkv.{kind}"] = torch.cat(
                [weights.pop(f"{theirs}multihead_attention.{p}.{kind}") for p in _PROJECTIONS]
            )
            for own, other in _PARTS.items():
                new[f"{ours}{own}.{kind}"] = weights.pop(f"{theirs}{other}.{kind}")
    for kind in ("weight", "bias"):
        new[f"final_norm.{kind}"] = weights.pop(f"seq_norm.{kind}")
    return new
