"""A SASRec.pytorch (pmixer) checkpoint as the reference SASRec, without that library's code.

The checkpoint is a bare state dict, and its names are those of three models that compute
different things:

- until 2024, the blocks of the paper's own code (only the queries are normalised), positions from
  0, the states of padding set to zero;
- from June 2024, the same blocks, positions from 1 and none for padding, whose states stay;
- from May 2025, blocks that are pre-norm with ``--norm_first`` and post-norm without.

All pad on the left to the whole window, and items attend to the padding. Which of them it is, and
the number of heads, are in the file name and in the `args.txt` that the training script writes
beside it, or have to be said.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from steerrec.adapters.rebuilding import count_layers, items_for, rebuild, table_of, weights_of
from steerrec.adapters.sasrec import SASRecConfig, SASRecRecommender
from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.specs import join_spec
from steerrec.unpickling import read_checkpoint

NormFirst = bool | Literal["queries"]
ARGS = "args.txt"
_NEEDED = ("item_emb.weight", "pos_emb.weight", "attention_layers.0.in_proj_weight")
_OWN = {"item_emb", "pos_emb", "attention_layernorms", "attention_layers"} | {
    *("forward_layernorms", "forward_layers", "last_layernorm")
}
_PARTS = {
    "attention_norm.{}": "attention_layernorms.{}.{}",
    "attention.qkv.{}": "attention_layers.{}.in_proj_{}",
    "attention.out.{}": "attention_layers.{}.out_proj.{}",
    "feed_forward_norm.{}": "forward_layernorms.{}.{}",
    "feed_forward.0.{}": "forward_layers.{}.conv1.{}",
    "feed_forward.2.{}": "forward_layers.{}.conv2.{}",
}
_SIZES = ("num_blocks", "num_heads", "hidden_units", "maxlen")  # as args.txt names them
_FILE_NAME = re.compile(r"layer=(\d{1,6})\.head=(\d{1,6})\.hidden=(\d{1,6})\.maxlen=(\d{1,6})")


def load(
    path: str | Path,
    *,
    items: Catalogue | None = None,
    device: str | torch.device = "cpu",
    heads: int | None = None,
    norm_first: NormFirst | None = None,
    maxlen: int | None = None,
    hidden_act: str | None = None,
) -> SASRecRecommender:
    """Load a SASRec.pytorch checkpoint (``.pth``) as the reference SASRec.

    What is not given is read from the file name (``….layer=2.head=1.hidden=50.maxlen=200.pth``)
    and from `args.txt` beside it, as far as they agree with the weights.

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
        Number of attention heads (``--num_heads``).
    norm_first
        Whether it was trained with ``--norm_first``; "queries" for code older than May 2025, which
        does not know that flag.
    maxlen
        The window (``--maxlen``), where the number of positions does not tell it.
    hidden_act
        The activation, "relu" if not given; "linear" for early code, which had none.

    Raises
    ------
    ModelError
        If it is no such checkpoint, nothing tells a setting, or `items` are more or fewer than its
        own.
    """
    weights = weights_of(path, read_checkpoint(path), "SASRec.pytorch", needed=_NEEDED, own=_OWN)
    rows, width = table_of(path, weights, "item_emb.weight")
    layers = count_layers(path, weights, "attention_layers")
    told = _Told(Path(path), num_blocks=layers, hidden_units=width)
    if heads is None:
        heads = told.heads()
    if maxlen is None:
        maxlen = told.sizes.get("maxlen")
    positions = table_of(path, weights, "pos_emb.weight")[0]
    if norm_first is None:
        norm_first = told.norm_first(positions)
    padded = _has_padding_row(path, weights["pos_emb.weight"], maxlen, norm_first)
    config = SASRecConfig(
        num_items=rows - 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=width,
        hidden_act=hidden_act or "relu",
        max_position_embeddings=positions - padded,
        norm_first=norm_first,
        final_norm=True,
        scale_embeddings=True,
        padding_side="left",
        zero_padding=not padded,
        layer_norm_eps=1e-8,
    )
    settings = {"heads": heads, "norm_first": norm_first, "maxlen": maxlen}
    return rebuild(
        path,
        "SASRec.pytorch",
        config,
        weights,
        partial(_translated, layers=layers, padded=padded),
        items_for(path, items, rows - 1),
        source=join_spec("pmixer", path, **settings, hidden_act=hidden_act),
        device=device,
    )


class _Told:
    """What the training script wrote of its settings, as far as it is of these weights.

    Parameters
    ----------
    path
        The checkpoint.
    shown
        What the weights show.
    """

    def __init__(self, path: Path, **shown: int) -> None:
        self.path, self.ignored = path, ""
        found = _FILE_NAME.search(path.name)
        named = dict(zip(_SIZES, map(int, found.groups()), strict=True)) if found else {}
        self.sizes = self._fitting("its name", named, shown)
        self.args = _read_args(path.parent / ARGS)
        sizes = {key: int(self.args[key]) for key in _SIZES if key in self.args}
        sizes = self._fitting(f"the {ARGS} beside it", sizes, shown | self.sizes)
        if not sizes:
            self.args = {}
        self.sizes = self.sizes | sizes

    def _fitting(self, where: str, sizes: dict[str, int], known: dict[str, int]) -> dict[str, int]:
        """The sizes, unless they are those of another run."""
        for key, size in sizes.items():
            if size != known.get(key, size):
                self.ignored += (
                    f" ({where} is of another run: it has {key} {size}, not {known[key]})"
                )
                return {}
        return sizes

    def heads(self) -> int:
        if "num_heads" not in self.sizes:
            raise ModelError(
                f"{self.path} does not say its number of attention heads, which its weights do not "
                f"show{self.ignored}; open it as pmixer:{self.path},heads=… with its --num_heads"
            )
        return self.sizes["num_heads"]

    def norm_first(self, positions: int) -> NormFirst:
        if "norm_first" in self.args:
            return self.args["norm_first"] == "True"
        if self.args or self.sizes.get("maxlen") == positions:
            return "queries"  # code that did not know the flag
        raise ModelError(
            f"{self.path} does not say whether it was trained with --norm_first, which its weights "
            f"do not show{self.ignored}; open it as pmixer:{self.path},norm_first=true or false, "
            "or norm_first=queries if its code is older than May 2025 and has no such flag"
        )


def _read_args(file: Path) -> dict[str, str]:
    """The settings in an `args.txt`, or none if there is none of this library."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            text = lines.read(1 << 16)
    except OSError:
        return {}
    pairs = dict(line.split(",", 1) for line in text.splitlines() if "," in line)
    ours = all(re.fullmatch(r"\d{1,6}", pairs.get(key, "")) for key in _SIZES)
    return pairs if ours else {}


def _has_padding_row(
    path: str | Path, table: Tensor, maxlen: int | None, norm_first: NormFirst
) -> bool:
    """Whether the first position is that of padding, as it is from June 2024 on."""
    positions = len(table)
    if maxlen is None:
        if norm_first == "queries" and bool(table[0].any()):
            raise ModelError(
                f"{path} has {positions} positions, which do not tell whether the first one is for "
                f"padding; open it as pmixer:{path},maxlen=… with its --maxlen"
            )
        return True
    if positions == maxlen and norm_first != "queries":
        raise ModelError(
            f"{path} has {positions} positions for maxlen {maxlen}, where the code that knows "
            "norm_first has one more; its code is older: expected norm_first=queries"
        )
    if positions not in (maxlen, maxlen + 1):
        raise ModelError(
            f"{path} has {positions} positions; expected {maxlen} or {maxlen + 1}, as maxlen is "
            f"{maxlen}: no known code makes both; is that the --maxlen that it was trained with?"
        )
    return positions > maxlen


def _translated(weights: dict[str, Tensor], layers: int, padded: bool) -> dict[str, Tensor]:
    """SASRec.pytorch's weights under the names of `SASRecModel`."""
    items, positions = weights.pop("item_emb.weight").clone(), weights.pop("pos_emb.weight")
    if padded:  # the position of padding, which here has none, goes into its embedding
        items[0] += positions[0] / items.shape[1] ** 0.5
    new = {
        "item_embedding.weight": items,
        "position_embedding.weight": positions[1:] if padded else positions,
    }
    for kind in ("weight", "bias"):
        new[f"final_norm.{kind}"] = weights.pop(f"last_layernorm.{kind}")
        for number in range(layers):
            for ours, theirs in _PARTS.items():
                tensor = weights.pop(theirs.format(number, kind))
                if kind == "weight" and ".conv" in theirs:
                    tensor = tensor.squeeze(-1)
                new[f"layers.{number}.{ours.format(kind)}"] = tensor
    return new
