"""The reference SASRec (Kang & McAuley 2018): a transformers model, and its `Recommender`.

Causal self-attention over a history, right-padded: item ids are 1..N (catalogue row + 1), 0 pads.
With causal attention no real position ever sees the padding behind it, so there is no key mask
and `scaled_dot_product_attention` takes its fastest path. Training is in `sasrec_training`.

Options that a new model does without (other `norm_first` than True, left padding, positions from
the end, …) are what other libraries' SASRecs compute, so that their weights give their scores here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from steerrec.adapters.weights import Weights, refuse_misfits
from steerrec.data import Catalogue, Histories
from steerrec.errors import ModelError
from steerrec.files import write_json
from steerrec.graphs import has_values
from steerrec.hub import Pushed, Snapshot, push
from steerrec.hub_names import is_repo_id, is_sha
from steerrec.loading import model_record
from steerrec.published import ORIGIN, RECORD
from steerrec.pulling import local_folder
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds

PAD = 0

Newest = Tensor | Literal[-1]
"""Which position of each history is wanted, [B]; -1 where it is the last one of all."""


@strict
class SASRecConfig(PreTrainedConfig):
    """Configuration of `SASRecModel`.

    Attributes
    ----------
    num_items
        Number of items N; the embedding has N + 1 rows, row 0 being the padding.
    max_position_embeddings
        How many of the latest items the model reads (L).
    norm_first
        Pre-norm blocks (True), post-norm blocks (False), or those of the paper's own code
        ("queries"): before attention only the queries are normalised, not the keys and values,
        and both residuals start from normalised vectors.
    final_norm
        Whether hidden states are layer-normalised after the last block; None for as `norm_first`
        says: not in post-norm models, whose last block does.
    embedding_norm
        Whether the sum of item and position embeddings is layer-normalised.
    scale_embeddings
        Whether item embeddings are multiplied by sqrt(hidden_size) at the input.
    padding_side
        With "left" a history fills the window from the left with padding, which has an embedding
        (row 0) without a position, and which items attend to as to other items.
    zero_padding
        Whether hidden states of padding are set to zero at the input and after each block.
    positions_from_end
        Whether the newest item has the last position of the window, whatever the length of the
        history; with left padding that is so anyway.
    """

    model_type = "steerrec_sasrec"

    num_items: int = 1
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    max_position_embeddings: int = 200
    hidden_dropout_prob: float = 0.2
    attention_probs_dropout_prob: float = 0.0
    norm_first: bool | Literal["queries"] = True
    final_norm: bool | None = None
    embedding_norm: bool = False
    scale_embeddings: bool = False
    padding_side: Literal["right", "left"] = "right"
    zero_padding: bool = False
    positions_from_end: bool = False
    layer_norm_eps: float = 1e-8
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = PAD

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ModelError(
                f"hidden_act {self.hidden_act!r} is no activation that transformers has; expected "
                "such as gelu, relu, silu, tanh"
            )
        super().__post_init__(**kwargs)


class SASRecAttention(nn.Module):
    """Causal multi-head self-attention, [B, L, H] to [B, L, H]."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, queries: Tensor | None = None, newest: Newest | None = None
    ) -> Tensor:
        """Mix each position with itself and those before it, [B, L, H].

        `queries` are what each position asks with, where that is not what it is asked for. With
        `newest` only that position of each history asks, [B, 1, H].
        """
        if newest is not None:
            return self._of_newest(x, x if queries is None else queries, newest)
        batch, length, width = x.shape
        projected = self.qkv(x)  # [B, L, 3 H]
        if queries is not None:
            asked = F.linear(queries, self.qkv.weight[:width], self.qkv.bias[:width])
            projected = torch.cat([asked, projected[..., width:]], dim=-1)
        qkv = projected.view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, H / heads]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out

    def _of_newest(self, x: Tensor, queries: Tensor, newest: Newest) -> Tensor:
        batch, length, width = x.shape
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(row_of(queries, newest), weight[:width], bias[:width])  # [B, 1, H]
        k, v = F.linear(x, weight[width:], bias[width:]).split(width, dim=-1)
        q, k, v = (
            t.view(batch, -1, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v)
        )
        seen = None  # from the last position everything
        if isinstance(newest, Tensor):
            steps = torch.arange(length, device=x.device)
            seen = (steps <= newest[:, None])[:, None, None]  # [B, 1, 1, L]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, 1, width))
        return out


def row_of(x: Tensor, places: Newest) -> Tensor:
    """The rows [B, 1, H] of [B, L, H] at a position of each history."""
    if not isinstance(places, Tensor):
        return x[:, -1:]
    return x.gather(1, places.view(-1, 1, 1).expand(-1, 1, x.shape[2]))


class SASRecLayer(nn.Module):
    """Attention and feed-forward, each with dropout, a residual and a layer norm."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = SASRecAttention(config)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            ACT2FN[config.hidden_act],
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, newest: Newest | None = None) -> Tensor:
        """Hidden states [B, L, H] of the next layer; with `newest` only those, [B, 1, H]."""
        out: Tensor

        def kept(states: Tensor) -> Tensor:
            return states if newest is None else row_of(states, newest)

        if self.norm_first == "queries":
            queries = self.attention_norm(x)
            mixed = self.dropout(self.attention(x, queries, newest))
            x = self.feed_forward_norm(kept(queries) + mixed)
            out = x + self.dropout(self.feed_forward(x))
        elif self.norm_first:
            x = kept(x) + self.dropout(self.attention(self.attention_norm(x), None, newest))
            out = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        else:
            x = self.attention_norm(kept(x) + self.dropout(self.attention(x, None, newest)))
            out = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return out


@dataclass
class SASRecOutput(ModelOutput):
    """What `SASRecModel` returns: the final hidden states, [B, L, H]."""

    last_hidden_state: Tensor | None = None


class SASRecModel(PreTrainedModel):
    """SASRec; items are scored by their input embeddings unless `tie_word_embeddings` is False.

    The user vector is the output of `final_norm` at the newest item (an identity in models without
    one, so that the site has one name); `score` multiplies it with the item matrix.

    Attributes
    ----------
    newest_only
        Whether `score` runs the last layer for the newest item alone, which is all that it needs,
        and much faster. Modules of that layer then emit [B, 1, H], so that sites there cannot have
        positions other than the user's. Off unless switched on: scores may differ in the last bits.
    """

    newest_only = False
    config_class = SASRecConfig
    base_model_prefix = "sasrec"
    main_input_name = "input_ids"

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, PAD)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embedding_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.embedding_norm
            else nn.Identity()
        )
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_hidden_layers))
        last = bool(config.norm_first) if config.final_norm is None else config.final_norm
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if last else nn.Identity()
        )
        self.output_embedding = (
            None
            if config.tie_word_embeddings
            else nn.Embedding(config.num_items, config.hidden_size)
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As transformers has it, but from safetensors alone, and with every weight or an error.

        transformers itself only reports what is missing, and makes it up.

        Raises
        ------
        ModelError
            If a weight is missing, or one is there that the configuration does not want.
        """
        options = {"use_safetensors": True, **options}
        load: Any = super().from_pretrained
        model, report = load(*args, output_loading_info=True, **options)
        missing, unexpected = report["missing_keys"], report["unexpected_keys"]
        if missing or unexpected:
            source = args[0] if args else options.get("pretrained_model_name_or_path")
            refuse_misfits(source, dict.fromkeys(unexpected, ()), dict.fromkeys(missing, ()))
        return (model, report) if output_loading_info else model

    @property
    def item_matrix(self) -> Tensor:
        """What the user vector is multiplied with, without a padding row: [N, H]."""
        if self.output_embedding is not None:
            return self.output_embedding.weight
        return self.item_embedding.weight[1:]

    def forward(
        self,
        input_ids: Tensor,
        return_dict: bool | None = None,
        *,
        newest: Newest | None = None,
    ) -> SASRecOutput:
        """Hidden states for padded `input_ids` [B, L] of ids 1..N (0 pads).

        With `newest` those of the last layer are of that position of each history alone, [B, 1, H].

        Raises
        ------
        ModelError
            If they are wider than the window, or with left padding are not just as wide.
        """
        length, window = input_ids.shape[1], self.config.max_position_embeddings
        if length > window:
            raise ModelError(
                f"histories of {length} items; this model reads at most {window}: keep the latest "
                "ones"
            )
        if length < window and self.config.padding_side == "left":
            raise ModelError(
                f"ids {length} wide; this model reads histories that are padded on the left to all "
                f"of its window of {window}"
            )
        x = self.item_embedding(input_ids)  # [B, L, H]
        if self.config.scale_embeddings:
            x = x * self.config.hidden_size**0.5
        x = x + self._positions(input_ids)
        x = self._zeroed(self.embedding_dropout(self.embedding_norm(x)), input_ids)
        for layer in self.layers[: len(self.layers) if newest is None else -1]:
            x = self._zeroed(layer(x), input_ids)
        if newest is not None:
            last = newest[:, None] if isinstance(newest, Tensor) else None
            here = input_ids[:, -1:] if last is None else input_ids.gather(1, last)
            x = self._zeroed(self.layers[-1](x, newest), here)
        return SASRecOutput(last_hidden_state=self.final_norm(x))

    def _positions(self, input_ids: Tensor) -> Tensor:
        """What is added for the place of each item, [L, H] or [B, L, H]."""
        weight = self.position_embedding.weight
        length = input_ids.shape[1]
        if self.config.padding_side == "left":
            return weight * (input_ids != PAD).unsqueeze(-1)
        if self.config.positions_from_end:
            lengths = (input_ids != PAD).sum(dim=1, keepdim=True)  # [B, 1]
            places = torch.arange(length, device=input_ids.device) + len(weight) - lengths
            return weight[places.clamp_max(len(weight) - 1)]
        return weight[:length]

    def _zeroed(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """The hidden states, those of padding set to zero if the configuration says so."""
        return x * (input_ids != PAD).unsqueeze(-1) if self.config.zero_padding else x

    def score(self, input_ids: Tensor) -> Tensor:
        """Scores [B, N] of every item as the next one after `input_ids` [B, L]."""
        left = self.config.padding_side == "left"
        if self.newest_only and len(self.layers):
            newest: Newest = -1
            if (
                not left
                and len(input_ids) == 1
                and has_values(input_ids)
                and input_ids.device.type == "cpu"
            ):
                input_ids = input_ids[:, : max(1, int((input_ids != PAD).sum()))]
            elif not left:
                newest = (input_ids != PAD).sum(dim=1).clamp_min(1) - 1  # [B]
            user_vectors = self(input_ids, newest=newest).last_hidden_state[:, 0]
        elif left:
            user_vectors = self(input_ids).last_hidden_state[:, -1]
        else:
            hidden = self(input_ids).last_hidden_state
            last = (input_ids != PAD).sum(dim=1).clamp_min(1) - 1  # [B]
            user_vectors = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        scores: Tensor = user_vectors @ self.item_matrix.T
        return scores


AutoConfig.register(SASRecConfig.model_type, SASRecConfig)
AutoModel.register(SASRecConfig, SASRecModel)


class SASRecRecommender:
    """A `SASRecModel` and its catalogue as a `steerrec.Recommender`.

    Attributes
    ----------
    model, catalogue
        The model, frozen and in eval mode, and its items.
    source
        The folder or Hub id that it was loaded from.
    repo_id, revision
        Where on the Hub the same model is: its repository and the id of the commit.
    record
        What the MODEL folder records of its data and training.
    """

    def __init__(
        self,
        model: SASRecModel,
        catalogue: Catalogue,
        source: str | None = None,
        *,
        repo_id: str | None = None,
        revision: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if model.config.num_items != len(catalogue):
            raise ModelError(
                f"the model has {model.config.num_items} items, its catalogue {len(catalogue)}: "
                "model.safetensors and items.parquet are not of one training run"
            )
        self.model = model.eval().requires_grad_(False)
        self.catalogue = catalogue
        self.source = source
        self.repo_id, self.revision = repo_id, revision
        self.record = dict(record or {})

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> SASRecRecommender:
        """The same as `load`, by the name that it has in other libraries."""
        return load(path, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Publish the model on the Hub as a MODEL, in one commit.

        Artifacts that are made for it from now on name that commit as their base model.

        Parameters
        ----------
        repo_id
            ``org/name``.
        **options
            Those of `steerrec.push`: revision, token, private, create_pr, commit_message, tag,
            endpoint, dry_run.
        """
        with TemporaryDirectory() as folder:
            save(self, folder)
            if self.record:
                write_json(Path(folder) / RECORD, self.record)
            pushed = push(folder, repo_id, **options)
        if pushed.revision is not None and not options.get("create_pr"):
            self.repo_id, self.revision = pushed.repo_id, pushed.revision
        return pushed

    @cached_property
    def site(self) -> Site:
        """The output of `final_norm` at the newest item: the scored vector itself."""
        return Site("final_norm", positions_from=TokenIds("item_embedding", pad_id=PAD))

    @property
    def max_length(self) -> int:
        """Window of the model, in items."""
        length: int = self.model.config.max_position_embeddings
        return length

    @property
    def item_head(self) -> ItemHead:
        """Dot product with the item matrix."""
        return ItemHead(self.model.item_matrix)

    def make_batch(self, histories: Histories) -> Mapping[str, Tensor]:
        """`input_ids` [B, L]: catalogue rows + 1, padded on the side that the model reads.

        On the right to the longest history here, on the left to the whole window.
        """
        side = self.model.config.padding_side
        longest = min(int(histories.lengths.max(initial=1)), self.max_length)
        width = longest if side == "right" else self.max_length
        padded = histories.padded(width, -1, side=side) + 1
        return {"input_ids": torch.from_numpy(padded).to(self.model.device)}

    def score(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's own scores, [B, N] in catalogue order."""
        scores: Tensor = self.model.score(batch["input_ids"])
        return scores

    def describe(self) -> dict[str, Any]:
        """Adapter, source, place on the Hub and architecture, for an artifact's record."""
        keys = ("num_items", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        config = {key: getattr(self.model.config, key) for key in keys}
        for key in _UNSEEN:  # as far as they are not the default: new options change no record
            if (value := getattr(self.model.config, key)) != getattr(SASRecConfig, key):
                config[key] = value
        place = {"repo_id": self.repo_id, "revision": self.revision} if self.repo_id else {}
        return {"adapter": "sasrec", "source": self.source, **place, "config": config}


# What decides what is computed, and does not show in the weights.
_UNSEEN = (
    "num_attention_heads",
    "hidden_act",
    "norm_first",
    "final_norm",
    "scale_embeddings",
    "padding_side",
    "zero_padding",
    "positions_from_end",
    "layer_norm_eps",
)
CONFIG_FILE, WEIGHTS_FILE, ITEMS_FILE = "config.json", "model.safetensors", "items.parquet"


def load(
    path: str | Path | Snapshot, *, device: str | torch.device = "cpu", **hub: Any
) -> SASRecRecommender:
    """Load a saved MODEL folder (`config.json`, `model.safetensors`, `items.parquet`).

    Names and shapes of the weights are compared with the configuration before anything is
    allocated, and the files are data alone: no class is looked up by a name that they give.

    Parameters
    ----------
    path
        The folder written by `save`, or the id of a Hub repository with the same files.
    device
        Where the model goes.
    **hub
        Options of `steerrec.pull`, for a Hub repository.

    Raises
    ------
    ModelError
        If a file is missing or damaged, or the weights do not fit the configuration.
    HubError
        If there is no such folder here, and no such repository that can be had.
    """
    where = local_folder(path, **hub)
    folder = Path(where)
    if not (folder / ITEMS_FILE).is_file():
        raise ModelError(
            f"{path} has no {ITEMS_FILE}, which holds the item ids; expected a folder written by "
            "`steerrec train`"
        )
    try:
        model = _read_model(folder)
    except ModelError:
        raise
    except Exception as error:  # a stranger's files can make these libraries raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(f"{path} cannot be loaded as a SASRec model ({reason})") from error
    model.to(torch.device(device))  # type: ignore[arg-type]
    record = model_record(folder)
    source, (repo_id, revision) = str(path), _origin(record)
    if isinstance(where, Snapshot):
        source, (repo_id, revision) = where.repo_id, where.origin
    return SASRecRecommender(
        model,
        Catalogue.read(folder / ITEMS_FILE),
        source,
        repo_id=repo_id,
        revision=revision,
        record=record,
    )


def save(rec: SASRecRecommender, path: str | Path) -> None:
    """Write a MODEL folder that `load` reads back: configuration, weights and items."""
    with _no_progress_bars():
        rec.model.save_pretrained(path)
    rec.catalogue.write(Path(path) / ITEMS_FILE)


def _read_model(folder: Path) -> SASRecModel:
    found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    known = SASRecConfig.__annotations__.keys() & found.keys()
    config = SASRecConfig(**{name: found[name] for name in known})
    weights = Weights(folder / WEIGHTS_FILE)
    if config.num_hidden_layers > len(weights):
        raise ModelError(
            f"{folder}: {CONFIG_FILE} wants {config.num_hidden_layers} layers, {WEIGHTS_FILE} has "
            f"{len(weights)} tensors"
        )
    with torch.device("meta"):
        model = SASRecModel(config)
    weights.fill(model)
    return model


def _origin(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Where on the Hub a folder was pushed to, or pulled from, by its record."""
    origin = record.get(ORIGIN)
    found = origin if isinstance(origin, dict) else {}
    repo_id, revision = found.get("repo_id"), found.get("revision")
    if isinstance(repo_id, str) and is_repo_id(repo_id) and is_sha(revision):
        return repo_id, revision
    return None, None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars, which it draws even where stderr is no terminal."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
