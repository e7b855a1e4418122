"""The checks of test_conformance.py on the libraries themselves, each where it is installed.

No part of `make test`: the libraries are heavy, and some pin other packages than steerrec does.
The docstring of `LIBRARIES` says how to install them beside torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec import RealMask, Steering, SteerTransform, attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.capturing import capture
from steerrec.hooks import edit
from steerrec.sites import Lengths, Site, TokenIds

from ..unit import test_conformance as conformance
from ..unit.clones import (
    HEADS,
    Clone,
    H,
    L,
    Lists,
    N,
    masked,
    padded,
    real_left,
    real_right,
    score_gru4rec,
    seeded,
)

LIBRARIES = {
    "cornac": "cornac",
    "recbole": "recbole",
    "recpack": "recpack",
    "rectools": "rectools",
    "replay": "replay-rec",
    "torch_rechub": "torch-rechub",
    "transformers": "transformers",
    "unirec": "unirec",
}
"""Import name of each library, and what pip calls it.

All of them run beside torch 2.13 and NumPy 2 when installed by ``pip install --no-deps``, with
their other dependencies added by hand (RecTools wants pandas<3; it and RePlay, Lightning).
"""


def library(name: str, module: str = "") -> ModuleType:
    """A module of an installed library; skips the test where there is no such library."""
    pytest.importorskip(name, reason=f"{LIBRARIES[name]} is not installed", exc_type=ImportError)
    return import_module(module or name)


last = partial(Site, positions_from="last")
everywhere = partial(Site, positions="all")


# --- RecBole: full_sort_predict(interaction) calls self.forward ----------------------------------


class RecBoleConfig(defaultdict[str, Any]):
    """The library's own settings for a model, in small: its Config does not run under NumPy 2."""

    def __init__(self, model: str) -> None:
        yaml = pytest.importorskip("yaml")
        configurator = library("recbole", "recbole.config.configurator")
        loader = configurator.Config._build_yaml_loader(None)  # reads 1e-12 as a number
        super().__init__(lambda: None)
        file = Path(configurator.__file__).parents[1] / f"properties/model/{model}.yaml"
        if file.exists():
            self.update(yaml.load(file.read_text(), Loader=loader))
        self.update(
            USER_ID_FIELD="user",
            ITEM_ID_FIELD="item",
            LIST_SUFFIX="_list",
            ITEM_LIST_LENGTH_FIELD="length",
            MAX_ITEM_LIST_LENGTH=L,
            NEG_PREFIX="neg_",
            device=torch.device("cpu"),
            embedding_size=H,
            hidden_size=H,
            inner_size=2 * H,
            reg_weight=self["reg_weight"] or [0.0, 0.0],
            n_layers=self["n_layers"] or 2,
            order_len=self["order_len"] or 2,
            train_batch_size=2,
            alpha=self["alpha"] or 0.6,
            loss_type=self["loss_type"] or "CE",
        )


RECBOLE_USERS = 5
RECBOLE_DATASET = SimpleNamespace(
    item_num=N + 1,
    user_num=RECBOLE_USERS,
    num=lambda field: {"item": N + 1, "user": RECBOLE_USERS}[field],
    field2seqlen={"item_list": L},
    inter_feat={
        "item": torch.ones(1, dtype=torch.long),
        "item_list": torch.ones(1, L, dtype=torch.long),
        "length": torch.full((1,), L),
    },
)


def recbole_model(name: str) -> nn.Module:
    kind = library("recbole", "recbole.utils").get_model(name)
    model: nn.Module = kind(RecBoleConfig(name), RECBOLE_DATASET)
    return model


@torch.no_grad()
def score_recbole(model: Any, histories: Lists) -> Tensor:
    ids = padded(histories, offset=1, pad=0, left=False)
    interaction = library("recbole", "recbole.data.interaction").Interaction(
        {"user": torch.arange(1, len(ids) + 1), "item_list": ids, "length": (ids != 0).sum(1)}
    )
    scores: Tensor = model.full_sort_predict(interaction)
    return scores[:, 1:]


def recbole_dot(model: Any, users: Tensor) -> Tensor:
    return users @ model.item_embedding.weight[1 : N + 1].T


def recbole_head(model: Any, users: Tensor) -> Tensor:
    """Scores by hand, of the models whose head is not just the item embedding."""
    items = model.item_embedding.weight[1 : N + 1]
    kind = type(model).__name__
    if kind == "BERT4Rec":
        return recbole_dot(model, users) + model.output_bias[1:]
    if kind == "CORE":
        return users @ F.normalize(items, dim=-1).T / model.temperature
    if kind == "NPE":
        return users @ F.relu(items).T
    if kind == "HGN":
        return users @ model.item_embedding_for_prediction.weight[1:].T
    if kind == "TransRec":
        return model.bias.weight[1:].T - (users[:, None] - items).norm(dim=-1)
    return recbole_dot(model, users)


recbole_ids = partial(Site, positions_from=TokenIds("item_embedding"))
BY_LENGTH = Lengths("", select=(1,), method="forward")  # forward(item_seq, item_seq_len)
MADE_IN_FORWARD = Site("", method="forward", layout="BH")


def recbole(
    name: str, site: Site = MADE_IN_FORWARD, *others: Site, silent: Mapping[str, str] = {}
) -> Clone:
    return Clone(
        name=f"RecBole {name}",
        build=seeded(partial(recbole_model, name)),
        score=score_recbole,
        site=site,
        head=recbole_head,
        silent={"": "forward", **silent},
        real=real_right,
        others=others if site is MADE_IN_FORWARD else (*others, MADE_IN_FORWARD),
    )


FORWARD_IS_BLH = Site("", method="forward", positions_from=TokenIds("item_embedding"))
RECBOLE = [
    recbole(
        "SASRec",
        recbole_ids("trm_encoder.layer.-1"),
        recbole_ids("trm_encoder", select=(-1,)),
        recbole_ids("trm_encoder.layer.0.multi_head_attention"),
        recbole_ids("trm_encoder.layer.1", at="input", select=(0,)),
        replace(recbole_ids("trm_encoder.layer.-1"), positions_from=BY_LENGTH),
        Site("", method="gather_indexes", layout="BH"),
        silent={"trm_encoder.layer": "ModuleList"},
    ),
    replace(
        recbole("BERT4Rec", recbole_ids("output_ln"), recbole_ids("trm_encoder", select=(-1,))),
        others=(FORWARD_IS_BLH, recbole_ids("output_gelu")),
    ),
    recbole("GRU4Rec", recbole_ids("dense"), recbole_ids("gru_layers", select=(0,))),
    recbole("NARM", Site("b", layout="BH"), recbole_ids("gru", select=(0,)), recbole_ids("a_1")),
    recbole("CORE", MADE_IN_FORWARD, recbole_ids("net.trm_encoder", select=(-1,))),
    recbole("STAMP", MADE_IN_FORWARD, Site("mlp_a", layout="BH"), recbole_ids("w1")),
    recbole("SRGNN", Site("linear_transform", layout="BH"), Site("linear_one", layout="BH")),
    recbole(
        "GCSAN",
        MADE_IN_FORWARD,
        Site("self_attention", select=(-1,), positions_from=BY_LENGTH),
    ),
    replace(  # it reads the last position, padding or not
        recbole("NextItNet", Site("final_layer", layout="BH"), last("residual_blocks.-1")),
        real=lambda histories: torch.ones(len(histories), L, dtype=torch.bool),
    ),
    recbole("LightSANs", recbole_ids("trm_encoder.layer.-1")),
    recbole("FEARec", recbole_ids("item_encoder.layer.-1"), recbole_ids("item_encoder.layer_ramp")),
    recbole("SINE"),
    recbole("Caser", recbole_ids("ac_fc", layout="BH", call=1), Site("fc2", layout="BH")),
    recbole("HGN"),
    recbole("NPE"),
    recbole("SHAN"),
    recbole("HRM"),
    recbole("FOSSIL"),
    recbole("TransRec"),
]


# --- RecTools: recommend(users, dataset) of a fitted model ---------------------------------------


def rectools_dataset(histories: Lists) -> Any:
    pandas = library("rectools", "pandas")
    if int(pandas.__version__.split(".")[0]) > 2:
        pytest.skip("RecTools does not run with pandas 3")
    start = pandas.Timestamp("2024-01-01")
    rows = [
        (user, item, 1.0, start + pandas.Timedelta(hours=step))
        for user, history in enumerate(histories)
        for step, item in enumerate(history)
    ]
    columns = ["user_id", "item_id", "weight", "datetime"]
    dataset = library("rectools", "rectools.dataset").Dataset
    return dataset.construct(pandas.DataFrame(rows, columns=columns))


def rectools_model(module: str, kind: str, **settings: Any) -> nn.Module:
    transformers = "rectools.models.nn.transformers"
    if settings.pop("ligr", False):
        settings["transformer_layers_type"] = library("rectools", f"{transformers}.ligr").LiGRLayers
    item_net = library("rectools", "rectools.models.nn.item_net").IdEmbeddingsItemNet
    recommender = getattr(library("rectools", f"{transformers}.{module}"), kind)(
        n_blocks=2,
        n_heads=HEADS,
        n_factors=H,
        session_max_len=L,
        epochs=1,
        item_net_block_types=(item_net,),
        recommend_torch_device="cpu",
        **settings,
    )
    halves = np.arange(N).reshape(2, -1).tolist()  # no longer than L: so all items are known
    recommender.fit(rectools_dataset(halves))
    model: nn.Module = recommender.torch_model
    vars(model)["recommender"] = recommender
    return model


def score_rectools(model: Any, histories: Lists) -> Tensor:
    recommender = model.recommender
    dataset, context = rectools_dataset(histories), None
    if recommender.require_recommend_context:
        context = dataset.get_raw_interactions()[["user_id", "datetime"]]
        context = context.groupby("user_id", as_index=False).max()
    users = list(range(len(histories)))
    found = recommender.recommend(users, dataset, k=N, filter_viewed=False, context=context)
    scores = torch.full((len(histories), N), torch.nan)
    rows, items = (torch.as_tensor(found[name].to_numpy()) for name in ("user_id", "item_id"))
    scores[rows, items] = torch.as_tensor(found["score"].to_numpy())
    return scores


def rectools_head(model: Any, users: Tensor, *, cosine: bool = False) -> Tensor:
    rows = model.recommender.data_preparator.item_id_map.convert_to_internal(np.arange(N))
    items = model.item_model.item_net_blocks[0].ids_emb.weight[rows]
    if cosine:
        users, items = F.normalize(users, dim=-1), F.normalize(items, dim=-1)
    return users @ items.T


RECTOOLS_SILENT = {"": "forward", "item_model": "forward", "similarity_module": "forward"}
RECTOOLS_MHA = {"transformer_layers.transformer_blocks.0.multi_head_attn.out_proj": "out_proj"}
RECTOOLS_BLOCKS = (
    last("transformer_layers.transformer_blocks.0"),
    last("transformer_layers.transformer_blocks.-1"),
    last("transformer_layers.transformer_blocks.0.multi_head_attn", select=(0,)),
    last("", method="encode_sessions"),
)


def rectools(name: str, module: str, kind: str, **facts: Any) -> Clone:
    settings = facts.pop("settings", {})
    return Clone(
        name=f"RecTools {name}",
        build=seeded(partial(rectools_model, module, kind, **settings)),
        score=score_rectools,
        **{
            "site": last("transformer_layers"),
            "head": rectools_head,
            "silent": RECTOOLS_SILENT | RECTOOLS_MHA,
            "real": real_left,
            "others": RECTOOLS_BLOCKS,
            **facts,
        },
    )


RECTOOLS = [
    rectools(
        "SASRec",
        "sasrec",
        "SASRecModel",
        site=last("transformer_layers.last_layernorm"),
        others=(last("transformer_layers"), last("emb_dropout"), *RECTOOLS_BLOCKS),
        written_later=(
            everywhere("emb_dropout"),
            everywhere("transformer_layers.transformer_blocks.-1"),
        ),
    ),
    rectools(
        "SASRec, cosine",
        "sasrec",
        "SASRecModel",
        settings={"similarity_module_kwargs": {"distance": "cosine"}},
        site=last("transformer_layers.last_layernorm"),
        head=partial(rectools_head, cosine=True),
    ),
    rectools("LiGR", "sasrec", "SASRecModel", settings={"ligr": True}),
    rectools(
        "BERT4Rec",
        "bert4rec",
        "BERT4RecModel",
        real=lambda histories: real_left(masked(histories)),
    ),
    rectools(
        "HSTU",
        "hstu",
        "HSTUModel",
        head=partial(rectools_head, cosine=True),
        silent=RECTOOLS_SILENT,
        others=(last("transformer_layers.stu_blocks.0"), last("", method="encode_sessions")),
    ),
]


# --- RePlay: predict() in old models, a root that returns a dict in new --------------------------


def replay_schema() -> Any:
    data, tensors = library("replay", "replay.data"), library("replay", "replay.data.nn")
    source = tensors.TensorFeatureSource(data.FeatureSource.INTERACTIONS, "item_id")
    feature = tensors.TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=data.FeatureType.CATEGORICAL,
        feature_hint=data.FeatureHint.ITEM_ID,
        feature_sources=[source],
        cardinality=N,
        padding_value=N,
        embedding_dim=H,
    )
    return tensors.TensorSchema([feature])


OLD_REPLAY = "replay.models.nn.sequential"
OLD_REPLAY_SIZE = {"num_blocks": 2, "num_heads": HEADS, "hidden_size": H, "max_len": L}
NEW_REPLAY_SIZE = {
    "embedding_dim": H,
    "num_heads": HEADS,
    "num_blocks": 2,
    "max_sequence_length": L,
}


def replay_old(module: str, kind: str, **settings: Any) -> nn.Module:
    found = library("replay", f"{OLD_REPLAY}.{module}.model")
    model: nn.Module = getattr(found, kind)(replay_schema(), **OLD_REPLAY_SIZE, **settings)
    return model


def replay_sasrec() -> nn.Module:
    kind = library("replay", "replay.nn.sequential").SasRec
    model: nn.Module = kind.from_params(schema=replay_schema(), **NEW_REPLAY_SIZE)
    return model


def replay_diff_sasrec() -> nn.Module:
    module = library("replay", "replay.nn.sequential.sasrec.diff_transformer")
    model = replay_sasrec()
    model.body.encoder = module.DiffTransformerLayer(H, HEADS, num_blocks=2)  # type: ignore[union-attr]
    return model


class RePlayCatalogue(dict[str, Tensor]):
    """Features of the items, as the item tower reads them."""

    feature_names = ("item_id",)

    def __missing__(self, _: str) -> Tensor:
        return torch.arange(N)


def replay_twotower() -> nn.Module:
    kind = library("replay", "replay.nn.sequential").TwoTower
    model: nn.Module = kind.from_params(
        schema=replay_schema(), item_features_reader=RePlayCatalogue(), **NEW_REPLAY_SIZE
    )
    return model


@torch.no_grad()
def score_replay_sasrec_old(model: Any, histories: Lists) -> Tensor:
    ids = padded(histories, offset=0, pad=0, left=True)  # the mask alone says what is padding
    scores: Tensor = model.predict({"item_id": ids}, real_left(histories))
    return scores


@torch.no_grad()
def score_replay_bert_old(model: Any, histories: Lists) -> Tensor:
    ids = padded(masked(histories), offset=0, pad=0, left=True)
    real = real_left(masked(histories))
    scores: Tensor = model.predict({"item_id": ids}, real, real & (torch.arange(L) < L - 1))
    return scores


@torch.no_grad()
def score_replay(model: Any, histories: Lists) -> Tensor:
    ids = padded(histories, offset=0, pad=N, left=True)
    scores: Tensor = model(feature_tensors={"item_id": ids}, padding_mask=ids != N)["logits"]
    return scores


def replay_twotower_head(model: Any, users: Tensor) -> Tensor:
    tower = model.body.item_tower
    items = tower.embedder({"item_id": torch.arange(N)})
    return (
        users
        @ tower.encoder(feature_tensors={}, input_embeddings=tower.embedding_aggregator(items)).T
    )


REPLAY_MASK = RealMask("", select=("padding_mask",))
replay_old_ids = partial(Site, positions_from=TokenIds("item_embedder.item_emb", pad_id=N))
# padding is item 0 with a mask beside it, the second argument of the method
replay_bert = partial(Site, positions_from=RealMask("", select=(1,), method="forward_step"))
replay = partial(Site, positions_from=REPLAY_MASK)
REPLAY = [
    Clone(
        name="RePlay SasRec, legacy",
        build=seeded(partial(replay_old, "sasrec", "SasRecModel")),
        score=score_replay_sasrec_old,
        site=replay_old_ids("output_normalization"),
        head=lambda model, users: users @ model.item_embedder.item_emb.weight[:N].T,
        silent={
            "": "forward",
            "sasrec_layers.forward_layers": "ModuleList",
            "sasrec_layers.attention_layers.1.out_proj": "out_proj",
        },
        real=real_left,
        others=(
            replay_old_ids("sasrec_layers"),
            replay_old_ids("sasrec_layers.forward_layers.-1"),
            replay_old_ids("sasrec_layers.attention_layers.0", select=(0,)),
            replay_old_ids("sasrec_layers.forward_layers.0.conv2", layout="BHL"),
            Site("sasrec_layers", positions_from=RealMask("sasrec_layers", select=(2,))),
            Site("_head", at="input", select=(0,), layout="BH"),
            Site("", method="get_query_embeddings", layout="BH"),
        ),
        written_later=(
            everywhere("sasrec_layers.forward_layers.0"),
            everywhere("sasrec_layers.forward_layers.0.conv2", layout="BHL"),
            everywhere("item_embedder.item_emb_dropout"),
        ),
    ),
    Clone(
        name="RePlay Bert4Rec, legacy",
        build=seeded(partial(replay_old, "bert4rec", "Bert4RecModel", num_passes_over_block=2)),
        score=score_replay_bert_old,
        site=replay_bert("transformer_blocks.-1", call=1),
        head=lambda model, users: users @ model._head.linear.weight.T + model._head.linear.bias,
        silent={"": "forward", "_head.linear": "weights", "transformer_blocks": "ModuleList"},
        real=lambda histories: real_left(masked(histories)),
        others=(
            replay_bert("transformer_blocks.0", call="first"),
            replay_bert("transformer_blocks.0", call="all"),
            Site("_head", at="input", select=(0,), layout="BH"),
        ),
    ),
    Clone(
        name="RePlay SasRec",
        build=seeded(replay_sasrec),
        score=score_replay,
        site=replay("body.output_normalization"),
        head=lambda model, users: (
            users @ model.body.embedder.feature_embedders.item_id.emb.weight[:N].T
        ),
        silent={
            "body.embedder.feature_embedders": "ModuleDict",
            "body.encoder.attention_layers": "ModuleList",
            "body.encoder.attention_layers.0.out_proj": "out_proj",
        },
        real=real_left,
        others=(
            Site("", select=("hidden_states", 0), positions_from="last"),
            Site("", select=("logits",), layout="BH"),
            replay("body"),
            replay("body.embedder", select=("item_id",)),
            replay("body.encoder", at="input", select=("input_embeddings",)),
            Site("head", at="input", select=(0,), layout="BH"),
        ),
    ),
    Clone(
        name="RePlay SasRec, differential",
        build=seeded(replay_diff_sasrec),
        score=score_replay,
        site=replay("body.output_normalization"),
        head=lambda model, users: (
            users @ model.body.embedder.feature_embedders.item_id.emb.weight[:N].T
        ),
        silent={"body.encoder.layers": "ModuleList"},
        real=real_left,
        others=(replay("body.encoder.layers.-1"), replay("body.encoder.layers.0.attn")),
    ),
    Clone(
        name="RePlay TwoTower",
        build=seeded(replay_twotower),
        score=score_replay,
        site=replay("body.query_tower.output_normalization"),
        head=replay_twotower_head,
        silent={"body": "forward", "body.query_tower.encoder.attention_layers": "ModuleList"},
        real=real_left,
        others=(
            replay("body.query_tower"),
            replay("body.query_tower.encoder"),
            Site("head", at="input", select=(0,), layout="BH"),
        ),
    ),
]


# --- Cornac: predict() takes one user a call -----------------------------------------------------


def cornac_sasrec() -> nn.Module:
    kind = library("cornac", "cornac.models.sasrec.sasrec").SASRecModel
    model: nn.Module = kind(N, embedding_dim=H, maxlen=L, n_layers=2, n_heads=HEADS)
    return model


def cornac_gru4rec() -> nn.Module:
    kind = library("cornac", "cornac.models.gru4rec.gru4rec").GRU4RecModel
    model: nn.Module = kind(N, layers=[H])
    return model


def cornac_transformer(backbone: str) -> nn.Module:
    kind = library("cornac", "cornac.models.transformer_rec.transformer_rec").TransformerRecModel
    model: nn.Module = kind(
        N, backbone=backbone, embedding_dim=H, maxlen=L, n_layers=2, n_heads=HEADS
    )
    return model


def score_cornac(model: Any, histories: Lists) -> Tensor:
    rows = padded(histories, offset=0, pad=N, left=True)
    return torch.stack([torch.from_numpy(model.predict(None, row[None])) for row in rows])


def cornac_head(model: Any, users: Tensor) -> Tensor:
    return users @ model.item_emb.weight[:N].T + model.item_biases.weight[:N].T


cornac = partial(Site, positions_from=TokenIds("item_emb", pad_id=N))


def cornac_backbone(name: str, site: Site, *others: Site, silent: dict[str, str]) -> Clone:
    return Clone(
        name=f"Cornac {name}",
        build=seeded(partial(cornac_transformer, name)),
        score=score_cornac,
        site=site,
        head=cornac_head,
        silent={"": "forward", **silent},
        real=real_left,
        others=(
            *others,
            cornac("backbone", select=("last_hidden_state",)),
            cornac("backbone", select=(0,)),
            cornac("backbone", at="input", select=("inputs_embeds",)),
            Site(
                "backbone",
                select=("last_hidden_state",),
                positions_from=RealMask("backbone", select=("attention_mask",)),
            ),
            cornac("", method="encode"),
        ),
    )


CORNAC = [
    Clone(
        name="Cornac SASRec",
        build=seeded(cornac_sasrec),
        score=score_cornac,
        site=last("last_layernorm"),
        head=cornac_head,
        silent={"": "forward", "attention_layers.0.out_proj": "out_proj"},
        real=real_left,
        others=(
            Site("", method="_encode", layout="BH"),
            last("forward_layers.-1"),
            last("attention_layers.0", select=(0,), layout="LBH"),
            last("attention_layernorms.1", at="input", layout="LBH"),
            last("forward_layers.0.process.0", layout="BHL"),
        ),
        written_later=(everywhere("forward_layers.0.process.4", layout="BHL"),),
    ),
    Clone(
        name="Cornac GRU4Rec",
        build=seeded(cornac_gru4rec),
        score=lambda model, histories: score_gru4rec(model, histories)[:, :N],
        site=Site("", method="score_items", at="input", select=(0,), layout="BH"),
        head=lambda model, users: users @ model.Wy.weight[:N].T + model.By.weight[:N].T,
        silent={"": "forward", "G": "ModuleList", "By": "weights"},
        real=real_left,
    ),
    cornac_backbone(
        "gpt2",
        last("backbone.ln_f"),
        cornac("backbone.h.-1"),
        cornac("backbone.h.0.attn", select=(0,)),
        silent={"backbone.h": "ModuleList", "backbone.wte": "weights"},
    ),
    cornac_backbone(
        "bert",
        cornac("backbone.encoder.layer.-1"),
        cornac("backbone.encoder.layer.0.attention", select=(0,)),
        silent={"backbone.encoder.layer": "ModuleList"},
    ),
    cornac_backbone(
        "electra",
        cornac("backbone.encoder.layer.-1"),
        silent={"backbone.encoder.layer": "ModuleList"},
    ),
    cornac_backbone(
        "xlnet",
        last("backbone.layer.-1", select=(0,), layout="LBH"),
        cornac("backbone.layer.0", select=(0,), layout="LBH"),
        silent={"backbone.layer": "ModuleList"},
    ),
]


# --- UniRec: predict() embeds the candidates [B, N] before the history [B, L] --------------------


def unirec_model(module: str, kind: str) -> nn.Module:
    config = {
        "exp_name": "small",
        "device": "cpu",
        "n_users": 2,
        "n_items": N + 1,
        "embedding_size": H,
        "hidden_size": H,
        "inner_size": 2 * H,
        "max_seq_len": L,
        "n_layers": 2,
        "n_heads": HEADS,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attn_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
        "use_position_emb": True,
        "distance_type": "dot",
        "has_user_emb": False,
        "init_mean": 0.0,
        "init_std": 0.1,
    }
    model: nn.Module = getattr(library("unirec", f"unirec.model.sequential.{module}"), kind)(config)
    return model


@torch.no_grad()
def score_unirec(model: Any, histories: Lists) -> Tensor:
    ids = padded(histories, offset=1, pad=0, left=True)
    items = torch.arange(1, N + 1).expand(len(ids), -1)
    interaction = {"item_id": items, "item_seq": ids, "item_seq_len": (ids != 0).sum(1)}
    return torch.from_numpy(model.predict(interaction))


unirec = partial(Site, positions_from=TokenIds("item_embedding"))
UNIREC_SCORED = Site("scorer_layers", at="input", select=(0,), layout="BH")
UNIREC = [
    Clone(
        name="UniRec SASRec",
        build=seeded(partial(unirec_model, "sasrec", "SASRec")),
        score=score_unirec,
        site=unirec("trm_encoder.layer.-1"),
        head=lambda model, users: users @ model.item_embedding.weight[1:].T,
        silent={"": "forward", "trm_encoder.layer": "ModuleList"},
        real=real_left,
        others=(UNIREC_SCORED, unirec("trm_encoder", select=(-1,)), last("LayerNorm")),
    ),
    Clone(
        name="UniRec GRU4Rec",
        build=seeded(partial(unirec_model, "gru4rec", "GRU4Rec")),
        score=score_unirec,
        site=unirec("dense"),
        head=lambda model, users: users @ model.item_embedding.weight[1:].T,
        silent={"": "forward"},
        real=real_left,
        others=(UNIREC_SCORED, unirec("gru_layers", select=(0,))),
    ),
]


# --- RecPack and Torch-RecHub --------------------------------------------------------------------


def recpack_interactions(histories: Lists) -> Any:
    pandas = library("recpack", "pandas")
    rows = [
        (user, item, step)
        for user, items in enumerate(histories)
        for step, item in enumerate(items)
    ]
    matrix = library("recpack", "recpack.matrix").InteractionMatrix
    table = pandas.DataFrame(rows, columns=["user", "item", "time"])
    return matrix(table, "item", "user", timestamp_ix="time", shape=(len(histories), N))


def recpack_gru4rec() -> nn.Module:
    kind = library("recpack", "recpack.algorithms").GRU4RecCrossEntropy
    recommender = kind(num_layers=2, hidden_size=H, num_components=H)
    recommender._init_model(recpack_interactions([list(range(N))]))
    model: nn.Module = recommender.model_
    vars(model)["recommender"] = recommender
    return model


def longest_first(histories: Lists) -> Lists:
    """As RecPack orders the users of a batch, however they came."""
    return sorted((history[-L:] for history in histories), key=len, reverse=True)


def score_recpack(model: Any, histories: Lists) -> Tensor:
    interactions = recpack_interactions(longest_first(histories))
    return torch.from_numpy(model.recommender._predict(interactions).toarray()).float()


def rechub_hstu() -> nn.Module:
    kind = library("torch_rechub", "torch_rechub.models.generative.hstu").HSTUModel
    model: nn.Module = kind(N + 1, d_model=H, n_heads=HEADS, n_layers=2, dqk=4, dv=4, max_seq_len=L)
    return model


@torch.no_grad()
def score_rechub_hstu(model: Any, histories: Lists) -> Tensor:
    ids = padded(histories, offset=1, pad=0, left=False)
    return model(ids)[torch.arange(len(ids)), (ids != 0).sum(1) - 1, 1:]


def rechub_narm() -> nn.Module:
    features = library("torch_rechub", "torch_rechub.basic.features")
    kind = library("torch_rechub", "torch_rechub.models.matching.narm").NARM
    ids = features.SequenceFeature("ids", vocab_size=N + 1, embed_dim=H, pooling="concat")
    model: nn.Module = kind(ids, hidden_dim=H // 2, emb_dropout_p=0.1, session_rep_dropout_p=0.1)
    return model


@torch.no_grad()
def score_rechub_narm(model: Any, histories: Lists) -> Tensor:
    scores: Tensor = model({"ids": padded(histories, offset=1, pad=0, left=False)})
    return scores[:, 1:]


rechub = partial(Site, positions_from=TokenIds("token_embedding"))
RECPACK = [
    Clone(
        name="RecPack GRU4Rec",
        build=seeded(recpack_gru4rec),
        score=score_recpack,
        site=Site("lin", at="input", positions_from=TokenIds("emb", pad_id=N)),
        head=lambda model, users: users @ model.lin.weight[:N].T + model.lin.bias[:N],
        silent={},
        real=lambda histories: real_right(longest_first(histories)),
        others=(Site("emb", positions_from=TokenIds("", pad_id=N)),),
    ),
]
RECHUB = [
    Clone(
        name="Torch-RecHub HSTU",
        build=seeded(rechub_hstu),
        score=score_rechub_hstu,
        site=rechub("hstu_block"),
        head=lambda model, users: (
            users @ model.token_embedding.weight[1:].T + model.output_bias[1:]
        ),
        silent={"hstu_block.layers": "ModuleList"},
        real=real_right,
        others=(
            rechub("hstu_block.layers.-1"),
            replace(rechub("hstu_block"), positions_from=TokenIds("")),
        ),
    ),
    Clone(
        name="Torch-RecHub NARM",
        build=seeded(rechub_narm),
        score=score_rechub_narm,
        site=Site("session_rep_dropout", layout="BH"),
        head=lambda model, users: users @ model.b.T @ model.item_emb.weight[1:].T,
        silent={},
        real=real_right,
        others=(Site("", method="_compute_session_repr", layout="BH"),),
    ),
]


# --- Hugging Face language models whose words are items ------------------------------------------

PAD, MASK = N, N + 1
SIZE = {"vocab_size": N + 2, "pad_token_id": PAD}


def gpt2_lm(**settings: Any) -> nn.Module:
    hf = library("transformers")
    config = hf.GPT2Config(
        n_positions=2 * L, n_embd=H, n_layer=2, n_head=HEADS, **SIZE, **NO_MARKS, **settings
    )
    model: nn.Module = hf.GPT2LMHeadModel(config)
    return model


def llama_lm(**settings: Any) -> nn.Module:
    hf = library("transformers")
    config = hf.LlamaConfig(
        hidden_size=H,
        intermediate_size=2 * H,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * L,
        **SIZE,
        **NO_MARKS,
        **settings,
    )
    model: nn.Module = hf.LlamaForCausalLM(config)
    return model


NO_MARKS = {"bos_token_id": None, "eos_token_id": None}


def bert_lm(**settings: Any) -> nn.Module:
    hf = library("transformers")
    config = hf.BertConfig(
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=2 * H,
        max_position_embeddings=L,
        **SIZE,
        **settings,
    )
    model: nn.Module = hf.BertForMaskedLM(config)
    return model


@torch.no_grad()
def score_lm(model: Any, histories: Lists, *, left: bool = False, **settings: Any) -> Tensor:
    """Logits of the items at the last real position."""
    if type(model).__name__ == "BertForMaskedLM":
        histories = masked(histories, MASK)
    ids = padded(histories, offset=0, pad=PAD, left=left)
    mask = (ids != PAD).long()
    output = model(input_ids=ids, attention_mask=mask, **settings)
    logits: Tensor = output[0]
    at = L - 1 if left else mask.sum(1) - 1
    return logits[torch.arange(len(ids)), at, :N]


def lm_head(model: Any, users: Tensor) -> Tensor:
    return users @ model.lm_head.weight[:N].T


def bert_head(model: Any, users: Tensor) -> Tensor:
    decoder = model.cls.predictions.decoder
    return users @ decoder.weight[:N].T + decoder.bias[:N]


HF_MASK = RealMask("", select=("attention_mask",))
hf = partial(Site, positions_from=HF_MASK)
hf_ids = partial(Site, positions_from=TokenIds("", pad_id=PAD, select=("input_ids",)))
AS_TUPLE = partial(score_lm, return_dict=False)
WITH_STATES = partial(score_lm, output_hidden_states=True)
FROM_THE_LEFT = partial(score_lm, left=True)

GPT2 = Clone(
    name="GPT-2",
    build=seeded(gpt2_lm),
    score=score_lm,
    site=hf("transformer.ln_f"),
    head=lm_head,
    silent={"transformer.h": "ModuleList"},
    real=real_right,
    others=(
        hf_ids("transformer.ln_f"),
        replace(hf("transformer.ln_f"), positions_from=TokenIds("transformer.wte", pad_id=PAD)),
        hf("transformer.h.0"),
        hf("transformer.h.-1"),
        hf("transformer.h.0.attn", select=(0,)),
        hf("transformer", select=("last_hidden_state",)),
        hf("transformer", select=(0,)),
        hf("lm_head", at="input"),
    ),
)
LLAMA = Clone(
    name="Llama",
    build=seeded(llama_lm),
    score=score_lm,
    site=hf("model.norm"),
    head=lm_head,
    silent={"model.layers": "ModuleList"},
    real=real_right,
    others=(
        hf_ids("model.norm"),
        hf("model.layers.0"),
        hf("model.layers.-1"),
        hf("model.layers.0.self_attn", select=(0,)),
        hf("model.layers.0.mlp"),
        hf("model.layers.1", at="input"),
        hf("model", select=("last_hidden_state",)),
    ),
)
BERT = Clone(
    name="BERT",
    build=seeded(bert_lm),
    score=score_lm,
    site=hf("cls.predictions.transform"),
    head=bert_head,
    silent={"bert.encoder.layer": "ModuleList"},
    real=lambda histories: real_right(masked(histories)),
    others=(
        hf_ids("cls.predictions.transform"),
        hf("bert.encoder.layer.0"),
        hf("bert.encoder.layer.-1"),
        hf("bert.encoder.layer.0.attention", select=(0,)),
        hf("bert", select=("last_hidden_state",)),
        hf("bert.encoder", select=(0,)),
    ),
)
TRANSFORMERS = [
    GPT2,
    LLAMA,
    BERT,
    replace(GPT2, name="GPT-2, tuples", score=AS_TUPLE, others=(hf("transformer", select=(0,)),)),
    replace(LLAMA, name="Llama, tuples", score=AS_TUPLE, others=(hf("model", select=(0,)),)),
    replace(BERT, name="BERT, tuples", score=AS_TUPLE, others=(hf("bert", select=(0,)),)),
    *(
        replace(
            lm,
            name=f"{lm.name}, all states",
            score=WITH_STATES,
            others=(hf("", select=("hidden_states", -1)), hf("", select=("hidden_states", 0))),
        )
        for lm in (GPT2, LLAMA, BERT)
    ),
    replace(
        LLAMA,
        name="Llama, grouped heads, left-padded",
        build=seeded(partial(llama_lm, num_key_value_heads=1)),
        score=FROM_THE_LEFT,
        real=real_left,
        others=(last("model.norm"), last("model.layers.0")),
    ),
]


# --- the checks ----------------------------------------------------------------------------------

MODELS = [*RECBOLE, *RECTOOLS, *REPLAY, *CORNAC, *UNIREC, *RECPACK, *RECHUB, *TRANSFORMERS]
each, each_model = conformance.each, conformance.each(MODELS)


@each_model
def test_scores_of_captured_user_vectors_are_the_scores_of_the_library(clone: Clone) -> None:
    conformance.test_scores_of_captured_user_vectors_are_the_scores_of_the_library(clone)


@each_model
def test_observing_leaves_the_scores_as_they_are(clone: Clone) -> None:
    conformance.test_observing_leaves_the_scores_as_they_are(clone)


@each_model
def test_an_edit_gives_the_scores_of_the_edited_user_vectors(clone: Clone) -> None:
    conformance.test_an_edit_gives_the_scores_of_the_edited_user_vectors(clone)


LAYERS = [(clone, site) for clone in MODELS for site in conformance.in_layers(clone)]
KNOWING = (Lengths, RealMask, TokenIds)
REAL = [
    (clone, replace(site, positions="real"))
    for clone, site in LAYERS
    if isinstance(site.positions_from, KNOWING)
]


@each(LAYERS + REAL)
def test_only_the_positions_of_the_site_change(clone: Clone, site: Site) -> None:
    conformance.test_only_the_positions_of_the_site_change(clone, site)


@pytest.mark.parametrize("tool", conformance.TOOLS.values(), ids=conformance.TOOLS)
@each_model
def test_nothing_stays_on_the_model(clone: Clone, tool: conformance.Tool) -> None:
    conformance.test_nothing_stays_on_the_model(clone, tool)


@each([(clone, Site(path, layout="BH")) for clone in MODELS for path in clone.silent])
def test_a_silent_module_is_refused_with_the_reason(clone: Clone, site: Site) -> None:
    conformance.test_a_silent_module_is_refused_with_the_reason(clone, site)


OTHERS = [(clone, site) for clone in MODELS for site in clone.others]


@each(OTHERS)
def test_other_sites_give_one_row_a_user(clone: Clone, site: Site) -> None:
    conformance.test_other_sites_give_one_row_a_user(clone, site)


@each(OTHERS)
def test_other_sites_can_be_replaced_by_what_they_are(clone: Clone, site: Site) -> None:
    conformance.test_other_sites_can_be_replaced_by_what_they_are(clone, site)


WRITTEN_LATER = [(clone, site) for clone in MODELS for site in clone.written_later]


@each(WRITTEN_LATER)
def test_a_capture_is_not_changed_by_the_library_afterwards(clone: Clone, site: Site) -> None:
    conformance.test_a_capture_is_not_changed_by_the_library_afterwards(clone, site)


@each(WRITTEN_LATER)
def test_the_library_does_not_write_into_a_replacement(clone: Clone, site: Site) -> None:
    conformance.test_the_library_does_not_write_into_a_replacement(clone, site)


@each_model
def test_steering_gives_the_scores_of_the_steered_user_vectors(clone: Clone) -> None:
    model, options = clone.build(), conformance.options(clone)
    users = conformance.user_vectors(clone, model)
    sae = SparseAutoencoder(H, 32, k=4)
    steering = Steering(torch.linspace(-1, 1, 32), alpha=2.0)
    with attach(model, sae, site=clone.site, steering=steering, **options):
        steered = clone.score(model, conformance.HISTORIES)
    conformance.close(steered, clone.head(model, SteerTransform(sae, steering)(users)))
    assert not torch.allclose(steered, conformance.plain_scores(clone, model), atol=1e-2)


# --- what only some libraries do -----------------------------------------------------------------


def test_the_steps_of_cornacs_own_scoring_are_told_apart() -> None:
    """Its `score` takes one history, and one item a call: each step is a forward of its own."""
    library("cornac")
    clone = next(clone for clone in CORNAC if clone.name == "Cornac GRU4Rec")
    model = clone.build()
    score = library("cornac", "cornac.models.gru4rec.gru4rec").score

    def score_all() -> Tensor:
        found = [score(model, [H], "cpu", history) for history in conformance.HISTORIES]
        return torch.from_numpy(np.stack(found))[:, :N]

    plain = score_all()
    with capture(model, clone.site) as captured:
        assert torch.equal(score_all(), plain)
    ends = torch.tensor([len(history) for history in conformance.HISTORIES]).cumsum(0) - 1
    users = captured[clone.site][ends]
    conformance.close(clone.head(model, users), plain)
    with edit(model, clone.site, conformance.push):
        conformance.close(score_all(), clone.head(model, conformance.push(users)))


@pytest.mark.parametrize("lm", [GPT2, LLAMA, BERT], ids=conformance.name)
@pytest.mark.parametrize(
    ("settings", "select"),
    [({}, ("logits",)), ({}, (0,)), ({"return_dict": False}, (0,))],
    ids=["by name", "by position", "tuple"],
)
def test_logits_are_vectors_too(
    lm: Clone, settings: dict[str, Any], select: tuple[int | str, ...]
) -> None:
    model = lm.build()
    score = partial(score_lm, model, conformance.HISTORIES, **settings)
    plain = score()
    site = hf("", select=select)
    with capture(model, site) as captured:
        assert torch.equal(score(), plain)
    assert torch.equal(captured[site][:, :N], plain)
    with edit(model, site, conformance.push):
        assert torch.equal(score(), conformance.push(captured[site])[:, :N])


@contextmanager
def edited_by_hand(layer: nn.Module, first: int) -> Iterator[None]:
    """A plain torch hook that edits what a layer gives from position `first` on."""

    def push(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :first], conformance.push(output[:, first:])], dim=1)

    with layer.register_forward_hook(push):
        yield


@pytest.mark.parametrize(
    ("lm", "path"),
    [(LLAMA, "model.layers.0"), (LLAMA, "model.norm"), (GPT2, "transformer.h.0")],
    ids=conformance.name,
)
def test_generation_with_a_cache_is_edited_at_every_new_position(lm: Clone, path: str) -> None:
    model: Any = lm.build()
    ids = padded(conformance.HISTORIES, offset=0, pad=PAD, left=True)
    mask = (ids != PAD).long()

    def generate() -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    plain = generate()
    sae = SparseAutoencoder(H, 32, k=4)
    with attach(model, sae, site=last(path)) as attachment:
        observed = generate()
    assert attachment.firings == 4
    assert all(map(torch.equal, observed.logits, plain.logits))
    with edit(model, last(path), conformance.push):
        edited = generate()

    everything = edited.sequences[:, :-1]
    real = F.pad(mask, (0, 3), value=1)
    with torch.no_grad(), edited_by_hand(model.get_submodule(path), first=L - 1):
        expected = model(
            input_ids=everything,
            attention_mask=real,
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    conformance.close(torch.stack(edited.logits, dim=1), expected[:, L - 1 :])
    assert not any(map(torch.equal, edited.logits, plain.logits))
    assert all(map(torch.equal, generate().logits, plain.logits))
